"""Peak memory of an encoding worker against the number of images: it should be flat.

    nice python benchmarks/worker_memory.py [--rows 1000,10000,100000] [--json]

For each count a new process runs the feature pass (read, decode, crop, a tiny teacher, int8, write)
over an index of that many rows, whose images are a few 64-pixel JPEGs over and over. Shards are
removed once written, so the disk need not hold them. Reported: the peak resident memory of the
process at its end, and when it had done the first 1,000 rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from PIL import Image

from repa_pipeline.config import FeaturesConfig
from repa_pipeline.data.index import Entry, content_digest, read_index, write_index
from repa_pipeline.engine.contracts import Shard, split_rows
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.registry import TABLES
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import ImagePass
from repa_pipeline.stages.index import cache_store
from repa_pipeline.testing.parts import tiny_encoder, write_weights

SIDE, NUM_FILES, SHARD_ROWS = 64, 16, 256
TEACHER = "tiny-teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1000,10000,100000")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(Path(arguments.worker))))
        return
    counts = [int(count) for count in arguments.rows.split(",")]
    runs = {str(count): measure(count) for count in counts}
    peaks = [run["peak_MiB"] for run in runs.values()]
    result = {"rows": runs, "peak_of_most_over_peak_of_fewest": round(peaks[-1] / peaks[0], 3)}
    path = save("worker_memory", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def measure(num_rows: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    try:
        prepare(folder, num_rows)
        command = [sys.executable, __file__, "--worker", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        shutil.rmtree(folder)


def settings(folder: Path) -> FeaturesConfig:
    return FeaturesConfig(
        source=str(folder / "images"),
        workspace=str(folder / "work"),
        encoder=(TEACHER,),
        resolution=SIDE,
        batch_size=64,
        threads=1,
        decode_threads=1,
        device="cpu",
    )


def prepare(folder: Path, num_rows: int) -> None:
    """Images, weights and an index of `num_rows` rows that share the images."""
    (folder / "images/a").mkdir(parents=True)
    generator = np.random.default_rng(0)
    files = []
    for number in range(NUM_FILES):
        path = folder / f"images/a/{number:02d}.jpg"
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
        files.append((f"a/{path.name}", path.read_bytes()))
    write_weights(teacher(folder))
    rows = [row_of(number, *files[number % NUM_FILES]) for number in range(num_rows)]
    manifest = {"shard_rows": SHARD_ROWS, "decode": {"exif": "upright", "max_pixels": 178_956_970}}
    write_index(cache_store(settings(folder)), rows, [], manifest)


def row_of(number: int, path: str, data: bytes) -> Entry:
    digest = content_digest(data)
    return Entry(f"{number:07d}", 0, path, -1, len(data), SIDE, SIDE, "", digest)


def teacher(folder: Path) -> Any:
    weights = str(folder / "teacher.safetensors")
    return tiny_encoder(TEACHER, weights=weights, width=64, patch_size=8)


def work(folder: Path) -> dict[str, Any]:
    """Runs the pass; MiB of peak resident memory, and images a second."""
    TABLES["encoders"].add(teacher(folder))
    config = settings(folder)
    store = cache_store(config)
    index = read_index(store)
    stage = ImagePass(config, tuple(features_products(config, index)))
    specs = {output.name: output.spec for output in stage.outputs}
    shards: list[Shard] = split_rows(index.num_rows, SHARD_ROWS)
    wanted = {shard.index: frozenset(specs) for shard in shards}
    done, early, began = 0, 0.0, time.perf_counter()
    for commits in LocalExecutor().map(lambda: stage.open(wanted), shards):
        for commit in commits:
            store.delete(specs[commit.output].shard_key(commit.index))
        done += commits[0].rows
        if done >= 1000 and not early:
            early = peak_mib()
    return {
        "peak_MiB": round(peak_mib(), 1),
        "peak_MiB_after_1000_rows": round(early or peak_mib(), 1),
        "images_per_s": round(done / (time.perf_counter() - began)),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
