"""`repa cache-features`: images -> patch tokens of frozen teachers, row-aligned with latents.

A lossy codec also keeps one float16 scale a token, in an array of its own (`.scale`), so that a
run whose objective needs the direction alone does not read it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from repa_pipeline.config import FeaturesConfig
from repa_pipeline.data.array import ArraySpec, read_spec
from repa_pipeline.data.codec import CODECS, Codec
from repa_pipeline.data.index import Index
from repa_pipeline.data.names import MIRRORED, SCALE, ArrayName
from repa_pipeline.encoders import ENCODERS, EncoderSpec
from repa_pipeline.errors import ConfigError, MissingError
from repa_pipeline.registry import encoder_spec
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
from repa_pipeline.stages.index import cache_store
from repa_pipeline.weights import file_sha256

DEFAULT_CODEC = "int8"


@dataclasses.dataclass(frozen=True)
class Features(Product):
    """features.<encoder>.<resolution>: coded tokens [N, T, D], and their scales [N, T]."""

    config: FeaturesConfig
    encoder: EncoderSpec
    codec: str

    def load(self, device: str) -> Encode:
        import torch

        from repa_pipeline.encoders.base import load_encoder

        config, codec = self.config, CODECS[self.codec]
        encoder = load_encoder(
            self.encoder,
            resolution=config.resolution,
            weights=config.weights,
            device=device,
            tokens=config.tokens,
            dtype=config.dtype,
            compile=config.compile,
        )
        self.check_weights(encoder.weights_sha256)

        def encode(images: Images, num_rows: int) -> Encoded:
            pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
            coded = codec.encode(encoder.tokens(pixels)[:num_rows])
            zeros = {"zero_tokens": coded.num_zero_tokens} if coded.num_zero_tokens else {}
            scale = {} if coded.scale is None else {SCALE: coded.scale}
            return Encoded({"": coded.records, **scale}, zeros)

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
    specs = [encoder_spec(config, name) for name in config.encoder]
    if len({spec.name for spec in specs}) < len(specs):  # an alias names the same teacher
        raise ConfigError(f"--encoder names one twice: {', '.join(config.encoder)}")
    return {spec.name: (spec, _check(config, spec)) for spec in specs}


def _check(config: FeaturesConfig, spec: EncoderSpec) -> str:
    from repa_pipeline.encoders.base import find_encoder_weights

    spec.stored_tokens(config.resolution, config.tokens)
    if config.codec != "auto":
        CODECS[config.codec].check(spec.width)
    return file_sha256(find_encoder_weights(spec, config.weights))


def features_products(config: FeaturesConfig, index: Index) -> list[Features]:
    """One product a teacher over the rows of `index`; raises as `check_features`."""
    return [_product(config, index, *checked) for checked in check_features(config).values()]


def _product(
    config: FeaturesConfig, index: Index, spec: EncoderSpec, weights_sha256: str
) -> Features:
    name = str(ArrayName("features", spec.name, config.resolution))
    codec = chosen_codec(config, name)
    num_tokens = spec.stored_tokens(config.resolution, config.tokens)
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
        **own_entry(ENCODERS, spec),
        **({"class_token": True} if config.tokens == "patch+cls" else {}),
        **common_manifest(config, index),
    }
    specs: dict[tuple[bool, str], ArraySpec] = {}
    for mirrored in views(config):
        view = {"view": "mirrored"} if mirrored else {}
        main = name + MIRRORED * mirrored
        about: dict[str, Any] = {**manifest, **view}
        shape = codec.record_shape(num_tokens, spec.width)
        specs[mirrored, ""] = array_spec(main, index, shape, codec.dtype, about, config.format)
        if codec.has_scale:
            about = {**about, "kind": "scale", "of": main}
            specs[mirrored, SCALE] = array_spec(
                main + SCALE, index, (num_tokens,), "float16", about, config.format
            )
    return Features(config, name, specs, spec, codec.name)


def chosen_codec(config: FeaturesConfig, name: str) -> Codec:
    """The codec asked for; for "auto" that of the array that stands there, else the default."""
    if config.codec != "auto":
        return CODECS[config.codec]
    try:
        return CODECS[read_spec(cache_store(config), name).manifest["codec"]["name"]]
    except MissingError:
        return CODECS[DEFAULT_CODEC]
