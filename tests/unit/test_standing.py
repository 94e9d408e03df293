"""Which shards of an output are done: recorded or sealed, of this plan, and there."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

from repa_pipeline.data.objects import LocalStore
from repa_pipeline.engine.contracts import Commit, Plan, split_rows
from repa_pipeline.engine.ledger import NUM_READERS, Ledger, standing


@dataclasses.dataclass
class Output:
    """Eight shards of 4 rows; `stands` answers once all that is asked at a time has been asked."""

    gone: frozenset[int] = frozenset()
    vouched: tuple[Commit, ...] = ()
    together: threading.Barrier | None = None
    name: str = "x"

    def plan(self) -> Plan:
        return Plan("here", "f", split_rows(32, 4), 32, 32)

    def check(self) -> None: ...

    def begin(self) -> None: ...

    def seal(self, commits: list[Commit]) -> None: ...

    def is_sealed(self) -> bool:
        return bool(self.vouched)

    def sealed(self) -> list[Commit]:
        return list(self.vouched)

    def stands(self, commit: Commit) -> bool:
        if self.together is not None:
            self.together.wait(timeout=30)
        return commit.index not in self.gone


def recorded(folder: Path, *commits: Commit) -> Ledger:
    ledger = Ledger(LocalStore(str(folder)), "ledger/x", "f")
    for commit in commits:
        ledger.record(commit)
    return ledger


def commit(index: int, rows: int = 4, digest: str = "d") -> Commit:
    return Commit(index, rows, 10, digest)


def test_records_of_this_plan_whose_objects_are_there(tmp_path: Path) -> None:
    ledger = recorded(tmp_path, commit(0), commit(1), commit(2, rows=3), commit(8), commit(7))
    assert standing(Output(frozenset({1})), ledger) == {0: commit(0), 7: commit(7)}
    assert standing(Output(), recorded(tmp_path / "none")) == {}


def test_a_seal_vouches_for_what_has_no_record(tmp_path: Path) -> None:
    ledger = recorded(tmp_path, commit(0, digest="of the ledger"))
    output = Output(frozenset({3}), (commit(0), commit(2), commit(3)))
    assert standing(output, ledger) == {0: commit(0, digest="of the ledger"), 2: commit(2)}


def test_objects_are_asked_for_many_at_a_time(tmp_path: Path) -> None:
    """One after another this would never end."""
    assert NUM_READERS >= 8
    ledger = recorded(tmp_path, *map(commit, range(8)))
    output = Output(together=threading.Barrier(8))
    assert list(standing(output, ledger)) == list(range(8))
