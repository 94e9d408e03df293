"""Which worker gets which shard, and what a failure or a death means: no Ray, no clock, no threads.

The driver tells what happened and when (`now`, seconds of any steady clock) and asks what to do.
Every shard ends exactly once: finished (`finish` returned True) or in `failed`.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import statistics
from collections import deque
from collections.abc import Iterable

from repa_pipeline.engine.contracts import Shard
from repa_pipeline.engine.pipeline import IN_FLIGHT
from repa_pipeline.errors import RepaError, StageError

# Times of this many finished shards make the median that stragglers are measured by.
NUM_TIMES = 101


@dataclasses.dataclass(frozen=True)
class Policy:
    """How often and how long.

    retries and pause_s are of passing faults, as the local executor has them. A shard that
    `max_deaths` workers died of is poison; one lost `max_lost` times in any way is given up too.
    straggler_factor 0: no copies; shard_timeout_s 0: no limit.
    """

    retries: int = 2
    pause_s: float = 0.5
    straggler_factor: float = 3.0
    straggler_floor_s: float = 10.0
    shard_timeout_s: float = 0.0
    max_deaths: int = 3
    max_lost: int = 10
    in_flight: int = IN_FLIGHT


class Loss(enum.Enum):
    """Why a worker is gone."""

    WORKER = "its process died"  # perhaps because of a shard that it held
    NODE = "its node died"  # not because of a shard


@dataclasses.dataclass
class _Task:
    shard: Shard
    holders: set[str] = dataclasses.field(default_factory=set)
    num_faults: int = 0
    num_deaths: int = 0
    num_lost: int = 0
    is_over: bool = False


@dataclasses.dataclass
class _Hands:
    """A worker's shards in the order given, each with the time; the first is being computed."""

    held: dict[int, float] = dataclasses.field(default_factory=dict)
    since: float = 0.0  # when the first became the first

    @property
    def head(self) -> int | None:
        return next(iter(self.held), None)


