"""Pictures and scores on the way, made from the saved EMA in processes of their own.

The trainer never needs the decoder or a feature network. What cannot be made is one event, not a
failure. One process works at a time, since it shares device or cores with the training.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.objects import LocalStore, get_json
from repa_pipeline.exits import TERMINATED
from repa_pipeline.observe import RunLog
from repa_pipeline.training.checkpoint import checkpoint_path, complete_steps
from repa_pipeline.training.world import never

PREVIEW, EVALUATION = "preview", "evaluation"
MAX_WAITING = 4  # of each kind
_SAMPLER_STEPS = 50
_BATCH = 64
_PICTURE = 100
_POLL_S = 0.1


@dataclasses.dataclass
class _Job:
    """A preview or an evaluation of one checkpoint: commands to run in turn, and the running one.

    errors: a file that takes what the commands say, which may be more than a pipe holds.
    """

    kind: str
    step: int
    checkpoint: Path
    output: Path = Path()
    commands: list[list[str]] = dataclasses.field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    errors: IO[str] | None = None


class Previews:
    """Makes previews and evaluations of a run and logs how they ended; on `with`.

    Leaving it without an error waits for what was started; an error stops it.
    """

    def __init__(self, config: TrainConfig, folder: Path, log: RunLog):
        self._config = config
        self._folder = folder
        self._log = log
        self._waiting: list[_Job] = []
        self._job: _Job | None = None

    def __enter__(self) -> Previews:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.stop()

    @property
    def steps_in_use(self) -> set[int]:
        """Steps whose checkpoint may still be read."""
        return {job.step for job in (*self._waiting, self._job) if job is not None}

    def start(self, step: int, checkpoint: Path) -> None:
        """Makes what is due at `step` once `checkpoint` is complete, which it need not be yet.

        Every one that waits keeps a checkpoint on the disk: of too many the oldest gives way.
        """
        for kind in kinds_due(self._config, step):
            alike = [job for job in self._waiting if job.kind == kind]
            if len(alike) >= MAX_WAITING:
                self._waiting.remove(alike[0])
                self._skip(alike[0], "those before it took too long")
            self._waiting.append(_Job(kind, step, checkpoint))
        self.poll()

    def finish(self, asked: Callable[[], bool] = never) -> bool:
        """Waits until nothing is left; False when it was `asked` to end before that.

        What is not done then is dropped: a later `catch_up` makes it.
        """
        while not asked():
            self.poll(is_last=True)
            if self._job is None:
                return True
            time.sleep(_POLL_S)
        is_idle = not self.steps_in_use
        self.stop()
        return is_idle

    def poll(self, is_last: bool = False) -> None:
        """Logs what is finished and starts what is next; is_last: no checkpoint comes any more."""
        while (job := self._job or self._next(is_last)) is not None:
            if job.process is not None and job.process.poll() is None:
                return
            try:
                self._advance(job)
            except (OSError, ValueError, KeyError) as error:
                self._job = None
                self._skip(job, str(error))

    def catch_up(
        self, last_step: int, checkpoints: Path, events: Iterable[Mapping[str, Any]]
    ) -> None:
        """Makes what the end of an earlier process, killed or stopped, has cut short.

        events: what the run has logged; checkpoints: its folder, read up to `last_step`.
        """
        undone = left_undone(self._config, last_step, checkpoints, events)
        self._waiting += [_Job(k, step, checkpoint_path(checkpoints, step)) for k, step in undone]
        self.poll()

    def stop(self) -> None:
        """Ends the running process and drops what waits: a later `catch_up` makes it."""
        if self._job is not None and self._job.process is not None:
            self._job.process.terminate()
            self._job.process.wait()
        self._waiting, self._job = [], None

    def _next(self, is_last: bool) -> _Job | None:
        """The first waiting job whose checkpoint is complete; with `is_last` others are over."""
        for job in list(self._waiting):
            if job.step in complete_steps(job.checkpoint.parent):
                # In this order: the saver's thread asks meanwhile for the steps in use.
                self._job = job
                self._waiting.remove(job)
                return job
            if is_last:
                self._waiting.remove(job)
                self._skip(job, f"there is no complete checkpoint {job.checkpoint.name}")
        return None

    def _advance(self, job: _Job) -> None:
        """Starts the next command of a job, or logs its end."""
        if job.errors is None:
            job.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            job.output = self._folder / f"{job.kind}s" / _folder_name(job.checkpoint)
            job.commands = [self._sample_command(job)]
            if job.kind == EVALUATION:
                job.commands.append(self._evaluate_command(job))
        code = 0 if job.process is None else job.process.wait()
        if code == 0 and job.commands:
            job.process = subprocess.Popen(
                job.commands.pop(0),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=job.errors,
                text=True,
            )
            return
        self._job = None
        job.errors.seek(0)
        said = job.errors.read().strip().splitlines()
        job.errors.close()
        if code in TERMINATED:
            # Batch systems signal every process of a job: no word of it, and `catch_up` makes it.
            print(f"{job.kind} of step {job.step} was told to end", file=sys.stderr)
        elif code:
            self._skip(job, said[-1] if said else f"exit code {code}, no message")
        else:
            self._report(job)

    def _report(self, job: _Job) -> None:
        picture = job.output / "grid.png"
        numbers: dict[str, float] = {}
        how: dict[str, Any] = {}
        if job.kind == EVALUATION:
            numbers, how = read_scores(job.output / "result.json")
            large = ("images", "ledger", *(p.name for p in job.output.glob("judge.*")))
            for part in large:  # scored, and large
                shutil.rmtree(job.output / part, ignore_errors=True)
        self._log.image(job.step, job.kind, picture)
        self._log.event(job.step, job.kind, numbers, path=str(picture), **how)

    def _skip(self, job: _Job, reason: str) -> None:
        self._log.event(job.step, f"{job.kind}_skipped", reason=reason)
        print(f"{job.kind} of step {job.step} skipped: {reason}", file=sys.stderr)

    def _sample_command(self, job: _Job) -> list[str]:
        config = self._config
        count = shown = at_once = config.preview_count
        if job.kind == EVALUATION:
            count = config.evaluate_count
            shown, at_once = min(count, _PICTURE), min(count, _BATCH)
        command = ["sample", "--checkpoint", str(job.checkpoint), "--output", str(job.output)]
        command += ["--sampler", "ode", "--num-steps", str(_SAMPLER_STEPS)]
        command += ["--labels", "balanced", "--num-images", str(count), "--no-npz"]
        command += ["--grid", str(shown), "--batch-size", str(at_once)]
        # Whatever the settings file wants of the user's own samples.
        command += ["--run", "", "--outputs", "images", "--score", ""]
        return self._command(command)

    def _evaluate_command(self, job: _Job) -> list[str]:
        """Scores by the network and reference that the settings file names.

        A curve is drawn of few samples, which a score for its own sake would refuse.
        """
        command = ["evaluate", "--samples", str(job.output), "--source", self._config.source]
        command += ["--output", str(job.output / "result.json"), "--features", ""]
        command += ["--preset", self._config.preset, "--allow-few", "--blocks", "0"]
        for plugin in self._config.plugins:
            command += ["--plugins", plugin]
        return self._command(command)

    def _command(self, arguments: list[str]) -> list[str]:
        config = self._config
        shared = ["--workspace", config.workspace, "--device", config.device]
        shared += ["--threads", "1", "--executor", "local"]
        # On another machine than the driver's it may not be there.
        if config.settings_file and Path(config.settings_file).is_file():
            shared += ["--config", config.settings_file]
        return [sys.executable, "-m", "repa_pipeline", *arguments, *shared]


def kinds_due(config: TrainConfig, step: int) -> list[str]:
    """What is to be made of the checkpoint after `step`; where there is any, one must be saved."""
    rhythms = {PREVIEW: config.preview_every, EVALUATION: config.evaluate_every}
    return [kind for kind, every in rhythms.items() if every and step % every == 0]


def left_undone(
    config: TrainConfig, last_step: int, checkpoints: Path, events: Iterable[Mapping[str, Any]]
) -> list[tuple[str, int]]:
    """(kind, step) of what is due of complete checkpoints up to `last_step` and had no end yet."""
    ended = {(event["step"], event["event"].removesuffix("_skipped")) for event in events}
    steps = [step for step in complete_steps(checkpoints) if step <= last_step]
    due = [(kind, step) for step in steps for kind in kinds_due(config, step)]
    return [(kind, step) for kind, step in due if (step, kind) not in ended]


def read_scores(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The finite numbers of a result.json as "eval/NAME", and how they were measured."""
    result = get_json(LocalStore(str(path.parent)), path.name)
    numbers = {
        f"eval/{name}": float(value)
        for name, value in result["metrics"].items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    how = {
        "num_samples": result["num_samples"],
        "network": result["network"]["name"],
        "reference": result["reference"]["name"],
    }
    return numbers, how


def _folder_name(checkpoint: Path) -> str:
    """Another name for another checkpoint of the same step, which a run may have that went on from
    an older one on a device whose sums differ from time to time."""
    marker = checkpoint.with_suffix(".json")
    digest = get_json(LocalStore(str(marker.parent)), marker.name)["sha256"]
    return f"{checkpoint.stem}.{digest[:8]}"
