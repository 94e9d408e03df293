"""What a run tells: progress for a person, events for programs, previews on the way."""

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

from repa_pipeline.cli import main
from repa_pipeline.observe import Bar, PlainLines, RunLog, Silent, progress_for_stream, read_events
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import isolated_tables, toy_train_config, write_toy_cache
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights
from repa_pipeline.training import previews

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [tiny_autoencoder(weights="tiny.safetensors")]
"""


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
    log = RunLog(tmp_path, from_step=0, every=2, tensorboard=False)
    for step in (2, 4, 5):
        log.scalars(step, {"loss": float(step)})
    log.event(5, "preview", path="x.png")
    log.event(6, "preview", path="y.png")
    log.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "scalars", "step": 7, "lo')  # torn by a kill
    assert [e["step"] for e in read_events(tmp_path / "events.jsonl")] == [2, 4, 5, 5, 6]

    # Step 5 ended a run inside an interval of 2: its means come again, whole, at step 6.
    RunLog(tmp_path, from_step=5, every=2, tensorboard=False).close()
    left = [(e["event"], e["step"]) for e in read_events(tmp_path / "events.jsonl")]
    assert left == [("scalars", 2), ("scalars", 4), ("preview", 5)]
    text = (tmp_path / "events.jsonl").read_text()
    assert all(json.loads(line) for line in text.splitlines()) and text.endswith("\n")


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, from_step=0)
    log.scalars(1, {"loss": 0.5})
    log.scalars(2, {"loss": 0.25})
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "x.png")
    log.image(2, "preview", tmp_path / "x.png")
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [e.step for e in events.Images("preview")] == [2]


# Previews.


class InThisProcess:
    """Stands for the preview's own process: runs its command line here and now."""

    commands: list[list[str]] = []

    def __init__(self, command: list[str], **_: Any):
        self.commands.append(command)
        try:
            main(command[3:])
        except SystemExit as error:
            self.returncode = error.code

    def poll(self) -> Any:
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        return "", "a warning\nrepa: the last line says it\n"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_toy_cache(tmp_path)
    (tmp_path / "preview_parts.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(previews.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(InThisProcess, "commands", [])
    with isolated_tables():
        yield tmp_path


def preview_run(workspace: Path) -> list[dict[str, Any]]:
    config = toy_train_config(
        workspace,
        plugins=("preview_parts",),
        steps=5,
        preview_every=2,
        preview_count=3,
        checkpoint_every=100,
        keep=1,
    )
    folder = train(plan_training(config), Silent()).run.folder
    return [e for e in read_events(folder / "events.jsonl") if e["event"] != "scalars"]


def test_previews_show_the_ema_of_their_step(workspace: Path) -> None:
    write_weights(tiny_autoencoder(weights="tiny.safetensors"))
    events = preview_run(workspace)
    assert [(e["event"], e["step"]) for e in events] == [("preview", 2), ("preview", 4)]
    for event, command in zip(events, InThisProcess.commands, strict=True):
        assert command[command.index("--device") + 1] == "cpu"
        name = f"step-{event['step']:08d}"
        assert command[command.index("--checkpoint") + 1].endswith(f"checkpoints/{name}.pt")
        with Image.open(event["path"]) as picture:
            assert picture.size == (68, 3 * 66 + 2)  # three classes, one image of each
        assert Path(event["path"]).parent.name == name


def test_a_preview_that_fails_is_one_event(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = preview_run(workspace)  # without the decoder's weights
    assert [(e["event"], e["step"]) for e in events] == [
        ("preview_skipped", 2),
        ("preview_skipped", 4),
    ]
    assert all(e["reason"] == "repa: the last line says it" for e in events)
    assert "preview of step 2 skipped: repa: the last line says it" in capsys.readouterr().err
