"""Pictures of a cache: rows decoded back from latents, teacher tokens in three colours."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.autoencoders import GAUSSIAN
from repa_pipeline.config_exchange import InspectConfig
from repa_pipeline.data.array import SealedArray, open_sealed
from repa_pipeline.data.index import Entry, Index, open_index
from repa_pipeline.data.names import ArrayName, parse_name
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.device import choose_device
from repa_pipeline.errors import RepaError
from repa_pipeline.pictures import png_bytes
from repa_pipeline.registry import autoencoder_spec
from repa_pipeline.stages.cached_rows import (
    decoded_tokens,
    image_config,
    patch_tokens,
    read_rows,
    spread_rows,
)
from repa_pipeline.stages.images import load_images
from repa_pipeline.stages.index import open_config_source
from repa_pipeline.stages.inspect import SEALED, CacheState
from repa_pipeline.stages.inspect_sheet import Cell, contact_sheet, tile_side

Images = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.float32]
DEFAULT_ROWS = 16
_BATCH = 8
_LOW, _HIGH = 1.0, 99.0


@dataclasses.dataclass
class Drawn:
    """Where pictures were put, and what could not be drawn and why."""

    pictures: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def draw_pictures(config: InspectConfig, state: CacheState) -> Drawn:
    """Draws every sealed array of `state` that holds latents or tokens of the plain view.

    The mirrored view of an array is drawn beside it. What fails (no weights, no source, a damaged
    row) becomes a note.
    """
    store = open_store(config.workspace).child("cache")
    output = open_store(config.output or f"{config.workspace}/inspect")
    drawn = Drawn()
    drawer = _Drawer(config, store, drawn)
    for array in state.arrays:
        if array.state != SEALED or array.view != "plain" or array.kind == "scale":
            continue
        name = parse_name(array.name)
        try:
            draw = drawer.latents if array.kind == "latents" else drawer.features
            picture = draw(name)
        except (RepaError, OSError) as error:
            drawn.notes.append(f"{array.name} is not drawn: {error}")
            continue
        output.put(f"{array.name}.png", png_bytes(picture))
        drawn.pictures.append(f"{output.url}/{array.name}.png")
    return drawn


class _Drawer:
    """Rows, images and decoded latents of a cache; what several pictures need is read once."""

    def __init__(self, config: InspectConfig, store: ObjectStore, drawn: Drawn):
        self._config = config
        self._store = store
        self._drawn = drawn
        self._index = open_index(store)
        self._rows = spread_rows(self._index.num_rows, config.rows or DEFAULT_ROWS, config.seed)
        self.decoded = functools.lru_cache(maxsize=None)(self._decoded)
        self.originals = functools.lru_cache(maxsize=None)(self._originals)

    def latents(self, name: ArrayName) -> Images:
        """Each row: its image where the source can be read, then what its latents decode to."""
        array = self._open(name)
        columns = {"image": self.originals(name.resolution, _preparation(array))}
        columns["decoded"] = self.decoded(name)
        mirrored = self._mirrored(name)
        if mirrored is not None:
            columns["mirrored"] = self.decoded(mirrored)
        how = "mean of the moments" if _is_gaussian(array) else "latents"
        return self._sheet(name, columns, f"decoded from the {how}, {_codec(array)}")

    def features(self, name: ArrayName) -> Images:
        """Each row: its image, then the first three principal components of its tokens."""
        array = self._open(name)
        plain = self._tokens(name)
        components = fit_components(plain.reshape(-1, plain.shape[-1]))
        grid: tuple[int, int] = tuple(array.spec.manifest["grid"])
        columns = {"image": self.originals(name.resolution, _preparation(array))}
        if columns["image"] is None:
            columns["decoded"] = self._any_decoded(name.resolution)
        columns["tokens"] = token_pictures(plain, components, grid)
        mirrored = self._mirrored(name)
        if mirrored is not None:
            columns["mirrored"] = token_pictures(self._tokens(mirrored), components, grid)
        about = (
            f"first three principal components of {grid[0]} x {grid[1]} tokens over these rows, "
            f"{_codec(array)}"
        )
        return self._sheet(name, columns, about)

    def _sheet(self, name: ArrayName, columns: Mapping[str, Images | None], about: str) -> Images:
        shown = {heading: images for heading, images in columns.items() if images is not None}
        cells = [
            Cell(tuple(images[i] for images in shown.values()), _lines(row, entry, self._index))
            for i, (row, entry) in enumerate(zip(self._rows, self._entries, strict=True))
        ]
        title = f"{name}: {len(cells)} of {self._index.num_rows:,} rows"
        return contact_sheet(title, about, list(shown), cells, tile_side(name.resolution))

    @functools.cached_property
    def _entries(self) -> list[Entry]:
        return [self._index.rows(row, row + 1)[0] for row in self._rows]

    def _open(self, name: ArrayName) -> SealedArray:
        return open_sealed(self._store, str(name), name.made_by)

    def _mirrored(self, name: ArrayName) -> ArrayName | None:
        mirrored = dataclasses.replace(name, mirrored=True)
        is_there = self._store.size(f"{mirrored}/seal.json") is not None
        return mirrored if is_there else None

    def _tokens(self, name: ArrayName) -> Tokens:
        """Patch tokens float32 [n, T, D] of the rows, with their scales where those are kept."""
        array = self._open(name)
        scale = dataclasses.replace(name, scale=True)
        scales = None
        if self._store.size(f"{scale}/seal.json") is not None:
            scales = read_rows(self._open(scale), self._rows)
        manifest = array.spec.manifest
        records = read_rows(array, self._rows)
        tokens = decoded_tokens(manifest, array.where, records, scales)
        found: Tokens = patch_tokens(manifest, tokens).numpy()
        return found

    def _decoded(self, name: ArrayName) -> Images:
        """Images uint8 [n, R, R, 3] of the rows' latents; raises MissingError without weights."""
        import torch

        from repa_pipeline.autoencoders.base import load_autoencoder

        array = self._open(name)
        spec = autoencoder_spec(self._config, array.spec.manifest["autoencoder"])
        weights = self._config.weights if len(self._config.array) == 1 else None
        device = choose_device(self._config.device)
        autoencoder = load_autoencoder(spec, weights=weights, device=device)
        if autoencoder.weights_sha256 != array.spec.manifest["weights_sha256"]:
            self._drawn.notes.append(
                f"{name} is decoded with weights {autoencoder.weights_sha256[:12]}, recorded are "
                f"{array.spec.manifest['weights_sha256'][:18]}"
            )
        raw = read_rows(array, self._rows).astype(np.float32)[:, : spec.channels]
        parts = [
            autoencoder.decode(torch.from_numpy(raw[start : start + _BATCH])).cpu()
            for start in range(0, len(raw), _BATCH)
        ]
        pixels = ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        images: Images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        return images

    def _any_decoded(self, resolution: int) -> Images | None:
        """What the first sealed latents of a resolution decode to, if any can be decoded."""
        for found in self._store.list(""):
            if not found.startswith("latents.") or not found.endswith(f".{resolution}"):
                continue
            if self._store.size(f"{found}/seal.json") is not None:
                try:
                    return self.decoded(parse_name(found))
                except (RepaError, OSError):
                    continue
        return None

    def _originals(self, resolution: int, prepare: tuple[tuple[str, Any], ...]) -> Images | None:
        """The rows' images as the networks saw them; None, and a note, without the source."""
        manifest = {"resolution": resolution, "prepare": dict(prepare)}
        config = image_config(self._config, self._index, manifest)
        try:
            return load_images(open_config_source(config), self._entries, config)[0]
        except (RepaError, OSError) as error:
            note = f"images of the source are not shown: {error}"
            if note not in self._drawn.notes:
                self._drawn.notes.append(note)
            return None


