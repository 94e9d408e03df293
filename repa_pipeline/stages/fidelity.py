"""`repa inspect --fidelity`: rows encoded again from the source, compared with what is stored.

Of teacher tokens the worst cosine must reach the floor of their codec, of latents the relative
error must stay below a ceiling: what does not is damaged, or of another network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config_exchange import InspectConfig
from repa_pipeline.data.array import SealedArray, open_sealed
from repa_pipeline.data.index import open_index
from repa_pipeline.data.names import SCALE, ArrayName, parse_name
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.encoders import PATCH, PATCH_CLS
from repa_pipeline.errors import DamagedError, MissingError, RepaError
from repa_pipeline.registry import autoencoder_spec, encoder_spec
from repa_pipeline.stages.cached_rows import (
    decoded_tokens,
    image_config,
    patch_tokens,
    read_rows,
    spread_rows,
)
from repa_pipeline.stages.images import Encode, Encoded, Images, encode_in_batches, load_images
from repa_pipeline.stages.index import open_config_source
from repa_pipeline.stages.inspect import chosen_names

if TYPE_CHECKING:
    from torch import Tensor

    from repa_pipeline.data.fidelity import Fidelity

DEFAULT_ROWS = 64
# Worst cosine of a token that a sound array of each codec reaches, sparse tokens included.
FLOORS: Mapping[str, float] = {"fp16": 0.9999, "bf16": 0.9999, "int8": 0.999, "int4": 0.97}
# bf16 networks give tokens that differ this much from device to device.
BF16_FLOOR = 0.95
LATENTS_CEILING = 0.1


@dataclasses.dataclass(frozen=True)
class ArrayFidelity:
    """How near an array is to what its network gives for `rows` rows of the source.

    Tokens: mean and worst cosine, relative error of the spatially normalised target, decoded with
    the scales and without. Latents: max_abs_error and relative_error of the moments. `limit` is
    the floor of worst_cosine or the ceiling of relative_error; a note says what is unusual, and
    without `checked` why nothing could be compared.
    """

    name: str
    rows: int
    checked: bool = True
    passed: bool = True
    note: str = ""
    mean_cosine: float | None = None
    worst_cosine: float | None = None
    worst_row: int | None = None
    spatial_error: float | None = None
    spatial_error_without_scale: float | None = None
    max_abs_error: float | None = None
    relative_error: float | None = None
    limit: float | None = None

    def as_line(self) -> str:
        """One line for people."""
        note = f"; {self.note}" if self.note else ""
        if not self.checked:
            return f"{self.name}: not checked{note}"
        verdict = "ok" if self.passed else "FAILED"
        if self.worst_cosine is None:
            return (
                f"{self.name}: {self.rows} rows, moments differ by at most "
                f"{self.max_abs_error:.3g}, relative error {self.relative_error:.2g} "
                f"(ceiling {self.limit:g}): {verdict}{note}"
            )
        plain = self.spatial_error_without_scale
        without = "" if plain is None else f" (without scales {plain:.2g})"
        return (
            f"{self.name}: {self.rows} rows, cosine mean {self.mean_cosine:.5f}, worst "
            f"{self.worst_cosine:.5f} in row {self.worst_row} (floor {self.limit:g}), error of the "
            f"spatially normalised target {self.spatial_error:.2g}{without}: {verdict}{note}"
        )


def check_fidelity(config: InspectConfig) -> list[ArrayFidelity]:
    """Compares every sealed array, or those asked for, with its source.

    Raises MissingError when none could be compared; what is too far off is said, not raised
    (`require_fidelity`).
    """
    store = open_store(config.workspace).child("cache")
    names = [name for name in chosen_names(store, config.array) if not name.endswith(SCALE)]
    sealed = [name for name in names if store.size(f"{name}/seal.json") is not None]
    if not sealed:
        raise MissingError(f"no finished array at {store.url}: run `repa encode` first")
    prepare_compute(config.threads)
    checker = _Checker(config, store)
    found = [checker.check(parse_name(name)) for name in sealed]
    if not any(array.checked for array in found):
        raise MissingError(f"nothing could be compared: {found[0].name}: {found[0].note}")
    return found


def require_fidelity(found: list[ArrayFidelity]) -> None:
    """Raises DamagedError naming the arrays that are not what their networks give."""
    failed = [array for array in found if not array.passed]
    if failed:
        worst = failed[0]
        got = (
            f"worst cosine {worst.worst_cosine:.4f} in row {worst.worst_row}, expected "
            f"{worst.limit:g} or more"
            if worst.worst_cosine is not None
            else f"relative error {worst.relative_error:.3g}, expected at most {worst.limit:g}"
        )
        others = f"; also {', '.join(array.name for array in failed[1:])}" if failed[1:] else ""
        raise DamagedError(
            f"{len(failed)} of {len(found)} arrays are not what their network gives: "
            f"{worst.name} ({got}){others}; shards are damaged or foreign, or the weights are "
            "others: run `repa verify`"
        )


class _Checker:
    """The sampled rows, their images and the networks, each loaded once."""

    def __init__(self, config: InspectConfig, store: ObjectStore):
        self._config = config
        self._store = store
        self._index = open_index(store)
        self._rows = spread_rows(self._index.num_rows, config.rows or DEFAULT_ROWS, config.seed)
        self._weights = config.weights if len(config.array) == 1 else None
        self._device = choose_device(config.device)
        self._images = functools.lru_cache(maxsize=2)(self._read_images)

    def check(self, name: ArrayName) -> ArrayFidelity:
        """Compares one array; what hinders it becomes a note."""
        try:
            array = open_sealed(self._store, str(name), name.made_by)
            manifest = array.spec.manifest
            prepare = tuple(sorted(manifest["prepare"].items()))
            images = self._images(name.resolution, prepare)
            seen = images[:, :, ::-1] if name.mirrored else images
            if name.kind == "latents":
                return self._check_latents(array, seen)
            return self._check_tokens(name, array, seen)
        except (RepaError, OSError) as error:
            return ArrayFidelity(str(name), len(self._rows), checked=False, note=str(error))

    def _check_latents(self, array: SealedArray, images: Images) -> ArrayFidelity:
        import torch

        from repa_pipeline.autoencoders.base import load_autoencoder

        manifest = array.spec.manifest
        spec = autoencoder_spec(self._config, manifest["autoencoder"])
        network = load_autoencoder(
            spec, weights=self._weights, device=self._device, dtype=_compute(manifest)
        )

        def encode(pixels: Images, num_rows: int) -> Encoded:
            batch = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
            return Encoded({"": network.encode(batch)[:num_rows].cpu().numpy()})

        given = self._encoded(encode, images, manifest).astype(np.float64)
        error = read_rows(array, self._rows).astype(np.float64) - given
        relative = float(np.linalg.norm(error)) / max(float(np.linalg.norm(given)), 1e-30)
        return ArrayFidelity(
            array.spec.name,
            len(self._rows),
            passed=relative <= LATENTS_CEILING,
            note=_weights_note(manifest, network.weights_sha256),
            max_abs_error=float(np.abs(error).max()),
            relative_error=relative,
            limit=LATENTS_CEILING,
        )

    def _check_tokens(self, name: ArrayName, array: SealedArray, images: Images) -> ArrayFidelity:
        from repa_pipeline.data.fidelity import fidelity

        manifest = array.spec.manifest
        given, note = self._teacher_tokens(manifest, images)
        records = read_rows(array, self._rows)
        scale_name = str(dataclasses.replace(name, scale=True))
        scale = None
        if self._store.size(f"{scale_name}/seal.json") is not None:
            scale = read_rows(open_sealed(self._store, scale_name, name.made_by), self._rows)
        found = fidelity(given, _patches(manifest, array, records, scale))
        bare = None if scale is None else fidelity(given, _patches(manifest, array, records, None))
        by_row = self._by_row(given, _patches(manifest, array, records, scale))
        limit = FLOORS[manifest["codec"]["name"]]
        limit = limit if _compute(manifest) == "float32" else min(limit, BF16_FLOOR)
        return ArrayFidelity(
            array.spec.name,
            len(self._rows),
            passed=found.worst_cosine >= limit,
            note=note,
            mean_cosine=found.mean_cosine,
            worst_cosine=found.worst_cosine,
            worst_row=min(by_row, key=lambda row: by_row[row].worst_cosine),
            spatial_error=found.spatial_error,
            spatial_error_without_scale=None if bare is None else bare.spatial_error,
            limit=limit,
        )

    def _teacher_tokens(self, manifest: Mapping[str, Any], images: Images) -> tuple[Tensor, str]:
        """Patch tokens float32 [n, T, D] as the teacher gives them now, and a note."""
        import torch

        from repa_pipeline.encoders.base import load_encoder

        spec = encoder_spec(self._config, manifest["encoder"])
        network = load_encoder(
            spec,
            resolution=manifest["resolution"],
            weights=self._weights,
            device=self._device,
            tokens=PATCH_CLS if manifest.get("class_token") else PATCH,
            dtype=_compute(manifest),
        )

        def encode(pixels: Images, num_rows: int) -> Encoded:
            batch = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
            return Encoded({"": network.tokens(batch)[:num_rows].cpu().numpy()})

        tokens = torch.from_numpy(self._encoded(encode, images, manifest))
        note = _weights_note(manifest, network.weights_sha256)
        return patch_tokens(manifest, tokens), note

    def _encoded(
        self, encode: Encode, images: Images, manifest: Mapping[str, Any]
    ) -> npt.NDArray[Any]:
        """What a network gives for the images, in batches of the recorded size."""
        batch_size = manifest.get("batch_size") or min(len(images), 32)
        return encode_in_batches(encode, images, batch_size).parts[""]

    def _by_row(self, given: Tensor, decoded: Tensor) -> dict[int, Fidelity]:
        from repa_pipeline.data.fidelity import fidelity

        return {
            row: fidelity(given[i : i + 1], decoded[i : i + 1]) for i, row in enumerate(self._rows)
        }

    def _read_images(self, resolution: int, prepare: tuple[tuple[str, Any], ...]) -> Images:
        manifest = {"resolution": resolution, "prepare": dict(prepare)}
        config = image_config(self._config, self._index, manifest)
        entries = [self._index.rows(row, row + 1)[0] for row in self._rows]
        return load_images(open_config_source(config), entries, config)[0]


def _patches(
    manifest: Mapping[str, Any],
    array: SealedArray,
    records: npt.NDArray[np.generic],
    scale: npt.NDArray[np.generic] | None,
) -> Tensor:
    return patch_tokens(manifest, decoded_tokens(manifest, array.where, records, scale))


def _compute(manifest: Mapping[str, Any]) -> str:
    """The compute type an array was made with."""
    return str(manifest.get("compute", {}).get("dtype", "float32"))


def _weights_note(manifest: Mapping[str, Any], weights_sha256: str) -> str:
    recorded = str(manifest["weights_sha256"])
    if recorded == weights_sha256:
        return ""
    return f"compared with weights {weights_sha256[:12]}, recorded are {recorded[:18]}"
