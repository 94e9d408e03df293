"""One worker's pipeline: shard k+1 loads while k is computed and k-1 is stored.

Each phase has a thread of its own, so at most one shard is in each of them, and the model always
runs on the same thread. What a shard's bytes are does not depend on any of this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from repa_pipeline.engine.contracts import Commits, Shard, Work

PHASES = ("load", "compute", "store")
# Shards a driver should have under way with a worker: one in the model, one loading or storing.
IN_FLIGHT = 2


class Pipeline:
    """Runs shards of one Work through its phases; a context manager."""

    def __init__(self, work: Work):
        self._work = work
        self._pools = {phase: ThreadPoolExecutor(1, f"repa-{phase}") for phase in PHASES}
        self._lock = threading.Lock()
        self._doing: dict[str, int] = {}

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def submit(self, shard: Shard) -> Future[Commits]:
        """Starts a shard; the future holds its commits, or the error of the phase that failed."""
        done: Future[Commits] = Future()

        def step(phase: str, run: Callable[[], Any], then: Callable[[Any], None]) -> None:
            def call() -> None:
                self._note(phase, shard.index)
                try:
                    result = run()
                except BaseException as error:
                    self._note(phase, None)
                    done.set_exception(error)
                else:
                    self._note(phase, None)
                    then(result)

            try:
                self._pools[phase].submit(call)
            except RuntimeError as error:  # closed meanwhile
                done.set_exception(error)

        def compute(loaded: Any) -> None:
            step("compute", lambda: self._work.compute(shard, loaded), store)

        def store(computed: Any) -> None:
            step("store", lambda: self._work.store(shard, computed), done.set_result)

        step("load", lambda: self._work.load(shard), compute)
        return done

    def state(self) -> str:
        """What it does now, for people: 'load 13, compute 12'."""
        with self._lock:
            doing: Mapping[str, int] = dict(self._doing)
        return ", ".join(f"{phase} {doing[phase]}" for phase in PHASES if phase in doing) or "idle"

    def close(self) -> None:
        """Ends the threads; shards not yet begun are dropped."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)

    def _note(self, phase: str, shard: int | None) -> None:
        with self._lock:
            if shard is None:
                self._doing.pop(phase, None)
            else:
                self._doing[phase] = shard
