"""The five commands of the README, typed as they stand there, in a folder with a repa.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from repa_pipeline.cli import main
from repa_pipeline.data.array import open_sealed
from repa_pipeline.data.objects import open_store
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [tiny_autoencoder(weights="weights/tiny.safetensors")]
"""

PROJECT = """
source = "images"
workspace = "work"
resolution = 64
autoencoder = "tiny-kl"
plugins = ["my_parts"]
device = "cpu"
threads = 1
[encoders.dinov2-b]
weights = "weights/dinov2_b.safetensors"
[encode-latents]
batch_size = 8
[cache-features]
batch_size = 8
[train]
model = "SiT-XS/2"
steps = 4
batch_size = 8
log_every = 2
[sample]
num_images = 8
num_steps = 4
batch_size = 8
[evaluate]
allow_few = true
"""

COMMANDS = (
    "repa encode-latents",
    "repa cache-features --encoder dinov2-b",
    "repa train",
    "repa sample --cfg 1.8 --interval 0,0.7",
    "repa evaluate",
)


def write_images(folder: Path, count: int = 24) -> None:
    """Images of odd sizes in two class folders."""
    generator = np.random.default_rng(0)
    for i in range(count):
        size = tuple(generator.integers(64, 100, 2))
        corners = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        path = folder / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR).save(path)


def write_dinov2(path: Path) -> None:
    """Random weights in timm's names and the published shapes, in float16."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch14_dinov2", num_classes=0)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in vit.state_dict().items():
        if "norm" in name or ".ls" in name:
            state[name] = torch.full(value.shape, 0.0 if name.endswith("bias") else 1.0).half()
        else:
            state[name] = (torch.randn(value.shape, generator=generator) * 0.03).half()
    assert sum(value.numel() for value in state.values()) > 85e6
    save_file(state, path)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_images(tmp_path / "images")
    (tmp_path / "weights").mkdir()
    write_dinov2(tmp_path / "weights" / "dinov2_b.safetensors")
    write_weights(tiny_autoencoder(weights=str(tmp_path / "weights" / "tiny.safetensors")))
    (tmp_path / "my_parts.py").write_text(PLUGIN)
    (tmp_path / "repa.toml").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with isolated_tables():
        yield tmp_path
    (tmp_path / "weights" / "dinov2_b.safetensors").unlink()


def test_the_five_commands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: dict[str, str] = {}
    for line in COMMANDS:
        program, *arguments = line.split()
        assert program == "repa"
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        out, err = capsys.readouterr()
        assert caught.value.code == 0, (line, err)
        assert "Traceback" not in err
        said[arguments[0]] = out

    latents, features = said["encode-latents"], said["cache-features"]
    assert "24 images in 2 classes, 0 excluded" in latents
    assert "output: ./work/cache/latents.tiny-kl.64\nnext: repa cache-features\n" in latents
    assert "output: ./work/cache/features.dinov2-b.64\nnext: repa train\n" in features
    name = "sit-xs-2.dinov2-b"
    assert f"train {name}: SiT-XS/2 aligned with dinov2-b, 4 steps of 8 images" in said["train"]
    assert f"run: work/runs/{name} at step 4 (loss " in said["train"]
    assert said["train"].endswith(f"next: repa sample --run {name} --cfg 1.8 --interval 0,0.7\n")
    assert "8 images, sde 4 steps, cfg 1.8 on t in [0, 0.7]" in said["sample"]
    made, last = said["sample"].splitlines()[-3], said["sample"].splitlines()[-1]
    assert made.endswith("/samples.npz")
    folder = made.removeprefix("made: ").removesuffix("/samples.npz")
    assert last == f"next: repa evaluate --samples {folder}"
    assert said["evaluate"].startswith("frechet_distance ")
    assert "network encoder:dinov2-b, against the training source" in said["evaluate"]
    assert said["evaluate"].endswith("/result.json; next: repa report\n")
    check_outputs(project / "work")


def check_outputs(workspace: Path) -> None:
    store = open_store(str(workspace / "cache"))
    array = open_sealed(store, "features.dinov2-b.64", "cache-features")
    manifest: Any = array.spec.manifest
    assert (manifest["grid"], manifest["width"]) == ([4, 4], 768)
    assert len(list((workspace / "runs").iterdir())) == 1
    (result,) = workspace.glob("runs/*/samples/*/result.json")
    with np.load(result.with_name("samples.npz"), allow_pickle=False) as stored:
        assert stored["arr_0"].shape == (8, 64, 64, 3)


def test_a_teacher_without_weights_names_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "repa.toml").write_text('source = "images"\n')
    write_images(tmp_path / "images", count=2)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "repa_pipeline", "cache-features", "--encoder", "dinov2-b"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    (line,) = found.stderr.splitlines()
    assert line.startswith("repa: no weights for encoder 'dinov2-b': ")
    for way_out in (
        "`--weights PATH`",
        '`[encoders.dinov2-b] weights = "PATH"` in repa.toml',
        "a network that reaches the hub repository timm/vit_base_patch14_dinov2.lvd142m",
    ):
        assert way_out in line
