"""Which rows make up batch s: a pure function of (seed, epoch, step).

Shards are permuted and their rows laid end to end; the sequence is cut into L lanes of equal
length; inside a lane the rows of a window of K shards are permuted together. Batch s takes its
share from every lane. Neither rank, world size nor speed enters.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from repa_pipeline.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Order:
    """The data order of a run. An epoch has num_rows // batch_size steps; the rest is left out,
    other rows every epoch."""

    num_rows: int
    shard_rows: int
    batch_size: int
    seed: int
    lanes: int = 1
    window: int = 16

    def __post_init__(self) -> None:
        if self.batch_size > self.num_rows:
            raise ConfigError(
                f"batch_size {self.batch_size} is larger than the data set of {self.num_rows} "
                "rows: use a smaller --batch-size"
            )
        if self.batch_size % self.lanes:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of lanes {self.lanes}: change one"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [steps_per_epoch, batch_size]: the rows of every batch of an epoch."""
        return _epoch_order(self, epoch)

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """int64 [batch_size]: the rows of batch `step`, counted from 0 over all epochs."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        rows: npt.NDArray[np.int64] = self.epoch(epoch)[inside]
        return rows

    def state(self, step: int) -> dict[str, int]:
        """Where the order stands before batch `step`: all that a reader needs to go on."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        return {"seed": self.seed, "epoch": epoch, "step": inside}


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Rank `rank`'s part of a global batch; parts differ by at most one sample."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


@functools.lru_cache(maxsize=2)
def _epoch_order(order: Order, epoch: int) -> npt.NDArray[np.int64]:
    num_shards = -(-order.num_rows // order.shard_rows)
    shards = np.random.default_rng([order.seed, epoch, 0]).permutation(num_shards)
    rows = shards[:, None] * order.shard_rows + np.arange(order.shard_rows)
    sequence = rows.reshape(-1)[rows.reshape(-1) < order.num_rows]
    share = order.batch_size // order.lanes
    parts = []
    for lane in range(order.lanes):
        start = lane * order.num_rows // order.lanes
        stop = (lane + 1) * order.num_rows // order.lanes
        shuffled = _shuffle_windows(order, epoch, lane, sequence[start:stop])
        parts.append(shuffled[: order.steps_per_epoch * share].reshape(-1, share))
    return np.concatenate(parts, axis=1).astype(np.int64)


def _shuffle_windows(
    order: Order, epoch: int, lane: int, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    generator = np.random.default_rng([order.seed, epoch, 1, lane])
    size = order.window * order.shard_rows
    windows = [generator.permutation(rows[i : i + size]) for i in range(0, len(rows), size)]
    return np.concatenate(windows)
