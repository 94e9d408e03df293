"""Runs on disk: resume bit for bit, what is refused, bad steps, damaged checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from repa_pipeline.config import RunsConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import ConfigError, DamagedError, MismatchError, StageError
from repa_pipeline.methods.base import Method
from repa_pipeline.observe import Silent, read_events
from repa_pipeline.stages.train import TrainPlan, TrainResult, plan_training, train
from repa_pipeline.testing.caches import ToyTeacher, toy_train_config, write_toy_cache
from repa_pipeline.training.checkpoint import (
    checkpoint_path,
    complete_steps,
    load_checkpoint,
    load_newest,
)
from repa_pipeline.training.runs import find_run, list_runs, locked
from repa_pipeline.training.state import new_state, optimiser_step

TIMING = ("images_per_s", "data_wait", "bytes_per_s", "rss_bytes")


class Stopping(Silent):
    """Progress that raises after `steps` steps, as a fault in the middle of the loop would."""

    def __init__(self, steps: int):
        self.left = steps

    def advance(self, count: int, **facts: float) -> None:
        self.left -= 1
        if not self.left:
            raise OSError("the machine room is on fire")


def run(config: TrainConfig) -> TrainResult:
    return train(plan_training(config), Silent())


def run_until(config: TrainConfig, steps: int) -> None:
    with pytest.raises(OSError, match="on fire"):
        train(plan_training(config), Stopping(steps))


def events_of(folder: Path) -> list[dict[str, Any]]:
    events = read_events(folder / "events.jsonl")
    return [{k: v for k, v in event.items() if k not in TIMING} for event in events]


def assert_equal(got: Any, expected: Any, where: str = "") -> None:
    """Deep equality of checkpoints, tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for i, value in enumerate(expected):
            assert_equal(got[i], value, f"{where}.{i}")
    else:
        assert got == expected, where


def assert_same_run(got: TrainResult, expected: TrainResult) -> None:
    assert events_of(got.run.folder) == events_of(expected.run.folder)
    ours, theirs = (load_checkpoint(r.run.newest_checkpoint()) for r in (got, expected))
    about, wanted = ours.pop("about"), theirs.pop("about")
    assert_equal(ours, theirs)
    assert (about["data"], about["inputs"]) == (wanted["data"], wanted["inputs"])


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_toy_cache(tmp_path)
    return tmp_path


def test_a_resumed_run_is_the_undisturbed_one(workspace: Path) -> None:
    def config(name: str, **changes: Any) -> TrainConfig:
        settings = {"steps": 9, "log_every": 4, "checkpoint_every": 3, **changes}
        return toy_train_config(workspace, name=name, **settings)

    undisturbed = run(config("undisturbed"))
    assert [e["step"] for e in events_of(undisturbed.run.folder)] == [4, 8, 9]

    # Stopped by its own end, inside a log interval, then extended.
    assert run(config("extended", steps=6)).step == 6
    extended = run(config("extended"))
    assert (extended.step, extended.num_new) == (9, 3)
    assert_same_run(extended, undisturbed)

    # Broken twice, behind a log line that no checkpoint covers.
    run_until(config("broken"), steps=5)
    run_until(config("broken"), steps=2)
    broken = run(config("broken"))
    assert broken.num_new == 6
    assert_same_run(broken, undisturbed)

    # Micro-steps and checkpoint rhythm may change on the way.
    run(config("changed", steps=5, checkpoint_every=5))
    changed = run(config("changed", checkpoint_every=2, keep=1))
    assert events_of(changed.run.folder) == events_of(undisturbed.run.folder)


def test_a_finished_run_is_left_alone(workspace: Path) -> None:
    first = run(toy_train_config(workspace))
    before = {p: p.stat().st_mtime_ns for p in first.run.folder.rglob("*") if p.name != "lock"}
    again = run(toy_train_config(workspace))
    shorter = run(toy_train_config(workspace, steps=2))
    assert (again.num_new, again.step, shorter.num_new, shorter.step) == (0, 3, 0, 3)
    after = {p: p.stat().st_mtime_ns for p in first.run.folder.rglob("*") if p.name != "lock"}
    assert after == before


