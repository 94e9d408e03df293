"""A small sealed cache of seeded random data: an index, latents and features, but no images.

    cache = write_toy_cache(folder)
    config = toy_train_config(folder, steps=3)

What is written is exactly what `repa encode-latents` and `repa cache-features` write, through the
same code, so trainer and methods cannot tell the difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline import registry
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.array import ArraySpec, begin_array, seal_array, write_shard
from repa_pipeline.data.codec import CODECS, Codec
from repa_pipeline.data.index import Entry, read_manifest, write_index
from repa_pipeline.data.names import MIRRORED, SCALE
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.data.shards import RecordLayout

if TYPE_CHECKING:
    from repa_pipeline.data.coders import Coded

Array = npt.NDArray[np.float16]
TOY_TRUNK = {"depth": 3, "width": 64, "num_heads": 2}
# The same as a repa.toml.
TOY_PROJECT = "[models.'SiT-XS/2']\ndepth = 3\nwidth = 64\nnum_heads = 2\n"
_PREPARE = {"exif": "upright", "max_pixels": 178_956_970}


@dataclasses.dataclass(frozen=True)
class ToyTeacher:
    """A teacher of a toy cache: tokens [N, T, width], T = grid * grid, one more with the class
    token in front."""

    name: str = "toy-vit"
    grid: int = 4
    width: int = 12
    codec: str = "fp16"
    class_token: bool = False


@dataclasses.dataclass(frozen=True)
class ToyLatents:
    """The latents of a toy cache: raw moments [N, 2C, h, w], or latents [N, C, h, w]."""

    name: str = "tiny-kl"
    channels: int = 4
    size: int = 8
    posterior: str = "gaussian"
    scale: tuple[float, ...] = (0.5,)
    shift: tuple[float, ...] = (0.1,)


@dataclasses.dataclass(frozen=True)
class ToyCache:
    """What was written: labels int64 [N], latents float16 as stored, tokens by teacher before
    they were coded; of the mirrored view likewise where it was asked for."""

    labels: npt.NDArray[np.int64]
    latents: Array
    tokens: Mapping[str, Array]
    mirrored_latents: Array | None = None
    mirrored_tokens: Mapping[str, Array] = dataclasses.field(default_factory=dict)


def write_toy_cache(
    workspace: str | Path,
    *,
    num_rows: int = 48,
    num_classes: int = 3,
    shard_rows: int = 8,
    resolution: int = 64,
    latents: ToyLatents | None = None,
    teachers: tuple[ToyTeacher, ...] = (ToyTeacher(),),
    flip: bool = False,
    seed: int = 0,
) -> ToyCache:
    """Writes WORKSPACE/cache with an index, sealed latents and a sealed array a teacher.

    Another `seed` gives other rows (and another row digest). Latents are of `resolution` pixels.
    With `flip` there is a mirrored view of every array, of other random numbers.
    """
    store = open_store(str(workspace)).child("cache")
    kind = latents or ToyLatents()
    generator = np.random.default_rng([seed, 0])
    labels = generator.integers(0, num_classes, num_rows).astype(np.int64)
    labels[:num_classes] = np.arange(num_classes)
    _write_index(store, labels, shard_rows, seed)
    common = {"resolution": resolution, "prepare": {"crop": "adm-center", **_PREPARE}}
    latents_manifest = _latents_manifest(kind, resolution)
    moments: list[Array] = []
    tokens: list[dict[str, Array]] = []
    for view in ("", MIRRORED) if flip else ("",):
        drawn = seed if not view else seed + 1000
        about = {**common, "view": "mirrored"} if view else common
        moments.append(_draw_moments(kind, num_rows, drawn))
        name = f"latents.{kind.name}.{resolution}{view}"
        write_array(store, name, moments[-1], shard_rows, {**latents_manifest, **about})
        tokens.append(
            {
                teacher.name: _write_teacher(store, teacher, num_rows, shard_rows, about, drawn)
                for teacher in teachers
            }
        )
    if flip:
        return ToyCache(labels, moments[0], tokens[0], moments[1], tokens[1])
    return ToyCache(labels, moments[0], tokens[0])


def write_array(
    store: ObjectStore,
    name: str,
    records: npt.NDArray[np.generic],
    shard_rows: int,
    manifest: Mapping[str, Any],
    *,
    seal: bool = True,
) -> None:
    """Writes records [N, ...] as array `name` over the rows of the store's index."""
    rows = {"rows_digest": read_manifest(store)["rows_digest"], "num_rows": len(records)}
    layout = RecordLayout(tuple(records.shape[1:]), str(records.dtype), shard_rows)
    spec = ArraySpec(name, len(records), layout, {**rows, **manifest})
    write_shards(store, spec, records, seal=seal)


