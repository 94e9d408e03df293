"""The mirror of a run: another machine goes on from it, and nothing half sent is ever seen."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import ConfigError, DamagedError, MismatchError, StageError
from repa_pipeline.observe import JsonLines, RunLog, Silent, read_events
from repa_pipeline.stages.train import TrainResult, plan_training, train
from repa_pipeline.testing.caches import toy_train_config, write_toy_cache
from repa_pipeline.training.checkpoint import (
    checkpoint_path,
    complete_steps,
    file_digest,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from repa_pipeline.training.checkpointer import Checkpointer
from repa_pipeline.training.mirror import Mirror, TakenOverError, load_newest, mirror_of
from repa_pipeline.training.runs import Run, open_run

DECIDED = {"rows": "abc"}


def config_of(folder: Path, machine: str = "a", **changes: Any) -> TrainConfig:
    """The settings on one of several machines that share `folder`/mirror."""
    settings = {"checkpoints": str(folder / "mirror"), **changes}
    return TrainConfig(workspace=str(folder / machine), **settings)


def content(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(100, 64, generator=generator), "n": step}


def machine(folder: Path, name: str, *steps: int, **changes: Any) -> tuple[Run, TrainConfig]:
    """A machine's run with checkpoints of its own."""
    config = config_of(folder, name, **changes)
    run = open_run(config, "r", DECIDED)
    for step in steps:
        save_checkpoint(run.checkpoints, step, content(step))
    return run, config


def mirror_in_parts(run: Run, config: TrainConfig) -> Mirror:
    mirror = mirror_of(run, config)
    assert mirror is not None
    return dataclasses.replace(mirror, part_bytes=10_000)  # a checkpoint has about 27,000 bytes


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "mirror/r/checkpoints"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_there(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 10)
    (run.folder / "events.jsonl").write_text('{"step": 1}\n{"step": 2, "tor')
    mirror_in_parts(run, config).sync(2, 0)
    digest = file_digest(checkpoint_path(run.checkpoints, 10))
    parts = [f"step-00000010.{digest[:16]}.{i:04d}.part" for i in range(3)]
    assert names(tmp_path) == ["step-00000010.json", *parts][1:] + ["step-00000010.json"]
    there = tmp_path / "mirror/r"
    joined = b"".join((there / "checkpoints" / part).read_bytes() for part in parts)
    assert joined == checkpoint_path(run.checkpoints, 10).read_bytes()
    marker = json.loads((there / "checkpoints/step-00000010.json").read_text())
    assert (marker["sha256"], marker["num_bytes"]) == (digest, len(joined))
    assert [part["name"] for part in marker["parts"]] == parts
    assert [part["num_bytes"] for part in marker["parts"]] == [10_000, 10_000, len(joined) - 20_000]
    assert marker["parts"][1]["sha256"] == file_digest(there / "checkpoints" / parts[1])
    assert (there / "run.json").read_bytes() == (run.folder / "run.json").read_bytes()
    assert (there / "events.jsonl").read_text() == '{"step": 1}\n'  # whole lines only


