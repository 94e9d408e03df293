"""A run that is watched: scores on the way in processes of their own, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from repa_pipeline.cli import main
from repa_pipeline.metrics.networks import load_network
from repa_pipeline.observe import read_events
from repa_pipeline.testing.caches import isolated_tables, write_toy_cache
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [tiny_autoencoder(weights="tiny.safetensors")]
"""
PROJECT = """
workspace = "."
preset = "imagenet"
device = "cpu"
threads = 1
plugins = ["watched_parts"]
[models."SiT-XS/2"]
depth = 3
width = 64
num_heads = 2
[train]
model = "SiT-XS/2"
steps = 6
batch_size = 8
log_every = 4
checkpoint_every = 6
evaluate_every = 6
evaluate_count = 10
projector_width = 16
[evaluate]
network = "digits-cnn"
reference = "reference.npz"
"""


def write_reference(path: Path) -> None:
    """Statistics of 70 random images of 64 pixels."""
    import torch

    images = np.random.default_rng(0).integers(0, 255, (70, 64, 64, 3), np.uint8)
    network = load_network("digits-cnn", weights=None, device="cpu")
    pool = network.features(torch.from_numpy(images).permute(0, 3, 1, 2)).pool.double().numpy()
    np.savez(path, arr_0=images, mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))


def test_scores_come_from_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy_cache(tmp_path)
    (tmp_path / "watched_parts.py").write_text(PLUGIN)
    (tmp_path / "repa.toml").write_text(PROJECT)
    write_weights(tiny_autoencoder(weights=str(tmp_path / "tiny.safetensors")))
    write_reference(tmp_path / "reference.npz")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "repa_pipeline", "train", "one"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    run = tmp_path / "runs" / "one"
    events = [e for e in read_events(run / "events.jsonl") if e["event"] != "scalars"]
    (event,) = events
    assert (event["event"], event["step"]) == ("evaluation", 6)
    result = json.loads((tmp_path / event["path"]).with_name("result.json").read_text())
    assert event["eval/frechet_distance"] == result["metrics"]["frechet_distance"]
    assert (event["network"], event["num_samples"]) == ("digits-cnn", 10)
    assert result["sample_settings"]["step"] == 6

    monkeypatch.chdir(tmp_path)
    with isolated_tables(tmp_path), pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Scores on the way" in page
    assert "10 samples, network digits-cnn, against reference.npz" in page
