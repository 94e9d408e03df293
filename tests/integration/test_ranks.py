"""Several ranks on one machine: the curve of one process, however many and whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.observe import Silent
from repa_pipeline.settings import as_json
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import TOY_PROJECT, toy_train_config, write_toy_cache
from repa_pipeline.testing.ranks import assert_same_curve, curve, train_arguments, wait_for
from repa_pipeline.training.checkpoint import checkpoint_path, complete_steps, load_checkpoint

pytestmark = pytest.mark.slow

STEPS = 8
TIMEOUT_S = 120

START = """
import sys
from repa_pipeline.training.launch import launch, read_config
config = read_config(sys.argv[1])
raise SystemExit(launch(config, config.ranks))
"""


def settings(workspace: Path, name: str, **changes: Any) -> TrainConfig:
    given = {"steps": STEPS, "log_every": 1, "checkpoint_every": 4, "ema_extra": (0.5,)}
    # Writing for TensorBoard takes longer to import than the toy to train.
    given["tensorboard"] = False
    return toy_train_config(workspace, name=name, **{**given, **changes})


def start(config: TrainConfig) -> subprocess.Popen[str]:
    """`config.ranks` processes, watched by one of their own."""
    path = Path(config.workspace) / f"{config.name}.json"
    path.write_text(json.dumps(as_json(config)))
    command = [sys.executable, "-c", START, str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, errors
    return out + errors


def saved(workspace: Path, name: str, step: int = STEPS) -> dict[str, Any]:
    return load_checkpoint(checkpoint_path(workspace / "runs" / name / "checkpoints", step))


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of the launcher's children."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found.update({int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")})
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and the run of one process that all are compared with."""
    folder = tmp_path_factory.mktemp("ranks")
    write_toy_cache(folder)
    train(plan_training(settings(folder, "one")), Silent())
    return folder


@pytest.mark.parametrize("ranks", [2, 3, 4])  # 3 does not divide the batch of 8
def test_any_number_of_ranks_gives_the_same_curve(workspace: Path, ranks: int) -> None:
    said = finish(start(settings(workspace, f"of-{ranks}", ranks=ranks)))
    assert f"{ranks} ranks" in said and said.count(f"train of-{ranks}: SiT-XS/2") == 1
    assert_same_curve(curve(workspace, f"of-{ranks}"), curve(workspace, "one"))
    ours, theirs = saved(workspace, f"of-{ranks}"), saved(workspace, "one")
    assert ours["reader"] == theirs["reader"] == {"seed": 0, "epoch": 1, "step": 2}
    for part in (ours["ema"], ours["more_emas"]["0.5"], ours["model"]):
        assert part.keys() == theirs["ema"].keys()
    for name, value in theirs["more_emas"]["0.5"].items():
        torch.testing.assert_close(ours["more_emas"]["0.5"][name], value, rtol=0, atol=1e-5)


def test_the_number_of_ranks_may_change_on_the_way(workspace: Path) -> None:
    finish(start(settings(workspace, "changing", ranks=2, steps=3)))
    finish(start(settings(workspace, "changing", ranks=3, steps=5, accumulate=2)))
    train(plan_training(settings(workspace, "changing", micro_batch=3)), Silent())
    assert_same_curve(curve(workspace, "changing"), curve(workspace, "one"))


def test_alignment_ends_and_ranks_go_on(workspace: Path) -> None:
    """Across the switch, and resumed on either side of it; one process beside."""
    ending = {"align_steps": 4, "checkpoint_every": 3}
    train(plan_training(settings(workspace, "ends", **ending)), Silent())
    finish(start(settings(workspace, "ends-of-2", ranks=2, **ending)))
    for stop in (3, 6):
        finish(start(settings(workspace, f"ends-at-{stop}", ranks=2, **{**ending, "steps": stop})))
        finish(start(settings(workspace, f"ends-at-{stop}", ranks=2, **ending)))
    expected = curve(workspace, "ends")
    assert ["alignment" in line for line in expected] == [True] * 4 + [False] * 4
    assert expected[:4] == curve(workspace, "one")[:4]
    whole = curve(workspace, "ends-of-2")
    assert_same_curve(whole, expected)
    for stop in (3, 6):
        assert curve(workspace, f"ends-at-{stop}") == whole  # bit for bit
    before, after = saved(workspace, "ends-of-2", 6), saved(workspace, "ends-of-2")
    for name, value in after["model"].items():
        moved = not torch.equal(value, before["model"][name])
        assert moved == (name.startswith("trunk.") and "pos_embed" not in name), name


