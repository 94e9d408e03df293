"""The executor of one process: no Ray, same results byte for byte."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from repa_pipeline.engine.contracts import Commits, Shard, Tell, Work, say_nothing
from repa_pipeline.engine.pipeline import PHASES, Pipeline
from repa_pipeline.errors import RepaError, StageError

WORKER = "local"
NUM_NAMED = 6


class LocalExecutor:
    """Runs shards in this process, the next one loading while one is computed.

    A passing fault (OSError: a disk, a network) is tried again `retries` times with a growing
    pause; a RepaError is about the data and is not. Either way the other shards are finished
    before StageError is raised.
    """

    name = "local"

    def __init__(self, retries: int = 2, pause_s: float = 0.5):
        self.retries = retries
        self.pause_s = pause_s

    def map(
        self, open_stage: Callable[[], Work], shards: list[Shard], tell: Tell = say_nothing
    ) -> Iterator[Commits]:
        failed: list[tuple[Shard, Exception]] = []
        waiting = deque(shards)
        running: deque[tuple[Shard, Future[Commits]]] = deque()
        with Pipeline(open_stage()) as pipeline:
            while waiting or running:
                while waiting and len(running) < len(PHASES):
                    shard = waiting.popleft()
                    running.append((shard, pipeline.submit(shard)))
                shard, future = running.popleft()
                tell({WORKER: pipeline.state()})
                try:
                    yield self._result(pipeline, shard, future)
                except (RepaError, OSError) as error:
                    failed.append((shard, error))
        if failed:
            raise_failed(failed, len(shards))

    def _result(self, pipeline: Pipeline, shard: Shard, future: Future[Commits]) -> Commits:
        for attempt in range(self.retries):
            try:
                return future.result()
            except RepaError:
                raise
            except OSError:
                time.sleep(self.pause_s * 2**attempt)
                future = pipeline.submit(shard)
        return future.result()


def raise_failed(failed: list[tuple[Shard, Exception]], num_shards: int) -> None:
    """Raises StageError for shards that could not be done, naming their rows and the first why."""
    shard, error = failed[0]
    others = [f"shard {s.index} (rows {s.start} to {s.stop - 1})" for s, _ in failed[1:NUM_NAMED]]
    also = f"; also {', '.join(others)}" if others else ""
    more = f" and {len(failed) - NUM_NAMED} more" if len(failed) > NUM_NAMED else ""
    raise StageError(
        f"{len(failed)} of {num_shards} shards failed, the others are kept; shard {shard.index} "
        f"(rows {shard.start} to {shard.stop - 1}): {error}{also}{more}; mend it and run the same "
        "command again"
    ) from error
