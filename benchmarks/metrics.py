"""What the numbers of `repa evaluate` cost: CPU seconds and memory of the mathematics alone.

    python benchmarks/metrics.py [--samples 50000] [--reference 10000] [--images 5000] [--json]

Every part is a process of its own, on random features of the width of Inception's pool (2,048),
float32, with a spectrum that falls as real ones do. `peak_mib` is the most that was resident
(VmHWM), `above_mib` what of it came after the input stood in memory.

    fid               statistics of the samples, the reference's factor (which is kept, for standard
                      errors and more samples) and their distance; cpu_s is of all three
    fid_sqrtm         the same distance by scipy.linalg.sqrtm of the product, as the ADM suite has
                      it; sqrtm_over_ours_cpu = its CPU seconds over those of factor and distance
    precision_recall  --reference against --samples, k = 3, float32
    npz               --images and a fifth of them, of 256 x 256, written in blocks: what the
                      writer holds does not grow with their number
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import command, save

from repa_pipeline.metrics.adm_file import AdmWriter
from repa_pipeline.metrics.frechet import FrechetReference
from repa_pipeline.metrics.precision_recall import precision_recall
from repa_pipeline.metrics.statistics import RunningStatistics

WIDTH, SIDE, BLOCK = 2048, 256, 256
Rows = np.ndarray[Any, np.dtype[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        name, *counts = arguments.part
        print(json.dumps(PARTS[name](*map(int, counts))))
        return
    many, few, images = arguments.samples, arguments.reference, arguments.images
    found = {
        "fid": run("fid", many),
        "fid_sqrtm": run("fid_sqrtm", many),
        "precision_recall": run("precision_recall", few, many),
        "npz": run("npz", images),
        "npz_of_a_fifth": run("npz", images // 5),
    }
    ratios = {
        "sqrtm_over_ours_cpu": found["fid_sqrtm"]["cpu_s"]
        / (found["fid"]["factor_cpu_s"] + found["fid"]["distance_cpu_s"]),
        "npz_peak_of_all_over_a_fifth": found["npz"]["peak_mib"]
        / found["npz_of_a_fifth"]["peak_mib"],
    }
    result = {
        "command": command(),
        "width": WIDTH,
        **{name: {k: round(v, 3) for k, v in part.items()} for name, part in found.items()},
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
    }
    path = save("metrics", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def run(name: str, *counts: int) -> dict[str, float]:
    """A part in a process of its own."""
    command_line = [sys.executable, __file__, "--part", name, *map(str, counts)]
    out = subprocess.run(command_line, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(out)
    print(f"{name} {counts}: {found}", file=sys.stderr)
    return found


def features(count: int, seed: int) -> Rows:
    """[count, WIDTH] rows, non-negative as pooled activations, the spread falling by column."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count, WIDTH), np.float32)
    mixing = generator.standard_normal((WIDTH, WIDTH), np.float32) / np.sqrt(WIDTH)
    rows *= np.linspace(1, 0.05, WIDTH, dtype=np.float32)
    for start in range(0, count, 5_000):
        rows[start : start + 5_000] = np.abs(rows[start : start + 5_000] @ mixing)
    return rows


def fid_part(count: int) -> dict[str, float]:
    reference = statistics_of(features(count, 0))
    with cpu() as factor:
        whole = FrechetReference(*reference)
    rows = features(count, 1)
    before = resident_mib()
    with cpu() as counted:
        ours = RunningStatistics()
        ours.update(rows)
    with cpu() as measured:
        distance = whole.distance(*ours.finalize()).distance
    return {
        "cpu_s": counted[0] + factor[0] + measured[0],
        "statistics_cpu_s": counted[0],
        "distance_cpu_s": measured[0],
        "factor_cpu_s": factor[0],
        "distance": distance,
        **memory(before),
    }


def sqrtm_part(count: int) -> dict[str, float]:
    from scipy.linalg import sqrtm

    mu1, sigma1 = statistics_of(features(count, 0))
    mu2, sigma2 = statistics_of(features(count, 1))
    with cpu() as measured:
        root = sqrtm(sigma1 @ sigma2).real
    traces = np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)
    return {"cpu_s": measured[0], "distance": float(np.square(mu1 - mu2).sum() + traces)}


def precision_recall_part(few: int, many: int) -> dict[str, float]:
    reference, samples = features(few, 0), features(many, 1)
    before = resident_mib()
    with cpu() as measured:
        precision, recall = precision_recall(reference, samples)
    return {"cpu_s": measured[0], "precision": precision, "recall": recall, **memory(before)}


def npz_part(count: int) -> dict[str, float]:
    block = np.zeros((BLOCK, SIDE, SIDE, 3), np.uint8)
    before = resident_mib()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.npz"
        with AdmWriter(path, num_images=count, resolution=SIDE) as writer:
            for start in range(0, count, BLOCK):
                writer.write(block[: min(BLOCK, count - start)])
        size = path.stat().st_size / 2**20
    return {"file_mib": size, **memory(before)}


PARTS = {
    "fid": fid_part,
    "fid_sqrtm": sqrtm_part,
    "precision_recall": precision_recall_part,
    "npz": npz_part,
}


def statistics_of(rows: Rows) -> tuple[Any, Any]:
    statistics = RunningStatistics()
    statistics.update(rows)
    return statistics.finalize()


@contextmanager
def cpu() -> Iterator[list[float]]:
    """A list that holds the CPU seconds of the block, of all threads, once it has ended."""
    found: list[float] = []
    began = time.process_time()
    yield found
    found.append(time.process_time() - began)


def resident_mib() -> float:
    return _status("VmRSS")


def memory(before: float) -> dict[str, float]:
    peak = _status("VmHWM")
    return {"peak_mib": peak, "above_mib": max(0.0, peak - before)}


def _status(field: str) -> float:
    lines: Sequence[str] = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
