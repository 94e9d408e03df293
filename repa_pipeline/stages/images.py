"""One pass over the images for any number of frozen networks: each image is decoded once.

Read and decode run on threads, the networks in fixed batches (the last one padded), so a shard's
bytes depend on its rows and the settings alone.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.config import EncodeConfig
from repa_pipeline.data.array import ArraySpec, write_shard
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.data.index import Entry, Index, content_digest, open_index
from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.data.patterns import is_unpacked
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.data.source import Item, Source
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.engine.contracts import Commit, Commits, Executor, Shard, Wanted, Work
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.engine.run import Progress, StageResult, ledger_of, run_stage
from repa_pipeline.errors import DataError, MismatchError, StageError
from repa_pipeline.registry import load_plugins
from repa_pipeline.stages.array_stage import ArrayOutput
from repa_pipeline.stages.index import cache_store, open_config_source
from repa_pipeline.tables import Table

Images = npt.NDArray[np.uint8]
Records = npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a network makes of a batch: records by part ("" the main one), and what was counted."""

    parts: Mapping[str, Records]
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


# Images uint8 [b, R, R, 3] and n -> what the network makes of the first n of them.
Encode = Callable[[Images, int], Encoded]


@dataclasses.dataclass(frozen=True)
class Product:
    """A frozen network and the arrays made with it: each view's main array and its other parts.

    `specs` maps (mirrored, part) to the array; subclasses say which network.
    """

    config: EncodeConfig
    name: str
    specs: Mapping[tuple[bool, str], ArraySpec]

    def load(self, device: str) -> Encode:
        """Loads the weights; returns the function of a batch."""
        raise NotImplementedError

    def check_weights(self, loaded_sha256: str) -> None:
        """Raises MismatchError unless this worker loaded the weights that the array is made with.

        The driver hashed its own file; another machine may hold another one at the same path.
        """
        wanted = next(iter(self.specs.values())).manifest["weights_sha256"]
        if loaded_sha256 != wanted:
            raise MismatchError(
                f"the weights of {self.name} on {socket.gethostname()} have sha256 "
                f"{loaded_sha256[:12]}, expected {wanted[:12]}: give every machine the same file"
            )


@dataclasses.dataclass(frozen=True)
class ImagePass:
    """A Stage that writes the arrays of all its products."""

    config: EncodeConfig
    products: tuple[Product, ...]

    @property
    def name(self) -> str:
        return " + ".join(product.name for product in self.products)

    @property
    def outputs(self) -> tuple[ArrayOutput, ...]:
        """Other parts before the main array, which is what a reader looks for."""
        url = cache_store(self.config).url
        keyed = [item for product in self.products for item in product.specs.items()]
        others = [spec for (_, part), spec in keyed if part]
        mains = [spec for (_, part), spec in keyed if not part]
        return tuple(ArrayOutput(url, spec) for spec in others + mains)

    def open(self, wanted: Wanted) -> Work:
        load_plugins(self.config.plugins)
        prepare_compute(self.config.threads)
        store = cache_store(self.config)
        device = choose_device(self.config.device)
        needed = frozenset[str]().union(*wanted.values())
        encoders = [
            (product, product.load(device))
            for product in self.products
            if any(spec.name in needed for spec in product.specs.values())
        ]
        source, index = open_config_source(self.config), open_index(store)
        return ImageWork(self.config, source, index, store, encoders, wanted)


@dataclasses.dataclass
class _Loaded:
    images: Images
    seconds: dict[str, float]


@dataclasses.dataclass
class _Coded:
    spec: ArraySpec
    records: Records
    seconds: dict[str, float]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ImageWork:
    """The three phases of a shard of images."""

    config: EncodeConfig
    source: Source
    index: Index
    store_: ObjectStore
    encoders: Sequence[tuple[Product, Encode]]
    wanted: Wanted

    def load(self, shard: Shard) -> _Loaded:
        rows = self.index.rows(shard.start, shard.stop)
        images, read_s, decode_s = load_images(self.source, rows, self.config)
        return _Loaded(images, {"read": read_s, "decode": decode_s})

    def compute(self, shard: Shard, loaded: _Loaded) -> list[_Coded]:
        wanted = self.wanted[shard.index]
        coded: list[_Coded] = []
        for product, encode in self.encoders:
            for mirrored in (False, True):
                parts = {
                    part: spec
                    for (flipped, part), spec in product.specs.items()
                    if flipped == mirrored and spec.name in wanted
                }
                if parts:
                    coded += self._encode(encode, loaded.images, mirrored, parts)
        coded[0].seconds = {**loaded.seconds, **coded[0].seconds}  # told in the order they came
        return coded

    def store(self, shard: Shard, computed: list[_Coded]) -> Commits:
        return tuple(self._write(shard, coded) for coded in computed)

    def _encode(
        self, encode: Encode, images: Images, mirrored: bool, parts: Mapping[str, ArraySpec]
    ) -> list[_Coded]:
        began = time.perf_counter()
        seen = images[:, :, ::-1] if mirrored else images
        encoded = encode_in_batches(encode, seen, self.config.batch_size)
        coded = [
            _Coded(spec, encoded.parts[part], {}, {} if part else dict(encoded.counts))
            for part, spec in parts.items()
        ]
        coded[0].seconds["encode"] = time.perf_counter() - began
        return coded

    def _write(self, shard: Shard, coded: _Coded) -> Commit:
        began = time.perf_counter()
        num_bytes, digest = write_shard(self.store_, coded.spec, shard.index, coded.records)
        seconds = {**coded.seconds, "write": time.perf_counter() - began}
        return Commit(
            shard.index,
            shard.num_rows,
            num_bytes,
            digest,
            {phase: round(value, 3) for phase, value in seconds.items()},
            coded.spec.name,
            coded.counts,
        )


