"""Checkpoints and runs on disk: whole or absent, verified, never unpickled; one trainer a run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repa_pipeline.config import CommonConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    MissingError,
    StageError,
)
from repa_pipeline.training import checkpoint as checkpoint_module
from repa_pipeline.training.checkpoint import (
    checkpoint_path,
    complete_steps,
    file_digest,
    load_checkpoint,
    load_newest,
    prune,
    save_checkpoint,
)
from repa_pipeline.training.runs import Run, find_run, list_runs, locked, open_run, runs_folder


def content(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(40, 50, generator=generator), "n": torch.tensor(seed)},
        "half": torch.randn(3, generator=generator).bfloat16(),
        "about": {"config": {"steps": 4, "grid": [2, 2]}, "path": None, "scale": 0.5},
    }


def save_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, content(step))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "new/folder", 400, content())
    assert path == tmp_path / "new/folder/step-00000400.pt"
    loaded = load_checkpoint(path)
    expected = content()
    assert (loaded["step"], loaded["format_version"]) == (400, 1)
    assert torch.equal(loaded["model"]["w"], expected["model"]["w"])
    assert loaded["half"].dtype == torch.bfloat16 and torch.equal(loaded["half"], expected["half"])
    assert loaded["about"] == expected["about"]
    marker = json.loads(path.with_suffix(".json").read_text())
    assert marker == {"num_bytes": path.stat().st_size, "sha256": file_digest(path)}
    assert sorted(os.listdir(path.parent)) == ["step-00000400.json", "step-00000400.pt"]
    plain = torch.load(path, weights_only=True)
    assert plain["step"] == 400


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    paths = [save_checkpoint(tmp_path / name, 7, content()) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"is torn: got \d+ bytes"),
    "empty": (lambda path: path.write_bytes(b""), "is torn: got 0 bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is torn"),
    "a weight": (lambda path: flip(path, path.stat().st_size // 2), "its sha256 is not the record"),
    "the last byte": (lambda path: flip(path, -1), "its sha256 is not the recorded one"),
    "foreign": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "its sha256 is not"),
    "marker torn": (lambda path: path.with_suffix(".json").write_text('{"num'), "is not JSON"),
    "marker empty": (lambda path: path.with_suffix(".json").write_text("{}"), "expected None"),
    "marker without hash": (
        lambda path: path.with_suffix(".json").write_text(
            json.dumps({"num_bytes": path.stat().st_size})
        ),
        "its sha256 is not",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused_and_passed_over(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    save_steps(tmp_path, 10, 20)
    newest = checkpoint_path(tmp_path, 20)
    damage(newest)
    with pytest.raises(DamagedError, match=message) as caught:
        load_checkpoint(newest)
    assert "step-00000020" in str(caught.value) and "\n" not in str(caught.value)
    loaded, faults = load_newest(tmp_path, "cpu")
    assert loaded is not None and loaded["step"] == 10
    assert torch.equal(loaded["model"]["w"], content(10)["model"]["w"])
    assert faults == [str(caught.value)]
    damage(checkpoint_path(tmp_path, 10))
    with pytest.raises(DamagedError, match="no sound checkpoint in .*restore one, or remove"):
        load_newest(tmp_path, "cpu")


def test_a_checkpoint_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    checkpoint_path(tmp_path, 20).unlink()
    loaded, faults = load_newest(tmp_path, "cpu")
    assert loaded is not None and loaded["step"] == 10
    assert len(faults) == 1 and "no checkpoint" in faults[0]
    with pytest.raises(MissingError, match="check --run or --checkpoint"):
        load_checkpoint(checkpoint_path(tmp_path, 20))


def test_none_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path, "cpu") == (None, [])
    assert load_newest(tmp_path / "absent", "cpu") == (None, [])
    assert complete_steps(tmp_path / "absent") == []


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.folder),))


@pytest.mark.parametrize("where", ["root", "inside"])
def test_a_pickle_bomb_does_not_go_off(where: str, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "executed")
    path = tmp_path / "step-00000001.pt"
    torch.save(bomb if where == "root" else {**content(), "format_version": 1, "x": bomb}, path)
    with pytest.raises(DamagedError, match="is not a checkpoint of this package"):
        load_checkpoint(path)
    marker = {"num_bytes": path.stat().st_size, "sha256": file_digest(path)}
    path.with_suffix(".json").write_text(json.dumps(marker))
    with pytest.raises(DamagedError, match="no sound checkpoint"):
        load_newest(tmp_path, "cpu")
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have


def test_foreign_files_without_a_marker(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for foreign in (torch.zeros(3), {"state_dict": {}}, [1, 2], {"format_version": None}):
        torch.save(foreign, path)
        with pytest.raises(DamagedError, match="model.pt (is not a checkpoint|has format version)"):
            load_checkpoint(path)
    for data in (b"", b"PK\3\4", b"text"):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match="is not a checkpoint of this package"):
            load_checkpoint(path)
    torch.save({"format_version": 2}, path)
    with pytest.raises(DamagedError, match="version 2, this package reads 1: use the package ver"):
        load_checkpoint(path)
    moved = save_checkpoint(tmp_path / "run", 3, content()).rename(tmp_path / "moved.pt")
    assert load_checkpoint(moved)["step"] == 3


def test_no_memory_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    save_steps(tmp_path, 10)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_newest(tmp_path, "cuda")


def test_other_files_in_the_folder(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    for name in ("step-last.json", "step-.json", "step-00000030.pt", "step-00000020.json.bak"):
        (tmp_path / name).write_text("{}")
    assert complete_steps(tmp_path) == [10]


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, 30, 40, 50)
    prune(tmp_path, 2, {20})
    assert complete_steps(tmp_path) == [20, 40, 50]
    assert len(list(tmp_path.glob("step-*.pt"))) == 3
    prune(tmp_path, 5, set())
    assert complete_steps(tmp_path) == [20, 40, 50]
    prune(tmp_path, 1, set())
    assert sorted(os.listdir(tmp_path)) == ["step-00000050.json", "step-00000050.pt"]


@pytest.mark.parametrize("moment", ["writing", "syncing", "marking"])
def test_a_full_disk_keeps_the_older_ones(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 10)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")

    class FullDisk(checkpoint_module._HashingFile):
        def write(self, data: bytes) -> int:
            if self._file.tell() > 4000:
                raise full
            return super().write(data)

    def fail(*_: Any) -> None:
        raise full

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(checkpoint_module, "_HashingFile", FullDisk)
        elif moment == "syncing":
            patch.setattr(checkpoint_module.os, "fsync", fail)
        else:
            patch.setattr(checkpoint_module.LocalStore, "put", fail)
        with pytest.raises(
            StageError, match="cannot write checkpoint .*step-00000020.pt"
        ) as caught:
            save_checkpoint(tmp_path, 20, content())
    assert "free some space and run the same command again" in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob("*.tmp")) and complete_steps(tmp_path) == [10]
    loaded, faults = load_newest(tmp_path, "cpu")
    assert loaded is not None and loaded["step"] == 10 and faults == []
    save_steps(tmp_path, 20)
    assert complete_steps(tmp_path) == [10, 20]


def test_a_killed_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Killed while writing, and killed between the file and its marker."""
    save_steps(tmp_path, 10, 20)
    path = checkpoint_path(tmp_path, 20)
    path.with_suffix(".json").unlink()
    (tmp_path / "step-00000030.pt.tmp").write_bytes(path.read_bytes()[:100])
    assert complete_steps(tmp_path) == [10]
    loaded, faults = load_newest(tmp_path, "cpu")
    assert loaded is not None and loaded["step"] == 10 and faults == []
    save_steps(tmp_path, 20)
    assert complete_steps(tmp_path) == [10, 20] and not list(tmp_path.glob("*.tmp"))