@pytest.fixture(scope="module")
def undisturbed(workspace: Path) -> list[dict[str, float]]:
    """The curve of two ranks over 60 steps."""
    finish(start(settings(workspace, "undisturbed", ranks=2, steps=60, checkpoint_every=1000)))
    return curve(workspace, "undisturbed")


def test_a_killed_rank_is_started_again(
    workspace: Path, undisturbed: list[dict[str, float]]
) -> None:
    changes = {"ranks": 2, "steps": 60, "checkpoint_every": 5, "keep": 20}
    process = start(settings(workspace, "killed", **changes))
    folder = workspace / "runs" / "killed" / "checkpoints"
    for number, rank in ((1, 1), (4, 0)):
        wait_for(lambda n=number: len(complete_steps(folder)) >= n)
        os.kill(ranks_of(process)[rank], signal.SIGKILL)
        wait_for(lambda r=rank: len(ranks_of(process)) < 2 or r not in ranks_of(process))
        wait_for(lambda: len(ranks_of(process)) == 2 or process.poll() is not None)
    said = finish(process)
    assert "rank 1 of 2 was killed by signal 9; all start again" in said
    assert curve(workspace, "killed") == undisturbed  # bit for bit


def test_ranks_that_are_always_killed_end_with_an_error(workspace: Path) -> None:
    config = settings(workspace, "dying", ranks=2, steps=100_000, max_failures=0)
    process = start(config)
    wait_for(lambda: complete_steps(workspace / "runs" / "dying" / "checkpoints"))
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert "StageError: rank 1 of 2 was killed by signal 9, and so it went 1 times" in finish(
        process, 1
    )


def test_sigterm_saves_and_the_same_command_goes_on(
    workspace: Path, undisturbed: list[dict[str, float]]
) -> None:
    changes = {"ranks": 2, "steps": 60, "checkpoint_every": 1000}
    process = start(settings(workspace, "preempted", **changes))
    wait_for(lambda: len(curve(workspace, "preempted")) > 3)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM, saved; the same command goes on from here" in finish(process, 143)
    (step,) = complete_steps(workspace / "runs" / "preempted" / "checkpoints")
    assert 3 < step < 60
    finish(start(settings(workspace, "preempted", **changes)))
    assert curve(workspace, "preempted") == undisturbed


def test_sigterm_before_the_first_step_starts_nothing_again(workspace: Path) -> None:
    process = start(settings(workspace, "early", ranks=2, steps=100_000))
    wait_for(lambda: len(ranks_of(process)) == 2)
    process.send_signal(signal.SIGTERM)
    assert "start again" not in finish(process, 143)


# The starter is hit the moment its first rank exists: the second does not, and neither listens yet.
HIT = """
import os, subprocess, sys
class Hit(subprocess.Popen):
    def __init__(self, command, **kwargs):
        super().__init__(command, **kwargs)
        if "repa_pipeline.commands_rank" in command and kwargs["env"]["RANK"] == "0":
            os.kill(os.getpid(), {number})
subprocess.Popen = Hit
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_while_ranks_are_being_started_ends_them(
    workspace: Path, number: signal.Signals, code: int
) -> None:
    config = settings(workspace, f"hit{code}", ranks=2, steps=100_000)
    path = workspace / "hit.json"
    path.write_text(json.dumps(as_json(config)))
    command = [sys.executable, "-c", HIT.format(number=int(number)) + START, str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finish(process, code)  # the pipes close when the last rank ends


def test_an_error_of_any_rank_is_told_once(workspace: Path, tmp_path: Path) -> None:
    said = finish(start(settings(workspace, "bad", ranks=2, autoencoder="no-such")), 2)
    assert said.count("repa: unknown autoencoder 'no-such'") == 1
    write_toy_cache(tmp_path)
    shard = tmp_path / "cache" / "features.toy-vit.64" / "c" / "3" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    said = finish(start(settings(tmp_path, "damaged", ranks=2)), 2)
    assert "fails its crc32c checksum; run `repa repair`" in said


def test_torchrun_starts_ranks_too(workspace: Path) -> None:
    arguments = train_arguments(settings(workspace, "torchrun"))
    (workspace / "repa.toml").write_text(TOY_PROJECT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "repa_pipeline", *arguments, "--ema-extra", "0.5"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert_same_curve(curve(workspace, "torchrun"), curve(workspace, "one"))
    assert done.stdout.count("train torchrun") == 1
