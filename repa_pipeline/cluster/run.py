"""One run: the loop that tells the scheduler what the workers did, and the workers what to do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from repa_pipeline.cluster.actors import Failure
from repa_pipeline.cluster.scheduler import Loss, Scheduler
from repa_pipeline.engine.contracts import Commits, Shard, Tell
from repa_pipeline.errors import RepaError

TICK_S = 0.2
TELL_EVERY_S = 1.0
DRAIN_S = 10.0


@dataclasses.dataclass(frozen=True)
class Ready:
    """A worker has loaded the stage and takes shards."""

    worker: str


@dataclasses.dataclass(frozen=True)
class Lost:
    """A worker that was ready is gone, with all it held."""

    worker: str
    loss: Loss
    cause: str


@dataclasses.dataclass(frozen=True)
class Answered:
    """A worker is done with a shard, one way or another."""

    worker: str
    index: int
    answer: Commits | Failure


Event = Ready | Lost | Answered


class Workers(Protocol):
    """What the loop needs of a fleet (fleet.py)."""

    def hire(self, num_useful: int) -> None: ...

    def start(self, worker: str, shard: Shard) -> None: ...

    def drop(self, worker: str, index: int) -> None: ...

    def stop(self, worker: str) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]: ...

    def states(self) -> Mapping[str, str]: ...

    def drain(self, timeout_s: float) -> None: ...


def run_shards(scheduler: Scheduler, workers: Workers, tell: Tell) -> Iterator[Commits]:
    """Commits of every shard that can be done, each once, as they come; the rest is in
    `scheduler.failed`. An error in a worker that is neither about data nor passing is raised.
    """
    told_at = float("-inf")
    while not scheduler.is_done:
        workers.hire(scheduler.num_left)
        done = [commits for event in workers.poll(TICK_S) for commits in _note(scheduler, event)]
        now = time.monotonic()
        for worker in scheduler.overdue(now):
            workers.stop(worker)
            scheduler.expire(worker, now)
        for worker, shard in scheduler.assign(now):  # before the caller takes its time with `done`
            workers.start(worker, shard)
        for worker, index in scheduler.take_drops():
            workers.drop(worker, index)
        if now - told_at >= TELL_EVERY_S:
            told_at = now
            tell(workers.states())
        yield from done
    if scheduler.num_busy:  # copies that lost the race: a write is never cut off
        workers.drain(DRAIN_S)


def _note(scheduler: Scheduler, event: Event) -> Iterator[Commits]:
    """Tells the scheduler; yields the commits of a shard that this event finishes."""
    now = time.monotonic()
    if isinstance(event, Ready):
        scheduler.add(event.worker)
    elif isinstance(event, Lost):
        scheduler.remove(event.worker, event.loss, event.cause)
    elif not isinstance(event.answer, Failure):
        if scheduler.finish(event.worker, event.index, now):
            yield event.answer
    elif event.answer.is_drop:
        scheduler.drop(event.worker, event.index, now)
    elif isinstance(event.answer.error, RepaError | OSError):
        scheduler.fail(event.worker, event.index, event.answer.error, now)
    else:
        event.answer.raise_here()
