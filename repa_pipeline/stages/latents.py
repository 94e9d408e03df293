"""`repa encode-latents`: images -> autoencoder moments, mean and std, raw and unscaled.

Posterior sample, scale and bias come at load: randomness is never frozen into the cache.
"""

from __future__ import annotations

import dataclasses

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.config import LatentsConfig
from repa_pipeline.data.codec import CODECS
from repa_pipeline.data.index import Index
from repa_pipeline.registry import autoencoder_spec
from repa_pipeline.stages.images import (
    Encode,
    Images,
    ImageStage,
    Records,
    array_spec,
    common_manifest,
)
from repa_pipeline.weights import file_sha256


@dataclasses.dataclass(frozen=True)
class LatentsStage(ImageStage):
    """Writes latents.<autoencoder>.<resolution>: float16 [N, 2C or C, h, w]."""

    autoencoder: AutoencoderSpec

    def load(self, device: str) -> Encode:
        import torch

        from repa_pipeline.autoencoders.base import load_autoencoder

        autoencoder = load_autoencoder(self.autoencoder, weights=self.config.weights, device=device)

        def encode(images: Images) -> Records:
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
            return CODECS["fp16"].encode(autoencoder.encode(pixels).cpu().numpy())

        return encode


def check_latents(config: LatentsConfig) -> tuple[AutoencoderSpec, str]:
    """The autoencoder and its weights' sha256, before any image is read.

    Raises UnknownNameError, ConfigError for the resolution, MissingError without weights.
    """
    from repa_pipeline.autoencoders.base import find_autoencoder_weights

    spec = autoencoder_spec(config, config.autoencoder)
    spec.latent_shape(config.resolution)
    return spec, file_sha256(find_autoencoder_weights(spec, config.weights))


def latents_stage(config: LatentsConfig, index: Index) -> LatentsStage:
    """The stage of `config` over the rows of `index`; raises as `check_latents`."""
    spec, weights_sha256 = check_latents(config)
    _, height, width = spec.latent_shape(config.resolution)
    manifest = {
        "kind": "latents",
        "autoencoder": spec.name,
        "weights_sha256": weights_sha256,
        "posterior": spec.posterior,
        "channels": spec.channels,
        "downsample": spec.downsample,
        "scale": list(spec.scale),
        "shift": list(spec.shift),
        "codec": {"name": "fp16", "version": CODECS["fp16"].version},
        **common_manifest(config, index),
    }
    name = f"latents.{spec.name}.{config.resolution}"
    shape = (spec.stored_channels, height, width)
    return LatentsStage(config, array_spec(name, index, shape, "float16", manifest), spec)
