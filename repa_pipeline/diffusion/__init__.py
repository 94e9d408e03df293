"""Pure mathematics of the diffusion: paths, losses, samplers, guidance.

Everything acts on a tuple of states, latents first, so that a method can diffuse more than one
thing. No models, no files, no settings objects.
"""
