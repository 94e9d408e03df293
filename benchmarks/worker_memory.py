"""Peak memory of an encoding worker against the number of images: flat, or not.

    python benchmarks/worker_memory.py [--rows 1000,10000,100000] [--json]

For each count the driver's part (index, plan) is done here, and a new process is the worker, as on
a cluster: it opens the stage for all shards and runs them through its pipeline, latents and int8
tokens in one pass, by networks of one layer. The index has that many rows, of 16 small JPEGs in a
tar over and over. Shards are deleted once written, so that the disk need not hold them.

Reported in MiB: `baseline`, resident once the stage is open, before the first shard; `peak`, the
most from there on, also as it was when 1,000 rows were done; `resident_at_end`. What stands between
baseline and peak is mostly what libraries load and set up with their first batch. The peak is VmHWM
of /proc: ru_maxrss would begin at what the parent held when it started the process.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from common import save
from PIL import Image

from repa_pipeline.config import EncodeAllConfig
from repa_pipeline.data.index import Entry, content_digest, open_index, write_index
from repa_pipeline.data.source import open_source
from repa_pipeline.engine.contracts import Commits, Shard, split_rows
from repa_pipeline.engine.pipeline import IN_FLIGHT, Pipeline
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import ImagePass
from repa_pipeline.stages.index import cache_store
from repa_pipeline.stages.latents import latents_product
from repa_pipeline.testing.encoded import tiny_parts

SIDE, NUM_FILES, SHARD_ROWS, FIRST = 64, 16, 64, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1000,10000,100000")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        with tiny_parts(Path(arguments.worker)):
            print(json.dumps(work(Path(arguments.worker))))
        return
    counts = [int(count) for count in arguments.rows.split(",")]
    runs = {str(count): measure(count) for count in counts}
    fewest, most = runs[str(min(counts))], runs[str(max(counts))]
    ratios = {
        "peak": most["peak"] / fewest["peak"],
        "peak_above_baseline": (most["peak"] - most["baseline"])
        / (fewest["peak"] - fewest["baseline"]),
    }
    result = {
        "MiB_by_rows": runs,
        "most_over_fewest_rows": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }
    path = save("worker_memory", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def measure(num_rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        with tiny_parts(Path(folder)):
            prepare(Path(folder), num_rows)
        command = [sys.executable, __file__, "--worker", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def settings(folder: Path) -> EncodeAllConfig:
    return EncodeAllConfig(
        source=str(folder / "images.tar"),
        workspace=str(folder / "work"),
        autoencoder="tiny-kl",
        encoder=("tiny-teacher",),
        resolution=SIDE,
        device="cpu",
        threads=1,
    )


def prepare(folder: Path, num_rows: int) -> None:
    """Images and an index of `num_rows` rows that share the images."""
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number in range(NUM_FILES):
            pixels = generator.integers(0, 256, (SIDE + number, SIDE, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(buffer.getvalue())
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    source = open_source(str(folder / "images.tar"))
    files = [(item, content_digest(source.read(item))) for item in source.items()]
    rows = []
    for number in range(num_rows):
        item, digest = files[number % NUM_FILES]
        place = (item.path, item.offset, item.num_bytes)
        rows.append(Entry(f"{number:07d}", 0, *place, SIDE, SIDE, "", digest))
    manifest = {
        "shard_rows": SHARD_ROWS,
        "decode": {"exif": "upright", "max_pixels": settings(folder).max_pixels},
    }
    write_index(cache_store(settings(folder)), rows, [], manifest)


def work(folder: Path) -> dict[str, float]:
    """The worker: every shard through the stage's pipeline."""
    config = settings(folder)
    index = open_index(cache_store(config))
    products = (latents_product(config, index), *features_products(config, index))
    stage = ImagePass(config, products)
    shards = split_rows(index.num_rows, SHARD_ROWS)
    wanted = {shard.index: frozenset(output.name for output in stage.outputs) for shard in shards}
    opened = stage.open(wanted)
    baseline, early = reset_peak(), 0.0
    with Pipeline(opened) as pipeline:
        for num_done, commits in enumerate(run(pipeline, shards), 1):
            forget(stage, commits)
            if not early and num_done * SHARD_ROWS >= FIRST:
                early = peak_mib()
    found = {
        "baseline": baseline,
        "peak_at_1000_rows": early or peak_mib(),
        "peak": peak_mib(),
        "resident_at_end": status_mib("VmRSS"),
    }
    return {name: round(mib, 1) for name, mib in found.items()}


def run(pipeline: Pipeline, shards: Sequence[Shard]) -> Iterator[Commits]:
    """As a driver hands them out: the next shard when one is done."""
    under_way: deque[Future[Commits]] = deque()
    for shard in shards:
        under_way.append(pipeline.submit(shard))
        if len(under_way) == IN_FLIGHT:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def forget(stage: ImagePass, commits: Commits) -> None:
    store = cache_store(stage.config)
    keys = {output.name: output.spec.shard_key for output in stage.outputs}
    for commit in commits:
        store.delete(keys[commit.output](commit.index))


def reset_peak() -> float:
    """MiB resident now; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")


def peak_mib() -> float:
    return status_mib("VmHWM")


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


if __name__ == "__main__":
    main()
