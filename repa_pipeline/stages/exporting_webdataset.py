"""Export to webdataset: a tar a shard, in the cache's own (already shuffled) order.

KEY.cls              the class, as text
KEY.json             {"key": the source's key, "label": class, "row": row}
KEY.png              the crop the networks saw (--images)
KEY.moments.npy      the latents' moments as stored, [2C, h, w]; KEY.moments.flip.npy mirrored
KEY.ENCODER.npy      float16 tokens [T, D], decoded; KEY.ENCODER.flip.npy mirrored
                     (--coded: as stored, and KEY.ENCODER.scale.npy)

KEY is the row as nine digits: source keys may hold dots and slashes, which mean something to
webdataset, so they stand in KEY.json alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from repa_pipeline.config import EncodeConfig
from repa_pipeline.config_exchange import ExportConfig
from repa_pipeline.data.array import SealedArray
from repa_pipeline.data.codec import encode_float
from repa_pipeline.data.index import Entry
from repa_pipeline.data.names import parse_name
from repa_pipeline.data.objects import json_bytes, open_store
from repa_pipeline.data.source import Source
from repa_pipeline.engine.contracts import Commit, Commits, Shard, Wanted, Work
from repa_pipeline.pictures import png_bytes
from repa_pipeline.stages.cached_rows import decoded_tokens, image_config
from repa_pipeline.stages.exporting import (
    RECORD,
    STATE,
    ExportOutput,
    Records,
    ShardRows,
    choose_arrays,
    destination,
)
from repa_pipeline.stages.exporting_reference import npy_bytes
from repa_pipeline.stages.images import Images, load_images
from repa_pipeline.stages.index import open_config_source

MOMENTS = "moments"
KEYS = "KEY is the row as nine digits; KEY.json holds the source's key"
# A tar is built in memory and may be one object of a store.
_MAX_TAR_BYTES = 2**29
_DECODED_TOGETHER = 32


def key_of(row: int) -> str:
    """The webdataset key of a row."""
    return f"{row:09d}"


def member_of(name: str) -> str:
    """What an array's member is called behind KEY: 'moments', 'dinov2-b', 'dinov2-b.flip'.

    In lower case, as webdataset reads extensions.
    """
    parts = parse_name(name)
    base = MOMENTS if parts.kind == "latents" else parts.part.lower()
    return base + ".flip" * parts.mirrored


@dataclasses.dataclass
class WebdatasetTars(ExportOutput):
    """The tars as an output."""

    def row_bytes(self) -> int:
        return sum(_sample_bytes(array, self.config.coded) for array in self.exported.arrays)

    def tar_key(self, index: int) -> str:
        return f"{index:06d}.tar"

    def stands(self, commit: Commit) -> bool:
        return self.store.size(self.tar_key(commit.index)) == commit.num_bytes

    def seal(self, commits: list[Commit]) -> None:
        arrays = {
            member_of(array.spec.name): {
                "name": array.spec.name,
                "coded": self.config.coded,
                "manifest": dict(array.spec.manifest),
            }
            for array in self.exported.arrays
        }
        tars = [
            {"name": self.tar_key(c.index), "rows": c.rows, "num_bytes": c.num_bytes,
             "digest": c.digest}
            for c in commits
        ]  # fmt: skip
        record = {**self.record(commits), "keys": KEYS, "members": arrays, "tars": tars}
        self.store.put(RECORD, json_bytes(record))


@dataclasses.dataclass(frozen=True)
class WebdatasetExport:
    """The Stage; one output."""

    config: ExportConfig
    output: WebdatasetTars

    @property
    def name(self) -> str:
        return f"export to {self.output.where}"

    @property
    def outputs(self) -> tuple[WebdatasetTars, ...]:
        return (self.output,)

    def open(self, wanted: Wanted) -> Work:
        exported = self.output.exported
        arrays = {array.spec.name: ShardRows(array) for array in exported.arrays}
        scales = {name: ShardRows(array) for name, array in exported.scales.items()}
        images, source = None, None
        if self.output.with_images:
            images = image_config(self.config, exported.index, exported.any_manifest)
            source = open_config_source(images)
        return _TarWork(self.output, arrays, scales, images, source)


@dataclasses.dataclass
class _Loaded:
    """Members of a shard before they are coded: rows, images, records by array and scales."""

    rows: tuple[Entry, ...]
    images: Images | None
    records: dict[str, Records]
    scales: dict[str, Records]


@dataclasses.dataclass(frozen=True)
class _TarWork:
    output: WebdatasetTars
    arrays: dict[str, ShardRows]
    scales: dict[str, ShardRows]
    images: EncodeConfig | None
    source: Source | None

    def load(self, shard: Shard) -> _Loaded:
        rows = self.output.exported.index.rows(shard.start, shard.stop)
        images = None
        if self.images is not None and self.source is not None:
            images = load_images(self.source, rows, self.images)[0]
        span = (shard.start, shard.stop)
        return _Loaded(
            rows,
            images,
            {name: array.rows(*span) for name, array in self.arrays.items()},
            {name: scale.rows(*span) for name, scale in self.scales.items()},
        )

    def compute(self, shard: Shard, loaded: _Loaded) -> bytes:
        """The tar."""
        pictures: list[bytes] | None = None
        if loaded.images is not None:
            with ThreadPoolExecutor(self.output.config.decode_threads) as pool:
                pictures = list(pool.map(png_bytes, loaded.images))
        columns = dict(self._columns(loaded))
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, entry in enumerate(loaded.rows):
                key = key_of(shard.start + i)
                _add(tar, f"{key}.cls", str(entry.label).encode())
                about = {"key": entry.key, "label": entry.label, "row": shard.start + i}
                _add(tar, f"{key}.json", json.dumps(about).encode())
                if pictures is not None:
                    _add(tar, f"{key}.png", pictures[i])
                for member, records in columns.items():
                    _add(tar, f"{key}.{member}.npy", npy_bytes(records[i]))
        return buffer.getvalue()

    def store(self, shard: Shard, computed: bytes) -> Commits:
        self.output.store.put(self.output.tar_key(shard.index), computed)
        digest = f"sha256:{hashlib.sha256(computed).hexdigest()}"
        name = self.output.name
        return (Commit(shard.index, shard.num_rows, len(computed), digest, output=name),)

    def _columns(self, loaded: _Loaded) -> Iterator[tuple[str, Records]]:
        for name, records in loaded.records.items():
            member, scale = member_of(name), loaded.scales.get(name)
            array = self.arrays[name].array
            if parse_name(name).kind == "latents":
                yield member, records
            elif self.output.config.coded:
                yield member, records
                if scale is not None:
                    yield f"{member}.scale", scale
            else:
                yield member, _decoded(array, records, scale)


def webdataset_export(config: ExportConfig) -> WebdatasetExport:
    """The stage of `repa export --to webdataset`; raises for what cannot be exported."""
    store = open_store(destination(config))
    exported = choose_arrays(config)
    sample = sum(_sample_bytes(array, config.coded) for array in exported.arrays)
    output = WebdatasetTars(
        config=config,
        exported=exported,
        store=store,
        state_store=store.child(STATE),
        rows_a_shard=_rows_a_tar(exported.shard_rows, sample),
    )
    return WebdatasetExport(config, output)


def _rows_a_tar(shard_rows: int, sample_bytes: int) -> int:
    """The rows of a shard, or the largest divisor of them of which a tar is not too large."""
    most = max(1, _MAX_TAR_BYTES // max(sample_bytes, 1))
    fitting = [n for n in range(1, shard_rows + 1) if shard_rows % n == 0 and n <= most]
    return fitting[-1]


def _sample_bytes(array: SealedArray, coded: bool) -> int:
    """Bytes of an array's member of one row, as exported."""
    manifest = array.spec.manifest
    if manifest["kind"] == "latents" or coded:
        return array.spec.layout.record_bytes
    return array.spec.layout.shape[0] * int(manifest["width"]) * 2


def _decoded(array: SealedArray, records: Records, scale: Records | None) -> Records:
    """Tokens float16 [n, T, D], some rows at a time."""
    parts = []
    for start in range(0, len(records), _DECODED_TOGETHER):
        span = slice(start, start + _DECODED_TOGETHER)
        tokens = decoded_tokens(
            array.spec.manifest, array.where, records[span], None if scale is None else scale[span]
        )
        parts.append(encode_float(tokens.numpy(), "float16"))
    return np.concatenate(parts)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
