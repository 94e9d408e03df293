"""Training diffusion transformers with representation alignment (REPA) from a cache."""

__version__ = "0.1.0"
