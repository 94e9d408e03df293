"""The record of finished shards: one small object each, written by the driver alone.

Resume asks the store, not the process: one listing says what is done.
"""

from __future__ import annotations

import dataclasses

from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes
from repa_pipeline.engine.contracts import Commit
from repa_pipeline.errors import DamagedError


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Done records under `prefix`; an entry of another fingerprint is not an entry."""

    store: ObjectStore
    prefix: str
    fingerprint: str

    def record(self, commit: Commit) -> None:
        """Records a stored shard; its times are left out, so equal work leaves equal bytes."""
        entry = {"fingerprint": self.fingerprint, **dataclasses.asdict(commit)}
        del entry["seconds"]
        self.store.put(f"{self.prefix}/{commit.index:06d}.json", json_bytes(entry))

    def entries(self) -> dict[int, Commit]:
        """Finished shards by index. A torn or foreign record counts as not done."""
        done = {}
        for name in self.store.list(self.prefix):
            if not name.endswith(".json"):
                continue
            try:
                entry = get_json(self.store, f"{self.prefix}/{name}")
                if entry.pop("fingerprint") == self.fingerprint:
                    done[int(entry["index"])] = Commit(**entry)
            except (DamagedError, KeyError, TypeError, ValueError):
                continue
        return done
