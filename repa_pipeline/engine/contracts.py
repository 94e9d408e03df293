"""The engine's nouns: what a stage, a unit of work, its result and an executor are.

A shard's bytes depend only on (settings, shard). So retry, a second worker on the same shard,
preemption and resume are one mechanism: do it (again), the first complete object wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol


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
    """What a worker reports of a stored shard.

    num_bytes and sha256 are of the stored object; seconds holds the time of each phase (read,
    decode, encode, write).
    """

    index: int
    rows: int
    num_bytes: int
    sha256: str
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a stage will do: where, how many bytes, in which shards."""

    where: str
    fingerprint: str
    shards: tuple[Shard, ...]
    num_rows: int
    num_bytes: int
    unit: str = "images"


Work = Callable[[Shard], Commit]


class Stage(Protocol):
    """One verb of the pipeline. Picklable by name; holds settings, never weights or handles."""

    @property
    def name(self) -> str: ...

    def plan(self) -> Plan:
        """Cheap: reads manifests, loads no weights."""
        ...

    def begin(self) -> None:
        """Before the first shard, in the driver: write what identifies the output."""
        ...

    def open(self) -> Work:
        """In the worker: load weights once, return the function of a shard."""
        ...

    def seal(self, commits: list[Commit]) -> None:
        """After the last shard, in the driver: declare the output complete."""
        ...

    def is_sealed(self) -> bool: ...

    def stands(self, commit: Commit) -> bool:
        """Whether the object that a record speaks of is there, with its size (cheap)."""
        ...


class Executor(Protocol):
    """Where shards run. Retries inside; yields commits in any order; raises when retries end."""

    @property
    def name(self) -> str: ...

    def map(self, open_stage: Callable[[], Work], shards: list[Shard]) -> Iterator[Commit]: ...


def split_rows(num_rows: int, shard_rows: int) -> tuple[Shard, ...]:
    """Shards of `shard_rows` rows each, the last one shorter."""
    starts = range(0, num_rows, shard_rows)
    return tuple(
        Shard(i, start, min(start + shard_rows, num_rows)) for i, start in enumerate(starts)
    )
