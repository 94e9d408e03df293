"""The executor of one process: no Ray, same results byte for byte."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from repa_pipeline.engine.contracts import Commit, Shard, Work
from repa_pipeline.errors import RepaError, StageError


class LocalExecutor:
    """Runs shards one after another in this process.

    A passing fault (OSError: a disk, a network) is tried again `retries` times with a growing
    pause; a RepaError is about the data and is not. Either way the other shards are finished
    before StageError is raised.
    """

    name = "local"

    def __init__(self, retries: int = 2, pause_s: float = 0.5):
        self.retries = retries
        self.pause_s = pause_s

    def map(self, open_stage: Callable[[], Work], shards: list[Shard]) -> Iterator[Commit]:
        work = open_stage()
        failed: list[tuple[Shard, Exception]] = []
        for shard in shards:
            try:
                yield self._attempt(work, shard)
            except (RepaError, OSError) as error:
                failed.append((shard, error))
        if failed:
            raise_failed(failed, len(shards))

    def _attempt(self, work: Work, shard: Shard) -> Commit:
        for attempt in range(self.retries):
            try:
                return work(shard)
            except RepaError:
                raise
            except OSError:
                time.sleep(self.pause_s * 2**attempt)
        return work(shard)


def raise_failed(failed: list[tuple[Shard, Exception]], num_shards: int) -> None:
    """Raises StageError for shards that could not be done, naming the first one's rows."""
    shard, error = failed[0]
    raise StageError(
        f"{len(failed)} of {num_shards} shards failed, the others are kept; shard {shard.index} "
        f"(rows {shard.start} to {shard.stop - 1}): {error}; mend it and run the same command again"
    ) from error
