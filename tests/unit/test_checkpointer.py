"""Checkpoints beside training: the bytes of a plain save, whatever training does meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import StageError
from repa_pipeline.training import checkpointer as module
from repa_pipeline.training.checkpoint import (
    checkpoint_path,
    complete_steps,
    load_checkpoint,
    save_checkpoint,
)
from repa_pipeline.training.checkpointer import Checkpointer, load_newest
from repa_pipeline.training.runs import Run, open_run
from repa_pipeline.training.snapshot import Snapshots


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(workspace=str(folder), **changes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(config_of(tmp_path), "r", {"rows": "abc"})


class Training:
    """A small model with tied weights under AdamW, its state as the trainer saves it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"a": nn.Linear(40, 30), "b": nn.Linear(40, 30)})
        self.model.get_submodule("b").weight = self.model.get_submodule("a").weight
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.flat = torch.arange(12.0)

    def step(self) -> None:
        for part in self.model.children():
            part(torch.ones(2, 40)).square().sum().backward()
        self.optimizer.step()
        self.flat.mul_(3)

    def content(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "views": [self.flat[2:5], self.flat[::2], self.flat.view(3, 4).t()],
            "half": self.flat.bfloat16(),
            "empty": torch.zeros(0),
            "plain": {"sums": [1, 2.5], "name": "x", "none": None, "pair": (1, "y")},
        }


def assert_equal(got: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(got[key], value)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert_equal(ours, theirs)
    else:
        assert got == expected


class Gate:
    """Holds every write until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        patch.setattr(module, "save_checkpoint", self._save)

    def _save(self, *arguments: Any) -> Path:
        self.entered.set()
        assert self.opened.wait(60)
        return save_checkpoint(*arguments)


def test_the_file_is_that_of_a_plain_save(run: Run, tmp_path: Path) -> None:
    training = Training()
    training.step()
    plain = save_checkpoint(tmp_path / "plain", 5, training.content())
    with Checkpointer(run, config_of(tmp_path)) as saver:
        saver.save(5, training.content())
    ours = checkpoint_path(run.checkpoints, 5)
    assert ours.read_bytes() == plain.read_bytes()
    assert ours.with_suffix(".json").read_bytes() == plain.with_suffix(".json").read_bytes()
    loaded = load_checkpoint(ours)["model"]
    assert loaded["a.weight"].data_ptr() == loaded["b.weight"].data_ptr()


def test_training_goes_on_while_it_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, training = Gate(monkeypatch), Training()
    training.step()
    content = training.content()
    plain = save_checkpoint(tmp_path / "plain", 1, content)
    with Checkpointer(run, config_of(tmp_path)) as saver:
        saver.save(1, content)
        assert gate.entered.wait(60)
        for _ in range(3):  # the very tensors and dicts that were given
            training.step()
        content["plain"]["sums"][0] = 9
        content["optimizer"]["param_groups"][0]["lr"] = 9.0
        assert saver.completed(1) is None
        gate.opened.set()
        saver.wait()
        assert saver.completed(1) == checkpoint_path(run.checkpoints, 1)
    assert checkpoint_path(run.checkpoints, 1).read_bytes() == plain.read_bytes()
    assert not torch.equal(
        load_checkpoint(plain)["model"]["a.weight"], training.model.state_dict()["a.weight"]
    )


def test_a_save_waits_for_the_one_before(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a snapshot is used again, so the next one must not begin too early."""
    gate, training, expected = Gate(monkeypatch), Training(), {}
    opener = threading.Timer(0.2, gate.opened.set)
    opener.start()
    with Checkpointer(run, config_of(tmp_path, keep=9)) as saver:
        for step in range(1, 5):
            training.step()
            path = save_checkpoint(tmp_path / "plain", step, training.content())
            expected[step] = path.read_bytes()
            saver.save(step, training.content())
        assert saver.wait_s > 0.05
    opener.join()
    for step, data in expected.items():
        assert checkpoint_path(run.checkpoints, step).read_bytes() == data


def test_the_memory_of_snapshots_is_used_again() -> None:
    snapshots, training = Snapshots(), Training()
    training.step()
    first = snapshots.take(training.content())["model"]["a.weight"].data_ptr()
    held = snapshots.num_bytes
    training.step()
    second = snapshots.take(training.content())
    assert second["model"]["a.weight"].data_ptr() == first and snapshots.num_bytes == held
    assert_equal(second["views"][2], training.flat.view(3, 4).t())
    snapshots.close()
    assert snapshots.num_bytes == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_snapshot_of_a_device_is_pinned_and_equal() -> None:
    snapshots = Snapshots()
    content = {"w": torch.randn(1000, 33, device="cuda"), "host": torch.ones(3)}
    expected = content["w"].cpu()
    frozen = snapshots.take(content)
    content["w"].zero_()
    assert frozen["w"].device.type == "cpu" and torch.equal(frozen["w"], expected)
    assert snapshots._is_pinned and torch.equal(frozen["host"], torch.ones(3))
    snapshots.close()


def test_what_the_policy_keeps(run: Run, tmp_path: Path) -> None:
    in_use: set[int] = {2}
    config = config_of(tmp_path, keep=2, keep_every=5)
    with Checkpointer(run, config, lambda: in_use) as saver:
        for step in range(1, 13):
            saver.save(step, {"n": step})
        saver.wait()
        assert complete_steps(run.checkpoints) == [2, 5, 10, 11, 12]
        in_use.clear()
        saver.save(13, {"n": 13})
    assert complete_steps(run.checkpoints) == [5, 10, 12, 13]
    assert [path.suffix for path in sorted(run.checkpoints.iterdir())] == [".json", ".pt"] * 4


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_ones(
    run: Run, tmp_path: Path
) -> None:
    config = config_of(tmp_path, keep=1)
    for step in (10, 20):
        save_checkpoint(run.checkpoints, step, {"n": step})
    checkpoint_path(run.checkpoints, 20).write_bytes(b"torn")
    content, (fault,) = load_newest(run, config)
    assert content is not None and content["n"] == 10 and "is torn" in fault
    with Checkpointer(run, config) as saver:
        saver.save(12, {"n": 12})
    assert complete_steps(run.checkpoints) == [12]
    content, faults = load_newest(run, config)
    assert content is not None and (content["n"], faults) == (12, [])


def fail(*_: Any, **__: Any) -> None:
    raise StageError("cannot write checkpoint: the disk is full")


@pytest.mark.parametrize("when", ["save", "check", "wait", "exit"])
def test_an_error_of_a_write_is_told(
    when: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageError, match="the disk is full"):
        with Checkpointer(run, config_of(tmp_path)) as saver:
            saver.save(1, {"n": 1})
            saver.wait()
            monkeypatch.setattr(module, "save_checkpoint", fail)
            saver.save(2, {"n": 2})
            if when == "check":
                assert saver._writer._thread is not None
                saver._writer._thread.join()
            if when != "exit":
                {"save": lambda: saver.save(3, {"n": 3}), "check": saver.check, "wait": saver.wait}[
                    when
                ]()
                raise AssertionError("it was not told")
    assert complete_steps(run.checkpoints) == [1]


def test_a_thread_that_is_just_being_started_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's thread starts the sender's while training asks how that one is."""
    background = module._Background("mirror")

    class Slow(threading.Thread):
        def start(self) -> None:
            background.check()
            background.join()
            super().start()

    monkeypatch.setattr(module.threading, "Thread", Slow)
    for _ in range(2):
        background.start(fail)
        with pytest.raises(StageError, match="the disk is full"):
            background.join()
        background.check()  # told once


def test_the_error_that_ends_a_run_is_not_hidden(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ZeroDivisionError):
        with Checkpointer(run, config_of(tmp_path)) as saver:
            saver.save(1, {"n": 1})
            raise ZeroDivisionError
    assert complete_steps(run.checkpoints) == [1]  # it was waited for
    monkeypatch.setattr(module, "save_checkpoint", fail)
    with pytest.raises(ZeroDivisionError):
        with Checkpointer(run, config_of(tmp_path)) as saver:
            saver.save(2, {"n": 2})
            raise ZeroDivisionError
    assert capsys.readouterr().err == "also: cannot write checkpoint: the disk is full\n"


def test_a_bug_in_the_thread_keeps_its_own_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(module, "save_checkpoint", broken)
    saver = Checkpointer(run, config_of(tmp_path))
    saver.save(1, {"n": 1})
    with pytest.raises(TypeError, match="ours"):
        saver.wait()


# Real faults, in processes of their own.

CHILD = """
import itertools, resource, sys, torch
from pathlib import Path
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import RepaError
from repa_pipeline.training.checkpointer import Checkpointer
from repa_pipeline.training.runs import Run

def content(step):
    return {"w": torch.full((2**18,), float(step)), "n": step}

folder, what = sys.argv[1:]
run = Run(Path(folder) / "runs/r")
with Checkpointer(run, TrainConfig(workspace=folder, keep=3)) as saver:
    try:
        for step in itertools.count(1):
            saver.save(step, content(step))
            if what == "full" and step == 3:
                saver.wait()
                # A file that grows beyond this is refused by the system, as on a full disk.
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))
    except RepaError as error:
        print(step, error)
        raise SystemExit(2)
