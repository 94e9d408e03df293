"""Checkpoints beside training: a copy off the device at once, everything else on threads.

    with Checkpointer(run, config, previews.in_use, log) as saver:
        saver.save(step, content)    # training stands still for the copy alone
        saver.check()                # now and then: an error of a write that failed meanwhile
        saver.wait()                 # until all is on the disk, and on the mirror

One thread writes, hashes and syncs the file and then its marker (checkpoint.py), so a checkpoint is
there completely or not at all; another brings it to the mirror (mirror.py). A mirror that cannot
be reached does not stop training: it is told, and tried again after the next checkpoint; at the
end it is an error. One that another trainer has taken over ends the run at once.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import RepaError, StageError
from repa_pipeline.observe import RunLog
from repa_pipeline.training.checkpoint import (
    checkpoint_path,
    complete_steps,
    prune,
    save_checkpoint,
)
from repa_pipeline.training.mirror import Mirror, TakenOverError, load_newest, mirror_of
from repa_pipeline.training.runs import Run
from repa_pipeline.training.snapshot import Snapshots

__all__ = ["Checkpointer", "load_newest"]


class Checkpointer:
    """Saves the checkpoints of a run; of several ranks the first one alone has it.

    `in_use` gives the steps whose file something still reads: they are not removed. `wait_s` is
    how long training has stood still for checkpoints. All methods are for one thread. Opening it
    brings what an earlier run left unsent to the mirror.
    """

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        in_use: Callable[[], set[int]] = set,
        log: RunLog | None = None,
    ):
        self.wait_s = 0.0
        self._run = run
        self._config = config
        self._in_use = in_use
        self._log = log
        self._snapshots = Snapshots()
        self._writer = _Background("checkpoint")
        mirror = mirror_of(run, config)
        self._sender = None if mirror is None else _Sender(mirror, config)

    def __enter__(self) -> Checkpointer:
        if self._sender is not None and self._run.last_step():
            self._sender.send(None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for everything; an error of a write is only printed where another one ends the
        run already."""
        try:
            self.wait()
        except RepaError as own:
            if error is None:
                raise
            print(f"also: {own}", file=sys.stderr)
        finally:
            self._snapshots.close()

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; when it returns, `content` may change.

        Waits for the checkpoint before, should it still be written. Raises StageError when that
        one could not be: every older complete checkpoint is kept.
        """
        began = time.perf_counter()
        self._writer.join()
        self.check()
        frozen = self._snapshots.take(content)
        self._writer.start(lambda: self._write(step, frozen))
        self.wait_s += time.perf_counter() - began

    def completed(self, step: int) -> Path | None:
        """The file of the checkpoint of `step` once it is complete on this machine."""
        is_complete = step in complete_steps(self._run.checkpoints)
        return checkpoint_path(self._run.checkpoints, step) if is_complete else None

    def check(self) -> None:
        """Raises what a write that is over ended with, and logs what the mirror refused."""
        self._writer.check()
        if self._sender is not None:
            self._sender.check()
            for step, reason in self._sender.take_faults():
                if self._log is not None:
                    self._log.event(step, "mirror_failed", reason=reason)

    def wait(self) -> None:
        """Until every checkpoint is on the disk, and the last one on the mirror.

        Raises StageError when the disk or the mirror does not take it; what is on the disk stays.
        """
        lacking = None
        try:
            self._writer.join()
        finally:
            if self._sender is not None:
                lacking = self._sender.finish()
            self.check()
        if lacking is not None:
            raise StageError(lacking)

    def wait_for_mirror(self) -> None:
        """Until the last checkpoint was brought to the mirror, or failed to be: `check` tells.

        Raises StageError when it could not be written to the disk.
        """
        self._writer.join()
        if self._sender is not None:
            self._sender.join()

    def _write(self, step: int, content: Mapping[str, Any]) -> None:
        save_checkpoint(self._run.checkpoints, step, content)
        config, folder = self._config, self._run.checkpoints
        prune(folder, config.keep, self._in_use(), config.keep_every, newest=step)
        if self._sender is not None:
            self._sender.send(step)


class _Background:
    """One call at a time on a thread of its own; `join` raises what it raised."""

    def __init__(self, name: str):
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, call: Callable[[], None]) -> None:
        """Runs `call`; the call before must be over."""
        # A daemon: a user who interrupts twice is not kept waiting.
        thread = threading.Thread(target=self._run, args=(call,), name=self._name, daemon=True)
        thread.start()
        self._thread = thread  # now: another thread may join what it finds here

    def join(self) -> None:
        """Waits; raises the error of the call once."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises the error of a call that is over, once; waits for nothing."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._error = error


class _Sender:
    """Brings checkpoints to the mirror on a thread; of several that wait the newest goes first."""

    def __init__(self, mirror: Mirror, config: TrainConfig):
        self._mirror = mirror
        self._config = config
        self._lock = threading.Lock()
        self._background = _Background("mirror")
        self._wanted: list[int | None] = []
        self._is_sending = False
        self._faults: list[tuple[int, str]] = []

    def send(self, step: int | None) -> None:
        """Asks for all that the policy keeps to be there; `step`: the newest one that counts."""
        with self._lock:
            self._wanted.append(step)
            if self._is_sending:
                return
            self._is_sending = True
        self._background.join()
        self._background.start(self._work)

    def check(self) -> None:
        """Raises an error that is no fault of the store's."""
        self._background.check()

    def join(self) -> None:
        """Waits until nothing is on its way."""
        self._background.join()

    def take_faults(self) -> list[tuple[int, str]]:
        """(step, reason) of what failed since the last call."""
        with self._lock:
            faults, self._faults = self._faults, []
        return faults

    def finish(self) -> str | None:
        """Waits, and brings the last state there; returns what is to be said if that fails."""
        self._background.join()
        run = self._mirror.run
        step = run.last_step()
        if not step:
            return None
        reason = "its upload was not completed"
        try:
            self._sync(None)
            if self._mirror.has(step):
                return None
        except TakenOverError:
            raise
        except (RepaError, OSError) as error:
            reason = str(error)
        return (
            f"{self._mirror.store.url} lacks the last checkpoint of run '{run.name}', step "
            f"{step:,}: {reason}; nothing is lost, it is in {run.checkpoints}: mend the store and "
            "run the same command again"
        )

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._is_sending = False
                    return
                step, self._wanted = self._wanted[-1], []
            try:
                self._try(step)
            except BaseException:
                with self._lock:
                    self._is_sending = False
                raise

    def _try(self, step: int | None) -> None:
        try:
            self._sync(step)
        except TakenOverError:
            raise
        except (RepaError, OSError) as error:
            told = step or self._mirror.run.last_step()
            with self._lock:
                self._faults.append((told, str(error)))
            print(
                f"checkpoint {told:,} is not at the mirror: {error}; it is tried again with the "
                "next one",
                file=sys.stderr,
                flush=True,
            )

    def _sync(self, step: int | None) -> None:
        self._mirror.sync(self._config.keep, self._config.keep_every, step)