# Runs.


def train_config(workspace: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(workspace=str(workspace), **changes)


def test_a_run_is_opened_and_gone_on_with(tmp_path: Path) -> None:
    decided = {"data": {"rows": "abc"}, "grid": (4, 4)}
    run = open_run(train_config(tmp_path), "b.4-c", decided)
    assert run.folder == tmp_path / "runs/b.4-c" and run.last_step() == 0
    with pytest.raises(MissingError, match="run b.4-c has no checkpoint yet"):
        run.newest_checkpoint()
    before = (run.folder / "run.json").read_bytes()
    again = open_run(train_config(tmp_path, steps=9, checkpoint_every=1), "b.4-c", decided)
    assert again == run and (run.folder / "run.json").read_bytes() == before
    assert run.record()["decided"]["grid"] == [4, 4]
    save_steps(run.checkpoints, 5, 12)
    assert run.last_step() == 12
    assert run.newest_checkpoint() == checkpoint_path(run.checkpoints, 12)


@pytest.mark.parametrize(
    ("settings", "decided", "message"),
    [
        ({"seed": 1}, {"rows": "abc"}, "settings.seed is 0 there, 1 now"),
        ({"model": "SiT-B/2"}, {"rows": "abc"}, "settings.model is 'SiT-XL/2' there"),
        ({}, {"rows": "abd"}, "rows is 'abc' there, 'abd' now"),
        ({}, {"rows": "abc", "teacher": "x"}, "teacher is None there, 'x' now"),
    ],
)
def test_a_run_of_other_settings_is_refused(
    settings: dict[str, Any], decided: dict[str, Any], message: str, tmp_path: Path
) -> None:
    open_run(train_config(tmp_path), "r", {"rows": "abc"})
    with pytest.raises(MismatchError, match=f"run 'r' was started with other settings: {message}"):
        open_run(train_config(tmp_path, **settings), "r", decided)


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path: Path) -> None:
    spec = {"name": "SiT-B/2", "depth": 12, "family": "sit"}
    run = open_run(train_config(tmp_path), "r", {"model": spec})
    record = run.record()
    for setting in ("align_schedule", "ema_extra", "max_grad_norm"):
        del record["decided"]["settings"][setting]
    del record["decided"]["model"]["family"]
    (run.folder / "run.json").write_text(json.dumps(record))
    assert open_run(train_config(tmp_path), "r", {"model": spec}) == run
    for changes, message in (
        ({"align_schedule": "linear"}, "align_schedule is 'constant' there, 'linear' now"),
        ({"ema_extra": (0.5,)}, r"ema_extra is \[\] there, \[0.5\] now"),
        ({"max_grad_norm": 3.0}, "max_grad_norm is 10000.0 there, 3.0 now"),
    ):
        with pytest.raises(MismatchError, match=message):
            open_run(train_config(tmp_path, **changes), "r", {"model": spec})
    with pytest.raises(MismatchError, match="model.family is 'sit' there, 'dit' now"):
        open_run(train_config(tmp_path), "r", {"model": {**spec, "family": "dit"}})
    del record["decided"]["model"]["depth"]  # has no default, so nobody knows what it was
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(MismatchError, match="model.depth is None there, 12 now"):
        open_run(train_config(tmp_path), "r", {"model": spec})


