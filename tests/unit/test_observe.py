"""What a run tells: progress for a person, a log for programs and services."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.errors import MissingError, StageError
from repa_pipeline.observe import (
    Bar,
    JsonLines,
    PlainLines,
    RunLog,
    TensorBoard,
    open_run_log,
    progress_for_stream,
    read_events,
)
from repa_pipeline.testing.caches import toy_train_config


def test_plain_lines_say_where_it_stands() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream, every_s=0)
    lines.start("train x", 2000, 500, "steps")
    lines.advance(1000, loss=0.5, hidden=float("nan"))
    lines.advance(500)
    lines.finish()
    first, middle, last = stream.getvalue().splitlines()
    assert first == "train x: 500 of 2,000 steps done, 1,500 to do"
    assert middle.startswith("train x: 1,500 of 2,000 steps, ") and middle.endswith(", loss 0.5")
    assert " steps/s, " in middle and " s left" in middle
    assert last.startswith("train x: 2,000 of 2,000 steps, ") and "left" not in last

    stream = io.StringIO()
    patient = PlainLines(stream, every_s=1000)
    patient.start("x", 10, 0, "images")
    patient.advance(5)
    patient.finish()  # broken off: what was done is said
    assert len(stream.getvalue().splitlines()) == 2 and "x: 5 of 10" in stream.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress_for_stream()
    assert isinstance(bar, Bar)
    bar.start("sample", 4, 1, "images")
    bar.advance(3, loss=0.25)
    bar.finish()
    assert "sample" in stream.getvalue() and "4/4" in stream.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress_for_stream(), PlainLines)


def test_events_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    log = RunLog([JsonLines(tmp_path, from_step=0, every=2)])
    for step in (2, 4, 5):
        log.scalars(step, {"loss": float(step)})
    log.event(5, "preview", path="x.png")
    log.event(6, "preview", path="y.png")
    log.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "scalars", "step": 7, "lo')  # torn by a kill
    assert [e["step"] for e in read_events(tmp_path / "events.jsonl")] == [2, 4, 5, 5, 6]

    # Step 5 ended a run inside an interval of 2: its means come again, whole, at step 6.
    JsonLines(tmp_path, from_step=5, every=2).close()
    left = [(e["event"], e["step"]) for e in read_events(tmp_path / "events.jsonl")]
    assert left == [("scalars", 2), ("scalars", 4), ("preview", 5)]
    text = (tmp_path / "events.jsonl").read_text()
    assert all(json.loads(line) for line in text.splitlines()) and text.endswith("\n")


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog([TensorBoard(tmp_path, from_step=0)])
    log.scalars(1, {"loss": 0.5})
    log.scalars(2, {"loss": 0.25})
    log.event(1, "evaluation", {"eval/x": 7.0}, path="late")
    log.scalars(3, {"loss": 0.2})
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "x.png")
    log.image(2, "preview", tmp_path / "x.png")
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")][:2] == [(1, 0.5), (2, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("eval/x")] == [(1, 7.0)]
    assert [e.step for e in events.Images("preview")] == [2]

    # Going on from step 2 takes back step 3, and not what came late about step 1.
    again = RunLog([TensorBoard(tmp_path, from_step=2)])
    again.scalars(3, {"loss": 0.125})
    again.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert found == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("eval/x")] == [(1, 7.0)]


def test_a_late_result_survives_a_resume(tmp_path: Path) -> None:
    log = RunLog([JsonLines(tmp_path, from_step=0, every=4)])
    log.scalars(4, {"loss": 1.0})
    log.scalars(8, {"loss": 0.5})
    log.event(3, "evaluation", {"eval/frechet_distance": 7.5}, path="a")  # 3 ends no interval
    log.scalars(12, {"loss": 0.25})
    log.event(9, "evaluation", {"eval/frechet_distance": 6.5}, path="b")
    log.close()
    # The checkpoint of step 8: what is about later steps will come again.
    JsonLines(tmp_path, from_step=8, every=4).close()
    assert read_events(tmp_path / "events.jsonl") == [
        {"event": "scalars", "step": 4, "loss": 1.0},
        {"event": "scalars", "step": 8, "loss": 0.5},
        {"event": "evaluation", "step": 3, "path": "a", "eval/frechet_distance": 7.5},
    ]


def test_sinks_are_those_that_are_asked_for(tmp_path: Path) -> None:
    def names(rank: int = 0, **changes: Any) -> list[str]:
        config = toy_train_config(tmp_path, **changes)
        log = open_run_log(tmp_path / "run", config, 0, rank)
        log.scalars(1, {"loss": 1.0})
        log.close()
        return [type(sink).__name__ for sink in log.sinks]

    assert names(rank=1, wandb="project") == []
    assert not (tmp_path / "run").exists()  # other ranks write nothing at all
    assert names(tensorboard=False) == ["JsonLines"]
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert names() == ["JsonLines", "TensorBoard"]


# Weights & Biases, by a module that stands for the package and writes down what it is asked.

FAKE_WANDB = """
import json, pathlib
CALLS = pathlib.Path(__file__).with_name("calls.jsonl")

