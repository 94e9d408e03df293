"""The trainer's reader against webdataset, MosaicML Streaming, LitData, zarr and a raw read.

    python benchmarks/reader.py [--rows 3072] [--rounds 2] [--s3-venv .venv-s3] [--json]

Rows are synthetic int8 DINOv2-B tokens [256, 768] and float16 latents [8, 32, 32], 213 KB each, on
the local disk, in shards of 256 (52 MB). Every reader gives shuffled batches of 256 in memory;
ours checks every record's checksum too. In turns, each in a process of its own, epoch after epoch,
the first not counted; of each the round with the least CPU time an image is kept. The three others
run in a virtual environment that is made here (`reader_rivals.py`), with no and with two worker
processes; the better counts. Cold: files leave the page cache (POSIX_FADV_DONTNEED, looked up with
mincore) before each epoch, ours, which reads ahead, as soon as it has read one; warm: they stay.

Waiting: a consumer takes batches at a trainer's rate, as with a GPU that does the rest, or decodes
them on the CPU one after another; the share of its time that it waits, after the first batch. From
the S3 server of the tests, which is a Python program on the same cores, likewise, and at the
higher rate with a local copy: in the second epoch.

`other_processes` is the share of the cores that the rest of the machine took meanwhile.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from reader_rows import (
    BATCH,
    EPOCHS,
    busy_s,
    cpu_s,
    drop,
    measure,
    resident_share,
)
from reader_waiting import (
    ARRAYS,
    B_RATE,
    XL_RATE,
    copied,
    image_bytes,
    make_order,
    open_arrays,
    shard_files,
    wait_share,
    write_cache,
)

from repa_pipeline.data.fetch import Unit
from repa_pipeline.data.objects import LocalStore, open_store
from repa_pipeline.data.reader import Reader

HERE = Path(__file__).parent
RIVALS = {"webdataset": "webdataset", "streaming": "mosaicml-streaming", "litdata": "litdata"}
THREADS = 2
ZARR_ROWS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--s3-venv", default=os.environ.get("REPA_S3_VENV", ".venv-s3"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # what, where
    arguments = parser.parse_args()
    if arguments.one:
        what, where = arguments.one
        print(json.dumps(ONE[what](where, arguments.rows)))
        return
    folder = Path(tempfile.mkdtemp(prefix="repa-reader-"))
    try:
        result = run(folder, arguments.rows, arguments.rounds, arguments.s3_venv)
    finally:
        shutil.rmtree(folder)
    path = save("reader", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def run(folder: Path, num_rows: int, rounds: int, s3_venv: str) -> dict[str, Any]:
    python = make_venv(folder / "venv")
    write_cache(open_store(str(folder / "ours")), num_rows)
    for name in RIVALS:
        rivals(python, "write", name, folder / name, num_rows)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for temperature in ("warm", "cold"):
            for name, measured in in_turn(folder, python, num_rows, temperature):
                better(found.setdefault(temperature, {}), name, measured)
    result: dict[str, Any] = {"num_rows": num_rows, "image_bytes": image_bytes()}
    for temperature, readers in found.items():
        result[temperature] = {"ratios": ratios(readers), "readers": readers}
    result["waiting_local"] = {
        what: one(what, folder / "ours", num_rows) for what in ("at_500", "at_2000", "decoding")
    }
    result["waiting_s3"] = measure_s3(folder, num_rows, s3_venv)
    return result


def in_turn(
    folder: Path, python: Path, num_rows: int, temperature: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "ours", one(f"ours_{temperature}", folder / "ours", num_rows)
    for what in ("raw", "zarr"):
        yield what, one(f"{what}_{temperature}", folder / "ours", num_rows)
    for name in RIVALS:
        for workers in (0, 2):
            arguments = (folder / name, num_rows, workers, temperature)
            yield name, {"workers": workers, **rivals(python, "read", name, *arguments)}


def better(found: dict[str, Any], name: str, measured: dict[str, Any]) -> None:
    """Keeps what takes less CPU time an image, and the best rate of all that were measured.

    What is called cold and is not does not count.
    """
    if measured["stayed_in_cache"] > 0.01:
        return
    rate = max(measured["images_per_s"], found.get(name, {}).get("best_images_per_s", 0.0))
    if measured["cpu_us_an_image"] < found.get(name, {}).get("cpu_us_an_image", np.inf):
        found[name] = {key: rounded(value) for key, value in measured.items()}
    found[name]["best_images_per_s"] = rounded(rate)


def ratios(readers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Above 1: ours is better."""
    ours = readers["ours"]
    best_cpu = min(readers[name]["cpu_us_an_image"] for name in RIVALS if name in readers)
    best_rate = max(readers[name]["best_images_per_s"] for name in RIVALS if name in readers)
    rate = ours["best_images_per_s"]
    return {
        "images_per_s_per_core_over_best_of_three": best_cpu / ours["cpu_us_an_image"],
        "images_per_s_over_best_of_three": rate / best_rate,
        "images_per_s_over_zarr": rate / readers["zarr"]["best_images_per_s"],
        "images_per_s_over_raw_sequential": rate / readers["raw"]["best_images_per_s"],
        "cpu_over_raw_sequential": ours["cpu_us_an_image"] / readers["raw"]["cpu_us_an_image"],
    }


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


