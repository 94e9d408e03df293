"""Commands killed at seeded moments and run again leave the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.data.array import open_sealed
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights

NUM_IMAGES, SHARD_ROWS, NUM_SHARDS = 1200, 16, 75
TIMEOUT_S = 120

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder
AUTOENCODERS = [tiny_autoencoder()]
ENCODERS = [tiny_encoder(patch_size=8)]
"""
PROJECT = f"""
source = "images"
workspace = "work"
plugins = ["tiny_parts"]
device = "cpu"
resolution = 32
batch_size = 4
shard_rows = {SHARD_ROWS}

[encode-latents]
autoencoder = "tiny-kl"
[cache-features]
encoder = "tiny-teacher"

[autoencoders.tiny-kl]
weights = "kl.safetensors"
[encoders.tiny-teacher]
weights = "teacher.safetensors"
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("source")
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / "ab"[number % 2] / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(path, compress_level=0)
    return folder


def make_project(folder: Path, images: Path) -> Path:
    """A folder as a user has it: repa.toml, a plugin module, weight files, images."""
    folder.mkdir()
    (folder / "images").symlink_to(images)
    (folder / "repa.toml").write_text(PROJECT)
    (folder / "tiny_parts.py").write_text(PLUGIN)
    write_weights(tiny_autoencoder(weights=str(folder / "kl.safetensors")))
    write_weights(tiny_encoder(weights=str(folder / "teacher.safetensors"), patch_size=8))
    return folder


def start(folder: Path, command: str) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("REPA_")}
    environment |= {"OMP_NUM_THREADS": "1"}
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "repa_pipeline", command],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )


def run(folder: Path, command: str) -> None:
    code = start(folder, command).wait(TIMEOUT_S)
    assert code == 0, (folder / "output.txt").read_text()


def kill_after(folder: Path, command: str, ledger: str, count: int, delay_s: float) -> None:
    """Kills `command` a moment after `count` entries stand in `ledger`; it must not be done."""
    process = start(folder, command)
    deadline = time.monotonic() + TIMEOUT_S
    while len(list((folder / "work/cache" / ledger).glob("*.json"))) < count:
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL, (folder / "output.txt").read_text()


def cache_files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted((folder / "work/cache").rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.slow
def test_killed_commands_give_the_bytes_of_an_undisturbed_run(images: Path, tmp_path: Path) -> None:
    seeded = random.Random(7)
    calm = make_project(tmp_path / "calm", images)
    undisturbed = start(calm, "encode-latents")  # beside the others, on a core of its own
    killed = make_project(tmp_path / "killed", images)
    latents, features = "ledger/latents.tiny-kl.32", "ledger/features.tiny-teacher.32"
    first, second = sorted(seeded.sample(range(1, NUM_SHARDS // 2), 2))
    kill_after(killed, "encode-latents", "index.parts", 1, 0)
    assert not (killed / "work/cache/manifest.json").exists()
    kill_after(killed, "encode-latents", latents, second, seeded.random() * 0.02)
    assert not (killed / "work/cache/latents.tiny-kl.32/seal.json").exists()
    assert undisturbed.wait(TIMEOUT_S) == 0, (calm / "output.txt").read_text()
    undisturbed = start(calm, "cache-features")
    run(killed, "encode-latents")
    for count in (first, second):
        kill_after(killed, "cache-features", features, count, seeded.random() * 0.02)
        assert not (killed / "work/cache/features.tiny-teacher.32/seal.json").exists()
    run(killed, "cache-features")
    assert undisturbed.wait(TIMEOUT_S) == 0, (calm / "output.txt").read_text()

    expected, got = cache_files(calm), cache_files(killed)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []
    arrays = ("latents.tiny-kl.32", "features.tiny-teacher.32", "features.tiny-teacher.32.scale")
    assert len([name for name in expected if "/c/" in name]) == len(arrays) * NUM_SHARDS
    for name in arrays:
        array = open_sealed(LocalStore(str(killed / "work/cache")), name, "x")
        for shard in range(NUM_SHARDS):
            assert len(array.read_shard(shard, array.new_buffer())) == SHARD_ROWS
    told = (killed / "output.txt").read_text()
    assert told.count("nothing to do") == 0 and told.count(", sealed") == len(arrays)