def test_the_record_of_an_extended_run_says_its_new_length(workspace: Path) -> None:
    run(toy_train_config(workspace, steps=2))
    run(toy_train_config(workspace, steps=3))
    (found,) = list_runs(RunsConfig(workspace=str(workspace)))
    assert found.record()["config"]["steps"] == found.last_step() == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-3}, r"settings.learning_rate is 0.001 there, 0.002 now"),
        ({"seed": 1}, r"settings.seed is 0 there, 1 now"),
        ({"batch_size": 4}, r"settings.batch_size is 8 there, 4 now"),
        ({"dtype": "bf16"}, r"dtype is 'float32' there, 'bf16' now"),
        ({"encoder": ("none",)}, r"data.arrays.features.toy-vit.64 is '[0-9a-f]{64}' there, None"),
        (
            {"overrides": {"models.SiT-XS/2": {"depth": 3, "width": 64, "num_heads": 4}}},
            r"model.num_heads is 2 there, 4 now",
        ),
    ],
)
def test_other_settings_are_refused(workspace: Path, changes: dict[str, Any], named: str) -> None:
    run(toy_train_config(workspace, name="one", steps=1))
    with pytest.raises(MismatchError, match=named):
        run(toy_train_config(workspace, name="one", **changes))


def test_another_cache_is_refused(tmp_path: Path) -> None:
    write_toy_cache(tmp_path / "a")
    write_toy_cache(tmp_path / "b", seed=1)
    runs_dir = str(tmp_path / "runs")
    run(toy_train_config(tmp_path / "a", runs_dir=runs_dir, steps=1))
    with pytest.raises(MismatchError, match=r"data.arrays.features.toy-vit.64 is '.*' there, '"):
        run(toy_train_config(tmp_path / "b", runs_dir=runs_dir, steps=2))


def test_names_and_locks(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"run name '\.\./up': expected letters"):
        run(toy_train_config(workspace, name="../up"))
    result = run(toy_train_config(workspace, name="one", steps=1))
    with pytest.raises(ConfigError, match="run 'one' exists and --no-resume was given"):
        run(toy_train_config(workspace, name="one", resume=False))
    with locked(result.run), pytest.raises(StageError, match=r"is being trained by process \d+"):
        run(toy_train_config(workspace, name="one"))
    run(toy_train_config(workspace, name="two", steps=1))
    with pytest.raises(ConfigError, match=r"2 runs in .* \(one, two\): choose with --run NAME"):
        find_run(RunsConfig(workspace=str(workspace)), None)


# Steps whose gradients are not finite.


@dataclasses.dataclass
class Faulty:
    """A method whose loss is NaN at the given calls."""

    method: Method
    bad: set[int]
    calls: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def loss(self, *args: Any) -> dict[str, Tensor]:
        self.calls += 1
        losses = self.method.loss(*args)
        factor = math.nan if self.calls in self.bad else 1.0
        return {name: value * factor for name, value in losses.items()}


def faulty(plan: TrainPlan, bad: set[int]) -> TrainPlan:
    method: Any = Faulty(plan.method, bad)
    return dataclasses.replace(plan, method=method)


