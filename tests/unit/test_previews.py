"""Pictures and scores on the way: of the right weights, in turn, and never the end of a run."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.cli import main
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.metrics.frechet import FrechetReference
from repa_pipeline.metrics.networks import load_network
from repa_pipeline.observe import JsonLines, RunLog, Silent, read_events
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import isolated_tables, toy_train_config, write_toy_cache
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights
from repa_pipeline.training import previews
from repa_pipeline.training.checkpoint import save_checkpoint
from repa_pipeline.training.previews import Previews, kinds_due, read_scores
from repa_pipeline.training.world import Stopping

PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [tiny_autoencoder(weights="tiny.safetensors")]
"""
# What the user's own samples are is not what a preview is.
PROJECT = """
[evaluate]
reference = "reference.npz"
output = "mine.json"
features = "mine"

[sample]
run = "another"
outputs = ["latents"]
score = ["inception-v3"]
"""


class InThisProcess:
    """Stands for a process: runs its command line here and now."""

    commands: list[list[str]] = []

    def __init__(self, command: list[str], *, stderr: IO[str], **_: Any):
        self.commands.append(command[3:])
        self.returncode: Any = 0
        try:
            main(command[3:])
        except SystemExit as error:
            self.returncode = error.code
        stderr.write("a warning\nrepa: the last line says it\n")

    def poll(self) -> Any:
        return self.returncode

    def wait(self) -> Any:
        return self.returncode


class Held:
    """Stands for a process that works until it is told to end."""

    started: list[Held] = []

    def __init__(self, command: list[str], **_: Any):
        self.command, self.returncode, self.was_stopped = command[3:], None, False
        self.started.append(self)

    def poll(self) -> Any:
        return self.returncode

    def wait(self) -> Any:
        return self.returncode

    def terminate(self) -> None:
        self.returncode, self.was_stopped = -15, True


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_toy_cache(tmp_path)
    (tmp_path / "preview_parts.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(previews.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(InThisProcess, "commands", [])
    with isolated_tables():
        yield tmp_path


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Held]:
    monkeypatch.setattr(previews.subprocess, "Popen", Held)
    monkeypatch.setattr(Held, "started", [])
    return Held.started


