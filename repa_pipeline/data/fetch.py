"""Reads shards with a few threads: from a local disk, a store, or the local copy of a store.

A shard is read in ranges of about 16 MiB of whole records, each by one thread: from a file into
the places where the records are wanted (data/scatter.py), from a store by one GET into memory of
the thread and from there. What a store is asked again, and how long an answer may take, is said by
its RetryPolicy.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.array import SealedArray
from repa_pipeline.data.local_copy import Busy, LocalCopy
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.data.scatter import Place, Wanted
from repa_pipeline.data.shard_sources import FileSource, Source, StoreSource, open_file
from repa_pipeline.data.shards import RecordLayout

RANGE_BYTES = 16 * 2**20
# How long another process is given to write a copy before the store is asked instead.
PATIENCE_S = 60.0
_LOOK_AGAIN_S = 0.05
_LEAVE_S = 10.0


def num_ranges(layout: RecordLayout, num_rows: int) -> int:
    """In how many ranges a shard is read."""
    return min(num_rows, -(-num_rows * layout.record_bytes // RANGE_BYTES))


def ranges(layout: RecordLayout, num_rows: int) -> list[tuple[int, int]]:
    """The records start..stop of each range of a shard, sizes differing by at most one."""
    count = num_ranges(layout, num_rows)
    return [(i * num_rows // count, (i + 1) * num_rows // count) for i in range(count)]


class _Left(Exception):
    """The reader was left before this was read."""


class Unit:
    """A shard to read; `error` says what came of it once it is done.

    steps: for its owner, the batches that need it.
    """

    def __init__(
        self,
        array: SealedArray,
        shard: int,
        records: npt.NDArray[np.int64],
        places: Sequence[Place],
        steps: Sequence[int],
    ):
        self.array = array
        self.shard = shard
        self.wanted = Wanted(array, shard, records, places)
        self.steps = steps
        self.error: BaseException | None = None
        self.left = 0  # ranges
        self.asked_at: float | None = None  # when another was first found writing its copy


class Fetcher:
    """Threads that read units in the order in which they are added; a context manager.

    on_done is called by such a thread. `num_bytes` were read so far, `num_store_bytes` of them by
    requests to a store.
    """

    def __init__(
        self, num_threads: int, on_done: Callable[[Unit], None], copy: LocalCopy | None = None
    ):
        self.num_bytes = 0
        self.num_store_bytes = 0
        self._on_done = on_done
        self._copy = copy
        self._changed = threading.Condition()
        self._jobs: collections.deque[Callable[[], None]] = collections.deque()
        self._later: collections.deque[tuple[float, Unit]] = collections.deque()
        self._is_ending = False
        self._memory = threading.local()
        self._threads = [
            threading.Thread(target=self._work, name=f"repa-reader-{i}", daemon=True)
            for i in range(num_threads)
        ]

    def __enter__(self) -> Fetcher:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What is under way is finished or, where a store does not answer, left behind."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        until = time.monotonic() + _LEAVE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def add(self, unit: Unit) -> None:
        """Reads a unit when those added before are begun."""
        with self._changed:
            self._jobs.append(partial(self._begin, unit))
            self._changed.notify()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while True:
                if self._is_ending:  # jobs that are left give back what they hold
                    return self._jobs.popleft() if self._jobs else None
                # What waits for another process goes first, once it is time: it is older.
                wait = self._later[0][0] - time.monotonic() if self._later else None
                if wait is not None and wait <= 0:
                    return partial(self._begin, self._later.popleft()[1])
                if self._jobs:
                    return self._jobs.popleft()
                self._changed.wait(wait)

    def _begin(self, unit: Unit) -> None:
        if self._is_ending:
            return
        try:
            source = self._source(unit)
        except Busy:
            with self._changed:
                self._later.append((time.monotonic() + _LOOK_AGAIN_S, unit))
            return
        except BaseException as error:  # raised where the batch is needed
            unit.error = error
            return self._on_done(unit)
        parts = ranges(unit.array.spec.layout, unit.wanted.num_rows)
        unit.left = len(parts)
        jobs = [partial(self._read, unit, source, start, stop) for start, stop in parts]
        with self._changed:
            self._jobs.extendleft(reversed(jobs))
            self._changed.notify(len(jobs))

    def _source(self, unit: Unit) -> Source:
        """Where to read a unit; raises Busy, or DamagedError for a file that is not there."""
        array, shard = unit.array, unit.shard
        if self._copy is None:
            if isinstance(array.store, LocalStore):
                return FileSource(unit.wanted, open_file(array.store, array, shard))
            return StoreSource(unit.wanted)
        fd = self._copy.open(array, shard)
        if fd is not None:
            return FileSource(unit.wanted, fd, self._copy)
        try:
            return StoreSource(unit.wanted, self._copy.begin(array, shard))
        except Busy:
            unit.asked_at = unit.asked_at or time.monotonic()
            if time.monotonic() - unit.asked_at < PATIENCE_S:
                raise
            return StoreSource(unit.wanted)

    def _read(self, unit: Unit, source: Source, start: int, stop: int) -> None:
        num_bytes = 0
        error: BaseException | None = None
        try:
            if self._is_ending:
                raise _Left
            if unit.error is None:  # else another range of it has failed
                num_bytes = source.read(self._memory, start, stop)
        except BaseException as raised:
            error = raised
        with self._changed:
            self.num_bytes += num_bytes
            self.num_store_bytes += num_bytes if isinstance(source, StoreSource) else 0
            unit.error = unit.error or error
            unit.left -= 1
            is_last = not unit.left
        if is_last:
            self._end(unit, source)

    def _end(self, unit: Unit, source: Source) -> None:
        try:
            source.close(unit.error is None)
        except BaseException as error:
            unit.error = unit.error or error
        if isinstance(source, FileSource) and source.drop(unit.error):
            unit.error = None
            with self._changed:  # from the store this time
                self._jobs.appendleft(partial(self._begin, unit))
                self._changed.notify()
            return
        self._on_done(unit)