"""


def start(tmp_path: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(tmp_path), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_disk_that_takes_no_more(run: Run, tmp_path: Path) -> None:
    child = start(tmp_path, "full")
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 2
    assert said.startswith("5 cannot write checkpoint ") and "step-00000004.pt" in said
    assert "File too large" in said and "free some space and run the same command again" in said
    assert complete_steps(run.checkpoints) == [1, 2, 3]
    assert not list(run.checkpoints.glob("*.tmp"))
    content, faults = load_newest(run, config_of(tmp_path))
    assert content is not None and (content["n"], faults) == (3, [])
    assert torch.equal(content["w"], torch.full((2**18,), 3.0))


@pytest.fixture
def writing(run: Run, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A child that is stopped in the middle of a write, with complete checkpoints behind it."""
    child = start(tmp_path, "write")
    try:
        end = time.monotonic() + 120
        while True:
            assert child.poll() is None and time.monotonic() < end
            if len(complete_steps(run.checkpoints)) >= 2:
                os.kill(child.pid, signal.SIGSTOP)
                os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
                if list(run.checkpoints.glob("*.tmp")):
                    break
                os.kill(child.pid, signal.SIGCONT)
            time.sleep(0.001)
        yield child
    finally:
        child.kill()
        child.communicate()


def test_killed_while_the_thread_writes(
    run: Run, tmp_path: Path, writing: subprocess.Popen[str]
) -> None:
    (torn,) = run.checkpoints.glob("*.tmp")
    writing.kill()
    writing.wait()
    newest = run.last_step()
    assert torn.exists() and torn.name.startswith(f"step-{newest + 1:08d}")
    content, faults = load_newest(run, config_of(tmp_path))
    assert content is not None and (content["n"], faults) == (newest, [])
    assert torch.equal(content["w"], torch.full((2**18,), float(newest)))
    with Checkpointer(run, config_of(tmp_path)) as saver:
        saver.save(newest + 1, {"n": newest + 1})
    assert not torn.exists() and run.last_step() == newest + 1
    assert json.loads(checkpoint_path(run.checkpoints, newest + 1).with_suffix(".json").read_text())
