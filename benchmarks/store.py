"""The cache's shard writer and reader against zarr itself and a raw sequential read.

    python benchmarks/store.py [--rows 1024] [--json]

Rows are synthetic DINOv2-B tokens (float16 [256, 768]) in shards of 128. All ways run in the same
process on the same files, warm page cache, crc32c of every record checked in ours and in zarr's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from common import save
from zarr.codecs import Crc32cCodec

from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    begin_array,
    open_sealed,
    seal_array,
    write_shard,
)
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader
from repa_pipeline.data.shards import RecordLayout

BATCH, SHARD = 64, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        result = measure(folder, arguments.rows)
    finally:
        shutil.rmtree(folder)
    path = save("store", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def measure(folder: Path, num_rows: int) -> dict[str, float]:
    """Seconds turned into ratios; above 1 means ours is faster."""
    layout = RecordLayout((256, 768), "float16", SHARD)
    spec = ArraySpec("features.synthetic", num_rows, layout, {"kind": "benchmark"})
    store = LocalStore(str(folder))
    shard = np.random.default_rng(0).standard_normal((SHARD, 256, 768)).astype(np.float16)
    ours = best(lambda: write_ours(store, spec, shard))
    theirs = best(lambda: write_zarr(folder / "zarr", num_rows, shard))
    array = open_sealed(store, spec.name, "benchmark")
    order = Order(num_rows, SHARD, BATCH, seed=0)
    reader = best(lambda: read_ours(array, order))
    return {
        "num_rows": num_rows,
        "write_speed_over_zarr": theirs / ours,
        "read_speed_over_zarr_slices": best(lambda: read_zarr(folder / spec.name)) / reader,
        "read_speed_over_raw_sequential": best(lambda: read_raw(folder / spec.name)) / reader,
        "reader_images_per_s": order.steps_per_epoch * BATCH / reader,
    }


def best(run: Callable[[], None], times: int = 3) -> float:
    """Fastest of several runs: the machine's noise only ever adds."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def write_ours(store: LocalStore, spec: ArraySpec, shard: np.ndarray) -> None:
    shutil.rmtree(store.root / spec.name, ignore_errors=True)
    begin_array(store, spec)
    entries = []
    for index in range(spec.num_shards):
        num_bytes, sha256 = write_shard(store, spec, index, shard)
        entries.append({"index": index, "rows": SHARD, "num_bytes": num_bytes, "sha256": sha256})
    seal_array(store, spec, entries)


def write_zarr(path: Path, num_rows: int, shard: np.ndarray) -> None:
    array = zarr.create_array(
        path,
        shape=(num_rows, *shard.shape[1:]),
        chunks=(1, *shard.shape[1:]),
        shards=shard.shape,
        dtype="float16",
        compressors=[Crc32cCodec()],
        fill_value=float("nan"),
        overwrite=True,
    )
    for start in range(0, num_rows, SHARD):
        array[start : start + SHARD] = shard


def read_ours(array: SealedArray, order: Order) -> None:
    with Reader([array], order, first_step=0, last_step=order.steps_per_epoch) as reader:
        for _ in reader:
            pass


def read_zarr(path: Path) -> None:
    array = zarr.open_array(path, mode="r")
    for start in range(0, array.shape[0], BATCH):
        array[start : start + BATCH]


def read_raw(path: Path) -> None:
    buffer = bytearray(64 * 2**20)
    for file in sorted((path / "c").rglob("0")):
        if file.is_file():
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


if __name__ == "__main__":
    main()
