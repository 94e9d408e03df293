"""The cache of benchmarks/reader.py, and how long a consumer of it waits."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from reader_rows import BATCH, LATENTS, SHARD_ROWS, TOKENS, busy_s, cpu_s, make_row, memory_bytes

from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    begin_array,
    open_sealed,
    seal_array,
    write_shard,
)
from repa_pipeline.data.codec import CODECS
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader
from repa_pipeline.data.shards import RecordLayout

ARRAYS = (("latents.x", LATENTS, "float16"), ("features.x", TOKENS, "int8"))
WINDOW = 4
XL_RATE, B_RATE = 500, 2000  # images/s a GPU
WAIT_EPOCHS = 3


def write_cache(store: ObjectStore, num_rows: int) -> None:
    specs = [
        ArraySpec(name, num_rows, RecordLayout(shape, dtype, SHARD_ROWS), {})
        for name, shape, dtype in ARRAYS
    ]
    entries: list[list[dict[str, Any]]] = [[] for _ in specs]
    for spec in specs:
        begin_array(store, spec)
    for shard in range(specs[0].num_shards):
        rows = range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, num_rows))
        tokens, latents = zip(*map(make_row, rows), strict=True)
        for spec, values, found in zip(specs, (latents, tokens), entries, strict=True):
            num_bytes, digest = write_shard(store, spec, shard, np.stack(values))
            found.append(
                {"index": shard, "rows": len(rows), "num_bytes": num_bytes, "digest": digest}
            )
    for spec, found in zip(specs, entries, strict=True):
        seal_array(store, spec, found)


def open_arrays(where: str) -> list[SealedArray]:
    return [open_sealed(open_store(where), name, "benchmark") for name, _, _ in ARRAYS]


def image_bytes() -> int:
    return sum(RecordLayout(shape, dtype, 1).stride for _, shape, dtype in ARRAYS)


def shard_files(where: str) -> list[Path]:
    return [path for path in Path(where).rglob("*") if path.is_file() and path.name[-4:] != "json"]


def make_order(num_rows: int) -> Order:
    return Order(num_rows, SHARD_ROWS, BATCH, seed=0, window=WINDOW)


def wait_share(
    where: str, num_rows: int, rate: float, *, copy: str | None = None, epochs: float = WAIT_EPOCHS
) -> dict[str, float]:
    """A consumer whose step takes BATCH / rate seconds (0: as long as it decodes a batch): its
    waiting in the last epoch, and after the first batch."""
    order = make_order(num_rows)
    num_steps = int(epochs * order.steps_per_epoch)
    last_epoch = max(1, num_steps - order.steps_per_epoch)
    decode = CODECS["int8"].decoder(CODECS["int8"].manifest(TOKENS[1]))
    marks = [Mark()]
    with Reader(
        open_arrays(where),
        order,
        first_step=0,
        last_step=num_steps,
        local_copy=copy,
        local_copy_bytes=10**10,
    ) as reader:
        for records in reader:
            if records.step in (0, last_epoch):
                marks.append(Mark(reader))
            if rate:
                time.sleep(BATCH / rate)
            else:
                decode_batch(decode, records.arrays[1])
        marks.append(Mark(reader))
        memory = memory_bytes()
    begin, first, last, end = marks
    count = num_steps * BATCH
    busy, own = end.busy_s - first.busy_s, end.cpu_s - first.cpu_s
    seconds = end.time - first.time
    return {
        "wait_share": (end.wait_s - first.wait_s) / seconds,
        "wait_share_of_last_epoch": (end.wait_s - last.wait_s) / (end.time - last.time),
        "first_batch_s": first.time - begin.time,
        "images_per_s": count / seconds,
        "cpu_us_an_image": 1e6 * own / count,
        "memory_MB": memory / 1e6,
        "buffers_MB": reader.buffer_bytes / 1e6,
        "store_MB": end.store_bytes / 1e6,
        "store_MB_in_last_epoch": (end.store_bytes - last.store_bytes) / 1e6,
        "other_processes": max(0.0, busy - own) / seconds / (os.cpu_count() or 1),
    }


class Mark:
    """Where the clocks and counters stand now."""

    def __init__(self, reader: Reader | None = None):
        self.time, self.cpu_s, self.busy_s = time.perf_counter(), cpu_s(), busy_s()
        self.wait_s = reader.wait_s if reader else 0.0
        self.store_bytes = reader.num_store_bytes if reader else 0


def decode_batch(decode: Callable[..., Any], tokens: np.ndarray) -> None:
    import torch

    decode(torch.from_numpy(tokens), None)


def copied(where: str, num_rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return wait_share(where, num_rows, B_RATE, copy=folder, epochs=2)
