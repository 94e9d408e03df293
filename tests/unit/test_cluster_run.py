"""The driver's loop with workers that are no processes, and what deaths of workers mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from repa_pipeline.cluster.actors import Dropped, Failure, failure
from repa_pipeline.cluster.health import (
    MAX_BROKEN_STARTS,
    MAX_SILENT_STARTS,
    StartHealth,
    explain_death,
    is_node_death,
)
from repa_pipeline.cluster.run import Answered, Event, Lost, Ready, run_shards
from repa_pipeline.cluster.scheduler import Loss, Policy, Scheduler
from repa_pipeline.engine.contracts import Commit, Commits, Shard, say_nothing, split_rows
from repa_pipeline.errors import DataError, StageError

POLICY = Policy()


def make(num_shards: int, workers: str = "", policy: Policy = POLICY) -> Scheduler:
    scheduler = Scheduler(split_rows(num_shards * 4, 4), policy)
    for worker in workers:
        scheduler.add(worker)
    return scheduler


@dataclasses.dataclass
class FakeWorkers:
    """Workers that answer a shard in the next `poll`, as told by `answers`."""

    answers: Mapping[int, list[Exception]]
    events: list[Event] = dataclasses.field(default_factory=lambda: [Ready("a"), Ready("b")])
    log: list[str] = dataclasses.field(default_factory=list)

    def hire(self, num_useful: int) -> None:
        self.log.append(f"hire {num_useful}")

    def start(self, worker: str, shard: Shard) -> None:
        faults = self.answers.get(shard.index, [])
        answer = failure(faults.pop(0)) if faults else commit_of(shard)
        self.events.append(Answered(worker, shard.index, answer))

    def drop(self, worker: str, index: int) -> None:
        self.log.append(f"drop {index}")

    def stop(self, worker: str) -> None:
        raise AssertionError("nothing is overdue")

    def poll(self, timeout_s: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def states(self) -> Mapping[str, str]:
        return {"a": "idle"}

    def drain(self, timeout_s: float) -> None:
        self.log.append("drain")


def commit_of(shard: Shard) -> Commits:
    return (Commit(shard.index, shard.num_rows, 8, "d"),)


def test_the_loop_yields_each_shard_once_and_tells() -> None:
    faults = {1: [DataError("bad")], 2: [OSError("once")], 3: [Dropped("3")]}
    scheduler = make(6, policy=Policy(pause_s=0.01))
    workers, told = FakeWorkers(faults), []
    commits = list(run_shards(scheduler, workers, lambda states: told.append(dict(states))))
    assert sorted(commit.index for (commit,) in commits) == [0, 2, 3, 4, 5]
    assert [(shard.index, str(error)) for shard, error in scheduler.failed] == [(1, "bad")]
    assert told == [{"a": "idle"}]
    assert workers.log[0] == "hire 6" and "drain" not in workers.log


def test_a_result_that_comes_twice_is_yielded_once_and_losers_may_end_their_write() -> None:
    scheduler = make(1)
    workers = FakeWorkers({}, [Ready("a")])
    run = run_shards(scheduler, workers, say_nothing)
    scheduler.add("b")
    scheduler._give("b", 0, 0.0)  # as if a copy had been started
    scheduler._waiting.clear()
    workers.events += [Answered("b", 0, commit_of(Shard(0, 0, 4)))] * 2
    assert len(list(run)) == 1
    assert "drain" not in workers.log

    scheduler = make(1, "ab")
    scheduler._give("a", 0, 0.0)
    scheduler._give("b", 0, 0.0)
    scheduler._waiting.clear()
    workers = FakeWorkers({}, [Answered("b", 0, commit_of(Shard(0, 0, 4)))])
    assert len(list(run_shards(scheduler, workers, say_nothing))) == 1
    assert workers.log == ["hire 1", "drop 0", "drain"]


def test_a_bug_in_a_worker_is_raised_with_where_it_happened() -> None:
    def buggy() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError) as caught:
        buggy()
    workers = FakeWorkers({1: [caught.value]})
    with pytest.raises(ZeroDivisionError, match="a bug") as raised:
        list(run_shards(make(3), workers, say_nothing))
    assert "in buggy" in str(raised.value.__cause__)


def test_a_lost_worker_is_replaced_in_the_loop() -> None:
    scheduler = make(2)
    workers = FakeWorkers({}, [Ready("a"), Lost("a", Loss.NODE, "gone"), Ready("b")])
    assert len(list(run_shards(scheduler, workers, say_nothing))) == 2


class Stubborn(Exception):
    def __init__(self, one: int, two: int):
        super().__init__("it needs two arguments")


def test_an_error_that_does_not_travel_becomes_its_text() -> None:
    found = failure(Stubborn(1, 2))
    assert isinstance(found.error, RuntimeError)
    assert str(found.error) == "Stubborn: it needs two arguments"
    assert isinstance(failure(DataError("x")).error, DataError)
    assert failure(Dropped("x")).is_drop and isinstance(found, Failure)


def test_starts_that_fail_in_a_row_end_the_run_unless_another_worker_is_ready() -> None:
    health, now = StartHealth(), 0.0
    for _ in range(MAX_BROKEN_STARTS - 1):
        health.failed(now, "x", answered=True, others_ready=False)
        assert not health.may_start(now)
        health.failed(now, "x", answered=True, others_ready=False)  # the same wave
        now += 40.0
        assert health.may_start(now)
    health.failed(now, "x", answered=True, others_ready=True)
    now += 40.0
    with pytest.raises(StageError, match="4 starts in a row failed, the last: no room"):
        health.failed(now, "no room", answered=True, others_ready=False)


def test_workers_that_never_answered_get_more_patience_and_success_forgets() -> None:
    health = StartHealth()
    for number in range(MAX_SILENT_STARTS - 1):
        health.failed(40.0 * number, "x", answered=False, others_ready=False)
    health.succeeded()
    for number in range(MAX_SILENT_STARTS - 1):
        health.failed(4000 + 40.0 * number, "x", answered=False, others_ready=False)
    with pytest.raises(StageError, match=f"{MAX_SILENT_STARTS} starts"):
        health.failed(9000.0, "x", answered=False, others_ready=False)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "The actor died unexpectedly.\n\tpid: 7\nThe actor is dead because its worker process "
            "has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly "
            "exits with a connection error code 2. End of file. Some common causes include: ...",
            "its process ended at once (killed, out of memory, or a crash in native code)",
        ),
        (
            "x\nThe actor died because its node has died. Node Id: ab12\n\tand more.",
            "its node has died. Node Id: ab12 and more",
        ),
        ("The actor 1 is unavailable: it is temporarily unavailable: RPC", "it cannot be reached"),
    ],
)
def test_a_death_is_explained_in_part_of_a_line(said: str, shown: str) -> None:
    assert explain_death(said).startswith(shown)
    assert is_node_death(said) == ("node has died" in said)
