"""`repa encode-latents`: images -> autoencoder moments, mean and std, raw and unscaled.

Posterior sample, scale and bias come at load: randomness is never frozen into the cache.
"""

from __future__ import annotations

import dataclasses

from repa_pipeline.autoencoders import AUTOENCODERS, AutoencoderSpec
from repa_pipeline.config import LatentsConfig
from repa_pipeline.data.codec import CODECS, encode_float
from repa_pipeline.data.index import Index
from repa_pipeline.data.names import MIRRORED, ArrayName
from repa_pipeline.registry import autoencoder_spec
from repa_pipeline.stages.images import (
    Encode,
    Encoded,
    Images,
    Product,
    array_spec,
    common_manifest,
    own_entry,
    views,
)
from repa_pipeline.weights import file_sha256


@dataclasses.dataclass(frozen=True)
class Latents(Product):
    """latents.<autoencoder>.<resolution>: float16 or float32 [N, 2C or C, h, w]."""

    config: LatentsConfig
    autoencoder: AutoencoderSpec

    def load(self, device: str) -> Encode:
        import torch

        from repa_pipeline.autoencoders.base import load_autoencoder

        config = self.config
        autoencoder = load_autoencoder(
            self.autoencoder,
            weights=config.weights,
            device=device,
            dtype=config.dtype,
            compile=config.compile,
        )
        self.check_weights(autoencoder.weights_sha256)

        def encode(images: Images, num_rows: int) -> Encoded:
            pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
            moments = autoencoder.encode(pixels)[:num_rows].cpu().numpy()
            return Encoded({"": encode_float(moments, config.moments_dtype)})

        return encode


def check_latents(config: LatentsConfig) -> tuple[AutoencoderSpec, str]:
    """The autoencoder and its weights' sha256, before any image is read.

    Raises UnknownNameError, ConfigError for the resolution, MissingError without weights.
    """
    from repa_pipeline.autoencoders.base import find_autoencoder_weights

    spec = autoencoder_spec(config, config.autoencoder)
    spec.latent_shape(config.resolution)
    return spec, file_sha256(find_autoencoder_weights(spec, config.weights))


def latents_product(config: LatentsConfig, index: Index) -> Latents:
    """The product of `config` over the rows of `index`; raises as `check_latents`."""
    spec, weights_sha256 = check_latents(config)
    _, height, width = spec.latent_shape(config.resolution)
    codec = {"name": "fp16", "version": CODECS["fp16"].version}
    if config.moments_dtype == "float32":
        codec = {"name": "fp32", "version": 1}
    manifest = {
        "kind": "latents",
        "autoencoder": spec.name,
        "weights_sha256": weights_sha256,
        "posterior": spec.posterior,
        "channels": spec.channels,
        "downsample": spec.downsample,
        "scale": list(spec.scale),
        "shift": list(spec.shift),
        "codec": codec,
        **own_entry(AUTOENCODERS, spec),
        **common_manifest(config, index),
    }
    name = str(ArrayName("latents", spec.name, config.resolution))
    shape = (spec.stored_channels, height, width)
    specs = {
        (mirrored, ""): array_spec(
            name + MIRRORED * mirrored,
            index,
            shape,
            config.moments_dtype,
            {**manifest, "view": "mirrored"} if mirrored else manifest,
            config.format,
        )
        for mirrored in views(config)
    }
    return Latents(config, name, specs, spec)
