"""Opens what a run trains on, and refuses arrays that do not belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import EMBEDDED
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.array import SealedArray, first_difference, open_sealed
from repa_pipeline.data.codec import Codec, codec_of
from repa_pipeline.data.index import read_labels, read_manifest
from repa_pipeline.data.names import MIRRORED, SCALE, parse_name
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.data.retry import RetryPolicy
from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.errors import ConfigError, MismatchError, MissingError
from repa_pipeline.methods.base import FeatureInfo, Inputs
from repa_pipeline.registry import autoencoder_spec, encoder_spec

if TYPE_CHECKING:
    from repa_pipeline.data.codec import Decode


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The stored tokens of one teacher, and their scales where the objective needs them."""

    tokens: SealedArray
    scale: SealedArray | None = None

    @property
    def arrays(self) -> tuple[SealedArray, ...]:
        return (self.tokens,) if self.scale is None else (self.tokens, self.scale)

    @property
    def codec(self) -> Codec:
        return codec_of(self.tokens.spec.manifest, self.tokens.where)

    def decoder(self) -> Decode:
        """Stored records, and scales where they were opened -> tokens."""
        return self.codec.decoder(self.tokens.spec.manifest["codec"])

    def describe(self) -> FeatureInfo:
        """What a method needs to know of it."""
        manifest = self.tokens.spec.manifest
        rows, columns = manifest["grid"]
        return FeatureInfo(
            manifest["encoder"],
            manifest["width"],
            (rows, columns),
            self.codec.kept(with_scale=self.scale is not None),
            manifest.get("class_token", False),
        )


@dataclasses.dataclass(frozen=True)
class OnlineTeacher:
    """A teacher that runs inside the step on the source's images (stages/online.py)."""

    spec: EncoderSpec
    resolution: int
    weights_sha256: str

    @property
    def arrays(self) -> tuple[SealedArray, ...]:
        return ()

    def describe(self) -> FeatureInfo:
        """What a method needs to know of it: nothing of its tokens is lost."""
        kept = frozenset({"direction", "magnitude"})
        return FeatureInfo(self.spec.name, self.spec.width, self.spec.grid(self.resolution), kept)


@dataclasses.dataclass(frozen=True)
class CacheInputs:
    """The sealed arrays of a run, its labels, and the facts a method builds on.

    mirrored: the arrays of the mirrored view, in the order of `arrays`; empty when it is not drawn.
    """

    latents: SealedArray
    teachers: tuple[Teacher | OnlineTeacher, ...]
    labels: npt.NDArray[np.int64]
    manifest: Mapping[str, Any]
    mirrored: tuple[SealedArray, ...] = ()

    @property
    def arrays(self) -> tuple[SealedArray, ...]:
        """Latents first, then each teacher's tokens and, where needed, scales."""
        return (self.latents, *(array for teacher in self.teachers for array in teacher.arrays))

    def describe(self) -> Inputs:
        """What a method needs to know."""
        latents = self.latents.spec.manifest
        return Inputs(
            resolution=latents["resolution"],
            latent_channels=latents["channels"],
            latent_size=self.latents.spec.layout.shape[-1],
            num_classes=self.manifest["num_classes"],
            features=tuple(teacher.describe() for teacher in self.teachers),
        )

    def digests(self) -> dict[str, Any]:
        """What identifies the data: row digest, array fingerprints, weights of online teachers."""
        arrays = (*self.arrays, *self.mirrored)
        online = {teacher.spec.name: teacher.weights_sha256 for teacher in self.online}
        return {
            "rows": self.manifest["rows_digest"],
            "arrays": {array.spec.name: array.spec.fingerprint for array in arrays},
            **({"online": online} if online else {}),
        }

    @property
    def online(self) -> tuple[OnlineTeacher, ...]:
        """The teachers that run inside the step: all or none."""
        return tuple(t for t in self.teachers if isinstance(t, OnlineTeacher))


def open_inputs(
    config: TrainConfig,
    *,
    uses_features: bool = True,
    needs: frozenset[str] = frozenset({"direction"}),
) -> CacheInputs:
    """Opens the latents and features of `config` and checks that they are of the same rows.

    `needs` is what the objective needs of a token: "magnitude" opens the scales too. Raises
    MissingError for what is absent or unsealed, ConfigError where "auto" would be a guess,
    MismatchError or DamagedError for arrays that do not fit.
    """
    store = open_store(config.workspace, retry=RetryPolicy.for_training()).child("cache")
    manifest = read_manifest(store)
    latents = open_sealed(store, _choose_latents(store, config), "encode-latents")
    resolution = latents.spec.manifest["resolution"]
    teachers: tuple[Teacher | OnlineTeacher, ...] = ()
    if uses_features and config.features == "online":
        _check_images(config, manifest)
        teachers = tuple(_online_teachers(store, config, resolution))
    elif uses_features:
        names = _choose_features(store, config, resolution)
        teachers = tuple(_open_teacher(store, name, needs) for name in names)
    inputs = CacheInputs(latents, teachers, read_labels(store), manifest)
    if config.flip:
        mirrored = tuple(_open_mirrored(store, array) for array in inputs.arrays)
        inputs = dataclasses.replace(inputs, mirrored=mirrored)
    for array in (*inputs.arrays, *inputs.mirrored):
        _check_rows(array, manifest)
        _check_prepared_alike(array, latents)
        array.check_present()
    return inputs


