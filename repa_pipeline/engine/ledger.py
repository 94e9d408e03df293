"""The record of finished shards: one small object each, written by the driver alone.

Resume asks the store, not the process: one listing says what is done.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes
from repa_pipeline.engine.contracts import Commit, Output
from repa_pipeline.errors import DamagedError, MissingError

# Small requests under way at once: an object store answers each in tens of milliseconds.
NUM_READERS = 16


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Done records under `prefix`; an entry of another fingerprint is not an entry."""

    store: ObjectStore
    prefix: str
    fingerprint: str

    def record(self, commit: Commit) -> None:
        """Records a stored shard; its times are left out, so equal work leaves equal bytes."""
        entry = {"fingerprint": self.fingerprint, **dataclasses.asdict(commit)}
        for name in ("seconds", "output"):
            del entry[name]
        self.store.put(f"{self.prefix}/{commit.index:06d}.json", json_bytes(entry))

    def entries(self) -> dict[int, Commit]:
        """Finished shards by index. A torn or foreign record counts as not done."""
        names = [name for name in self.store.list(self.prefix) if name.endswith(".json")]
        with ThreadPoolExecutor(NUM_READERS) as pool:
            found = pool.map(self._entry, names)
        return {commit.index: commit for commit in found if commit is not None}

    def _entry(self, name: str) -> Commit | None:
        try:
            entry = get_json(self.store, f"{self.prefix}/{name}")
            if entry.pop("fingerprint") != self.fingerprint:
                return None
            return _commit(entry)
        except (DamagedError, MissingError, KeyError, TypeError, ValueError):
            return None


def standing(output: Output, ledger: Ledger) -> dict[int, Commit]:
    """The shards of an output's plan that are recorded or sealed and whose objects are there.

    By index, in order. Objects are asked for NUM_READERS at a time. A record of another
    partition is none; where seal and ledger both speak of a shard, the ledger is believed.
    """
    rows = {shard.index: shard.num_rows for shard in output.plan().shards}
    vouched = {**{commit.index: commit for commit in output.sealed()}, **ledger.entries()}
    fitting = [
        commit for index, commit in sorted(vouched.items()) if rows.get(index) == commit.rows
    ]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        stands = pool.map(output.stands, fitting)
    return {c.index: c for c, is_there in zip(fitting, stands, strict=True) if is_there}


def _commit(entry: dict[str, Any]) -> Commit:
    """A record as a commit; earlier ones hold the sha256 of the object instead of a digest."""
    if "sha256" in entry:
        entry["digest"] = f"sha256:{entry.pop('sha256')}"
    entry["index"] = int(entry["index"])
    return Commit(**entry)
