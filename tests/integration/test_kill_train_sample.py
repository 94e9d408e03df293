"""SIGKILL `repa train` and `repa sample` at seeded moments: a rerun ends where none would have."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from repa_pipeline.cli import main
from repa_pipeline.observe import read_events
from repa_pipeline.testing.caches import isolated_tables, write_toy_cache
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights
from repa_pipeline.training.checkpoint import checkpoint_path, complete_steps, load_checkpoint

STEPS, LOG_EVERY, CHECKPOINT_EVERY = 42, 4, 6
TIMING = ("images_per_s", "data_wait", "bytes_per_s", "rss_bytes")
TIMEOUT_S = 300

# What every child needs, imported once by the process that they are forked from.
PRELOADED = [
    "repa_pipeline.stages.sample",
    "repa_pipeline.stages.train",
    "torch._dynamo",
    "torch.utils.tensorboard",
]

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [tiny_autoencoder(weights="tiny.safetensors")]
"""

PROJECT = f"""
workspace = "."
preset = "imagenet"
plugins = ["kill_parts"]
device = "cpu"
threads = 1
[models."SiT-XS/2"]
depth = 3
width = 64
num_heads = 2
[train]
model = "SiT-XS/2"
steps = {STEPS}
batch_size = 8
log_every = {LOG_EVERY}
checkpoint_every = {CHECKPOINT_EVERY}
keep = 1000
learning_rate = 1e-3
projector_width = 16
[sample]
run = "whole"
num_images = 24
num_steps = 25
batch_size = 4
shard_rows = 4
cfg = 1.8
grid = 8
outputs = ["npz", "png", "latents"]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy cache with an undisturbed run and undisturbed samples, made in this process."""
    folder = tmp_path_factory.mktemp("kill")
    write_toy_cache(folder)
    write_weights(tiny_autoencoder(weights=str(folder / "tiny.safetensors")))
    (folder / "kill_parts.py").write_text(PLUGIN)
    (folder / "repa.toml").write_text(PROJECT)
    with isolated_tables(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in ("train whole", "sample --output samples/whole"):
            with pytest.raises(SystemExit) as caught:
                main(line.split())
            assert caught.value.code == 0
        yield folder


def start(line: str) -> ForkServerProcess:
    """The command in a process of its own, started in the current folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=main, args=(line.split(),))
    process.start()
    return process


def finish(line: str) -> None:
    process = start(line)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0


def kill_when(line: str, is_time: Callable[[], bool]) -> None:
    """Starts a command, and SIGKILLs it as soon as `is_time()`."""
    process = start(line)
    end = time.monotonic() + TIMEOUT_S
    try:
        while not is_time():
            assert process.is_alive(), "it ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        process.kill()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL


def last_event_step(run: Path) -> int:
    path = run / "events.jsonl"
    events = read_events(path) if path.exists() else []
    return int(events[-1]["step"]) if events else 0


def curve(run: Path) -> list[dict[str, Any]]:
    events = read_events(run / "events.jsonl")
    return [{k: v for k, v in event.items() if k not in TIMING} for event in events]


def test_a_killed_training_run(project: Path) -> None:
    run, undisturbed = project / "runs" / "killed", project / "runs" / "whole"
    moments = random.Random(0)
    for low, high in ((8, 13), (18, 26)):
        step = moments.randint(low, high)
        kill_when("train killed", lambda step=step: last_event_step(run) >= step)
        left = complete_steps(run / "checkpoints")
        assert left and left[-1] < STEPS and left[-1] % CHECKPOINT_EVERY == 0
    finish("train killed")

    assert curve(run) == curve(undisturbed)
    assert [event["step"] for event in curve(run)] == [*range(LOG_EVERY, STEPS, LOG_EVERY), STEPS]
    steps = complete_steps(undisturbed / "checkpoints")
    assert complete_steps(run / "checkpoints") == steps and len(steps) == 7
    for step in steps:
        ours, theirs = (
            load_checkpoint(checkpoint_path(r / "checkpoints", step)) for r in (run, undisturbed)
        )
        moments_of = [content["optimizer"]["state"] for content in (ours, theirs)]
        for got, expected in (
            *((ours[part], theirs[part]) for part in ("model", "ema")),
            *((moments_of[0][i], moment) for i, moment in moments_of[1].items()),
        ):
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], value) for name, value in expected.items()), step


def test_killed_sampling(project: Path) -> None:
    folder, undisturbed = project / "samples" / "killed", project / "samples" / "whole"
    moments = random.Random(1)

    def num_done() -> int:
        ledger = folder / "ledger" / "images"
        return len(list(ledger.glob("*.json"))) if ledger.is_dir() else 0

    for low, high in ((1, 1), (3, 4)):
        shards = moments.randint(low, high)
        kill_when("sample --output samples/killed", lambda n=shards: num_done() >= n)
        assert shards <= num_done() < 6
        assert not (folder / "images" / "seal.json").exists()
    finish("sample --output samples/killed")

    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        p.relative_to(undisturbed) for p in undisturbed.rglob("*") if p.is_file()
    )
    assert {"samples.npz", "grid.png", "000005.tar"} <= {path.name for path in files}
    for path in files:
        assert (folder / path).read_bytes() == (undisturbed / path).read_bytes(), path