def test_a_bad_step_leaves_everything_alone(workspace: Path) -> None:
    config = toy_train_config(workspace)
    state = new_state(config, plan_training(config).method, "cpu")
    trainable = [p for p in state.model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    optimiser_step(config, state)
    before = copy.deepcopy(state.to_checkpoint())
    for i, parameter in enumerate(trainable):
        parameter.grad = torch.full_like(parameter, math.inf if i == 3 else 1.0)
    norm, bad = optimiser_step(config, state)
    assert not math.isfinite(float(norm)) and bool(bad)
    assert_equal(state.to_checkpoint(), before)
    assert all(parameter.grad is None for parameter in trainable)


def test_skipped_steps_are_counted_and_left_out_of_the_means(workspace: Path) -> None:
    config = toy_train_config(workspace, steps=6, log_every=1)
    result = train(faulty(plan_training(config), {2, 3}), Silent())
    events = events_of(result.run.folder)
    assert [e["skipped_steps"] for e in events] == [0, 1, 2, 2, 2, 2]
    assert ["loss" in e for e in events] == [True, False, False, True, True, True]
    assert "NaN" not in (result.run.folder / "events.jsonl").read_text()

    config = toy_train_config(workspace, name="means", steps=6, log_every=6)
    means = events_of(train(faulty(plan_training(config), {2, 3}), Silent()).run.folder)[0]
    expected = sum(e["loss"] for e in events if "loss" in e) / 4
    assert means["loss"] == pytest.approx(expected, abs=1e-6)


def test_counts_of_skipped_steps_survive_a_resume(workspace: Path) -> None:
    config = toy_train_config(workspace, steps=3, log_every=1)
    train(faulty(plan_training(config), {2, 3}), Silent())
    longer = dataclasses.replace(config, steps=5)
    result = train(plan_training(longer), Silent())
    assert [e["skipped_steps"] for e in events_of(result.run.folder)] == [0, 1, 2, 2, 2]

    config = dataclasses.replace(config, name="bad", steps=3)
    train(faulty(plan_training(config), {2, 3}), Silent())
    plan = faulty(plan_training(dataclasses.replace(config, steps=50)), set(range(1, 50)))
    with pytest.raises(StageError, match=r"10 steps in a row were skipped \(now at step 11\)"):
        train(plan, Silent())


def test_ten_bad_steps_in_a_row_end_the_run(workspace: Path) -> None:
    config = toy_train_config(workspace, steps=20, checkpoint_every=2)
    plan = faulty(plan_training(config), set(range(4, 20)))
    with pytest.raises(StageError, match="loss and denoising and alignment are not finite"):
        train(plan, Silent())
    run_folder = workspace / "runs" / plan.name
    saved = load_checkpoint(checkpoint_path(run_folder / "checkpoints", 12))
    assert saved["meter"]["bad"][:2].tolist() == [9, 9]
    good = load_checkpoint(checkpoint_path(run_folder / "checkpoints", 10))
    assert_equal(saved["model"], good["model"])
    assert_equal(saved["ema"], good["ema"])


# Checkpoints on disk.


def test_a_damaged_checkpoint_is_passed_over(workspace: Path) -> None:
    config = toy_train_config(workspace, steps=4, checkpoint_every=2, keep=5)
    folder = run(config).run.checkpoints
    assert complete_steps(folder) == [2, 4]
    newest = checkpoint_path(folder, 4)
    sound = newest.read_bytes()
    newest.write_bytes(sound[:-1])
    content, (fault,) = load_newest(folder, "cpu")
    assert content is not None and content["step"] == 2
    assert f"{newest} is torn: got {len(sound) - 1} bytes, expected {len(sound)}" in fault

    result = run(config)
    assert (result.step, result.num_new) == (4, 2)
    (refusal,) = [e for e in events_of(result.run.folder) if e["event"] == "checkpoint_refused"]
    assert refusal["step"] == 2 and "is torn" in refusal["reason"]

    flipped = bytearray(newest.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    newest.write_bytes(flipped)
    with pytest.raises(DamagedError, match="its sha256 is not the recorded one"):
        load_checkpoint(newest)
    checkpoint_path(folder, 2).unlink()
    with pytest.raises(DamagedError, match="no sound checkpoint"):
        run(toy_train_config(workspace, steps=6))


def test_only_the_newest_checkpoints_are_kept(workspace: Path) -> None:
    result = run(toy_train_config(workspace, steps=7, checkpoint_every=2, keep=2))
    assert complete_steps(result.run.checkpoints) == [6, 7]
    assert len(list(result.run.checkpoints.glob("*.pt*"))) == 2


def test_a_checkpoint_that_cannot_be_written_keeps_the_older_ones(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(toy_train_config(workspace, steps=2))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StageError, match="No space left on device; free some space"):
        run(toy_train_config(workspace, steps=4))
    monkeypatch.undo()
    folder = workspace / "runs" / "sit-xs-2.toy-vit" / "checkpoints"
    assert complete_steps(folder) == [2] and not list(folder.glob("*.tmp"))


def test_two_teachers_name_a_run(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, teachers=(ToyTeacher("my.first"), ToyTeacher("second")))
    result = run(toy_train_config(tmp_path, encoder=("my.first", "second"), seed=3, steps=1))
    assert result.run.name == "sit-xs-2.my.first+second.seed3"
