"""The driver's logic without Ray: in a simulated cluster every shard has exactly one end."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from repa_pipeline.cluster.scheduler import Loss, Policy, Scheduler
from repa_pipeline.engine.contracts import Shard, split_rows
from repa_pipeline.errors import DataError

POLICY = Policy(pause_s=0.5, straggler_floor_s=5.0)


def make(num_shards: int, workers: str = "", policy: Policy = POLICY) -> Scheduler:
    scheduler = Scheduler(split_rows(num_shards * 4, 4), policy)
    for worker in workers:
        scheduler.add(worker)
    return scheduler


def given_to(scheduler: Scheduler, now: float = 0.0) -> dict[str, list[int]]:
    """Shards just assigned, by worker."""
    found: dict[str, list[int]] = {}
    for worker, shard in scheduler.assign(now):
        found.setdefault(worker, []).append(shard.index)
    return found


def test_every_hand_gets_one_shard_before_any_gets_two() -> None:
    scheduler = make(5, "abc")
    assert given_to(scheduler) == {"a": [0, 3], "b": [1, 4], "c": [2]}
    assert given_to(scheduler) == {}


def test_a_finished_shard_makes_room_for_the_next() -> None:
    scheduler = make(4, "a")
    assert given_to(scheduler) == {"a": [0, 1]}
    assert scheduler.finish("a", 0, 1.0)
    assert given_to(scheduler, 1.0) == {"a": [2]}
    assert (scheduler.num_left, scheduler.is_done) == (3, False)


def test_a_dead_worker_costs_what_it_held_and_the_first_death_blames_nobody() -> None:
    scheduler = make(3, "ab")
    assert given_to(scheduler) == {"a": [0, 2], "b": [1]}
    scheduler.remove("a", Loss.WORKER, "killed")
    assert given_to(scheduler) == {}  # both are suspects now, and b is busy: they run alone
    assert scheduler.finish("b", 1, 1.0)
    assert given_to(scheduler, 1.0) == {"b": [2]}
    assert scheduler.finish("b", 2, 2.0)
    assert given_to(scheduler, 2.0) == {"b": [0]}
    assert scheduler.finish("b", 0, 3.0)
    assert (scheduler.is_done, scheduler.failed) == (True, [])


def test_a_dead_node_blames_nobody() -> None:
    scheduler = make(3, "ab")
    assert given_to(scheduler) == {"a": [0, 2], "b": [1]}
    scheduler.remove("a", Loss.NODE, "gone")
    assert given_to(scheduler) == {"b": [2]}  # beside another: no suspect


def test_a_shard_that_workers_die_of_is_given_up() -> None:
    scheduler = make(1)
    for name in "abc":
        assert not scheduler.is_done
        scheduler.add(name)
        assert given_to(scheduler) == {name: [0]}
        scheduler.remove(name, Loss.WORKER, f"{name} crashed")
    assert scheduler.is_done
    ((shard, error),) = scheduler.failed
    assert shard == Shard(0, 0, 4)
    assert str(error) == "3 workers died while they held it, the last: c crashed"


def test_a_shard_that_nodes_die_of_is_given_up_later() -> None:
    scheduler = make(1)
    for name in "abcdefghij":
        assert not scheduler.is_done
        scheduler.add(name)
        given_to(scheduler)
        scheduler.remove(name, Loss.NODE, "gone")
    assert str(scheduler.failed[0][1]) == "it was lost with 10 workers, the last: gone"


def test_data_errors_are_final_and_passing_ones_tried_again_after_growing_pauses() -> None:
    scheduler = make(2, "a")
    given_to(scheduler)
    scheduler.fail("a", 0, DataError("image n7"), 0.0)
    assert [str(error) for _, error in scheduler.failed] == ["image n7"]
    scheduler.fail("a", 1, OSError("reset"), 0.0)
    assert (given_to(scheduler, 0.4), given_to(scheduler, 0.5)) == ({}, {"a": [1]})
    scheduler.fail("a", 1, OSError("reset"), 1.0)
    assert (given_to(scheduler, 1.9), given_to(scheduler, 2.0)) == ({}, {"a": [1]})
    scheduler.fail("a", 1, OSError("reset again"), 3.0)
    assert scheduler.is_done
    assert [str(error) for _, error in scheduler.failed] == ["image n7", "reset again"]


def test_an_idle_worker_takes_a_shard_that_is_not_begun_elsewhere() -> None:
    scheduler = make(2, "a")
    assert given_to(scheduler) == {"a": [0, 1]}
    scheduler.add("b")
    assert given_to(scheduler, 1.0) == {"b": [1]}
    assert scheduler.take_drops() == [("a", 1)]
    scheduler.drop("a", 1, 1.5)
    assert scheduler.finish("b", 1, 2.0)
    assert scheduler.finish("a", 0, 2.0)
    assert (scheduler.is_done, scheduler.num_busy) == (True, 0)


def test_a_moved_shard_whose_new_worker_dies_waits_again() -> None:
    scheduler = make(2, "a")
    given_to(scheduler)
    scheduler.add("b")
    given_to(scheduler)
    scheduler.drop("a", 1, 1.0)
    scheduler.remove("b", Loss.NODE, "gone")
    assert given_to(scheduler, 2.0) == {"a": [1]}


def straggling(policy: Policy = POLICY) -> Scheduler:
    """Shard 0 is held by "a"; the others took 2 s each; "b" is idle at 6 s."""
    scheduler = make(4, "ab", policy)
    assert given_to(scheduler) == {"a": [0, 2], "b": [1, 3]}
    for time, index in ((2.0, 1), (4.0, 3), (6.0, 2)):
        assert scheduler.finish("b", index, time)
        given_to(scheduler, time)
    assert ("a", 2) in scheduler.take_drops()
    return scheduler


def test_a_straggler_gets_one_copy_and_the_first_result_counts() -> None:
    scheduler = straggling()
    assert given_to(scheduler, 6.0) == {}  # 3 x the median of 2 s
    assert given_to(scheduler, 6.1) == {"b": [0]}
    scheduler.add("c")
    assert given_to(scheduler, 50.0) == {}  # one copy only
    assert scheduler.finish("b", 0, 51.0)
    assert (scheduler.is_done, scheduler.num_busy) == (True, 1)
    assert scheduler.take_drops() == [("a", 0)]
    assert not scheduler.finish("a", 0, 52.0)
    scheduler.drop("a", 2, 52.0)
    assert (scheduler.num_left, scheduler.num_busy, scheduler.take_drops()) == (0, 0, [])


def test_no_copies_when_switched_off_and_none_below_the_floor() -> None:
    off = straggling(dataclasses.replace(POLICY, straggler_factor=0.0))
    assert given_to(off, 1e6) == {}
    floor = straggling(dataclasses.replace(POLICY, straggler_floor_s=60.0))
    assert (given_to(floor, 60.0), given_to(floor, 60.1)) == ({}, {"b": [0]})


def test_a_failed_copy_leaves_the_decision_to_the_other() -> None:
    scheduler = straggling()
    given_to(scheduler, 7.0)
    scheduler.fail("b", 0, DataError("torn"), 8.0)
    assert scheduler.failed == []
    assert scheduler.finish("a", 0, 9.0)
    assert (scheduler.is_done, scheduler.failed) == (True, [])


def test_the_time_limit_costs_a_fault_of_the_first_shard_alone() -> None:
    policy = Policy(retries=1, shard_timeout_s=10.0, straggler_factor=0.0, pause_s=0.0)
    scheduler = make(3, "a", policy)
    assert given_to(scheduler, 0.0) == {"a": [0, 1]}
    assert (scheduler.overdue(10.0), scheduler.overdue(10.1)) == ([], ["a"])
    scheduler.expire("a", 10.1)
    scheduler.add("b")
    assert given_to(scheduler, 11.0) == {"b": [0, 1]}
    scheduler.expire("b", 22.0)
    assert [(s.index, str(e)) for s, e in scheduler.failed] == [
        (0, "it took longer than the limit of 10 s (--shard-timeout-s)")
    ]
    scheduler.add("c")
    assert given_to(scheduler, 23.0) == {"c": [1, 2]}
    assert scheduler.finish("c", 1, 30.0)
    assert scheduler.overdue(39.0) == []  # shard 2 is the first only since 30


@dataclasses.dataclass
class World:
    """A cluster in simulated time. Workers do their shards one after another."""

    scheduler: Scheduler
    random: random.Random
    poison: frozenset[int]
    bad: frozenset[int]
    flaky: frozenset[int]
    death_rate: float
    num_workers: int = 4
    now: float = 0.0

    def __post_init__(self) -> None:
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, str, str, int]] = []
        self.queues: dict[str, list[int]] = {}
        self.dropped: set[tuple[str, int]] = set()
        self.attempts: Counter[int] = Counter()
        self.results: Counter[int] = Counter()
        self.deaths_of: Counter[int] = Counter()
        for _ in range(self.num_workers):
            self.hire()

    def hire(self) -> None:
        self.at(self.random.uniform(0.5, 3.0), "born", f"w{next(self.numbers)}")

    def at(self, delay: float, kind: str, worker: str, index: int = -1) -> None:
        entry = (self.now + delay, next(self.numbers), kind, worker, index)
        heapq.heappush(self.events, entry)

    def begin(self, worker: str) -> None:
        """Starts the head of a worker's queue."""
        index = self.queues[worker][0]
        if (worker, index) in self.dropped:
            self.at(0.0, "dropped", worker, index)
            return
        self.attempts[index] += 1
        slow = self.random.random() < 0.05
        length = self.random.uniform(0.5, 1.5) * (100 if slow else 1)
        if index in self.poison:
            self.at(length / 2, "poisoned", worker, index)
        elif self.random.random() < self.death_rate:
            self.at(length / 2, self.random.choice(["killed", "node"]), worker, index)
        else:
            self.at(length, "end", worker, index)

    def step(self) -> None:
        self.now, _, kind, worker, index = heapq.heappop(self.events)
        if kind == "born":
            self.queues[worker] = []
            self.scheduler.add(worker)
        elif worker not in self.queues:
            return
        elif kind in ("poisoned", "killed", "node"):
            self.deaths_of[index] += kind == "poisoned"
            del self.queues[worker]
            loss = Loss.NODE if kind == "node" else Loss.WORKER
            self.scheduler.remove(worker, loss, kind)
            self.hire()
        else:
            self.answer(worker, index, kind == "dropped")

    def answer(self, worker: str, index: int, is_dropped: bool) -> None:
        assert self.queues[worker].pop(0) == index
        self.dropped.discard((worker, index))
        if is_dropped:
            self.scheduler.drop(worker, index, self.now)
        elif index in self.bad:
            self.scheduler.fail(worker, index, DataError("bad"), self.now)
        elif index in self.flaky and self.attempts[index] < 3:
            self.scheduler.fail(worker, index, OSError("flaky"), self.now)
        else:
            self.results[index] += self.scheduler.finish(worker, index, self.now)
        if self.queues[worker]:
            self.begin(worker)

    def run(self) -> None:
        for _ in range(100_000):
            for worker, shard in self.scheduler.assign(self.now):
                queue = self.queues[worker]
                assert shard.index not in queue and len(queue) < 2
                queue.append(shard.index)
                if len(queue) == 1:
                    self.begin(worker)
            self.dropped |= set(self.scheduler.take_drops())
            for worker in self.scheduler.overdue(self.now):
                del self.queues[worker]
                self.scheduler.expire(worker, self.now)
                self.hire()
            if self.scheduler.is_done:
                return
            if not any(kind == "tick" for _, _, kind, _, _ in self.events):
                self.at(0.5, "tick", "")
            self.step()
        raise AssertionError("the run does not end")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_shards=st.integers(1, 60),
    poison=st.frozensets(st.integers(0, 59), max_size=3),
    bad=st.frozensets(st.integers(0, 59), max_size=3),
    flaky=st.frozensets(st.integers(0, 59), max_size=5),
    death_rate=st.sampled_from([0.0, 0.02]),
    timeout_s=st.sampled_from([0.0, 20.0]),
)
def test_every_shard_ends_exactly_once(
    seed: int,
    num_shards: int,
    poison: frozenset[int],
    bad: frozenset[int],
    flaky: frozenset[int],
    death_rate: float,
    timeout_s: float,
) -> None:
    policy = Policy(retries=10, shard_timeout_s=timeout_s, max_deaths=3)
    scheduler = make(num_shards, policy=policy)
    world = World(scheduler, random.Random(seed), poison, bad - poison, flaky, death_rate)
    world.run()
    failed = [shard.index for shard, _ in scheduler.failed]
    assert sorted(failed + list(world.results.elements())) == list(range(num_shards))
    must_fail = {index for index in poison | bad if index < num_shards}
    assert must_fail <= set(failed)
    if not death_rate:
        # Without other deaths nothing but the poisoned and the bad is given up.
        assert set(failed) == must_fail
        assert all(world.deaths_of[index] <= 3 for index in poison)
