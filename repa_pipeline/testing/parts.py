"""Table entries of tiny frozen networks: real shapes and real weight files, milliseconds to run.

A plugin module for a test is three lines:

    from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder
    AUTOENCODERS = [tiny_autoencoder(weights="PATH")]
    ENCODERS = [tiny_encoder(weights="PATH")]

`write_weights(spec)` makes the file that a spec names. Data only: torch is imported by loaders.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.encoders import EncoderSpec


def tiny_autoencoder(
    name: str = "tiny-kl",
    *,
    weights: str | None = None,
    channels: int = 4,
    downsample: int = 8,
    posterior: str = "gaussian",
) -> AutoencoderSpec:
    """An autoencoder of one convolution each way; posterior "gaussian" or "none"."""
    return AutoencoderSpec(
        name=name,
        loader="repa_pipeline.testing.networks:load_autoencoder",
        channels=channels,
        downsample=downsample,
        posterior=posterior,
        scale=(0.5,),
        shift=(0.1,),
        weights=weights,
    )


def tiny_encoder(
    name: str = "tiny-teacher",
    *,
    weights: str | None = None,
    width: int = 16,
    patch_size: int = 16,
) -> EncoderSpec:
    """A teacher of one patch embedding: R / patch_size tokens a side for images of R pixels."""
    return EncoderSpec(
        name=name,
        loader="repa_pipeline.testing.networks:load_encoder",
        preprocess="dinov1",
        width=width,
        patch_size=patch_size,
        weights=weights,
    )


def write_weights(spec: AutoencoderSpec | EncoderSpec, seed: int = 0) -> None:
    """Writes the safetensors file at `spec.weights`: seeded, so equal specs get equal files."""
    import safetensors.numpy

    if spec.weights is None:
        raise ValueError(f"{spec.name} names no weights file")
    generator = np.random.default_rng(seed)
    arrays = {}
    for key, shape in _shapes(spec).items():
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        arrays[key] = (generator.standard_normal(shape) * scale).astype(np.float32)
    Path(spec.weights).write_bytes(safetensors.numpy.save(arrays))


def _shapes(spec: AutoencoderSpec | EncoderSpec) -> dict[str, tuple[int, ...]]:
    if isinstance(spec, EncoderSpec):
        return {"embed.weight": (spec.width, 3, spec.patch_size, spec.patch_size)}
    side = spec.downsample
    return {
        "down.weight": (spec.stored_channels, 3, side, side),
        "up.weight": (spec.channels, 3, side, side),
    }
