"""The trainer needs none of the big libraries: not timm, diffusers, ray or zarr."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from repa_pipeline.observe import read_events
from repa_pipeline.testing.caches import ToyLatents, write_toy_cache
from repa_pipeline.training.checkpoint import complete_steps

BLOCKER = '''
"""Loaded by the interpreter at its start: these packages are not installed, as it were."""
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"timm", "diffusers", "ray", "zarr"}:
            raise ModuleNotFoundError(f"No module named '{name}' (blocked)", name=name)


sys.meta_path.insert(0, Blocked())
'''

PROJECT = """
workspace = "."
preset = "imagenet"
device = "cpu"
threads = 1
[models."SiT-XS/2"]
depth = 3
width = 64
num_heads = 2
[autoencoders.taesd]
weights = "taesd.safetensors"
[train]
model = "SiT-XS/2"
steps = 4
batch_size = 8
log_every = 1
preview_every = 4
preview_count = 2
projector_width = 16
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(tmp_path / "blocked"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.parametrize("package", ["timm", "diffusers", "ray", "zarr"])
def test_the_blocker_blocks(package: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", f"import {package}"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 1 and "(blocked)" in found.stderr


def test_training_completes_without_them(tmp_path: Path, environment: dict[str, str]) -> None:
    write_toy_cache(tmp_path, latents=ToyLatents("taesd"))
    (tmp_path / "repa.toml").write_text(PROJECT)
    (tmp_path / "taesd.safetensors").write_bytes(b"never read")
    command = [sys.executable, "-m", "repa_pipeline", "train", "one"]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "run: runs/one at step 4" in found.stdout
    assert "next: repa sample" in found.stdout
    assert complete_steps(tmp_path / "runs" / "one" / "checkpoints") == [4]

    # The preview's own process needs diffusers to decode: one clear event, and no failure.
    events = read_events(tmp_path / "runs" / "one" / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "scalars"] == [1, 2, 3, 4]
    (skipped,) = [e for e in events if e["event"] != "scalars"]
    assert (skipped["event"], skipped["step"]) == ("preview_skipped", 4)
    assert "diffusers" in skipped["reason"] and "\n" not in skipped["reason"]
    assert "preview of step 4 skipped: " in found.stderr