def say(what, **facts):
    with open(CALLS, "a") as file:
        file.write(json.dumps([what, facts], default=str) + chr(10))

class Settings:
    def __init__(self, **settings):
        self.settings = settings

class Image:
    def __init__(self, path):
        self.path = path
    def __str__(self):
        return "picture " + self.path

class Run:
    def define_metric(self, name, step_metric):
        say("define_metric", name=name, step_metric=step_metric)
    def log(self, values):
        if values.get("loss") == 13:
            raise OSError("the network is away")
        say("log", **values)
    def finish(self):
        say("finish")

def init(**given):
    if given["project"] == "forbidden":
        raise RuntimeError("no API key configured")
    say("init", **{**given, "settings": given["settings"].settings})
    return Run()
"""


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield tmp_path / "site" / "calls.jsonl"
    sys.modules.pop("wandb", None)


def calls(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_wandb_gets_the_numbers_and_one_id_a_run(fake_wandb: Path, tmp_path: Path) -> None:
    config = toy_train_config(tmp_path, wandb="digits", source="s3://key:secret@bucket/x")
    folder = tmp_path / "one"
    for first in (0, 4):
        log = open_run_log(folder, config, first)
        log.scalars(first + 2, {"loss": 0.5, "denoising/t0.0-0.1": 0.25})
        log.event(first + 1, "evaluation", {"eval/x": 7.0}, path="p")
        log.event(first + 2, "checkpoint_refused", reason="torn")  # no numbers: not for W&B
        log.image(first + 2, "preview", write_picture(tmp_path))
        log.close()
    began, axis, numbers, score, picture, finish, again, *rest = calls(fake_wandb)
    assert began[0] == "init" and axis == ["define_metric", {"name": "*", "step_metric": "step"}]
    about = began[1]
    assert (about["project"], about["name"], about["resume"]) == ("digits", "one", "allow")
    assert about["dir"] == str(folder) and len(about["id"]) == 16
    assert about["config"]["batch_size"] == 8 and "source" not in about["config"]
    assert about["settings"] == {
        **{"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True}
    }
    assert "secret" not in fake_wandb.read_text()
    assert numbers == ["log", {"loss": 0.5, "denoising/t0.0-0.1": 0.25, "step": 2}]
    assert score == ["log", {"eval/x": 7.0, "step": 1}]
    assert picture == ["log", {"preview": f"picture {tmp_path}/x.png", "step": 2}]
    assert finish == ["finish", {}] and again == began and len(rest) == 5
    # Another project knows nothing of that id; the first keeps it.
    for project in ("other", "digits"):
        open_run_log(folder, toy_train_config(tmp_path, wandb=project), 0).close()
    ids = [facts["id"] for what, facts in calls(fake_wandb) if what == "init"]
    assert ids[0] == ids[1] == ids[3] != ids[2]


def test_wandb_that_goes_away_does_not_end_the_run(
    fake_wandb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_train_config(tmp_path, wandb="digits", tensorboard=False)
    log = open_run_log(tmp_path / "one", config, 0)
    for step, loss in enumerate((12.0, 13.0, 14.0), start=1):
        log.scalars(step, {"loss": loss})
    log.close()
    assert [what for what, _ in calls(fake_wandb)] == ["init", "define_metric", "log"]
    assert [e["loss"] for e in read_events(tmp_path / "one" / "events.jsonl")] == [12, 13, 14]
    assert capsys.readouterr().err == (
        "Weights & Biases failed (the network is away) and gets nothing more; events.jsonl goes "
        "on\n"
    )
    with pytest.raises(StageError, match="project 'forbidden' .no API key configured.: run `wandb"):
        open_run_log(tmp_path / "one", toy_train_config(tmp_path, wandb="forbidden"), 0)


def test_without_the_wandb_package_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(MissingError, match="--wandb needs the wandb package.*pip install wandb"):
        open_run_log(tmp_path, toy_train_config(tmp_path, wandb="digits"), 0)


def write_picture(folder: Path) -> Path:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "x.png")
    return folder / "x.png"
