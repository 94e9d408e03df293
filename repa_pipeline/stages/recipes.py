"""From an array's manifest back to the settings that made it: what `repa repair` encodes with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from repa_pipeline.config import EncodeConfig, FeaturesConfig, LatentsConfig
from repa_pipeline.config_care import RepairConfig
from repa_pipeline.data.array import ArraySpec, first_difference
from repa_pipeline.data.index import Index
from repa_pipeline.data.names import parse_name
from repa_pipeline.errors import MismatchError
from repa_pipeline.stages.cached_rows import source_of
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import Product
from repa_pipeline.stages.latents import latents_product

_FLOAT_NAMES = {"fp16": "float16", "fp32": "float32"}


def recipe_of(spec: ArraySpec, config: RepairConfig, index: Index) -> EncodeConfig:
    """The settings of the command that made `spec`; machine and places are those of `config`.

    The source is as `source_of` says. Raises
    MismatchError when the manifest does not say how the array is encoded.
    """
    manifest = spec.manifest
    if manifest.get("imported"):
        raise MismatchError(
            f"{spec.name} was imported, not encoded: remove its damaged shards and run "
            "`repa import` again"
        )
    try:
        settings = {
            **_common(manifest, index),
            "source": source_of(config, index),
            "flip": manifest.get("view") == "mirrored",
            "format": spec.layout.container,
        }
        if parse_name(spec.name).kind == "latents":
            return _settings_of(LatentsConfig, config, {**settings, **_of_latents(manifest)})
        return _settings_of(FeaturesConfig, config, {**settings, **_of_features(manifest)})
    except (KeyError, TypeError) as error:
        raise MismatchError(
            f"the manifest of {spec.name} does not say how it is encoded (no {error}): make it "
            "again with the command that made it"
        ) from error


def product_of(settings: EncodeConfig, index: Index) -> Product:
    """The network and the arrays of `settings`, as the encoding commands have them."""
    if isinstance(settings, FeaturesConfig):
        return features_products(settings, index)[0]
    if isinstance(settings, LatentsConfig):
        return latents_product(settings, index)
    raise ValueError(f"{type(settings).__name__} encodes nothing")


def check_recipe(spec: ArraySpec, product: Product) -> None:
    """Raises MismatchError unless `product` makes `spec` exactly: weights, entry, index, codec."""
    now = next((found for found in product.specs.values() if found.name == spec.name), None)
    if now is not None and now.fingerprint == spec.fingerprint:
        return
    difference = None
    if now is not None:
        difference = first_difference(_plain(spec), _plain(now))
    name, sealed, here = difference or ("name", spec.name, sorted(_names(product)))
    if name == "weights_sha256":
        raise MismatchError(
            f"other weights than those of {spec.name}: sha256 {here} here, {sealed} there; give "
            "the file it was encoded with, by --weights or in repa.toml"
        )
    raise MismatchError(
        f"{spec.name} cannot be encoded as it was: {name} is {here!r} here, {sealed!r} there; "
        "restore that setting of its table entry or the package version that made it, or make "
        "the array again"
    )


def _common(manifest: Mapping[str, Any], index: Index) -> dict[str, Any]:
    compute = manifest.get("compute", {})
    return {
        "resolution": manifest["resolution"],
        "batch_size": manifest["batch_size"],
        "dtype": compute.get("dtype", "float32"),
        "compile": compute.get("compile", False),
        **index.manifest["decode"],
    }


def _of_latents(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "autoencoder": manifest["autoencoder"],
        "moments_dtype": _FLOAT_NAMES[manifest["codec"]["name"]],
    }


def _of_features(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "encoder": (manifest["encoder"],),
        "codec": manifest["codec"]["name"],
        "tokens": "patch+cls" if manifest.get("class_token") else "patch",
    }


def _settings_of(
    kind: type[EncodeConfig], config: RepairConfig, settings: Mapping[str, Any]
) -> EncodeConfig:
    """Settings of `kind`: `settings`, and from `config` whatever both have."""
    known, given = ({field.name for field in dataclasses.fields(c)} for c in (kind, config))
    return kind(**{**{name: getattr(config, name) for name in known & given}, **settings})


def _plain(spec: ArraySpec) -> Any:
    layout = dataclasses.asdict(spec.layout)
    return json.loads(json.dumps({**spec.manifest, "layout": layout, "num_rows": spec.num_rows}))


def _names(product: Product) -> set[str]:
    return {spec.name for spec in product.specs.values()}