@dataclasses.dataclass(frozen=True)
class Components:
    """mean [D], axes [D, 3] and, for each axis, which values become 0 and 255."""

    mean: npt.NDArray[np.float64]
    axes: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]


def fit_components(tokens: npt.NDArray[np.float32]) -> Components:
    """The first three principal components of tokens [N, D].

    The sign of each is fixed: its largest loading is positive. Colours span the 1st to the 99th
    percentile of the tokens' own values.
    """
    values = tokens.astype(np.float64)
    mean = values.mean(axis=0)
    centred = values - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = np.zeros((values.shape[1], 3))
    found = vectors[:, ::-1][:, :3]
    largest = np.abs(found).argmax(axis=0)
    signs = np.sign(found[largest, np.arange(found.shape[1])])
    axes[:, : found.shape[1]] = found * signs
    low, high = np.percentile(centred @ axes, [_LOW, _HIGH], axis=0)
    return Components(mean, axes, low, high)


def token_pictures(tokens: Tokens, components: Components, grid: tuple[int, int]) -> Images:
    """Tokens [n, T, D] as pictures uint8 [n, rows, columns, 3], a pixel a token."""
    projected = (tokens.astype(np.float64) - components.mean) @ components.axes
    span = np.maximum(components.high - components.low, 1e-12)
    scaled = np.clip((projected - components.low) / span, 0, 1)
    return (scaled * 255).round().astype(np.uint8).reshape(len(tokens), *grid, 3)


def _lines(row: int, entry: Entry, index: Index) -> tuple[str, str]:
    names: Sequence[str] | None = index.manifest["class_names"]
    name = names[entry.label] if names else str(entry.label)
    name = "" if name == str(entry.label) else f" ({name})"
    return f"class {entry.label}{name}, row {row:,}", entry.key


def _preparation(array: SealedArray) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(array.spec.manifest["prepare"].items()))


def _is_gaussian(array: SealedArray) -> bool:
    return bool(array.spec.manifest["posterior"] == GAUSSIAN)


def _codec(array: SealedArray) -> str:
    return f"stored as {array.spec.manifest['codec']['name']}"
