"""What a run tells and saves: logs, progress, checkpoints, previews."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.reader import Reader
from repa_pipeline.engine.run import Progress
from repa_pipeline.observe import RunLog, open_run_log, read_events
from repa_pipeline.training.checkpoint import checkpoint_path
from repa_pipeline.training.checkpointer import Checkpointer
from repa_pipeline.training.previews import Previews, left_undone
from repa_pipeline.training.runs import Run, note_settings
from repa_pipeline.training.speed import Speed, peak_flops
from repa_pipeline.training.state import TrainState
from repa_pipeline.training.world import World


class Waited(Protocol):
    """What training waits for, and for how long it has."""

    @property
    def wait_s(self) -> float: ...


class Outputs:
    """Files and lines of rank 0, a context manager; the other ranks take part in the sums alone.

    about: what every checkpoint says of itself. means: of the last log line.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        world: World,
        progress: Progress,
        *,
        device: str,
        flops_per_image: float | None,
        about: Mapping[str, Any],
    ):
        self._config, self._run, self._world, self._progress = config, run, world, progress
        self._about = about
        peak = peak_flops(device, config.peak_tflops)
        self._speed = Speed(flops_per_image, peak, world.size, device)
        self._stack = contextlib.ExitStack()
        self._main: tuple[RunLog, Checkpointer, Previews] | None = None
        self._step = self._logged_step = 0
        self.means: dict[str, float] = {}

    def begin(self, step: int, faults: list[str]) -> None:
        """At `step`, gone back to because of `faults`."""
        self._step = self._logged_step = step
        if not self._world.is_main:
            return
        config, run = self._config, self._run
        if step < config.steps:
            note_settings(run, config)
        elif not left_undone(config, step, run.checkpoints, _events(run)):
            # A finished run is left alone; the mirror may lack what an earlier end left unsent.
            self._stack.enter_context(Checkpointer(run, config))
            return
        log = open_run_log(run.folder, config, step)
        self._stack.callback(log.close)
        for fault in faults:
            log.event(step, "checkpoint_refused", reason=fault)
            print(f"going back to step {step:,}: {fault}", file=sys.stderr)
        previews = Previews(config, run.folder, log)
        saver = Checkpointer(run, config, lambda: previews.steps_in_use, log)
        self._stack.enter_context(saver)
        previews.catch_up(step, run.checkpoints, _events(run))
        self._main = log, saver, previews
        self._progress.start(f"train {run.name}", config.steps, step, "steps")
        self._stack.callback(self._progress.finish)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self._stack:
            if self._main and error is not None:
                self._main[2].stop()

    def finish(self, asked: Callable[[], bool]) -> bool:
        """Waits until all is saved and shown; False when it was `asked` to end before that.

        Previews and scores that are not done then are left to who goes on. The last checkpoint
        comes first: when it is complete older ones go, but for those in use.
        """
        if not self._main:
            return True
        self._main[1].wait()
        return self._main[2].finish(asked)

    def follow(self, reader: Reader, *others: Waited) -> None:
        """From now on `reader` is what is read, and it and `others` are waited for."""
        self._reader, self._waited = reader, (reader, *others)
        self._logged_step = self._step
        self._speed.restart()

    def advance(self) -> None:
        """A step was made."""
        self._step += 1
        if self._main:
            self._progress.advance(1, loss=self.means.get("loss", float("nan")))

    def log(self, step: int, means: dict[str, float]) -> None:
        """A log line: means over the interval, and how fast it went."""
        num_images = (step - self._logged_step) * self._config.batch_size
        wait_s = sum(waited.wait_s for waited in self._waited)
        rates = self._speed.read(num_images, wait_s, self._reader.num_bytes)
        self._logged_step, self.means = step, {**means, **rates}
        if self._main:
            log, saver, previews = self._main
            log.scalars(step, self.means)
            saver.check()
            previews.poll()

    def save(self, state: TrainState, reader: Mapping[str, int]) -> None:
        """A checkpoint, and what is due to be made of it. Every rank must call it.

        reader: where the order of the data stands.
        """
        changing = state.to_checkpoint(self._world)
        if not self._main:
            return
        log, saver, previews = self._main
        log.flush()
        saver.save(state.step, {**changing, "reader": dict(reader), "about": self._about})
        previews.start(state.step, checkpoint_path(self._run.checkpoints, state.step))


def _events(run: Run) -> list[dict[str, Any]]:
    path = run.folder / "events.jsonl"
    return read_events(path) if path.is_file() else []