# Processes.


def make_venv(folder: Path) -> Path:
    """The others' virtual environment, on top of this one's torch; returns its python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(str(Path(np.__file__).parents[1]))
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *RIVALS.values()], check=True, capture_output=True)
    return python


def rivals(python: Path, *arguments: Any) -> dict[str, Any]:
    """Runs reader_rivals.py; what it measured."""
    return last_line([python, HERE / "reader_rivals.py", *arguments])


def one(what: str, where: object, num_rows: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--rows", num_rows, "--one", what, where]
    return {key: rounded(value) for key, value in last_line(command).items()}


def last_line(command: list[Any]) -> dict[str, Any]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr[-2000:]}")
    lines = done.stdout.strip().splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1][:1] == "{" else {}
    return found


# Speed.


def measure_ours(where: str, num_rows: int, *, is_cold: bool) -> dict[str, float]:
    order, files = make_order(num_rows), shard_files(where)
    steps = order.steps_per_epoch
    last = (EPOCHS + 1) * steps  # at the end it is reading ahead, as it was at the beginning
    with Reader(
        open_arrays(where), order, first_step=0, last_step=last, read_threads=THREADS
    ) as reader:
        if is_cold:
            drop(files)
            drop_behind(reader)
        batches = iter(reader)

        def epoch(number: int) -> Iterator[tuple[Any, Any]]:
            for _ in range(steps):
                records = next(batches)
                yield records.arrays[1], records.arrays[0]

        found = measure(epoch, num_rows, lambda: 0.0)
        if is_cold:  # what is being read just now may be there
            found["stayed_in_cache"] = 0.0
            found["in_cache_at_the_end"] = resident_share(files)
    return {**found, "buffers_MB": reader.buffer_bytes / 1e6, "threads": THREADS}


def drop_behind(reader: Reader) -> None:
    """Each shard leaves the page cache when it has been read."""
    done = reader._fetcher._on_done

    def forget(unit: Unit) -> None:
        store = unit.array.store
        assert isinstance(store, LocalStore)
        drop_file(store.root / unit.array.spec.shard_key(unit.shard))
        done(unit)

    reader._fetcher._on_done = forget


def drop_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def measure_plain(
    where: str, num_rows: int, read: Callable[[str], int], *, is_cold: bool
) -> dict[str, float]:
    """A reader that shuffles nothing: the best of a few passes."""
    files, best = shard_files(where), {"images_per_s": 0.0}
    for number in range(EPOCHS):
        stayed = drop(files) if is_cold else 0.0
        began, own, busy = time.perf_counter(), cpu_s(), busy_s()
        count = read(where)
        seconds, own = time.perf_counter() - began, cpu_s() - own
        if number and count / seconds > best["images_per_s"]:
            others = max(0.0, busy_s() - busy - own) / seconds / (os.cpu_count() or 1)
            best = {
                "images_per_s": count / seconds,
                "cpu_us_an_image": 1e6 * own / count,
                "stayed_in_cache": stayed,
                "other_processes": others,
            }
    return best


def read_raw(where: str) -> int:
    buffer = bytearray(2**20)
    num_bytes = 0
    for path in sorted(shard_files(where)):
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                num_bytes += got
    return num_bytes // image_bytes()


def read_zarr(where: str) -> int:
    import zarr

    arrays = [zarr.open_array(f"{where}/{name}", mode="r") for name, _, _ in ARRAYS]
    for start in range(0, ZARR_ROWS, BATCH):
        for array in arrays:
            array[start : start + BATCH]
    return ZARR_ROWS


def measure_s3(folder: Path, num_rows: int, venv: str) -> dict[str, Any]:
    """From the S3 server of the tests; {} without it."""
    from repa_pipeline.errors import MissingError
    from repa_pipeline.testing.swift import SwiftServer

    try:
        server = SwiftServer(venv)
    except MissingError as error:
        return {"left_out": str(error)}
    with server:
        os.environ.update(server.environment())
        server.create_bucket("benchmark")
        url = "s3://benchmark/ours"
        write_cache(open_store(url), num_rows)
        return {
            "at_500": one("at_500", url, num_rows),
            "at_2000_with_local_copy": one("at_2000_copied", url, num_rows),
        }


ONE: dict[str, Callable[[str, int], dict[str, float]]] = {
    "ours_warm": functools.partial(measure_ours, is_cold=False),
    "ours_cold": functools.partial(measure_ours, is_cold=True),
    "raw_warm": functools.partial(measure_plain, read=read_raw, is_cold=False),
    "raw_cold": functools.partial(measure_plain, read=read_raw, is_cold=True),
    "zarr_warm": functools.partial(measure_plain, read=read_zarr, is_cold=False),
    "zarr_cold": functools.partial(measure_plain, read=read_zarr, is_cold=True),
    "at_500": functools.partial(wait_share, rate=XL_RATE),
    "at_2000": functools.partial(wait_share, rate=B_RATE),
    "decoding": functools.partial(wait_share, rate=0, epochs=0.5),
    "at_2000_copied": copied,
}


if __name__ == "__main__":
    main()
