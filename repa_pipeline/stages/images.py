"""What the two image passes share: rows of a shard -> images -> records -> a stored shard.

Read and decode run on threads, the model in fixed batches (the last one padded), so a shard's
bytes depend on its rows and the settings alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import EncodeConfig
from repa_pipeline.data.array import ArraySpec, write_shard
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.data.index import Entry, content_digest, read_index
from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.data.source import Item, Source
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.engine.contracts import Commit, Shard, Work
from repa_pipeline.errors import DataError, StageError
from repa_pipeline.stages.array_stage import ArrayStage
from repa_pipeline.stages.index import cache_store, open_config_source

Images = npt.NDArray[np.uint8]
Records = npt.NDArray[np.generic]
Encode = Callable[[Images], Records]


@dataclasses.dataclass(frozen=True)
class ImageStage(ArrayStage):
    """A pass over all images that writes one array. Subclasses say which model and which array."""

    config: EncodeConfig
    spec: ArraySpec

    @property
    def name(self) -> str:
        return self.spec.name

    def load(self, device: str) -> Encode:
        """Loads the weights; returns uint8 [b, R, R, 3] -> records [b, ...] of the spec's dtype."""
        raise NotImplementedError

    @property
    def store(self) -> ObjectStore:
        return cache_store(self.config)

    def open(self) -> Work:
        prepare_compute(self.config.threads)
        store, source = self.store, open_config_source(self.config)
        entries = read_index(store).entries
        check_scratch(entries, self.config)
        encode = self.load(choose_device(self.config.device))

        def work(shard: Shard) -> Commit:
            rows = entries[shard.start : shard.stop]
            images, read_s, decode_s = load_images(source, rows, self.config)
            began = time.perf_counter()
            records = encode_in_batches(encode, images, self.config.batch_size)
            encode_s = time.perf_counter() - began
            began = time.perf_counter()
            num_bytes, sha256 = write_shard(store, self.spec, shard.index, records)
            seconds = {
                "read": round(read_s, 3),
                "decode": round(decode_s, 3),
                "encode": round(encode_s, 3),
                "write": round(time.perf_counter() - began, 3),
            }
            return Commit(shard.index, len(rows), num_bytes, sha256, seconds)

        return work


def common_manifest(config: EncodeConfig, index: Any) -> dict[str, Any]:
    """The settings of both passes that decide bytes, and the rows they belong to."""
    return {
        "resolution": config.resolution,
        "prepare": {"crop": "adm-center", **index.manifest["decode"]},
        "batch_size": config.batch_size,
        "rows_digest": index.manifest["rows_digest"],
        "num_rows": index.num_rows,
    }


def array_spec(
    name: str, index: Any, shape: tuple[int, ...], dtype: str, manifest: dict[str, Any]
) -> ArraySpec:
    """The array `name` over the rows of `index`, in the index's partition."""
    layout = RecordLayout(shape, dtype, index.manifest["shard_rows"])
    return ArraySpec(name, index.num_rows, layout, manifest)


def load_images(
    source: Source, rows: tuple[Entry, ...], config: EncodeConfig
) -> tuple[Images, float, float]:
    """Reads, decodes and crops the rows' images.

    Returns uint8 [n, R, R, 3] and the seconds of reading and of decoding, summed over threads.
    Raises DataError when the source's bytes are not the indexed ones.
    """
    images = np.empty((len(rows), config.resolution, config.resolution, 3), np.uint8)

    def load(i: int) -> tuple[float, float]:
        began = time.perf_counter()
        data = _read_indexed(source, rows[i])
        middle = time.perf_counter()
        upright = config.exif == "upright"
        decoded = decode_image(data, upright=upright, max_pixels=config.max_pixels)
        images[i] = adm_center_crop(decoded.image, config.resolution)
        return middle - began, time.perf_counter() - middle

    with ThreadPoolExecutor(config.decode_threads) as pool:
        times = list(pool.map(load, range(len(rows))))
    return images, sum(t[0] for t in times), sum(t[1] for t in times)


def encode_in_batches(encode: Encode, images: Images, batch_size: int) -> Records:
    """Encodes images uint8 [n, R, R, 3] in batches of exactly `batch_size`, padding the last."""
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        if missing:
            batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)])
        parts.append(encode(batch)[: batch_size - missing])
    return np.concatenate(parts)


def check_scratch(entries: tuple[Entry, ...], config: EncodeConfig) -> None:
    """Raises StageError when the unpacked .tar.gz files do not fit the scratch folder together.

    Rows are stored in random order: with less room every image would unpack a whole tar again.
    """
    ends: dict[str, int] = {}
    for entry in entries:
        if entry.path.endswith((".gz", ".tgz")):
            ends[entry.path] = max(ends.get(entry.path, 0), entry.offset + entry.num_bytes)
    needed, limit = sum(ends.values()) / 2**30, config.scratch_gb
    if needed > limit:
        raise StageError(
            f"the {len(ends)} compressed tars unpack to {needed:.3g} GiB, the scratch folder may "
            f"hold {limit:.3g}: raise --scratch-gb, or unpack them and use the .tar files"
        )


def _read_indexed(source: Source, row: Entry) -> bytes:
    data = source.read(Item(row.key, row.label, row.path, row.offset, row.num_bytes))
    if content_digest(data) != row.digest:
        raise DataError(
            f"image {row.key} ({row.path}) is not the one that was indexed: restore it, or "
            "start a new --workspace"
        )
    return data
