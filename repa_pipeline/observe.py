"""What a run tells: progress for a person; a log as JSON lines, on TensorBoard, on W&B."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from repa_pipeline.config import decisions
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import MissingError, StageError

if TYPE_CHECKING:
    from repa_pipeline.config_train import TrainConfig

NUM_SHOWN_WORKERS = 8


class Silent:
    """Progress for callers that want none."""

    def start(self, title: str, total: int, done: int, unit: str) -> None:
        return

    def advance(self, count: int, **facts: float) -> None:
        return

    def workers(self, states: Mapping[str, str]) -> None:
        return

    def finish(self) -> None:
        return


class PlainLines:
    """A line at the start, about every `every_s` seconds, and at the end: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 10.0):
        self.stream = stream or sys.stderr
        self.every_s = every_s

    def start(self, title: str, total: int, done: int, unit: str) -> None:
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self.began = self.last = time.monotonic()
        self.at_start, self.states = done, ""
        self._say(f"{title}: {done:,} of {total:,} {unit} done, {total - done:,} to do")

    def advance(self, count: int, **facts: float) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.every_s and self.done < self.total:
            self.last = now
            shown = "".join(f", {n} {_shown(v)}" for n, v in facts.items() if math.isfinite(v))
            said = f"{self.done:,} of {self.total:,} {self._rate()}{shown}{self.states}"
            self._say(f"{self.title}: {said}")

    def workers(self, states: Mapping[str, str]) -> None:
        self.states = _listed(states)

    def finish(self) -> None:
        self._say(f"{self.title}: {self.done:,} of {self.total:,} {self._rate()}")

    def _rate(self) -> str:
        rate = (self.done - self.at_start) / max(time.monotonic() - self.began, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        left_text = f", {left:.0f} s left" if 0 < left < float("inf") else ""
        return f"{self.unit}, {rate:.1f} {self.unit}/s{left_text}"

    def _say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


class Bar:
    """A bar with rate and time left: for a terminal."""

    def start(self, title: str, total: int, done: int, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        self.at_start, self.began, self.unit = done, time.monotonic(), unit
        self.bar = Rich(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}{task.fields[workers]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(
            title, total=total, completed=done, rate=unit, facts="", workers=""
        )
        self.bar.start()

    def advance(self, count: int, **facts: float) -> None:
        self.bar.advance(self.task, count)
        gained = self.bar.tasks[0].completed - self.at_start
        rate = gained / max(time.monotonic() - self.began, 1e-9)
        shown = " ".join(f"{n} {_shown(v)}" for n, v in facts.items() if math.isfinite(v))
        self.bar.update(self.task, rate=f"{self.unit}, {rate:.1f}/s", facts=shown)

    def workers(self, states: Mapping[str, str]) -> None:
        self.bar.update(self.task, workers=_listed(states))

    def finish(self) -> None:
        self.bar.stop()


def _shown(value: float) -> str:
    """Whole and large numbers in full, others with four digits."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"


def _listed(states: Mapping[str, str]) -> str:
    """Worker states on one line; of many workers only how many do the same."""
    if len(states) > NUM_SHOWN_WORKERS:
        counts = Counter(state.split()[0] for state in states.values())
        return f" [{len(states)} workers: " + ", ".join(f"{n} {s}" for s, n in counts.items()) + "]"
    return " [" + "; ".join(f"{name}: {state}" for name, state in states.items()) + "]"


def progress_for_stream() -> Progress:
    """A bar when standard error is a terminal, plain lines otherwise."""
    return Bar() if sys.stderr.isatty() else PlainLines()


class Sink:
    """A place that a run's log goes to; every method may be left out."""

    def record(
        self, step: int, event: str, numbers: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        """Takes what happened at `step`: numbers to plot, and other facts (JSON values)."""

    def image(self, step: int, name: str, png: Path) -> None:
        """Takes a picture file."""

    def flush(self) -> None:
        """Makes everything taken so far survive a kill."""

    def close(self) -> None:
        """Takes no more."""


class RunLog:
    """The log of one training run, written to any number of sinks; without any it is dropped."""

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = tuple(sinks)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the means of the interval that ends at `step`."""
        for sink in self.sinks:
            sink.record(step, "scalars", values, {})

    def event(
        self, step: int, event: str, numbers: Mapping[str, float] | None = None, **facts: Any
    ) -> None:
        """Logs something that happened, with the numbers that were found if there are any.

        `step` may lie before steps that are logged already.
        """
        for sink in self.sinks:
            sink.record(step, event, numbers or {}, facts)

    def image(self, step: int, name: str, png: Path) -> None:
        """Logs a picture file."""
        for sink in self.sinks:
            sink.image(step, name, png)

    def flush(self) -> None:
        """Makes everything logged so far survive a kill."""
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class JsonLines(Sink):
    """`events.jsonl` in `folder`: the record that `repa report` reads.

    Opening it at step s drops what a killed run logged of the steps after s, and the means of an
    interval of `every` steps that the end of a run cut short, so that the curve of a resumed run is
    the curve of an undisturbed one. What was found out late about a step up to s stays.
    """

    def __init__(self, folder: Path, from_step: int, every: int = 1):
        self.path = folder / "events.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_after(from_step, every)
        self._file = open(self.path, "a", encoding="utf-8")

    def record(
        self, step: int, event: str, numbers: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        record = {"event": event, "step": step, **facts, **numbers}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()

    def _drop_after(self, step: int, every: int) -> None:
        if not self.path.exists():
            return
        kept = [
            json.dumps(record) + "\n"
            for record in read_events(self.path)
            if record["step"] <= step
            and not (record["event"] == "scalars" and record["step"] % every)
        ]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)


class TensorBoard(Sink):
    """Numbers and pictures as TensorBoard files in `folder`/tensorboard."""

    def __init__(self, folder: Path, from_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def record(
        self, step: int, event: str, numbers: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, png: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(png) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases(Sink):
    """Numbers and pictures in a Weights & Biases project; WANDB_MODE=offline keeps them local.

    The run's id is kept in `folder`/wandb.json, so that a resumed run goes on in the same one.
    `settings` are shown with the run; the command line, which may hold secrets, is not sent. A
    service that fails later on is left out with a word on standard error: it must not cost the run.
    Raises MissingError without the wandb package, StageError when the service refuses the run.
    """

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise MissingError(
                "--wandb needs the wandb package, which is not installed: pip install wandb, or "
                "leave --wandb out"
            ) from error
        self._wandb: Any = wandb
        try:
            self._run: Any = wandb.init(
                project=project,
                id=_wandb_id(folder, project),
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=dict(settings),
                settings=wandb.Settings(
                    console="off", disable_git=True, save_code=False, x_disable_meta=True
                ),
            )
            # A resumed run logs steps again, and evaluations come late: an axis of our own.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of the service's many kinds none may look like a bug
            raise StageError(
                f"Weights & Biases did not open project '{project}' ({error}): run `wandb login`, "
                "set WANDB_MODE=offline, or leave --wandb out"
            ) from error

    def record(
        self, step: int, event: str, numbers: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        if numbers:
            self._send(lambda run: run.log({**numbers, "step": step}))

    def image(self, step: int, name: str, png: Path) -> None:
        self._send(lambda run: run.log({name: self._wandb.Image(str(png)), "step": step}))

    def close(self) -> None:
        self._send(lambda run: run.finish())

    def _send(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            print(
                f"Weights & Biases failed ({error}) and gets nothing more; events.jsonl goes on",
                file=sys.stderr,
            )


def _wandb_id(folder: Path, project: str) -> str:
    """The id that this run has in `project`; a new one is kept before it is used."""
    path = folder / "wandb.json"
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if project not in ids:
        ids[project] = secrets.token_hex(8)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(ids) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return ids[project]


def open_run_log(folder: Path, config: TrainConfig, from_step: int, rank: int = 0) -> RunLog:
    """The log of the run in `folder` that goes on at `from_step`; only rank 0 writes.

    Raises what WeightsAndBiases raises.
    """
    if rank:
        return RunLog(())
    sinks: list[Sink] = [JsonLines(folder, from_step, config.log_every)]
    if config.tensorboard:
        sinks.append(TensorBoard(folder, from_step))
    if config.wandb:
        sinks.append(WeightsAndBiases(folder, config.wandb, decisions(config)))
    return RunLog(sinks)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Reads `events.jsonl`; a last line torn by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
