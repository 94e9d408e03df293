"""The worker: one process that loads weights once and runs shards. Knows nothing of Ray.

All methods are coroutines, so that it answers while it computes; the work itself runs on the
threads of engine/pipeline.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pickle
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from repa_pipeline import __version__
from repa_pipeline.cluster.carry import Source, install
from repa_pipeline.engine.contracts import Commits, Shard, Work
from repa_pipeline.engine.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Failure:
    """What went wrong with a call in a worker, and where."""

    error: BaseException
    trace: str
    is_drop: bool = False

    def raise_here(self) -> NoReturn:
        """Raises the error in this process; where it happened is shown as its cause."""
        raise self.error from _WorkerTrace(self.trace)


@dataclasses.dataclass(frozen=True)
class Greeting:
    """What a worker says of itself."""

    host: str
    pid: int
    version: str
    unseen: tuple[str, ...]


class _WorkerTrace(Exception):
    """The traceback of a worker, shown above that of the driver."""

    def __str__(self) -> str:
        return f"in a worker:\n{self.args[0]}"


class Dropped(Exception):
    """The driver needs this shard no more."""


class ShardWorker:
    """An actor. The order of calls: greet, open, then run, drop and state in any order, drain."""

    def __init__(self, folder: str, modules: Mapping[str, Source]):
        # Relative paths of the settings are the driver's; on other machines it may not exist.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        install(modules)
        self._work: _Droppable | None = None
        self._pipeline: Pipeline | None = None

    async def greet(self, paths: Sequence[str]) -> Greeting:
        """Who it is, and which of `paths` it does not see."""
        unseen = tuple(path for path in paths if not os.path.exists(path))
        return Greeting(socket.gethostname(), os.getpid(), __version__, unseen)

    async def open(self, open_stage: Callable[[], Work]) -> Failure | None:
        """Loads what the stage needs; None when it is ready for shards."""
        try:
            self._work = _Droppable(await asyncio.to_thread(open_stage))
        except BaseException as error:
            return failure(error)
        self._pipeline = Pipeline(self._work)
        return None

    async def run(self, shard: Shard) -> Commits | Failure:
        """The commits of a shard, or what went wrong."""
        if self._pipeline is None or self._work is None:
            raise RuntimeError("run before open")
        self._work.want(shard.index)
        try:
            return await asyncio.wrap_future(self._pipeline.submit(shard))
        except BaseException as error:
            return failure(error)

    async def drop(self, index: int) -> None:
        """Leaves out what is not begun of a shard."""
        if self._work is not None:
            self._work.drop(index)

    async def state(self) -> str:
        """What it does now, for people."""
        return self._pipeline.state() if self._pipeline is not None else "starting"

    async def drain(self) -> None:
        """Stores nothing from now on; returns when what is being stored is stored."""
        if self._work is not None:
            await asyncio.to_thread(self._work.stop)


class _Droppable:
    """A Work whose phases leave out shards that are not wanted any more."""

    def __init__(self, work: Work):
        self._work = work
        self._dropped: set[int] = set()
        self._is_stopped = False
        self._storing = threading.Lock()

    def load(self, shard: Shard) -> Any:
        self._check(shard)
        return self._work.load(shard)

    def compute(self, shard: Shard, loaded: Any) -> Any:
        self._check(shard)
        return self._work.compute(shard, loaded)

    def store(self, shard: Shard, computed: Any) -> Commits:
        with self._storing:
            self._check(shard)
            return self._work.store(shard, computed)

    def want(self, index: int) -> None:
        self._dropped.discard(index)

    def drop(self, index: int) -> None:
        self._dropped.add(index)

    def stop(self) -> None:
        self._is_stopped = True
        with self._storing:
            return

    def _check(self, shard: Shard) -> None:
        if self._is_stopped or shard.index in self._dropped:
            raise Dropped(f"shard {shard.index}")


def failure(error: BaseException) -> Failure:
    """The error as it can travel: one that does not pickle becomes its text."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Failure(error.with_traceback(None), trace, isinstance(error, Dropped))