def test_names_and_no_resume(tmp_path: Path) -> None:
    for name in ("", "a/b", "../a", ".hidden", "a b"):
        with pytest.raises(ConfigError, match="expected letters, digits"):
            open_run(train_config(tmp_path), name, {})
    open_run(train_config(tmp_path, resume=False), "r", {})
    with pytest.raises(ConfigError, match="run 'r' exists and --no-resume was given"):
        open_run(train_config(tmp_path, resume=False), "r", {})


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    run = open_run(train_config(tmp_path), "r", {})
    with pytest.raises(MissingError, match="no run at"):
        Run(tmp_path / "other").record()
    (run.folder / "run.json").write_text('{"decided"')
    with pytest.raises(DamagedError, match="run.json is not JSON"):
        run.record()
    (run.folder / "run.json").write_text('{"by": "another program"}')
    with pytest.raises(MismatchError, match="run 'r' was started with other settings: settings"):
        open_run(train_config(tmp_path), "r", {})


def test_finding_a_run(tmp_path: Path) -> None:
    config = CommonConfig(workspace=str(tmp_path))
    with pytest.raises(MissingError, match="no runs in .*runs: run `repa train` first"):
        find_run(config, None)
    open_run(train_config(tmp_path), "one", {})
    assert find_run(config, None).name == find_run(config, "one").name == "one"
    open_run(train_config(tmp_path), "another", {})
    (tmp_path / "runs/no-run").mkdir()
    assert [run.name for run in list_runs(config)] == ["another", "one"]
    with pytest.raises(ConfigError, match=r"2 runs in .* \(another, one\): choose with --run NAME"):
        find_run(config, None)
    with pytest.raises(MissingError, match="no run 'two' in .*: known are another, one"):
        find_run(config, "two")


def test_runs_are_local() -> None:
    with pytest.raises(ConfigError, match="the workspace is s3://bucket/x: give --runs-dir"):
        runs_folder(CommonConfig(workspace="s3://bucket/x"))
    config = CommonConfig(workspace="s3://bucket/x", runs_dir="/data/runs")
    assert runs_folder(config) == Path("/data/runs")


def hold_lock(folder: str, told: Any, may_go: Any) -> None:
    with locked(Run(Path(folder))):
        told.set()
        may_go.wait(60)


def test_a_run_has_one_trainer(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # quick; the child only locks a file
    told, may_go = context.Event(), context.Event()
    holder = context.Process(target=hold_lock, args=(str(tmp_path), told, may_go))
    holder.start()
    assert told.wait(60)
    with pytest.raises(StageError, match=f"is being trained by process {holder.pid}: wait for it"):
        with locked(Run(tmp_path)):
            pass
    may_go.set()
    holder.join()
    with locked(Run(tmp_path)):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