def settings(workspace: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {"plugins": ("preview_parts",), "steps": 5, "checkpoint_every": 100}
    return toy_train_config(workspace, **{**given, "keep": 1, **changes})


def events_of(config: TrainConfig) -> list[dict[str, Any]]:
    folder = train(plan_training(config), Silent()).run.folder
    return [e for e in read_events(folder / "events.jsonl") if e["event"] != "scalars"]


def flag(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def test_previews_show_the_ema_of_their_step(workspace: Path) -> None:
    write_weights(tiny_autoencoder(weights="tiny.safetensors"))
    events = events_of(settings(workspace, preview_every=2, preview_count=3))
    assert [(e["event"], e["step"]) for e in events] == [("preview", 2), ("preview", 4)]
    for event, command in zip(events, InThisProcess.commands, strict=True):
        assert (flag(command, "device"), flag(command, "executor")) == ("cpu", "local")
        assert flag(command, "threads") == "1" and "--no-use-ema" not in command
        name = f"step-{event['step']:08d}"
        assert flag(command, "checkpoint").endswith(f"checkpoints/{name}.pt")
        with Image.open(event["path"]) as picture:
            assert picture.size == (68, 3 * 66 + 2)  # three classes, one image of each
        assert Path(event["path"]).parent.name.startswith(name)


def test_the_settings_file_of_the_run_is_read(
    workspace: Path, held: list[Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Held, "poll", lambda self: 1)
    monkeypatch.setattr(Held, "wait", lambda self: 1)
    other = workspace / "other.toml"
    other.write_text(
        f'workspace = "{workspace}"\n[train]\nbatch_size = 8\npreview_every = 1\n'
        "[models.'SiT-XS/2']\ndepth = 3\nwidth = 64\nnum_heads = 2\n"
    )
    arguments = ["--config", "other.toml", "--model", "SiT-XS/2", "--steps", "1"]
    for name in ("given", "named"):
        with pytest.raises(SystemExit) as ended:
            main(["train", name, "--device", "cpu", *arguments])
        assert ended.value.code == 0
        assert flag(held[-1].command, "config") == "other.toml"
        arguments = arguments[2:]
        monkeypatch.setenv("REPA_CONFIG", "other.toml")
    config = toy_train_config(workspace, settings_file="gone.toml", preview_every=1)
    shown = Previews(config, workspace, RunLog([]))
    shown.start(1, save_checkpoint(workspace / "checkpoints", 1, {}))
    assert "--config" not in held[-1].command


def test_what_fails_is_one_event(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Without the decoder's weights.
    events = events_of(settings(workspace, preview_every=2, evaluate_every=4))
    assert [(e["event"], e["step"]) for e in events] == [
        ("preview_skipped", 2),
        ("preview_skipped", 4),
        ("evaluation_skipped", 4),
    ]
    assert all(e["reason"] == "repa: the last line says it" for e in events)
    assert "preview of step 2 skipped: repa: the last line says it" in capsys.readouterr().err


def write_reference(path: Path) -> Any:
    """An ADM-style reference of 70 images of 64 pixels; returns its mu and sigma."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (70, 64, 64, 3), np.uint8)
    pool = digits_features(images)
    mu, sigma = pool.mean(0), np.cov(pool, rowvar=False)
    np.savez(path, arr_0=images, mu=mu, sigma=sigma)
    return mu, sigma


def digits_features(images: Any) -> Any:
    import torch

    network = load_network("digits-cnn", weights=None, device="cpu")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return network.features(pixels).pool.double().numpy()


def test_scores_are_those_of_the_samples(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tiny_autoencoder(weights="tiny.safetensors"))
    mu, sigma = write_reference(workspace / "reference.npz")
    (workspace / "repa.toml").write_text(PROJECT)
    seen: list[Any] = []
    report = Previews._report

    def keep_images(self: Previews, job: Any) -> None:
        from repa_pipeline.stages.sample import open_samples, sample_blocks

        seen.append(np.concatenate(list(sample_blocks(open_samples(str(job.output))))))
        report(self, job)

    monkeypatch.setattr(Previews, "_report", keep_images)
    config = settings(workspace, evaluate_every=3, evaluate_count=11, keep=9)
    (event,) = events_of(config)
    sample, evaluate = InThisProcess.commands
    assert (event["event"], event["step"]) == ("evaluation", 3)
    assert flag(sample, "num-images") == "11" and flag(sample, "labels") == "balanced"
    # Network and reference are the workspace's: digits-cnn by the preset, the file by repa.toml.
    assert "--network" not in evaluate and "--reference" not in evaluate
    folder = Path(event["path"]).parent
    result = json.loads((folder / "result.json").read_text())
    assert (result["network"]["name"], result["reference"]["name"]) == (
        "digits-cnn",
        "reference.npz",
    )
    numbers = {name: value for name, value in event.items() if name.startswith("eval/")}
    assert numbers == read_scores(folder / "result.json")[0]
    how = {"num_samples": 11, "network": "digits-cnn", "reference": "reference.npz"}
    assert {name: event[name] for name in how} == how
    assert {"eval/frechet_distance", "eval/inception_score"} <= numbers.keys()
    assert len(seen[0]) == 11
    pool = digits_features(seen[0])
    distance = FrechetReference(mu, sigma).distance(pool.mean(0), np.cov(pool, rowvar=False))
    assert numbers["eval/frechet_distance"] == pytest.approx(distance.distance, rel=1e-3)
    # What is large is gone once it is scored; made again, it is the same.
    assert sorted(path.name for path in folder.iterdir()) == [
        "grid.png",
        "result.json",
        "settings.json",
    ]
    picture = (folder / "grid.png").read_bytes()
    for command in (sample, evaluate):
        assert InThisProcess(["", "", "", *command], stderr=io.StringIO()).poll() in (0, None)
    assert json.loads((folder / "result.json").read_text()) == result
    assert (folder / "grid.png").read_bytes() == picture

    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(folder.parents[1] / "tensorboard"))
    board.Reload()
    (point,) = board.Scalars("eval/frechet_distance")
    assert point.step == 3
    assert point.value == pytest.approx(numbers["eval/frechet_distance"], rel=1e-6)


# In turn, with processes that take as long as the test says.


def new_previews(folder: Path, from_step: int = 0, **changes: Any) -> Previews:
    rhythm = {"preview_every": 1, "evaluate_every": 2, **changes}
    log = RunLog([JsonLines(folder, from_step)])
    return Previews(toy_train_config(folder, **rhythm), folder, log)


def said(folder: Path) -> list[tuple[str, int, str]]:
    events = read_events(folder / "events.jsonl")
    return [(e["event"], e["step"], e.get("reason", "")) for e in events]


def test_one_process_at_a_time_and_few_waiting(
    tmp_path: Path, held: list[Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "MAX_WAITING", 1)
    shown = new_previews(tmp_path)
    for step in (1, 2, 3):
        shown.start(step, save_checkpoint(tmp_path / "checkpoints", step, {}))
    # The preview of step 1 works, the evaluation of 2 waits, the preview of 3 replaced that of 2.
    assert len(held) == 1 and shown.steps_in_use == {1, 2, 3}
    assert said(tmp_path) == [("preview_skipped", 2, "those before it took too long")]
    held[0].returncode = 3
    shown.poll()
    assert said(tmp_path)[1:] == [("preview_skipped", 1, "exit code 3, no message")]
    assert len(held) == 2 and held[1].command[0] == "sample" and shown.steps_in_use == {2, 3}
    assert "step-00000002" in flag(held[1].command, "output")
    held[1].returncode = 0
    shown.poll()
    assert len(held) == 3 and held[2].command[:2] == ["evaluate", "--samples"]
    assert flag(held[2].command, "samples") == flag(held[1].command, "output")
    assert len(said(tmp_path)) == 2

    held[2].returncode = 0  # and yet no result
    shown.poll()
    (event, step, reason) = said(tmp_path)[2]
    assert (event, step) == ("evaluation_skipped", 2) and "result.json" in reason
    assert shown.steps_in_use == {3}
    shown.stop()
    assert held[3].was_stopped and shown.steps_in_use == set() and len(said(tmp_path)) == 3

    # A later process makes what was stopped, and nothing that had its end; up to where it goes on.
    save_checkpoint(tmp_path / "checkpoints", 4, {})
    again = new_previews(tmp_path, from_step=3)
    again.catch_up(3, tmp_path / "checkpoints", read_events(tmp_path / "events.jsonl"))
    assert again.steps_in_use == {3} and len(held) == 5
    assert "step-00000003" in flag(held[4].command, "output")


def test_a_checkpoint_that_is_not_yet_written_is_waited_for(
    tmp_path: Path, held: list[Held]
) -> None:
    path = tmp_path / "checkpoints" / "step-00000001.pt"
    shown = new_previews(tmp_path)
    shown.start(1, path)
    shown.poll()
    assert not held and shown.steps_in_use == {1}
    save_checkpoint(tmp_path / "checkpoints", 1, {})
    shown.poll()
    assert len(held) == 1 and flag(held[0].command, "checkpoint") == str(path)
    held[0].returncode = 1
    with shown:
        shown.start(3, tmp_path / "checkpoints" / "step-00000003.pt")
    assert said(tmp_path)[-1] == (
        *("preview_skipped", 3),
        "there is no complete checkpoint step-00000003.pt",
    )


def test_what_dies_of_sigterm_is_made_later(tmp_path: Path, held: list[Held]) -> None:
    """Batch systems send it to every process of a job."""
    shown = new_previews(tmp_path, evaluate_every=0)
    for step, code in enumerate((-15, 143, -9), start=1):
        shown.start(step, save_checkpoint(tmp_path / "checkpoints", step, {}))
        held[-1].returncode = code
        shown.poll()
    assert said(tmp_path) == [("preview_skipped", 3, "exit code -9, no message")]
    again = new_previews(tmp_path, from_step=3, evaluate_every=0)
    again.catch_up(3, tmp_path / "checkpoints", read_events(tmp_path / "events.jsonl"))
    assert again.steps_in_use == {1, 2}


def test_waiting_ends_when_the_run_is_told_to_end(tmp_path: Path, held: list[Held]) -> None:
    shown = new_previews(tmp_path)
    shown.start(2, save_checkpoint(tmp_path / "checkpoints", 2, {}))
    asked = iter([False, False, True])
    assert not shown.finish(lambda: next(asked))
    assert held[0].was_stopped and shown.steps_in_use == set() and said(tmp_path) == []
    assert shown.finish(lambda: True)  # there is nothing left


def test_an_error_of_the_run_stops_what_works(tmp_path: Path, held: list[Held]) -> None:
    with pytest.raises(KeyboardInterrupt), new_previews(tmp_path) as shown:
        shown.start(1, save_checkpoint(tmp_path / "checkpoints", 1, {}))
        raise KeyboardInterrupt
    assert held[0].was_stopped and said(tmp_path) == []


def test_a_process_that_cannot_start_is_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("out of memory")

    monkeypatch.setattr(previews.subprocess, "Popen", refuse)
    shown = new_previews(tmp_path)
    shown.start(1, save_checkpoint(tmp_path / "checkpoints", 1, {}))
    assert said(tmp_path) == [("preview_skipped", 1, "out of memory")]
    assert shown.steps_in_use == set()


def test_another_checkpoint_of_the_same_step_has_a_folder_of_its_own(
    tmp_path: Path, held: list[Held]
) -> None:
    outputs = []
    for content in ({"a": 1}, {"a": 1}, {"a": 2}):
        shown = new_previews(tmp_path)
        shown.start(1, save_checkpoint(tmp_path / "checkpoints", 1, content))
        outputs.append(flag(held[-1].command, "output"))
        shown.stop()
    assert outputs[0] == outputs[1] != outputs[2]


def test_rhythms(tmp_path: Path) -> None:
    config = toy_train_config(tmp_path, preview_every=2, evaluate_every=3)
    assert [kinds_due(config, step) for step in (1, 2, 3, 6)] == [
        [],
        ["preview"],
        ["evaluation"],
        ["preview", "evaluation"],
    ]
    assert kinds_due(toy_train_config(tmp_path), 6) == []


def test_a_run_that_is_told_to_stop_waits_for_nothing(
    workspace: Path, held: list[Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([False, False, True])
    monkeypatch.setattr(Stopping, "asked", lambda self: next(asked))
    config = settings(workspace, preview_every=2, steps=9)
    result = train(plan_training(config), Silent())
    assert (result.step, result.stopped) == (3, True)
    assert len(held) == 1 and held[0].was_stopped and said(result.run.folder)[1:] == []

    # Who goes on makes what was left: here, it ends at once, without a word.
    monkeypatch.setattr(Stopping, "asked", lambda self: False)
    monkeypatch.setattr(Held, "poll", lambda self: 1)
    monkeypatch.setattr(Held, "wait", lambda self: 1)
    result = train(plan_training(settings(workspace, preview_every=2, steps=4)), Silent())
    skipped = [(e, step) for e, step, _ in said(result.run.folder) if e != "scalars"]
    assert skipped == [("preview_skipped", 2), ("preview_skipped", 4)]


def test_a_finished_run_makes_what_its_end_cut_short(
    workspace: Path, held: list[Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = iter([False] * 5 + [True])  # four steps, and a look at what is made
    monkeypatch.setattr(Stopping, "heard", lambda self: next(heard))
    config = settings(workspace, preview_every=4, steps=4)
    result = train(plan_training(config), Silent())
    assert (result.step, result.stopped) == (4, True)  # told while the last preview was made
    assert held[0].was_stopped
    assert {event for event, *_ in said(result.run.folder)} == {"scalars"}

    monkeypatch.setattr(Stopping, "heard", lambda self: False)
    monkeypatch.setattr(Held, "poll", lambda self: 1)
    monkeypatch.setattr(Held, "wait", lambda self: 1)
    result = train(plan_training(config), Silent())
    assert (result.step, result.num_new, result.stopped) == (4, 0, False)
    assert [(e, step) for e, step, _ in said(result.run.folder) if e != "scalars"] == [
        ("preview_skipped", 4)
    ]
