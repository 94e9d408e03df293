"""A sealed array as an output of a stage: plan, begin, seal, what stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from repa_pipeline.data.array import (
    ArraySpec,
    begin_array,
    check_standing,
    open_sealed,
    seal_array,
    stored_digest,
)
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.engine.contracts import Commit, Plan, split_rows
from repa_pipeline.errors import DamagedError, MismatchError, MissingError


@dataclasses.dataclass(frozen=True)
class ArrayOutput:
    """The array `spec` below a store's URL."""

    url: str
    spec: ArraySpec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def store(self) -> ObjectStore:
        return open_store(self.url)

    def plan(self) -> Plan:
        return Plan(
            where=f"{self.store.url}/{self.spec.name}",
            fingerprint=self.spec.fingerprint,
            shards=split_rows(self.spec.num_rows, self.spec.layout.shard_rows),
            num_rows=self.spec.num_rows,
            num_bytes=self.spec.num_bytes,
        )

    def check(self) -> None:
        check_standing(self.store, self.spec)

    def begin(self) -> None:
        begin_array(self.store, self.spec)

    def seal(self, commits: list[Commit]) -> None:
        seal_array(self.store, self.spec, [seal_entry(commit) for commit in commits])

    def is_sealed(self) -> bool:
        return self.store.size(f"{self.spec.name}/seal.json") is not None

    def sealed(self) -> list[Commit]:
        try:
            array = open_sealed(self.store, self.spec.name, "")
        except (DamagedError, MismatchError, MissingError):
            return []
        if array.spec.fingerprint != self.spec.fingerprint:
            return []
        return [commit_of(entry) for entry in array.shards]

    def stands(self, commit: Commit) -> bool:
        return self.store.size(self.spec.shard_key(commit.index)) == commit.num_bytes


def commit_of(entry: Mapping[str, Any]) -> Commit:
    """What a seal says of a shard, as the ledger's record."""
    return Commit(
        index=entry["index"],
        rows=entry["rows"],
        num_bytes=entry["num_bytes"],
        digest=stored_digest(entry),
        counts=entry.get("counts", {}),
    )


def seal_entry(commit: Commit) -> dict[str, object]:
    """What a seal says of a shard."""
    entry: dict[str, object] = {
        "index": commit.index,
        "rows": commit.rows,
        "num_bytes": commit.num_bytes,
        "digest": commit.digest,
    }
    return {**entry, "counts": dict(commit.counts)} if commit.counts else entry
