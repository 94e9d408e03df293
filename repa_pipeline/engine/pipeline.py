"""One worker's pipeline: shard k+1 loads while k is computed and k-1 is stored.

Each phase has a thread of its own, so at most one shard is in each of them, and the model always
runs on the same thread. A shard begins to load when the one before the last has left the model: two
shards' images are in memory at the most. What a shard's bytes are does not depend on any of this.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from repa_pipeline.engine.contracts import Commits, Shard, Work

PHASES = ("load", "compute", "store")
# Shards a driver should have under way with a worker: one in the model, one loading or storing.
IN_FLIGHT = 2
# Shards whose images are in memory at once: one in the model, one loading or loaded.
_HELD = 2


class Pipeline:
    """Runs shards of one Work through its phases; a context manager."""

    def __init__(self, work: Work):
        self._work = work
        self._pools = {phase: ThreadPoolExecutor(1, f"repa-{phase}") for phase in PHASES}
        self._lock = threading.Lock()
        self._doing: dict[str, int] = {}
        self._room = threading.Semaphore(_HELD)
        self._is_closed = False

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
                try:
                    result = run()
                except BaseException as error:
                    done.set_exception(error)
                else:
                    then(result)

            try:
                self._pools[phase].submit(call)
            except RuntimeError as error:  # closed meanwhile
                done.set_exception(error)

        def compute(loaded: Any) -> None:
            step("compute", lambda: self._compute(shard, loaded), store)

        def store(computed: Any) -> None:
            step("store", lambda: self._store(shard, computed), done.set_result)

        step("load", lambda: self._load(shard), compute)
        return done

    def state(self) -> str:
        """What it does now, for people: 'load 13, compute 12'."""
        with self._lock:
            doing: Mapping[str, int] = dict(self._doing)
        return ", ".join(f"{phase} {doing[phase]}" for phase in PHASES if phase in doing) or "idle"

    def close(self) -> None:
        """Ends the threads; shards not yet begun are dropped."""
        self._is_closed = True
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, shard: Shard) -> Any:
        self._room.acquire()
        try:
            if self._is_closed:
                raise CancelledError
            with self._noted("load", shard):
                return self._work.load(shard)
        except BaseException:
            self._room.release()
            raise

    def _compute(self, shard: Shard, loaded: Any) -> Any:
        try:
            with self._noted("compute", shard):
                return self._work.compute(shard, loaded)
        finally:
            self._room.release()

    def _store(self, shard: Shard, computed: Any) -> Commits:
        with self._noted("store", shard):
            return self._work.store(shard, computed)

    @contextlib.contextmanager
    def _noted(self, phase: str, shard: Shard) -> Iterator[None]:
        with self._lock:
            self._doing[phase] = shard.index
        try:
            yield
        finally:
            with self._lock:
                del self._doing[phase]
