"""The engine's nouns: what a stage, a unit of work, its result and an executor are.

A shard's bytes depend only on (settings, shard). So retry, a second worker on the same shard,
preemption and resume are one mechanism: do it (again), the first complete object wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows [start, stop): the unit of work, retry and storage."""

    index: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Commit:
    """What a worker reports of a stored shard of one output.

    num_bytes and digest are of the stored object; seconds holds the time of each phase (read,
    decode, encode, write); counts what was seen on the way (zero tokens, say).
    """

    index: int
    rows: int
    num_bytes: int
    digest: str
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    output: str = ""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


Commits = tuple[Commit, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an output will be: where, how many bytes, in which shards."""

    where: str
    fingerprint: str
    shards: tuple[Shard, ...]
    num_rows: int
    num_bytes: int
    unit: str = "images"


class Work(Protocol):
    """The function of a shard, in three phases that a worker may overlap for different shards.

    Each phase runs on one shard at a time and always on the same thread (engine/pipeline.py).
    """

    def load(self, shard: Shard) -> Any:
        """Reads and decodes: network and CPU threads."""
        ...

    def compute(self, shard: Shard, loaded: Any) -> Any:
        """The model."""
        ...

    def store(self, shard: Shard, computed: Any) -> Commits:
        """Writes; a commit for every output written."""
        ...


@dataclasses.dataclass(frozen=True)
class SimpleWork:
    """A Work of one function, for stages with nothing to overlap."""

    function: Callable[[Shard], Commits]

    def load(self, shard: Shard) -> None:
        return None

    def compute(self, shard: Shard, loaded: None) -> Commits:
        return self.function(shard)

    def store(self, shard: Shard, computed: Commits) -> Commits:
        return computed


def run_phases(work: Work, shard: Shard) -> Commits:
    """The three phases one after another."""
    return work.store(shard, work.compute(shard, work.load(shard)))


class Output(Protocol):
    """One thing that a stage writes, shard by shard: it is begun, filled and sealed."""

    @property
    def name(self) -> str: ...

    def plan(self) -> Plan:
        """Cheap: reads manifests, loads no weights."""
        ...

    def check(self) -> None:
        """Raises RepaError when something else stands in the output's place; writes nothing."""
        ...

    def begin(self) -> None:
        """Before the first shard, in the driver: write what identifies the output."""
        ...

    def seal(self, commits: list[Commit]) -> None:
        """After the last shard, in the driver: declare the output complete."""
        ...

    def is_sealed(self) -> bool: ...

    def sealed(self) -> list[Commit]:
        """The shards that the seal vouches for; none without a sound one."""
        ...

    def stands(self, commit: Commit) -> bool:
        """Whether the object that a record speaks of is there, with its size (cheap)."""
        ...


# Shard index -> names of the outputs that lack it.
Wanted = Mapping[int, frozenset[str]]


class Stage(Protocol):
    """One pass over the shards. Picklable by name; holds settings, never weights or handles."""

    @property
    def name(self) -> str: ...

    @property
    def outputs(self) -> tuple[Output, ...]:
        """All of one partition; sealed in this order."""
        ...

    def open(self, wanted: Wanted) -> Work:
        """In the worker: load once the weights that `wanted` needs, return the work."""
        ...


# Worker name -> what it does now, for whoever watches.
Tell = Callable[[Mapping[str, str]], None]


def say_nothing(states: Mapping[str, str]) -> None:
    """A Tell for callers that do not watch."""


class Executor(Protocol):
    """Where shards run. Retries inside; yields commits in any order; raises when retries end."""

    @property
    def name(self) -> str: ...

    def map(
        self, open_stage: Callable[[], Work], shards: list[Shard], tell: Tell = say_nothing
    ) -> Iterator[Commits]:
        """Runs every shard; one that cannot be done is reported after the rest is finished.

        Raises StageError (`local.raise_failed`) naming the shard, its rows and why.
        """
        ...


def split_rows(num_rows: int, shard_rows: int) -> tuple[Shard, ...]:
    """Shards of `shard_rows` rows each, the last one shorter."""
    starts = range(0, num_rows, shard_rows)
    return tuple(
        Shard(i, start, min(start + shard_rows, num_rows)) for i, start in enumerate(starts)
    )
