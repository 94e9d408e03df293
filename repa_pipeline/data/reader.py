"""The trainer's reader: verified records of sealed arrays, in the canonical order, ahead of time.

A thread reads whole shards into reused buffers, checks every record's crc32c, and gathers the
rows of this rank's slice of each global batch. Where it stands is one integer, the step.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.array import SealedArray
from repa_pipeline.data.order import Order, rank_slice
from repa_pipeline.data.shards import as_rows

_Failure = tuple[BaseException]
# Step -> bool [global batch]: whose mirrored view is drawn.
Views = Callable[[int], npt.NDArray[np.bool_]]


@dataclasses.dataclass(frozen=True)
class Records:
    """One rank's slice of batch `step`.

    rows: int64 [b]; arrays: for each array of the reader its records [b, ...], as stored.
    """

    step: int
    rows: npt.NDArray[np.int64]
    arrays: tuple[npt.NDArray[np.generic], ...]


class Reader:
    """Iterates over batches first_step, ..., last_step - 1; a context manager.

    With `mirrored`, the arrays of the mirrored view in the same order, each row of a batch is read
    from the view that `views` says. Raises DamagedError (from the thread, at the batch that needs
    it) for a missing, short or corrupted shard. `wait_s` sums the time the consumer waited.
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
        prefetch: int = 4,
        mirrored: Sequence[SealedArray] = (),
        views: Views | None = None,
    ):
        self.wait_s = 0.0
        self.num_bytes = 0
        self._order = order
        self._steps = range(first_step, last_step)
        self._slice = rank_slice(order.batch_size, rank, world_size)
        self._views = views if mirrored else None
        self._windows: list[tuple[_Window, ...]] = [(_Window(array),) for array in arrays]
        if mirrored:
            pairs = zip(arrays, mirrored, strict=True)
            self._windows = [(_Window(array), _Window(flipped)) for array, flipped in pairs]
        self._queue: queue.Queue[Records | _Failure | None] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="repa-reader", daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Records]:
        while True:
            began = time.perf_counter()
            item = self._queue.get()
            self.wait_s += time.perf_counter() - began
            if item is None or isinstance(item, tuple):
                # The thread has ended: whoever iterates again must not wait for it.
                self._queue.put(item)
            if item is None:
                return
            if isinstance(item, tuple):
                raise item[0]
            yield item

    def _produce(self) -> None:
        try:
            for step in self._steps:
                if not self._put(self._read(step)):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._put((error,))

    def _put(self, item: Records | _Failure | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _read(self, step: int) -> Records:
        epoch, inside = divmod(step, self._order.steps_per_epoch)
        if inside == 0 or step == self._steps.start:
            self._expect(self._order.epoch(epoch)[inside:, self._slice], step)
        rows = self._order.rows(step)[self._slice]
        flipped = self._flipped(step)
        return Records(step, rows, tuple(_take(views, rows, flipped) for views in self._windows))

    def _expect(self, ahead: npt.NDArray[np.int64], first_step: int) -> None:
        """Tells every window which rows the rest of the epoch asks it for."""
        steps = range(first_step, first_step + len(ahead))
        flipped = np.array([self._flipped(step) for step in steps]) if self._views else None
        for views in self._windows:
            for view, window in enumerate(views):
                window.expect(ahead if flipped is None else ahead[flipped == view])

    def _flipped(self, step: int) -> npt.NDArray[np.bool_] | None:
        return self._views(step)[self._slice] if self._views else None


def _take(
    views: tuple[_Window, ...],
    rows: npt.NDArray[np.int64],
    flipped: npt.NDArray[np.bool_] | None,
) -> npt.NDArray[np.generic]:
    """The records of `rows`, each from the view that is drawn for it."""
    if flipped is None:
        return views[0].take(rows)
    plain, mirrored = views[0].take(rows[~flipped]), views[1].take(rows[flipped])
    records = np.empty((len(rows), *plain.shape[1:]), plain.dtype)
    records[~flipped], records[flipped] = plain, mirrored
    return records


class _Window:
    """The shards of one array in use, each held until its last row of the epoch is read."""

    def __init__(self, array: SealedArray):
        self._array = array
        self._records: dict[int, npt.NDArray[np.uint8]] = {}
        self._buffers: dict[int, bytearray] = {}
        self._spare: list[bytearray] = []
        self._left = np.zeros(array.spec.num_shards, np.int64)

    def expect(self, rows: npt.NDArray[np.int64]) -> None:
        """Tells which rows will be asked for until the next call."""
        shards = rows.reshape(-1) // self._array.spec.layout.shard_rows
        self._left = np.bincount(shards, minlength=self._array.spec.num_shards)
        for shard in [shard for shard in self._records if not self._left[shard]]:
            self._release(shard)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.generic]:
        """Copies the records of `rows`, in their order."""
        layout = self._array.spec.layout
        shards, inside = np.divmod(rows, layout.shard_rows)
        gathered = np.empty((len(rows), layout.record_bytes), np.uint8)
        # Shards in hand first: most end here, and make room before others are read.
        for shard in sorted(np.unique(shards), key=lambda shard: shard not in self._records):
            here = np.flatnonzero(shards == shard)
            gathered[here] = self._shard(int(shard))[inside[here]]
            self._left[shard] -= len(here)
            if self._left[shard] <= 0:
                self._release(int(shard))
        return as_rows(gathered, layout)

    def _shard(self, shard: int) -> npt.NDArray[np.uint8]:
        if shard not in self._records:
            buffer = self._spare.pop() if self._spare else self._array.new_buffer()
            self._records[shard] = self._array.read_shard(shard, buffer)
            self._buffers[shard] = buffer
        return self._records[shard]

    def _release(self, shard: int) -> None:
        del self._records[shard]
        self._spare.append(self._buffers.pop(shard))
