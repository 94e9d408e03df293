"""Features are the same bytes whatever dies on the way, and wherever they are made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.cluster.executor import RayExecutor
from repa_pipeline.cluster.placement import Wish
from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.observe import Silent
from repa_pipeline.stages.evaluate import evaluate
from repa_pipeline.testing.samples import noise_images, write_sample_folder

pytestmark = pytest.mark.slow

COUNT, SHARD_ROWS, TIMEOUT_S = 480, 8, 120
NUM_SHARDS = COUNT // SHARD_ROWS
# Files of a forward pass: how many, and by which process.
PLUGIN = """
import os
import time
from repa_pipeline.metrics import digits_cnn
from repa_pipeline.metrics.networks import NetworkSpec


class Marked(digits_cnn.DigitsCNN):
    def forward(self, images):
        with open(os.environ["MARKS"], "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(0.02)
        return super().forward(images)


def load(spec, path):
    digits_cnn.DigitsCNN, original = Marked, digits_cnn.DigitsCNN
    try:
        return digits_cnn.load(spec, path)
    finally:
        digits_cnn.DigitsCNN = original


NETWORKS = [
    NetworkSpec("marked", "marked_network:load", "asset:digits_cnn.safetensors", pool=64,
                spatial=448, logits=10)
]
"""


def write_project(folder: Path) -> None:
    folder.mkdir()
    (folder / "marked_network.py").write_text(PLUGIN)
    images = noise_images(COUNT, seed=1, side=16)
    write_sample_folder(folder / "samples", images, shard_rows=SHARD_ROWS, cfg=1.0)
    reference = noise_images(40, seed=0, side=16)
    generator = np.random.default_rng(0)
    mu, sigma = generator.standard_normal(64), np.eye(64)
    np.savez(folder / "reference.npz", arr_0=reference, mu=mu, sigma=sigma)


def start(folder: Path) -> subprocess.Popen[bytes]:
    line = "evaluate --samples samples --reference reference.npz --network marked --is-split 240"
    line += " --plugins marked_network --allow-few --batch-size 8 --kid-subsets 2 --device cpu"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("REPA_")}
    environment |= {"OMP_NUM_THREADS": "1", "MARKS": str(folder / "marks.txt")}
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "repa_pipeline", *line.split()],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )


def array_files(folder: Path) -> dict[str, bytes]:
    array = folder / "samples" / "judge.marked"
    return {p.name + str(p.parent): p.read_bytes() for p in array.rglob("*") if p.is_file()}


def named(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    return {name.replace(str(folder), ""): data for name, data in files.items()}


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        write_project(folder)
    assert start(calm).wait(TIMEOUT_S) == 0, (calm / "output.txt").read_text()

    for at_least in (3, 20):
        process = start(killed)
        deadline = time.monotonic() + TIMEOUT_S
        ledger = killed / "samples" / "ledger" / "judge.marked"
        while len(list(ledger.glob("*.json"))) < at_least:
            assert process.poll() is None, (killed / "output.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
        assert not (killed / "samples" / "judge.marked" / "seal.json").exists()
        assert not (killed / "samples" / "result.json").exists()
    assert start(killed).wait(TIMEOUT_S) == 0, (killed / "output.txt").read_text()

    assert named(array_files(killed), killed) == named(array_files(calm), calm)
    results = [
        json.loads((folder / "samples" / "result.json").read_text()) for folder in (calm, killed)
    ]
    assert results[0]["metrics"] == results[1]["metrics"]
    # A forward pass a shard of samples, 5 of the reference; at most 3 shards in flight a kill.
    passes = [len((folder / "marks.txt").read_text().splitlines()) for folder in (calm, killed)]
    assert passes[0] == NUM_SHARDS + 5 and passes[0] <= passes[1] <= passes[0] + 2 * 3


def test_ray_workers_make_the_bytes_of_this_process(cluster: Any, tmp_path: Path) -> None:
    metrics, files = [], []
    for name in ("local", "ray"):
        folder = tmp_path / name
        images = noise_images(64, seed=1, side=16)
        write_sample_folder(folder / "samples", images, shard_rows=SHARD_ROWS)
        reference = noise_images(20, seed=0, side=16)
        np.savez(folder / "reference.npz", arr_0=reference, mu=np.zeros(64), sigma=np.eye(64))
        config = EvaluateConfig(
            **{"workspace": str(folder / "ws"), "samples": str(folder / "samples")},
            **{"reference": str(folder / "reference.npz"), "network": "digits-cnn"},
            **{"device": "cpu", "threads": 1, "allow_few": True, "is_split": 32, "blocks": 2},
            kid_subsets=2,
        )
        executor = RayExecutor(Wish("cpu", workers=2, threads=1), shared=str(folder))
        found = evaluate(config, Silent(), executor if name == "ray" else None)
        metrics.append(found["metrics"])
        array = folder / "samples" / "judge.digits-cnn"
        paths = sorted(path for path in array.rglob("*") if path.is_file())
        files.append({str(p.relative_to(array)): p.read_bytes() for p in paths})
    assert files[0] == files[1] and len(files[0]) == 8 + 2
    assert metrics[0] == metrics[1]
