"""The trainer's reader: verified records of sealed arrays, in the canonical order, ahead of time.

plan (data/schedule.py) -> fetch with threads (data/fetch.py) -> check each record's crc32c and put
it into its place in its batch (data/scatter.py). A shard that a coming batch needs is read whole
into all the batches it has rows for; so the batches of a window of shards are begun together, and
the next window is read while the current one is trained on. Where it stands is three integers:
seed, epoch, and step in the epoch.

Memory: the buffers of the batches that are begun, which is a window (`window` shards of every
lane) and, to read ahead, another one (`read_ahead_bytes` to have less, or more). From a store that
has no local copy it is up to one more, so that a shard that lies in two windows is read once; and
every thread has a range of 16 MiB on top.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.array import SealedArray
from repa_pipeline.data.buffers import Buffers
from repa_pipeline.data.fetch import Fetcher, Unit
from repa_pipeline.data.local_copy import LocalCopy
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.data.order import Order, rank_slice
from repa_pipeline.data.schedule import EpochPlan, ShardRows, plan_epoch

READ_THREADS = 8
# Step -> bool [global batch]: whose mirrored view is drawn.
Views = Callable[[int], npt.NDArray[np.bool_]]
# Batches that the consumer may still use: the one it was given, and the one before.
_NUM_HELD = 2
_LEAST_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Records:
    """One rank's slice of batch `step`.

    rows: int64 [b]; arrays: for each array of the reader its records [b, ...], as stored. They
    are views of memory that is used again: they hold until the next batch but one is asked for.
    """

    step: int
    rows: npt.NDArray[np.int64]
    arrays: tuple[npt.NDArray[np.generic], ...]

    def copy(self) -> Records:
        """The same batch in memory of its own."""
        return dataclasses.replace(self, arrays=tuple(array.copy() for array in self.arrays))


@dataclasses.dataclass
class _Batch:
    """A batch that is begun: its rows and memory, the units it still waits for, what went wrong."""

    rows: npt.NDArray[np.int64]
    buffers: Buffers
    num_missing: int
    error: BaseException | None = None


class Reader:
    """Iterates over batches first_step, ..., last_step - 1; a context manager.

    With `mirrored`, the arrays of the mirrored view in the same order, each row of a batch is read
    from the view that `views` says. read_ahead_bytes: memory for batches that are begun, 0 for two
    windows; never less than one window. local_copy: a folder where what is read of the arrays'
    store is kept, at most `local_copy_bytes`, and read from then on. pin: batches in page-locked
    memory, from which a CUDA device copies on its own; such a copy must have ended when the next
    batch but one is asked for.

    Raises, at the batch that needs it, DamagedError for a missing, short, replaced or corrupted
    shard and StoreError for a store that does not answer. `wait_s` sums the time the consumer
    waited, `num_bytes` what was read, `num_store_bytes` that part of it that a store sent and
    `buffer_bytes` the memory of all batches.
    """

    def __init__(
        self,
        arrays: Sequence[SealedArray],
        order: Order,
        *,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
        mirrored: Sequence[SealedArray] = (),
        views: Views | None = None,
        read_threads: int = READ_THREADS,
        read_ahead_bytes: int = 0,
        local_copy: str | None = None,
        local_copy_bytes: int = 0,
        pin: bool = False,
    ):
        self.wait_s = 0.0
        self._order = order
        self._steps = range(first_step, last_step)
        self._slice = rank_slice(order.batch_size, rank, world_size)
        self._views = views if mirrored else None
        self._arrays = (tuple(arrays), tuple(mirrored))
        self._read_ahead_bytes = read_ahead_bytes
        self._pin = pin
        copy = LocalCopy(local_copy, local_copy_bytes) if local_copy else None
        self._has_copy = copy is not None
        self._fetcher = Fetcher(read_threads, self._done, copy)
        self._planner = threading.Thread(target=self._plan, name="repa-reader-plan", daemon=True)
        self._changed = threading.Condition()
        self._batches: dict[int, _Batch] = {}
        self._free: list[Buffers] = []
        self._num_buffers = 0
        self._most_batches = 0
        self._next = first_step
        self._is_ending = False
        self._error: BaseException | None = None  # of the planner

    @property
    def num_bytes(self) -> int:
        return self._fetcher.num_bytes

    @property
    def num_store_bytes(self) -> int:
        return self._fetcher.num_store_bytes

    @property
    def buffer_bytes(self) -> int:
        return self._num_buffers * self._batch_bytes

    def __enter__(self) -> Reader:
        if self._slice.stop > self._slice.start:  # else there is nothing to read
            self._fetcher.__enter__()
            self._planner.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        if self._planner.ident is not None:
            self._planner.join()
            self._fetcher.__exit__()
        with self._changed:
            for buffers in (*self._free, *(batch.buffers for batch in self._batches.values())):
                buffers.close()
            # Their memory is to go now, not when the garbage collector comes by.
            self._free.clear()
            self._batches.clear()

    def __iter__(self) -> Iterator[Records]:
        while self._next < self._steps.stop:
            began = time.perf_counter()
            batch = self._take(self._next)
            self.wait_s += time.perf_counter() - began
            step = self._next
            self._next += 1
            arrays = tuple(
                flat.view(array.spec.layout.dtype).reshape(len(flat), *array.spec.layout.shape)
                for flat, array in zip(batch.buffers.parts, self._arrays[0], strict=True)
            )
            yield Records(step, batch.rows, arrays)

    def _take(self, step: int) -> _Batch:
        """Batch `step`, once it is complete."""
        if self._slice.stop == self._slice.start:
            return _Batch(np.empty(0, np.int64), self._new_buffers(), 0)
        with self._changed:
            released = self._batches.pop(step - _NUM_HELD, None)
            if released:
                self._free.append(released.buffers)
            self._changed.notify_all()  # the planner waits for room, or for this step
            while True:
                batch = self._batches.get(step)
                error = self._error or (batch.error if batch else None)
                if error:
                    raise error
                if batch and not batch.num_missing:
                    return batch
                self._changed.wait()

    def _plan(self) -> None:
        """The planner's thread: begins shards in order, as far ahead as memory allows."""
        try:
            for steps in self._epochs():
                plan = self._plan_epoch(steps)
                self._set_limit(plan)
                for shard in plan.shards:
                    if not self._wait_for_room(shard):
                        return
                    self._begin(shard, plan, steps.start)
        except BaseException as error:  # handed to the consumer, who raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _plan_epoch(self, steps: range) -> EpochPlan:
        arrays = (*self._arrays[0], *self._arrays[1])
        is_near = self._has_copy or all(isinstance(a.store, LocalStore) for a in arrays)
        flipped = None
        if self._views:
            flipped = np.stack([self._views(step)[self._slice] for step in steps])
        return plan_epoch(self._order, steps, self._slice, flipped, split=is_near)

    def _epochs(self) -> Iterator[range]:
        """The steps, cut at the ends of epochs."""
        start = self._steps.start
        while start < self._steps.stop:
            end = (start // self._order.steps_per_epoch + 1) * self._order.steps_per_epoch
            yield range(start, min(end, self._steps.stop))
            start = end

    def _set_limit(self, plan: EpochPlan) -> None:
        ahead = max(plan.num_window, _LEAST_AHEAD)
        if self._read_ahead_bytes:
            ahead = max(0, self._read_ahead_bytes // self._batch_bytes - plan.num_open)
        self._most_batches = plan.num_open + _NUM_HELD + ahead

    def _wait_for_room(self, shard: ShardRows) -> bool:
        """Waits until the batches that a shard begins fit; False at the end."""
        with self._changed:
            while not self._is_ending:
                num_new = sum(step not in self._batches for step in shard.touched)
                # What the consumer waits for is begun in any case.
                if len(self._batches) + num_new <= self._most_batches or shard.first <= self._next:
                    return True
                self._changed.wait()
        return False

    def _begin(self, shard: ShardRows, plan: EpochPlan, first_step: int) -> None:
        arrays = self._arrays[shard.view]
        for step in shard.touched:
            if step not in self._batches:  # nobody else begins batches
                inside = step - first_step
                missing = int(plan.num_shards[inside]) * len(arrays)
                batch = _Batch(plan.rows[inside], self._new_buffers(), missing)
                with self._changed:
                    self._batches[step] = batch
        batches = [self._batches[step] for step in shard.steps.tolist()]
        positions = shard.positions.tolist()
        for column, array in enumerate(arrays):
            places = [
                batch.buffers.parts[column][position]
                for batch, position in zip(batches, positions, strict=True)
            ]
            self._fetcher.add(Unit(array, shard.shard, shard.records, places, shard.touched))

    def _done(self, unit: Unit) -> None:
        """Called by a thread of the fetcher."""
        with self._changed:
            for step in unit.steps:
                batch = self._batches.get(step)
                if batch is None:  # the reader was left
                    return
                batch.num_missing -= 1
                batch.error = batch.error or unit.error
                if batch.error or not batch.num_missing:
                    self._changed.notify_all()

    def _new_buffers(self) -> Buffers:
        """Buffers of a released batch, else fresh ones."""
        with self._changed:
            if self._free:
                return self._free.pop()
        self._num_buffers += 1
        rows = self._slice.stop - self._slice.start
        return Buffers(rows, self._record_bytes, self._pin)

    @property
    def _record_bytes(self) -> list[int]:
        return [array.spec.layout.record_bytes for array in self._arrays[0]]

    @property
    def _batch_bytes(self) -> int:
        rows: int = self._slice.stop - self._slice.start
        return max(1, rows * sum(self._record_bytes))