def write_shards(
    store: ObjectStore, spec: ArraySpec, records: npt.NDArray[np.generic], *, seal: bool = True
) -> None:
    """Writes records [N, ...] as the array `spec`."""
    begin_array(store, spec)
    shards = []
    for index in range(spec.num_shards):
        part = records[index * spec.layout.shard_rows : (index + 1) * spec.layout.shard_rows]
        num_bytes, digest = write_shard(store, spec, index, part)
        shards.append({"index": index, "rows": len(part), "num_bytes": num_bytes, "digest": digest})
    if seal:
        seal_array(store, spec, shards)


def toy_train_config(workspace: str | Path, **changes: Any) -> TrainConfig:
    """Settings of a run of a second on a toy cache, on the CPU in float32, of a trunk shrunk to
    TOY_TRUNK."""
    settings: dict[str, Any] = {
        "workspace": str(workspace),
        "device": "cpu",
        "threads": 1,
        "model": "SiT-XS/2",
        "overrides": {"models.SiT-XS/2": TOY_TRUNK},
        "steps": 3,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "projector_width": 16,
        "log_every": 2,
        "checkpoint_every": 1000,
    }
    return TrainConfig(**{**settings, **changes})


@contextmanager
def isolated_tables(folder: str | Path | None = None) -> Iterator[None]:
    """Inside, plugins may add entries (modules in `folder` are importable); after, none is left."""
    tables = registry.TABLES.values()
    entries = [dict(table._entries) for table in tables]
    loaded, modules, path = set(registry._loaded), set(sys.modules), list(sys.path)
    if folder is not None:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
    try:
        yield
    finally:
        added = registry._loaded - loaded
        for table, kept in zip(tables, entries, strict=True):
            table._entries = kept
        registry._loaded.intersection_update(loaded)
        sys.path[:] = path
        for name in (sys.modules.keys() - modules) & added:
            del sys.modules[name]


def _write_index(
    store: ObjectStore, labels: npt.NDArray[np.int64], shard_rows: int, seed: int
) -> None:
    rows = [
        Entry(
            key=f"{row:06d}",
            label=int(label),
            path=f"{row:06d}.png",
            offset=-1,
            num_bytes=1,
            width=64,
            height=64,
            notes="",
            digest=hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=16).hexdigest(),
        )
        for row, label in enumerate(labels)
    ]
    manifest = {
        "source": "toy",
        "listing": "toy",
        "permutation_seed": 0,
        "decode": _PREPARE,
        "shard_rows": shard_rows,
        "num_classes": int(labels.max()) + 1,
        "class_names": None,
        "num_excluded": 0,
        "excluded_reasons": {},
        "notes": {},
        "remarks": [],
        "num_duplicates": 0,
    }
    write_index(store, rows, [], manifest)


def _latents_manifest(kind: ToyLatents, resolution: int) -> dict[str, Any]:
    return {
        "kind": "latents",
        "autoencoder": kind.name,
        "weights_sha256": "0" * 64,
        "posterior": kind.posterior,
        "channels": kind.channels,
        "downsample": resolution // kind.size,
        "scale": list(kind.scale),
        "shift": list(kind.shift),
        "codec": {"name": "fp16", "version": CODECS["fp16"].version},
    }


def _draw_moments(kind: ToyLatents, num_rows: int, seed: int) -> Array:
    """A mean that varies from row to row, and for a gaussian posterior a std of 0.1 to 0.6."""
    generator = np.random.default_rng([seed, 1])
    shape = (num_rows, kind.channels, kind.size, kind.size)
    mean = generator.standard_normal(shape)
    if kind.posterior == "none":
        return mean.astype(np.float16)
    return np.concatenate([mean, generator.uniform(0.1, 0.6, shape)], axis=1).astype(np.float16)


def _write_teacher(
    store: ObjectStore,
    teacher: ToyTeacher,
    num_rows: int,
    shard_rows: int,
    common: Mapping[str, Any],
    seed: int,
) -> Array:
    generator = np.random.default_rng([seed, 2, *teacher.name.encode()])
    shape = (num_rows, teacher.grid**2 + teacher.class_token, teacher.width)
    tokens = generator.standard_normal(shape).astype(np.float16)
    codec = CODECS[teacher.codec]
    manifest = {
        "kind": "features",
        "encoder": teacher.name,
        "weights_sha256": "0" * 64,
        "width": teacher.width,
        "grid": [teacher.grid, teacher.grid],
        "tokens": "patch tokens",
        "codec": codec.manifest(teacher.width),
        **({"class_token": True} if teacher.class_token else {}),
        **common,
    }
    view = MIRRORED if "view" in common else ""
    name = f"features.{teacher.name}.{common['resolution']}{view}"
    coded = _code(codec, tokens)
    if coded.scale is not None:
        about = {**manifest, "kind": "scale", "of": name}
        write_array(store, name + SCALE, coded.scale, shard_rows, about)
    write_array(store, name, coded.records, shard_rows, manifest)
    return tokens


def _code(codec: Codec, tokens: Array) -> Coded:
    import torch

    return codec.encode(torch.from_numpy(tokens).float())