def common_manifest(config: EncodeConfig, index: Index) -> dict[str, Any]:
    """The settings of all passes that decide bytes, and the rows they belong to."""
    manifest = {
        "resolution": config.resolution,
        "prepare": {"crop": "adm-center", **index.manifest["decode"]},
        "batch_size": config.batch_size,
        "rows_digest": index.manifest["rows_digest"],
        "num_rows": index.num_rows,
    }
    compute = {"dtype": config.dtype, "compile": config.compile}
    plain = {"dtype": "float32", "compile": False}
    return manifest if compute == plain else {**manifest, "compute": compute}


def own_entry(table: Table[Any], spec: EncoderSpec | AutoencoderSpec) -> dict[str, Any]:
    """What decides bytes of an entry that is not as this package has it: {} for one that is."""
    packaged = table.packaged.get(spec.name)
    own = {"loader": spec.loader, "model": dict(spec.config)}
    if packaged and own == {"loader": packaged.loader, "model": dict(packaged.config)}:
        return {}
    return {"entry": own}


def array_spec(
    name: str,
    index: Index,
    shape: tuple[int, ...],
    dtype: str,
    manifest: dict[str, Any],
    container: str,
) -> ArraySpec:
    """The array `name` over the rows of `index`, in the index's partition."""
    layout = RecordLayout(shape, dtype, index.manifest["shard_rows"], container)
    return ArraySpec(name, index.num_rows, layout, manifest)


def views(config: EncodeConfig) -> tuple[bool, ...]:
    """Which views are stored: mirrored or not."""
    return (False, True) if config.flip else (False,)


def load_images(
    source: Source, rows: Sequence[Entry], config: EncodeConfig
) -> tuple[Images, float, float]:
    """Reads, decodes and crops the rows' images.

    Returns uint8 [n, R, R, 3] and the seconds of reading and of decoding, summed over threads.
    Raises DataError when the source's bytes are not the indexed ones.
    """
    images = np.empty((len(rows), config.resolution, config.resolution, 3), np.uint8)
    items = [Item(row.key, row.label, row.path, row.offset, row.num_bytes) for row in rows]

    def decode(i: int, data: bytes) -> None:
        if content_digest(data) != rows[i].digest:
            raise DataError(
                f"image {rows[i].key} ({rows[i].path}) is not the one that was indexed: restore "
                "it, or start a new --workspace"
            )
        upright = config.exif == "upright"
        decoded = decode_image(data, upright=upright, max_pixels=config.max_pixels)
        images[i] = adm_center_crop(decoded.image, config.resolution)

    read_s, decode_s = read_images(source, items, decode, config.decode_threads)
    return images, read_s, decode_s


def read_images(
    source: Source, items: Sequence[Item], handle: Callable[[int, bytes], None], threads: int
) -> tuple[float, float]:
    """Calls `handle(position, bytes)` for every item, from `threads` threads.

    Items that one request reads together are read together. Returns the seconds spent reading and
    in `handle`, summed over threads.
    """

    def run(group: list[int]) -> tuple[float, float]:
        began = time.perf_counter()
        found = source.read_group([items[i] for i in group])
        middle = time.perf_counter()
        for i, data in zip(group, found, strict=True):
            handle(i, data)
        return middle - began, time.perf_counter() - middle

    with ThreadPoolExecutor(threads) as pool:
        times = list(pool.map(run, source.groups(items)))
    return sum(t[0] for t in times), sum(t[1] for t in times)


def encode_in_batches(encode: Encode, images: Images, batch_size: int) -> Encoded:
    """Encodes images uint8 [n, R, R, 3] in batches of exactly `batch_size`, padding the last."""
    parts: dict[str, Records] = {}
    counts: dict[str, int] = {}
    for start in range(0, len(images), batch_size):
        batch = np.ascontiguousarray(images[start : start + batch_size])
        num_rows = len(batch)
        if num_rows < batch_size:
            padding = np.zeros((batch_size - num_rows, *batch.shape[1:]), np.uint8)
            batch = np.concatenate([batch, padding])
        encoded = encode(batch, num_rows)
        for part, records in encoded.parts.items():
            if part not in parts:
                parts[part] = np.empty((len(images), *records.shape[1:]), records.dtype)
            parts[part][start : start + num_rows] = records
        for name, counted in encoded.counts.items():
            counts[name] = counts.get(name, 0) + counted
    return Encoded(parts, counts)


def run_pass(stage: ImagePass, index: Index, executor: Executor, progress: Progress) -> StageResult:
    """Runs a pass over the rows of `index`: what is missing of its arrays is made and sealed.

    Raises StageError when shards could not be done; what was done is kept.
    """
    check_scratch(index, stage.config)
    return run_stage(stage, executor, pass_ledgers(stage), progress)


def pass_ledgers(stage: ImagePass) -> dict[str, Ledger]:
    """The done records of a pass, by output."""
    store = cache_store(stage.config)
    return {output.name: ledger_of(store, output) for output in stage.outputs}


def check_scratch(index: Index, config: EncodeConfig) -> None:
    """Raises StageError when the unpacked source files do not fit the scratch folder together.

    Rows are stored in random order: with less room every image would unpack a whole file again.
    """
    ends: dict[str, int] = {}
    for batch in index.batches(("path", "offset", "num_bytes")):
        for path, offset, size in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            if is_unpacked(path):
                ends[path] = max(ends.get(path, 0), offset + size)
    needed, limit = sum(ends.values()) / 2**30, config.scratch_gb
    if needed > limit:
        raise StageError(
            f"the {len(ends)} compressed files unpack to {needed:.3g} GiB, the scratch folder may "
            f"hold {limit:.3g}: raise --scratch-gb, or unpack them and use tars or folders"
        )
