"""Opens what a run trains on, and refuses arrays that do not belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import TrainConfig
from repa_pipeline.data.array import SealedArray, first_difference, open_sealed
from repa_pipeline.data.codec import CODECS, Codec, codec_of
from repa_pipeline.data.index import read_labels, read_manifest
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.errors import ConfigError, MismatchError, MissingError
from repa_pipeline.methods.base import FeatureInfo, Inputs
from repa_pipeline.registry import autoencoder_spec, encoder_spec


@dataclasses.dataclass(frozen=True)
class CacheInputs:
    """The sealed arrays of a run, its labels, and the facts a method builds on."""

    latents: SealedArray
    features: tuple[SealedArray, ...]
    labels: npt.NDArray[np.int64]
    manifest: Mapping[str, Any]

    @property
    def arrays(self) -> tuple[SealedArray, ...]:
        """Latents first, then the teachers in the order asked for."""
        return (self.latents, *self.features)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return tuple(codec_of(array.spec.manifest, array.where) for array in self.features)

    @property
    def latents_codec(self) -> Codec:
        return CODECS["fp16"]

    def describe(self) -> Inputs:
        """What a method needs to know."""
        latents = self.latents.spec.manifest
        return Inputs(
            resolution=latents["resolution"],
            latent_channels=latents["channels"],
            latent_size=self.latents.spec.layout.shape[-1],
            num_classes=self.manifest["num_classes"],
            features=tuple(
                feature_info(array.spec.manifest, codec)
                for array, codec in zip(self.features, self.codecs, strict=True)
            ),
        )

    def digests(self) -> dict[str, Any]:
        """What identifies the data: row digest and array fingerprints."""
        return {
            "rows": self.manifest["rows_digest"],
            "arrays": {array.spec.name: array.spec.fingerprint for array in self.arrays},
        }


def feature_info(manifest: Mapping[str, Any], codec: Codec) -> FeatureInfo:
    """A teacher as its manifest describes it."""
    rows, columns = manifest["grid"]
    return FeatureInfo(manifest["encoder"], manifest["width"], (rows, columns), codec.preserves)


def open_inputs(config: TrainConfig) -> CacheInputs:
    """Opens the latents and features of `config` and checks that they are of the same rows.

    Raises MissingError for what is absent or unsealed, ConfigError where "auto" would be a guess,
    MismatchError or DamagedError for arrays that do not fit.
    """
    store = open_store(config.workspace).child("cache")
    manifest = read_manifest(store)
    latents = open_sealed(store, _choose_latents(store, config), "encode-latents")
    resolution = latents.spec.manifest["resolution"]
    features = tuple(
        open_sealed(store, name, f"cache-features --encoder {part_name(name)}")
        for name in _choose_features(store, config, resolution)
    )
    for array in (latents, *features):
        _check_rows(array, manifest)
        _check_prepared_alike(array, latents)
        array.check_present()
    return CacheInputs(latents, features, read_labels(store), manifest)


def _sealed_names(store: ObjectStore, kind: str) -> list[str]:
    names = [name for name in store.list("") if name.startswith(f"{kind}.")]
    return [name for name in names if store.size(f"{name}/seal.json") is not None]


def _choose_latents(store: ObjectStore, config: TrainConfig) -> str:
    found = _sealed_names(store, "latents")
    if config.autoencoder != "auto":
        chosen = config.autoencoder
        if chosen not in map(part_name, found):
            chosen = autoencoder_spec(config, chosen).name
        found = [name for name in found if part_name(name) == chosen]
    if len(found) > 1:
        raise ConfigError(
            f"{store.url} holds several latents ({', '.join(found)}): choose with --autoencoder, "
            "or keep each resolution in a --workspace of its own"
        )
    if not found:
        wanted = "" if config.autoencoder == "auto" else f" of {config.autoencoder}"
        raise MissingError(
            f"no finished latents{wanted} at {store.url}: run `repa encode-latents` first"
        )
    return found[0]


def _choose_features(store: ObjectStore, config: TrainConfig, resolution: int) -> list[str]:
    if config.encoder in (("none",), ()):
        return []
    found = [n for n in _sealed_names(store, "features") if n.endswith(f".{resolution}")]
    if config.encoder != ("auto",):
        chosen = [f"features.{name}.{resolution}" for name in config.encoder]
        return [
            array if array in found else f"features.{encoder_spec(config, name).name}.{resolution}"
            for array, name in zip(chosen, config.encoder, strict=True)
        ]
    if len(found) > 1:
        raise ConfigError(
            f"{store.url} holds several teachers ({', '.join(map(part_name, found))}): choose "
            "with --encoder"
        )
    if not found:
        raise MissingError(
            f"no finished teacher features at {store.url}: run `repa cache-features` first, or "
            "train the vanilla twin with --encoder none"
        )
    return found


def part_name(array_name: str) -> str:
    """The autoencoder or encoder in the name of an array, KIND.NAME.RESOLUTION."""
    return array_name.split(".", 1)[1].rsplit(".", 1)[0]


def _check_rows(array: SealedArray, manifest: Mapping[str, Any]) -> None:
    got, expected = array.spec.manifest["rows_digest"], manifest["rows_digest"]
    if got != expected or array.spec.num_rows != manifest["num_rows"]:
        raise MismatchError(
            f"{array.where} holds other rows than the index (row digest {got[:12]}, expected "
            f"{expected[:12]}; {array.spec.num_rows} rows, expected {manifest['num_rows']}): "
            "it belongs to another cache; remove it and encode again"
        )


def _check_prepared_alike(array: SealedArray, latents: SealedArray) -> None:
    keys = ("resolution", "prepare")
    got = {key: array.spec.manifest[key] for key in keys}
    expected = {key: latents.spec.manifest[key] for key in keys}
    difference = first_difference(got, expected)
    if difference:
        name, here, there = difference
        raise MismatchError(
            f"{array.where} saw other images than {latents.spec.name}: {name} is {here!r}, "
            f"expected {there!r}; encode both with the same settings"
        )
