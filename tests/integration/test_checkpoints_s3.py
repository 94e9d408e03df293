"""Checkpoints on a real S3 server: it goes away and comes back, and an upload is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import StageError, StoreError
from repa_pipeline.observe import JsonLines, RunLog, read_events
from repa_pipeline.testing.faults import FaultProxy, Rule, Script, slow_down, throttle
from repa_pipeline.testing.swift import SwiftServer
from repa_pipeline.training import mirror as mirror_module
from repa_pipeline.training.checkpoint import checkpoint_path, complete_steps, save_checkpoint
from repa_pipeline.training.checkpointer import Checkpointer, load_newest
from repa_pipeline.training.mirror import mirror_of
from repa_pipeline.training.runs import Run, open_run

pytestmark = pytest.mark.slow

NUM_VALUES = 2**20  # 4 MiB a checkpoint
QUICK = {"ATTEMPTS": "4", "FIRST_DELAY_SECONDS": "0.01", "LONGEST_DELAY_SECONDS": "0.1"}


@pytest.fixture(autouse=True)
def quick_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setenv(f"REPA_STORE_{name}", value)
    monkeypatch.setattr(mirror_module, "PART_BYTES", 2**20)


def content(step: int) -> dict[str, Any]:
    return {"w": torch.full((NUM_VALUES,), float(step)), "n": step}


def machine(bucket: str, folder: Path, **changes: Any) -> tuple[Run, TrainConfig]:
    """A machine with an empty disk: the workspace is remote, runs lie in a local folder."""
    config = TrainConfig(workspace=f"{bucket}/ws", runs_dir=str(folder), **changes)
    return open_run(config, "r", {"rows": "abc"}), config


def test_a_new_machine_goes_on(bucket: str, s3: SwiftServer, tmp_path: Path) -> None:
    run, config = machine(bucket, tmp_path / "a")
    assert load_newest(run, config) == (None, [])
    log = RunLog([JsonLines(run.folder, 0)])
    with Checkpointer(run, config, log=log) as saver:
        for step in (10, 20, 30):
            log.event(step, "x")
            saver.save(step, content(step))
    keys = s3.objects(bucket.removeprefix("s3://"), "ws/runs/r/")
    assert sorted(key for key in keys if not key.endswith(".part")) == [
        *(f"ws/runs/r/checkpoints/step-{step:08d}.json" for step in (20, 30)),
        "ws/runs/r/events.jsonl",
        "ws/runs/r/run.json",
        "ws/runs/r/trainer.json",
    ]
    sizes = [size for key, size in sorted(keys.items()) if "step-00000030." in key][:-1]
    assert len(sizes) == 5 and set(sizes[:4]) == {2**20}
    assert sum(sizes) == checkpoint_path(run.checkpoints, 30).stat().st_size
    other, there = machine(bucket, tmp_path / "b")
    loaded, faults = load_newest(other, there)
    assert loaded is not None and (loaded["n"], faults) == (30, [])
    assert torch.equal(loaded["w"], content(30)["w"])
    assert [event["step"] for event in read_events(other.folder / "events.jsonl")] == [10, 20, 30]


def test_the_store_goes_away_and_comes_back(
    bucket: str, s3: SwiftServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = machine(bucket, tmp_path / "a")
    log = RunLog([JsonLines(run.folder, 0)])
    mirror = mirror_of(run, config)
    assert mirror is not None
    with Checkpointer(run, config, log=log) as saver:
        saver.save(10, content(10))
        saver.wait()
        s3.stop()
        try:
            saver.save(20, content(20))  # training goes on
            saver.wait_for_mirror()
            saver.check()
            with pytest.raises(StoreError, match="tried 4 times"):  # it may know of later steps
                load_newest(*machine(bucket, tmp_path / "b"))
        finally:
            s3.start()
        assert mirror.steps() == [10]
        saver.save(30, content(30))
    assert mirror.steps() == [20, 30]
    events = read_events(run.folder / "events.jsonl")
    assert [(e["event"], e["step"]) for e in events] == [("mirror_failed", 20)]
    assert "tried 4 times" in events[0]["reason"]
    assert "checkpoint 20 is not at the mirror" in capsys.readouterr().err


def test_a_store_that_stays_away_is_an_error_at_the_end(
    bucket: str, s3: SwiftServer, tmp_path: Path
) -> None:
    run, config = machine(bucket, tmp_path / "a")
    try:
        with pytest.raises(StageError, match="lacks the last checkpoint of run 'r', step 20"):
            with Checkpointer(run, config) as saver:
                saver.save(10, content(10))
                saver.wait()
                s3.stop()
                saver.save(20, content(20))
    finally:
        s3.start()
    assert complete_steps(run.checkpoints) == [10, 20]
    with Checkpointer(run, config):  # the same command again
        pass
    loaded, _ = load_newest(*machine(bucket, tmp_path / "b"))
    assert loaded is not None and loaded["n"] == 20


def test_short_absences_pass_unseen(
    bucket: str, s3: SwiftServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        run, config = machine(bucket, tmp_path / "a")
        proxy.script = Script(Rule(slow_down(), method="PUT", path=".part", times=3))
        with Checkpointer(run, config) as saver:
            saver.save(10, content(10))
        assert proxy.faults()["503 SlowDown"] == 3
        proxy.script = Script(Rule(slow_down(), method="GET", path=".part", times=3))
        loaded, faults = load_newest(*machine(bucket, tmp_path / "b"))
        assert loaded is not None and (loaded["n"], faults) == (10, [])


SENDER = """
import sys
from pathlib import Path
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.training import mirror
from repa_pipeline.training.runs import Run
mirror.PART_BYTES = 2**20
run = Run(Path(sys.argv[2]) / "r")
mirror.mirror_of(run, TrainConfig(workspace=sys.argv[1])).sync(2, 0)
"""


def test_a_killed_upload_shows_nothing(
    bucket: str, s3: SwiftServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = machine(bucket, tmp_path / "a")
    with Checkpointer(run, config) as saver:
        saver.save(10, content(10))
    save_checkpoint(run.checkpoints, 20, content(20))
    name = bucket.removeprefix("s3://")
    with FaultProxy(s3.endpoint) as proxy:
        slowly = Rule(throttle(200_000), method="PUT", path="0003.part", times=None)
        proxy.script = Script(slowly)
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            command = [sys.executable, "-c", SENDER, f"{bucket}/ws", str(tmp_path / "a")]
            with subprocess.Popen(command) as sender:
                while not [e for e in proxy.exchanges if "0003.part" in e.path and e.body_bytes]:
                    assert sender.poll() is None
                    time.sleep(0.01)
                while len(s3.objects(name, "ws/runs/r/checkpoints/step-00000020")) < 3:
                    assert sender.poll() is None
                    time.sleep(0.01)
                sender.send_signal(signal.SIGKILL)
        assert sender.returncode == -signal.SIGKILL
    sent = s3.objects(name, "ws/runs/r/checkpoints/step-00000020")
    assert 3 <= len(sent) <= 4 and not [key for key in sent if key.endswith(".json")]
    assert s3.multipart_uploads(name) == []
    loaded, faults = load_newest(*machine(bucket, tmp_path / "b"))
    assert loaded is not None and (loaded["n"], faults) == (10, [])
    with Checkpointer(run, config):
        pass
    loaded, _ = load_newest(*machine(bucket, tmp_path / "c"))
    assert loaded is not None and torch.equal(loaded["w"], content(20)["w"])
    assert len(s3.objects(name, "ws/runs/r/checkpoints/step-00000020")) == 6
