"""The benchmark of the training step runs where the big libraries are not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CASES = ("SiT-XS/2:digits-vit", "SiT-XS/2:mobilenet-v2")
BLOCKER = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"diffusers", "ray", "zarr", "webdataset", "tensorboard"}:
            raise ModuleNotFoundError(f"No module named '{name}' (blocked)", name=name)


sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
def test_the_suite_of_training_steps(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(tmp_path), str(BENCHMARKS.parent)])
    command = [
        sys.executable, str(BENCHMARKS / "train_step.py"), "--suite", "gpu", "--device", "cpu",
        "--cases", ",".join(CASES), "--batch", "2", "--rounds", "1", "--out", str(tmp_path / "out"),
        "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    saved = json.loads((tmp_path / "out/train_gpu.json").read_text())
    assert saved["cases"] == told and list(told) == [case.replace(":", " ") for case in CASES]
    assert "--suite gpu" in saved["command"] and saved["environment"]["versions"]["torch"]
    for case in told.values():
        seconds = {way: values[0] for way, values in case["seconds"].items()}
        for one, other in (("online", "cached"), ("cached", "memory")):
            expected = seconds[one] / seconds[other]
            assert case[f"{one}_over_{other}"] == pytest.approx(expected, rel=0.05)
        # 6 x the multiply-adds of SiT-XS/2 at 256 tokens: 0.27 billion a pass.
        assert case["training_flops_per_image"] == pytest.approx(6 * 0.27e9, rel=0.01)
        for way, rate in case["images_per_s"].items():
            assert rate == pytest.approx(2 / seconds[way], rel=0.05)
    table = (tmp_path / "out/train_step.profile.txt").read_text()
    assert table.startswith("SiT-XS/2, batch 2, 3 cached steps on cpu") and "aten::addmm" in table
