"""`repa cache-features`: images -> patch tokens of frozen teachers, row-aligned with latents."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import FeaturesConfig
from repa_pipeline.data.codec import CODECS
from repa_pipeline.data.index import Index
from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.errors import ConfigError
from repa_pipeline.registry import encoder_spec
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
class FeaturesStage(ImageStage):
    """Writes features.<encoder>.<resolution>: coded tokens [N, T, D]."""

    encoder: EncoderSpec
    codec: str

    def load(self, device: str) -> Encode:
        import torch

        from repa_pipeline.encoders.base import load_encoder

        resolution, weights = self.config.resolution, self.config.weights
        encoder = load_encoder(self.encoder, resolution=resolution, weights=weights, device=device)

        def encode(images: Images) -> Records:
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
            return CODECS[self.codec].encode(encoder.tokens(pixels).cpu().numpy())

        return encode


def check_features(config: FeaturesConfig) -> dict[str, tuple[EncoderSpec, str]]:
    """Every teacher and its weights' sha256, before any image is read.

    Raises UnknownNameError, ConfigError for the resolution or for settings that do not fit
    together, MissingError without weights.
    """
    if config.weights and len(config.encoder) > 1:
        raise ConfigError(
            f"--weights names one file for {len(config.encoder)} encoders: cache them one by one, "
            'or set [encoders.NAME] weights = "..." in repa.toml'
        )
    if len(set(config.encoder)) < len(config.encoder):
        raise ConfigError(f"--encoder names one twice: {', '.join(config.encoder)}")
    return {name: _check(config, name) for name in config.encoder}


def _check(config: FeaturesConfig, name: str) -> tuple[EncoderSpec, str]:
    from repa_pipeline.encoders.base import find_encoder_weights

    spec = encoder_spec(config, name)
    spec.grid(config.resolution)
    return spec, file_sha256(find_encoder_weights(spec, config.weights))


def features_stages(config: FeaturesConfig, index: Index) -> list[FeaturesStage]:
    """One stage a teacher over the rows of `index`; raises as `check_features`."""
    return [_stage(config, index, *checked) for checked in check_features(config).values()]


def _stage(
    config: FeaturesConfig, index: Index, spec: EncoderSpec, weights_sha256: str
) -> FeaturesStage:
    codec = CODECS[config.codec]
    tokens = spec.num_tokens(config.resolution)
    manifest = {
        "kind": "features",
        "encoder": spec.name,
        "weights_sha256": weights_sha256,
        "width": spec.width,
        "grid": list(spec.grid(config.resolution)),
        "tokens": spec.tokens,
        "preprocess": dataclasses.asdict(spec.rule),
        "model": dict(spec.config),
        "codec": codec.manifest(spec.width),
        **common_manifest(config, index),
    }
    shape = codec.record_shape(tokens, spec.width)
    array = array_spec(
        f"features.{spec.name}.{config.resolution}", index, shape, codec.dtype, manifest
    )
    return FeaturesStage(config, array, spec, config.codec)