def test_a_new_machine_goes_on_where_the_old_one_died(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a")
    log = RunLog([JsonLines(run.folder, 0)])
    (run.folder / "wandb.json").write_text('{"digits": "1234"}\n')
    with Checkpointer(run, config, log=log) as saver:
        for step in (10, 20):
            log.event(step, "x")
            saver.save(step, content(step))
    other, there = machine(tmp_path, "b")
    loaded, faults = load_newest(other, there)
    assert loaded is not None and (loaded["n"], faults) == (20, [])
    assert torch.equal(loaded["w"], content(20)["w"])
    ours, theirs = (checkpoint_path(r.checkpoints, 20) for r in (run, other))
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.with_suffix(".json").read_bytes() == theirs.with_suffix(".json").read_bytes()
    assert [event["step"] for event in read_events(other.folder / "events.jsonl")] == [10, 20]
    assert (other.folder / "wandb.json").read_text() == '{"digits": "1234"}\n'
    with Checkpointer(other, there) as saver:
        saver.save(30, content(30))
    loaded, _ = load_newest(run, config)
    assert loaded is not None and loaded["n"] == 30
    assert load_newest(*machine(tmp_path, "c"), step=20)[0]["n"] == 20  # type: ignore[index]
    assert load_newest(*machine(tmp_path, "d"), step=15) == (None, [])


def test_what_this_machine_has_newer_is_taken(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 10)
    mirror_in_parts(run, config).sync(2, 0)
    save_checkpoint(run.checkpoints, 20, content(20))  # killed before it was sent
    (run.folder / "events.jsonl").write_text('{"step": 20}\n')
    loaded, _ = load_newest(run, config)
    assert loaded is not None and loaded["n"] == 20
    assert (run.folder / "events.jsonl").read_text() == '{"step": 20}\n'
    with Checkpointer(run, config):  # sends what was left unsent
        pass
    mirror = mirror_of(run, config)
    assert mirror is not None and mirror.steps() == [10, 20] and mirror.has(20)


def test_a_torn_file_is_taken_from_the_mirror(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 10, 20)
    mirror_in_parts(run, config).sync(2, 0)
    path = checkpoint_path(run.checkpoints, 20)
    good = path.read_bytes()
    for damage in (lambda: path.write_bytes(good[:-5]), lambda: flip(path), path.unlink):
        damage()
        loaded, (fault,) = load_newest(run, config)
        assert loaded is not None and loaded["n"] == 20
        assert "step-00000020.pt" in fault and path.read_bytes() == good


def test_damage_there_falls_back_to_the_older_one(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 10, 20)
    mirror_in_parts(run, config).sync(2, 0)
    parts = sorted((tmp_path / "mirror/r/checkpoints").glob("step-00000020.*.part"))
    good = parts[1].read_bytes()
    for number, (damage, told) in enumerate(
        {
            (lambda: flip(parts[1])): "0001.part is damaged: its sha256 is not the recorded one",
            (lambda: parts[1].write_bytes(b"")): "is damaged",
            parts[1].unlink: "no object",
        }.items()
    ):
        damage()
        other, there = machine(tmp_path, f"new{number}")
        loaded, (fault,) = load_newest(other, there)
        assert loaded is not None and loaded["n"] == 10 and told in fault
        assert complete_steps(other.checkpoints) == [10]
        assert not list(other.checkpoints.glob("*.fetch"))
        parts[1].write_bytes(good)
    for part in (tmp_path / "mirror/r/checkpoints").glob("*.0000.part"):
        part.unlink()
    with pytest.raises(DamagedError, match=r"no sound checkpoint in .*last/.* and .*mirror/r"):
        load_newest(*machine(tmp_path, "last"))


def test_the_policy_holds_there_too(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", keep=1, keep_every=20)
    with Checkpointer(run, config) as saver:
        for step in (10, 20, 30, 40, 50):
            saver.save(step, content(step))
            saver.wait()
    assert complete_steps(run.checkpoints) == [20, 40, 50]
    assert [name[:13] for name in names(tmp_path)] == [
        f"step-{step:08d}" for step in (20, 20, 40, 40, 50, 50)
    ]


def test_pieces_of_a_killed_upload_are_not_seen(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 10)
    mirror = mirror_in_parts(run, config)
    mirror.sync(2, 0)
    whole = names(tmp_path)
    save_checkpoint(run.checkpoints, 20, content(20))
    mirror.sync(2, 0)
    marker = tmp_path / "mirror/r/checkpoints/step-00000020.json"
    marker.unlink()  # killed before the marker
    (tmp_path / "mirror/r/checkpoints" / f"step-00000015.{'0' * 16}.0000.part").write_bytes(b"x")
    assert mirror.steps() == [10]
    loaded, _ = load_newest(*machine(tmp_path, "b"))
    assert loaded is not None and loaded["n"] == 10
    # The pieces that stand are not sent again; strays go.
    part = next((tmp_path / "mirror/r/checkpoints").glob("step-00000020.*.0001.part"))
    before = part.stat().st_ino
    mirror.sync(2, 0)
    assert part.stat().st_ino == before and mirror.steps() == [10, 20]
    assert not [name for name in names(tmp_path) if "00000015" in name]
    prune(run.checkpoints, 1, set())
    mirror.sync(1, 0)
    assert mirror.steps() == [20] and not set(names(tmp_path)) & set(whole)


def test_another_file_of_the_same_step_replaces_the_first(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 10)
    mirror = mirror_in_parts(run, config)
    mirror.sync(2, 0)
    save_checkpoint(run.checkpoints, 10, content(11))
    assert not mirror.has(10)
    mirror.sync(2, 0)
    assert mirror.has(10) and len(names(tmp_path)) == 4
    loaded, _ = load_newest(*machine(tmp_path, "b"))
    assert loaded is not None and loaded["n"] == 11


def test_another_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 10)
    mirror_in_parts(run, config).sync(2, 0)
    before = names(tmp_path)
    other, there = machine(tmp_path, "b", seed=1)
    with pytest.raises(MismatchError, match=r"holds another run: settings.seed is 0 there, 1 now"):
        load_newest(other, there)
    save_checkpoint(other.checkpoints, 50, content(50))
    with pytest.raises(StageError, match=r"lacks the last checkpoint .* holds another run"):
        with Checkpointer(other, there):
            pass
    assert names(tmp_path) == before


def test_a_run_from_before_a_setting_existed_is_the_same_run(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 10)
    record = run.record()
    del record["decided"]["settings"]["align_schedule"]
    (run.folder / "run.json").write_text(json.dumps(record) + "\n")
    mirror_in_parts(run, config).sync(2, 0)
    loaded, _ = load_newest(*machine(tmp_path, "b"))
    assert loaded is not None and loaded["n"] == 10
    with pytest.raises(MismatchError, match="align_schedule is 'constant' there, 'cosine' now"):
        load_newest(*machine(tmp_path, "c", align_schedule="cosine"))


def test_a_mirror_that_is_away_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = machine(tmp_path, "a")
    (tmp_path / "mirror").write_text("not mounted")  # where a folder should be
    log = RunLog([JsonLines(run.folder, 0)])
    with pytest.raises(StageError, match="lacks the last checkpoint of run 'r', step 20: ") as told:
        with Checkpointer(run, config, log=log) as saver:
            saver.save(10, content(10))
            saver.wait_for_mirror()
            saver.save(20, content(20))
    assert "nothing is lost, it is in" in str(told.value) and "\n" not in str(told.value)
    assert complete_steps(run.checkpoints) == [10, 20]
    faults = [e for e in read_events(run.folder / "events.jsonl") if e["event"] == "mirror_failed"]
    assert [e["step"] for e in faults] == [10, 20] and "Not a directory" in faults[0]["reason"]
    assert "checkpoint 10 is not at the mirror" in capsys.readouterr().err
    (tmp_path / "mirror").unlink()
    with Checkpointer(run, config, log=log) as saver:
        saver.save(30, content(30))
    mirror = mirror_of(run, config)
    assert mirror is not None and mirror.steps() == [20, 30]


def test_of_two_trainers_the_later_one_has_the_mirror(tmp_path: Path) -> None:
    first, second = (machine(tmp_path, name) for name in "ab")
    with pytest.raises(TakenOverError, match="trained by another process too") as refused:
        with Checkpointer(*first) as ours:
            ours.save(10, content(10))
            ours.wait()
            load_newest(*second)
            with Checkpointer(*second) as theirs:
                theirs.save(20, content(20))
                theirs.wait()
                ours.save(15, content(15))
                ours.wait_for_mirror()
    told = str(refused.value)
    assert f"(process {os.getpid()} on " in told and str(first[0].checkpoints) in told
    assert complete_steps(first[0].checkpoints) == [10, 15]  # nothing is lost
    loaded, faults = load_newest(*machine(tmp_path, "c"))
    assert loaded is not None and (loaded["n"], faults) == (20, [])
    assert {name[:13] for name in names(tmp_path)} == {"step-00000010", "step-00000020"}
    with Checkpointer(*first) as ours:  # the same command again: now it is the later one
        ours.save(30, content(30))


def fetch(folder: Path, start: Any, told: Any) -> None:
    run, config = machine(folder, "b")
    start.wait()
    loaded, _ = load_newest(run, config)
    assert loaded is not None
    told.put((loaded["n"], checkpoint_path(run.checkpoints, 20).stat().st_ino))


def test_several_processes_download_once(tmp_path: Path) -> None:
    run, config = machine(tmp_path, "a", 20)
    mirror_in_parts(run, config).sync(2, 0)
    context = multiprocessing.get_context("fork")  # quick; the children only read files
    start, told = context.Barrier(4), context.Queue()
    children = [context.Process(target=fetch, args=(tmp_path, start, told)) for _ in range(4)]
    for child in children:
        child.start()
    answers = {told.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(answers) == 1 and answers.pop()[0] == 20  # one file, never replaced


def test_a_full_disk_while_downloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = machine(tmp_path, "a", 20)
    mirror_in_parts(run, config).sync(2, 0)
    other, there = machine(tmp_path, "b")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("repa_pipeline.training.mirror._write_all", full)
    with pytest.raises(StageError, match="No space left on device; free some space and run"):
        load_newest(other, there)
    assert os.listdir(other.checkpoints) == [".fetch.lock"]


def test_where_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs/big")
    assert mirror_of(run, TrainConfig(workspace=str(tmp_path))) is None
    named = mirror_of(run, TrainConfig(workspace=str(tmp_path), checkpoints="s3://b/ck/"))
    assert named is not None and named.store.url == "s3://b/ck/big"
    default = mirror_of(run, TrainConfig(workspace="s3://b/p/"))
    assert default is not None and default.store.url == "s3://b/p/runs/big"
    with pytest.raises(ConfigError, match="is where the runs are: give another folder"):
        mirror_of(run, TrainConfig(workspace="x", checkpoints=str(tmp_path / "runs")))
    with pytest.raises(ConfigError, match="carries a user name or a password"):
        mirror_of(run, TrainConfig(checkpoints="s3://key:secret@b/ck"))


# Through the trainer itself.


def trained(folder: Path, machine: str, **changes: Any) -> TrainResult:
    """A run on a machine whose disk holds its own runs alone; cache and mirror are shared."""
    settings = {"name": "r", "runs_dir": str(folder / machine), "log_every": 2, **changes}
    settings.setdefault("checkpoints", str(folder / "mirror"))
    config = toy_train_config(folder, checkpoint_every=2, **settings)
    return train(plan_training(config), Silent())


def curve(result: TrainResult) -> list[tuple[int, float, float]]:
    events = read_events(result.run.folder / "events.jsonl")
    return [(e["step"], e["loss"], e["grad_norm"]) for e in events if e["event"] == "scalars"]


def test_training_goes_on_on_another_machine(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    whole = trained(tmp_path, "whole", steps=8, checkpoints=None)
    assert trained(tmp_path, "a", steps=4).num_new == 4
    moved = trained(tmp_path, "b", steps=8)
    assert (moved.step, moved.num_new) == (8, 4)
    assert curve(moved) == curve(whole) and [step for step, *_ in curve(moved)] == [2, 4, 6, 8]
    ours, theirs = (load_checkpoint(r.run.newest_checkpoint()) for r in (moved, whole))
    for part in ("model", "ema"):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), name
    back = trained(tmp_path, "a", steps=8)  # the first machine has the older state on its disk
    assert (back.step, back.num_new) == (8, 0)


def test_a_finished_run_is_sent_by_the_same_command_again(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    (tmp_path / "mirror").write_text("not mounted")
    with pytest.raises(StageError, match="lacks the last checkpoint of run 'r', step 2: .* again"):
        trained(tmp_path, "a", steps=2)
    (tmp_path / "mirror").unlink()
    again = trained(tmp_path, "a", steps=2)
    assert (again.step, again.num_new) == (2, 0)
    assert (tmp_path / "mirror/r/checkpoints/step-00000002.json").is_file()
