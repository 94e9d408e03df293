"""What a run tells: events as JSON lines and TensorBoard scalars, progress for a person."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from repa_pipeline.engine.run import Progress

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
            shown = "".join(f", {n} {v:.4g}" for n, v in facts.items() if math.isfinite(v))
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
        shown = " ".join(f"{n} {v:.4g}" for n, v in facts.items() if math.isfinite(v))
        self.bar.update(self.task, rate=f"{self.unit}, {rate:.1f}/s", facts=shown)

    def workers(self, states: Mapping[str, str]) -> None:
        self.bar.update(self.task, workers=_listed(states))

    def finish(self) -> None:
        self.bar.stop()


def _listed(states: Mapping[str, str]) -> str:
    """Worker states on one line; of many workers only how many do the same."""
    if len(states) > NUM_SHOWN_WORKERS:
        counts = Counter(state.split()[0] for state in states.values())
        return f" [{len(states)} workers: " + ", ".join(f"{n} {s}" for s, n in counts.items()) + "]"
    return " [" + "; ".join(f"{name}: {state}" for name, state in states.items()) + "]"


def progress_for_stream() -> Progress:
    """A bar when standard error is a terminal, plain lines otherwise."""
    return Bar() if sys.stderr.isatty() else PlainLines()


class RunLog:
    """Events of one training run: `events.jsonl` and TensorBoard files in `folder`.

    Opening it at step s drops what a killed run logged after s, and the means of an interval of
    `every` steps that the end of a run cut short, so that the curve of a resumed run is the curve
    of an undisturbed one.
    """

    def __init__(self, folder: Path, from_step: int, every: int = 1, tensorboard: bool = True):
        self.path = folder / "events.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_after(from_step, every)
        self._file = open(self.path, "a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Logs numbers at `step` to both outputs."""
        self._write({"event": "scalars", "step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, png: Path) -> None:
        """Logs a picture file to TensorBoard."""
        if self._board is not None:
            import numpy as np
            from PIL import Image

            with Image.open(png) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Logs something that happened."""
        self._write({"event": event, "step": step, **facts})

    def flush(self) -> None:
        """Makes everything logged so far survive a kill."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

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


def read_events(path: Path) -> list[dict[str, Any]]:
    """Reads `events.jsonl`; a last line torn by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