def _open_teacher(store: ObjectStore, name: str, needs: frozenset[str]) -> Teacher:
    made_by = parse_name(name).made_by
    teacher = Teacher(open_sealed(store, name, made_by))
    if "magnitude" not in needs or not teacher.codec.has_scale:
        return teacher
    scale = open_sealed(store, name + SCALE, made_by)
    _check_same_recipe(scale, teacher.tokens, "scale")
    return Teacher(teacher.tokens, scale)


def _online_teachers(
    store: ObjectStore, config: TrainConfig, resolution: int
) -> Iterator[OnlineTeacher]:
    """The teachers named by --encoder; "auto" is the one of the cache's features."""
    from repa_pipeline.encoders.base import find_encoder_weights
    from repa_pipeline.weights import file_sha256

    names: tuple[str, ...] = config.encoder
    if names in (("none",), ()):
        return
    if names == ("auto",):
        found = [n for n in _sealed_names(store, "features") if n.endswith(f".{resolution}")]
        if len(found) != 1:
            raise ConfigError("--features online: say which teacher runs, with --encoder NAME")
        names = (part_name(found[0]),)
    for name in names:
        spec = encoder_spec(config, name)
        spec.input_size(resolution)
        weights = file_sha256(find_encoder_weights(spec))
        yield OnlineTeacher(spec, resolution, weights)


def _check_images(config: TrainConfig, manifest: Mapping[str, Any]) -> None:
    """Raises ConfigError when no source was named and the cache is not of the default one.

    Another name is no fault: every image is compared with the indexed one.
    """
    if config.source == EMBEDDED and manifest["source"] != EMBEDDED:
        raise ConfigError(
            f"--features online needs the images of {manifest['source']}: give it as --source"
        )


def _open_mirrored(store: ObjectStore, array: SealedArray) -> SealedArray:
    """The mirrored view of an array; raises MissingError, or MismatchError for another recipe."""
    name = dataclasses.replace(parse_name(array.spec.name), mirrored=True)
    found = open_sealed(store, str(name), name.made_by)
    _check_same_recipe(found, array, "mirrored view")
    return found


def _check_same_recipe(found: SealedArray, array: SealedArray, what: str) -> None:
    """Raises MismatchError unless `found` is made as `array` is, but for the view and the part."""
    apart = ("view", "of", "kind")
    got = {key: value for key, value in found.spec.manifest.items() if key not in apart}
    expected = {key: value for key, value in array.spec.manifest.items() if key not in apart}
    difference = first_difference(got, expected)
    if difference:
        setting, here, there = difference
        raise MismatchError(
            f"{found.where} is not the {what} of {array.spec.name}: {setting} is {here!r}, "
            f"expected {there!r}; encode both with the same settings"
        )


def _sealed_names(store: ObjectStore, kind: str) -> list[str]:
    """Sealed main arrays of the plain view."""
    names = [name for name in store.list("") if name.startswith(f"{kind}.")]
    names = [name for name in names if not name.endswith((MIRRORED, SCALE))]
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
    """The autoencoder or encoder in the name of an array."""
    return parse_name(array_name).part


def _check_rows(array: SealedArray, manifest: Mapping[str, Any]) -> None:
    got, expected = array.spec.manifest["rows_digest"], manifest["rows_digest"]
    differences = []
    if got != expected:
        differences.append(f"row digest {got[:12]}, expected {expected[:12]}")
    if array.spec.num_rows != manifest["num_rows"]:
        differences.append(f"{array.spec.num_rows} rows, expected {manifest['num_rows']}")
    if differences:
        raise MismatchError(
            f"{array.where} holds other rows than the index ({'; '.join(differences)}): it belongs "
            "to another cache; remove it and encode again"
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


def read_options(config: TrainConfig, device: str) -> dict[str, Any]:
    """How `Reader` reads, as keyword arguments."""
    return {
        "read_threads": config.read_threads,
        "read_ahead_bytes": int(config.read_ahead_gb * 1e9),
        "local_copy": config.local_copy,
        "local_copy_bytes": int(config.local_copy_gb * 1e9),
        "pin": device.startswith("cuda"),
    }
