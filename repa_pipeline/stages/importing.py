"""`repa import`: arrays that others encoded, checked value by value and sealed in a cache.

What is common to both formats: a table says where each row's .npy lies, a stage over the index's
shards reads, checks and stores them. No network is run.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.autoencoders import GAUSSIAN, AutoencoderSpec
from repa_pipeline.config import EncodeConfig
from repa_pipeline.config_exchange import ImportConfig
from repa_pipeline.data.array import ArraySpec, write_shard
from repa_pipeline.data.codec import CODECS, encode_float
from repa_pipeline.data.index import Index
from repa_pipeline.data.items import Item, Source
from repa_pipeline.data.names import ArrayName
from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.data.refset import open_refset
from repa_pipeline.data.source import open_source
from repa_pipeline.data.tables import TableRows, table_bytes
from repa_pipeline.engine.contracts import Commit, Commits, Executor, Shard, Wanted, Work
from repa_pipeline.engine.run import Progress, StageResult, ledger_of, run_stage
from repa_pipeline.errors import DataError, MismatchError
from repa_pipeline.stages.array_stage import ArrayOutput
from repa_pipeline.stages.images import array_spec, common_manifest, read_images
from repa_pipeline.stages.index import cache_store
from repa_pipeline.weights import file_sha256

UNKNOWN = "imported: unknown"
_TABLES = "import.parts"
_COLUMNS = {"name": "string", "path": "string", "offset": "int64", "num_bytes": "int64"}
_FLOATS = ("float16", "float32")
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|][a-z]\d+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *\}\s*"
)

Records = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Member:
    """Where the .npy of one row lies; `name` is what messages call it."""

    name: str
    path: str
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class ImportStage:
    """Copies members into the arrays `specs`, shard by shard; a Stage."""

    config: ImportConfig
    specs: tuple[ArraySpec, ...]
    name: str = "import"

    @property
    def outputs(self) -> tuple[ArrayOutput, ...]:
        return tuple(ArrayOutput(cache_store(self.config).url, spec) for spec in self.specs)

    def open(self, wanted: Wanted) -> Work:
        store = cache_store(self.config)
        tables = {spec.name: TableRows(store, _table(spec.name)) for spec in self.specs}
        return _ImportWork(self.config, self.specs, store, tables, _reader(self.config), wanted)


@dataclasses.dataclass(frozen=True)
class _ImportWork:
    config: ImportConfig
    specs: tuple[ArraySpec, ...]
    store_: ObjectStore
    tables: Mapping[str, TableRows]
    reader: Source
    wanted: Wanted

    def load(self, shard: Shard) -> dict[str, tuple[Floats, float]]:
        """Of every wanted array the values float32 [n, *shape], and the seconds it took."""
        loaded = {}
        for spec in self.specs:
            if spec.name in self.wanted[shard.index]:
                began = time.perf_counter()
                values = self._read(spec, shard)
                loaded[spec.name] = values, time.perf_counter() - began
        return loaded

    def compute(
        self, shard: Shard, loaded: dict[str, tuple[Floats, float]]
    ) -> list[tuple[ArraySpec, Records, dict[str, int], float]]:
        found = []
        for spec in self.specs:
            if spec.name in loaded:
                values, seconds = loaded[spec.name]
                records, counts = _coded(spec, values)
                found.append((spec, records, counts, seconds))
        return found

    def store(
        self, shard: Shard, computed: list[tuple[ArraySpec, Records, dict[str, int], float]]
    ) -> Commits:
        commits = []
        for spec, records, counts, read_s in computed:
            began = time.perf_counter()
            num_bytes, digest = write_shard(self.store_, spec, shard.index, records)
            write_s = time.perf_counter() - began
            seconds = {"read": round(read_s, 3), "write": round(write_s, 3)}
            commits.append(
                Commit(shard.index, shard.num_rows, num_bytes, digest, seconds, spec.name, counts)
            )
        return tuple(commits)

    def _read(self, spec: ArraySpec, shard: Shard) -> Floats:
        rows = self.tables[spec.name].rows(shard.start, shard.stop, tuple(_COLUMNS))
        items = [Item(r["name"], None, r["path"], r["offset"], r["num_bytes"]) for r in rows]
        shape = spec.layout.shape
        values = np.empty((len(items), *shape), np.float32)

        def handle(i: int, data: bytes) -> None:
            values[i] = parse_npy(data, items[i].key, shape)
            _check_values(spec, values[i], items[i].key)

        read_images(self.reader, items, handle, self.config.decode_threads)
        return values


def run_import(
    config: ImportConfig,
    specs: Iterable[ArraySpec],
    members: Callable[[str], Iterable[Member]],
    executor: Executor,
    progress: Progress,
) -> StageResult:
    """Writes the table of members of each array (`members` of its name, in row order) and runs
    the stage. The tables are removed when everything is sealed."""
    stage = ImportStage(config, tuple(specs))
    store = cache_store(config)
    for spec in stage.specs:
        store.put(_table(spec.name), _table_of(list(members(spec.name))))
    ledgers = {output.name: ledger_of(store, output) for output in stage.outputs}
    result = run_stage(stage, executor, ledgers, progress)
    for spec in stage.specs:
        store.delete(_table(spec.name))
    return result


def latents_spec(
    config: ImportConfig,
    autoencoder: AutoencoderSpec,
    shape: tuple[int, ...],
    index: Index,
    known: Mapping[str, Any],
    mirrored: bool = False,
) -> ArraySpec:
    """The array of imported latents; `known` entries come before what is assumed.

    shape: of a row, [2C or C, h, w]. The recipe of the networks (batch size, compute type) is
    unknown, so such an array cannot be encoded again.
    """
    resolution = resolution_of(autoencoder, shape)
    weights = file_sha256(config.weights) if config.weights else UNKNOWN
    codec = {"name": "fp16", "version": CODECS["fp16"].version}
    if config.moments_dtype == "float32":
        codec = {"name": "fp32", "version": 1}
    manifest = {
        "kind": "latents",
        "autoencoder": autoencoder.name,
        "weights_sha256": weights,
        "posterior": autoencoder.posterior,
        "channels": autoencoder.channels,
        "downsample": autoencoder.downsample,
        "scale": list(autoencoder.scale),
        "shift": list(autoencoder.shift),
        "codec": codec,
        **imported_manifest(resolution, index),
        **known,
        **({"view": "mirrored"} if mirrored else {}),
    }
    name = str(ArrayName("latents", autoencoder.name, resolution, mirrored))
    return array_spec(name, index, shape, config.moments_dtype, manifest, config.format)


def imported_manifest(resolution: int, index: Index) -> dict[str, Any]:
    """What every imported array says: rows, resolution, preparation, and that it is imported.

    The images were cropped already, so the crop of those beside it changes nothing and `prepare`
    is that of arrays encoded from them.
    """
    common = common_manifest(EncodeConfig(resolution=resolution), index)
    del common["batch_size"]
    return {**common, "imported": True}


def resolution_of(autoencoder: AutoencoderSpec, shape: tuple[int, ...]) -> int:
    """The resolution of images whose latents have `shape`; raises MismatchError."""
    channels = autoencoder.stored_channels
    if len(shape) != 3 or shape[0] != channels or shape[1] != shape[2] or not shape[1]:
        raise MismatchError(
            f"latents have shape {list(shape)}, those of autoencoder '{autoencoder.name}' are "
            f"[{channels}, h, h]: name the one that made them with --autoencoder"
        )
    return shape[1] * autoencoder.downsample


def parse_npy(data: bytes, name: str, shape: tuple[int, ...] | None = None) -> Records:
    """The array of a .npy file; raises DataError for another type or shape, or a torn file."""
    start = int.from_bytes(data[8:10], "little") + 10
    # Not by numpy: it parses Python source, which threads of Python 3.11 must not do together.
    header = _NPY_HEADER.fullmatch(data[10:start])
    if data[:7] != b"\x93NUMPY\x01" or header is None:
        raise DataError(f"{name} is not a whole .npy file (version 1): restore it")
    dtype = np.dtype(header[1].decode())
    if dtype.name not in _FLOATS:
        raise DataError(
            f"{name} holds {dtype.name}, expected {' or '.join(_FLOATS)}"
            + (": it was exported with --coded, export without" if dtype.kind in "iu" else "")
        )
    found = tuple(int(size) for size in header[3].replace(b",", b" ").split())
    if len(data) - start != math.prod(found) * dtype.itemsize:
        raise DataError(f"{name} is torn: {len(data)} bytes for shape {list(found)}; restore it")
    if shape is not None and found != shape:
        raise DataError(f"{name} has shape {list(found)}, expected {list(shape)} as others")
    values = np.frombuffer(data, dtype, offset=start)
    return values.reshape(found, order="F" if header[2] == b"True" else "C")


def _check_values(spec: ArraySpec, values: Floats, name: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(f"{name} holds values that are not finite: encode it again")
    manifest = spec.manifest
    if manifest["kind"] == "latents" and manifest["posterior"] == GAUSSIAN:
        std = values[manifest["channels"] :]
        if std.min() <= 0:
            raise DataError(
                f"{name} holds a std of {std.min():g}, expected all above 0: the second half of "
                "the channels must be std (not log-variance)"
            )


def _coded(spec: ArraySpec, values: Floats) -> tuple[Records, dict[str, int]]:
    """Values as they are stored, and what was counted."""
    if spec.manifest["kind"] == "latents":
        return encode_float(values, spec.layout.dtype), {}
    import torch

    coded = CODECS["fp16"].encode(torch.from_numpy(values))
    counts = {"zero_tokens": coded.num_zero_tokens} if coded.num_zero_tokens else {}
    return coded.records, counts


def _reader(config: ImportConfig) -> Source:
    if config.from_ == "reference":
        return open_refset(config.source)
    return open_source(config.source)


def _table(name: str) -> str:
    return f"{_TABLES}/{name}.parquet"


def _table_of(members: list[Member]) -> bytes:
    columns = {column: [getattr(m, column) for m in members] for column in _COLUMNS}
    return table_bytes(columns, _COLUMNS)