class Scheduler:
    """The queue of one run.

    A shard that a worker died with is a suspect: it runs alone on its worker from then on, so
    that a second death says which shard it is.
    """

    def __init__(self, shards: Iterable[Shard], policy: Policy):
        self._policy = policy
        self._tasks = {shard.index: _Task(shard) for shard in shards}
        self._waiting = deque(self._tasks)
        self._suspects: deque[int] = deque()
        self._paused: list[tuple[float, int]] = []
        self._hands: dict[str, _Hands] = {}
        self._drops: list[tuple[str, int]] = []
        self._times: deque[float] = deque(maxlen=NUM_TIMES)
        self.num_left = len(self._tasks)
        self.failed: list[tuple[Shard, Exception]] = []

    @property
    def is_done(self) -> bool:
        return self.num_left == 0

    @property
    def num_busy(self) -> int:
        """Workers that hold a shard, needed or not."""
        return sum(bool(hands.held) for hands in self._hands.values())

    def add(self, worker: str) -> None:
        """A worker that is ready for shards."""
        self._hands[worker] = _Hands()

    def remove(self, worker: str, loss: Loss, cause: str) -> None:
        """A worker is gone; its shards wait again, or are given up as poison."""
        for index in self._take_all(worker):
            task = self._tasks[index]
            task.num_lost += 1
            task.num_deaths += loss is Loss.WORKER
            if task.is_over or task.holders:
                continue
            if task.num_deaths >= self._policy.max_deaths:
                what = f"{task.num_deaths} workers died while they held it, the last: {cause}"
                self._give_up(task, StageError(what))
            elif task.num_lost >= self._policy.max_lost:
                what = f"it was lost with {task.num_lost} workers, the last: {cause}"
                self._give_up(task, StageError(what))
            else:
                self._wait_again(task)

    def expire(self, worker: str, now: float) -> None:
        """A worker was stopped because of the time limit: that counts as a fault of its first."""
        limit = f"it took longer than the limit of {self._policy.shard_timeout_s:g} s"
        for position, index in enumerate(self._take_all(worker)):
            task = self._tasks[index]
            if task.is_over or task.holders:
                continue
            if position == 0:
                self._fault(task, StageError(f"{limit} (--shard-timeout-s)"), now)
            else:
                self._wait_again(task)

    def finish(self, worker: str, index: int, now: float) -> bool:
        """A worker finished a shard; True for the first to do so, whose result counts."""
        took = self._release(worker, index, now)
        task = self._tasks[index]
        if task.is_over:
            return False
        if took is not None:
            self._times.append(took)
        self._end(task)
        self._drops += [(other, index) for other in task.holders]
        return True

    def fail(self, worker: str, index: int, error: Exception, now: float) -> None:
        """A worker could not do a shard. While another still holds a copy, that one decides."""
        self._release(worker, index, now)
        task = self._tasks[index]
        if task.is_over or task.holders:
            return
        if isinstance(error, RepaError):
            self._give_up(task, error)
        else:
            self._fault(task, error, now)

    def drop(self, worker: str, index: int, now: float) -> None:
        """A worker left out a shard because it was told to."""
        self._release(worker, index, now)
        task = self._tasks[index]
        if not task.is_over and not task.holders:
            self._wait_again(task)

    def assign(self, now: float) -> list[tuple[str, Shard]]:
        """What to start now. Empty hands first; at the end of the queue, copies for idle hands."""
        while self._paused and self._paused[0][0] <= now:
            self._wait_again(self._tasks[heapq.heappop(self._paused)[1]])
        given: list[tuple[str, Shard]] = []
        for depth in range(self._policy.in_flight):
            for worker, hands in self._hands.items():
                index = self._next_for(hands) if len(hands.held) == depth else None
                if index is not None:
                    given.append(self._give(worker, index, now))
        if not self._waiting and not self._suspects:
            for worker in [w for w, hands in self._hands.items() if not hands.held]:
                index = self._copy_for_idle(now)
                if index is not None:
                    given.append(self._give(worker, index, now))
        return given

    def take_drops(self) -> list[tuple[str, int]]:
        """Copies that nobody needs any more: (worker, shard), each told once."""
        drops, self._drops = self._drops, []
        return [(worker, index) for worker, index in drops if self._holds(worker, index)]

    def overdue(self, now: float) -> list[str]:
        """Workers whose first shard is over the time limit."""
        limit = self._policy.shard_timeout_s
        return [w for w, h in self._hands.items() if limit and h.held and now - h.since > limit]

    def _next_for(self, hands: _Hands) -> int | None:
        """The next shard for a worker that has room, None when it should get none."""
        if not hands.held and self._suspects:
            return self._suspects.popleft()
        if hands.held and (self._suspects or self._is_suspect(hands)):
            return None  # a suspect runs alone, so hands must become empty
        return self._waiting.popleft() if self._waiting else None

    def _is_suspect(self, hands: _Hands) -> bool:
        return any(self._tasks[index].num_deaths for index in hands.held)

    def _copy_for_idle(self, now: float) -> int | None:
        """A shard for a worker that would be idle: one not begun elsewhere, else a straggler."""
        slowest: tuple[float, int] | None = None
        for worker, hands in self._hands.items():
            for index in hands.held:
                task = self._tasks[index]
                if task.is_over or task.num_deaths or len(task.holders) > 1:
                    continue
                if index != hands.head:
                    self._drops.append((worker, index))
                    return index
                if slowest is None or now - hands.since > slowest[0]:
                    slowest = (now - hands.since, index)
        return slowest[1] if slowest and slowest[0] > self._straggler_s() else None

    def _straggler_s(self) -> float:
        factor = self._policy.straggler_factor
        if not factor or not self._times:
            return float("inf")
        return max(factor * statistics.median(self._times), self._policy.straggler_floor_s)

    def _give(self, worker: str, index: int, now: float) -> tuple[str, Shard]:
        hands, task = self._hands[worker], self._tasks[index]
        if not hands.held:
            hands.since = now
        hands.held[index] = now
        task.holders.add(worker)
        return worker, task.shard

    def _holds(self, worker: str, index: int) -> bool:
        return worker in self._hands and index in self._hands[worker].held

    def _release(self, worker: str, index: int, now: float) -> float | None:
        """Takes a shard off a worker; returns how long it was the worker's first, in seconds."""
        self._tasks[index].holders.discard(worker)
        hands = self._hands.get(worker)
        if hands is None or index not in hands.held:
            return None
        was_head = hands.head == index
        del hands.held[index]
        if not was_head:
            return None
        took, hands.since = now - hands.since, now
        return took

    def _take_all(self, worker: str) -> list[int]:
        held = list(self._hands.pop(worker, _Hands()).held)
        for index in held:
            self._tasks[index].holders.discard(worker)
        return held

    def _fault(self, task: _Task, error: Exception, now: float) -> None:
        task.num_faults += 1
        if task.num_faults > self._policy.retries:
            self._give_up(task, error)
        else:
            pause_s = self._policy.pause_s * 2 ** (task.num_faults - 1)
            heapq.heappush(self._paused, (now + pause_s, task.shard.index))

    def _wait_again(self, task: _Task) -> None:
        queue = self._suspects if task.num_deaths else self._waiting
        queue.appendleft(task.shard.index)

    def _give_up(self, task: _Task, error: Exception) -> None:
        self._end(task)
        self.failed.append((task.shard, error))

    def _end(self, task: _Task) -> None:
        task.is_over = True
        self.num_left -= 1
