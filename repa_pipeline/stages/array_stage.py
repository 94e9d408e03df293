"""What every stage that writes one sealed array shares: plan, begin, seal, what stands."""

from __future__ import annotations

from repa_pipeline.data.array import ArraySpec, begin_array, seal_array
from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.engine.contracts import Commit, Plan, split_rows


class ArrayStage:
    """The half of a Stage that does not depend on what is computed; subclasses add `open`."""

    spec: ArraySpec

    @property
    def store(self) -> ObjectStore:
        """Where the array goes."""
        raise NotImplementedError

    def plan(self) -> Plan:
        return Plan(
            where=f"{self.store.url}/{self.spec.name}",
            fingerprint=self.spec.fingerprint,
            shards=split_rows(self.spec.num_rows, self.spec.layout.shard_rows),
            num_rows=self.spec.num_rows,
            num_bytes=self.spec.num_bytes,
        )

    def begin(self) -> None:
        begin_array(self.store, self.spec)

    def seal(self, commits: list[Commit]) -> None:
        shards = [
            {"index": c.index, "rows": c.rows, "num_bytes": c.num_bytes, "sha256": c.sha256}
            for c in commits
        ]
        seal_array(self.store, self.spec, shards)

    def is_sealed(self) -> bool:
        return self.store.size(f"{self.spec.name}/seal.json") is not None

    def stands(self, commit: Commit) -> bool:
        return self.store.size(self.spec.shard_key(commit.index)) == commit.num_bytes
