"""Which rows of which shards one rank needs in an epoch, and in which batch each of them goes."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.order import Order

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """The rows that are needed of one shard of one view (0: plain, 1: mirrored).

    records: int64 [n] ascending, their places in the shard; steps, positions: int64 [n], the batch
    of each and its place in this rank's part of it. touched: the distinct steps, ascending.
    """

    shard: int
    view: int
    records: Ints
    steps: Ints
    positions: Ints
    touched: tuple[int, ...]

    @property
    def first(self) -> int:
        return self.touched[0]


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """What a rank reads for some steps of an epoch, shards in the order in which to read them.

    rows: int64 [steps, rows of the rank's part]. num_shards: int64 [steps], of how many of
    `shards` each batch is made. num_open: the most batches that are begun and not complete while
    steps are taken one by one. num_window: batches of a window.
    """

    shards: tuple[ShardRows, ...]
    rows: Ints
    num_shards: Ints
    num_open: int
    num_window: int


def plan_epoch(
    order: Order, steps: range, part: slice, flipped: Flags | None = None, split: bool = False
) -> EpochPlan:
    """Plans batches `steps` (of one epoch, counted over all) of the rank that takes `part`.

    flipped: bool [len(steps), rows of the part], whose mirrored view is drawn. A shard that lies
    in two windows has its rows in the batches of both, which are then begun together; with
    `split` it is read twice instead, a part for each.
    """
    epoch, inside = divmod(steps.start, order.steps_per_epoch)
    rows = order.epoch(epoch)[inside : inside + len(steps), part]
    num_steps, width = rows.shape
    shards, records = np.divmod(rows.reshape(-1), order.shard_rows)
    views = np.zeros(rows.size, np.int64) if flipped is None else flipped.reshape(-1).astype(int)
    group = views * order.num_rows + shards
    if split:
        group += 2 * order.num_rows * _windows(order, inside, num_steps, part).reshape(-1)
    sort = np.lexsort((records, group))
    group, shards, records = group[sort], shards[sort], records[sort]
    bounds = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)] if width else [0]
    parts = []
    num_shards = np.zeros(num_steps, np.int64)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        own, positions = np.divmod(sort[start:stop], width)
        touched = np.unique(own)
        num_shards[touched] += 1
        parts.append(
            ShardRows(
                int(shards[start]),
                int(views[sort[start]]),
                records[start:stop],
                own + steps.start,
                positions,
                tuple((touched + steps.start).tolist()),
            )
        )
    parts.sort(key=lambda shard: (shard.first, shard.shard, shard.view))
    window = -(-order.window * order.shard_rows * order.lanes // order.batch_size)
    return EpochPlan(tuple(parts), rows, num_shards, _most_open(parts), min(window, num_steps))


def _windows(order: Order, first_step: int, num_steps: int, part: slice) -> Ints:
    """int64 [num_steps, rows of the part]: the window of its lane that each row is of."""
    share = order.batch_size // order.lanes
    inside = np.arange(part.start, part.stop) % share
    place = np.arange(first_step, first_step + num_steps)[:, None] * share + inside
    windows: Ints = place // (order.window * order.shard_rows)
    return windows


def _most_open(parts: list[ShardRows]) -> int:
    """A step needs every shard that begins before it; those reach up to some later step."""
    last, most = 0, 0
    for shard in parts:
        last = max(last, shard.touched[-1])
        most = max(most, last - shard.first + 1)
    return most
