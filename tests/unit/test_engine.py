"""The engine: what is missing is done, once, recorded, and only then sealed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.data.array import (
    ArraySpec,
    begin_array,
    open_sealed,
    seal_array,
    write_shard,
)
from repa_pipeline.data.objects import LocalStore, json_bytes
from repa_pipeline.data.shards import RecordLayout, as_rows
from repa_pipeline.engine import local
from repa_pipeline.engine.contracts import (
    Commit,
    Commits,
    Plan,
    Shard,
    SimpleWork,
    Tell,
    Wanted,
    Work,
    run_phases,
    split_rows,
)
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.pipeline import Pipeline
from repa_pipeline.engine.run import OutputResult, ledger_of, run_stage
from repa_pipeline.errors import DataError, MismatchError, StageError
from repa_pipeline.observe import Silent
from repa_pipeline.stages.array_stage import ArrayOutput

NAME, LEDGER = "latents.toy.8", "ledger/latents.toy.8"
Fault = Callable[[Shard], None]


@dataclasses.dataclass
class ToyStage:
    """Row i is filled with the number i * factor; the fault of (shard, attempt) is raised."""

    store: LocalStore
    num_rows: int = 22
    shard_rows: int = 4
    factor: int = 1
    faults: dict[tuple[int, int], Exception] = dataclasses.field(default_factory=dict)
    calls: Counter[int] = dataclasses.field(default_factory=Counter)
    num_opened: int = 0
    name: str = NAME

    @property
    def spec(self) -> ArraySpec:
        layout = RecordLayout((3, 2), "float16", self.shard_rows)
        return ArraySpec(NAME, self.num_rows, layout, {"factor": self.factor})

    def plan(self) -> Plan:
        shards = split_rows(self.num_rows, self.shard_rows)
        fingerprint = self.spec.fingerprint
        return Plan("here", fingerprint, shards, self.num_rows, self.spec.num_bytes)

    def check(self) -> None:
        return

    def sealed(self) -> list[Commit]:
        return []

    def begin(self) -> None:
        begin_array(self.store, self.spec)

    @property
    def outputs(self) -> tuple[ToyStage, ...]:
        return (self,)

    def open(self, wanted: Wanted) -> Work:
        self.num_opened += 1
        return SimpleWork(self.work)

    def work(self, shard: Shard) -> Commits:
        self.calls[shard.index] += 1
        fault = self.faults.get((shard.index, self.calls[shard.index]))
        if fault is not None:
            raise fault
        rows = np.arange(shard.start, shard.stop, dtype=np.float16) * self.factor
        records = np.broadcast_to(rows[:, None, None], (len(rows), 3, 2))
        stored = write_shard(self.store, self.spec, shard.index, records)
        return (Commit(shard.index, shard.num_rows, *stored, {"encode": 0.25}, NAME),)

    def seal(self, commits: list[Commit]) -> None:
        keys = ("index", "rows", "num_bytes", "digest")
        seal_array(self.store, self.spec, [{k: getattr(c, k) for k in keys} for c in commits])

    def is_sealed(self) -> bool:
        return self.store.size(f"{NAME}/seal.json") is not None

    def stands(self, commit: Commit) -> bool:
        return self.store.size(self.spec.shard_key(commit.index)) == commit.num_bytes


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(local.time, "sleep", found.append)
    return found


def ledgers(stage: ToyStage) -> dict[str, Ledger]:
    return {NAME: Ledger(stage.store, LEDGER, stage.plan().fingerprint)}


def run(stage: ToyStage, retries: int = 2) -> OutputResult:
    return run_stage(stage, LocalExecutor(retries), ledgers(stage), Silent()).outputs[NAME]


def files(store: LocalStore) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.root)): path.read_bytes()
        for path in sorted(store.root.rglob("*"))
        if path.is_file()
    }


def shard_path(store: LocalStore, index: int) -> Path:
    return store.root / f"{NAME}/c/{index}/0/0"


def values(store: LocalStore) -> list[float]:
    array = open_sealed(store, NAME, "x")
    layout = array.spec.layout
    found: list[float] = []
    for k in range(array.spec.num_shards):
        found += as_rows(array.read_shard(k, array.new_buffer()), layout)[:, 0, 0].tolist()
    return found


def test_split_rows() -> None:
    assert split_rows(10, 4) == (Shard(0, 0, 4), Shard(1, 4, 8), Shard(2, 8, 10))
    assert split_rows(8, 4) == (Shard(0, 0, 4), Shard(1, 4, 8))
    assert [shard.num_rows for shard in split_rows(10, 4)] == [4, 4, 2]


def test_a_whole_run_then_nothing(store: LocalStore) -> None:
    stage = ToyStage(store)
    result = run(stage)
    assert stage.calls == dict.fromkeys(range(6), 1)
    assert result.num_new == 6 and [c.index for c in result.commits] == list(range(6))
    assert [c.rows for c in result.commits] == [4, 4, 4, 4, 4, 2]
    assert values(store) == list(range(22))
    before = files(store)
    again = ToyStage(store)
    second = run(again)
    assert again.num_opened == 0 and again.calls == {} and second.num_new == 0
    assert list(second.commits) == [untimed(commit) for commit in result.commits]
    assert files(store) == before


def untimed(commit: Commit) -> Commit:
    return dataclasses.replace(commit, seconds={}, output="")


def test_what_the_ledger_says(store: LocalStore) -> None:
    result = run(ToyStage(store))
    assert result.commits[5].seconds == {"encode": 0.25}
    entry = json.loads(store.get(f"{LEDGER}/000005.json"))
    # No times: equal work leaves equal bytes.
    expected = dataclasses.asdict(result.commits[5])
    del expected["seconds"], expected["output"]
    assert entry == {"fingerprint": ToyStage(store).spec.fingerprint, **expected}
    seal = json.loads(store.get(f"{NAME}/seal.json"))
    assert [shard["digest"] for shard in seal["shards"]] == [c.digest for c in result.commits]


def test_only_missing_shards_run(store: LocalStore) -> None:
    run(ToyStage(store))
    before = files(store)
    (store.root / f"{NAME}/seal.json").unlink()
    for index in (1, 4):
        (store.root / f"{LEDGER}/{index:06d}.json").unlink()
    shard_path(store, 4).unlink()
    stage = ToyStage(store)
    assert run(stage).num_new == 2
    assert stage.calls == {1: 1, 4: 1} and files(store) == before


@pytest.mark.parametrize("damage", ["removed", "truncated", "extended"])
def test_a_sealed_array_is_mended(damage: str, store: LocalStore) -> None:
    run(ToyStage(store))
    before = files(store)
    path = shard_path(store, 2)
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(
            before[f"{NAME}/c/2/0/0"][:-3] + (b"" if damage == "truncated" else b"1234")
        )
    stage = ToyStage(store)
    assert run(stage).num_new == 1
    assert stage.calls == {2: 1} and files(store) == before


def test_lost_metadata_of_a_sealed_array_comes_back(store: LocalStore) -> None:
    run(ToyStage(store))
    before = files(store)
    (store.root / f"{NAME}/zarr.json").unlink()
    stage = ToyStage(store)
    assert run(stage).num_new == 0 and stage.num_opened == 0
    assert files(store) == before


def test_passing_faults_are_tried_again(store: LocalStore, pauses: list[float]) -> None:
    stage = ToyStage(store)
    stage.faults = {
        (1, 1): OSError("disk"),
        (3, 1): TimeoutError("network"),
        (3, 2): ConnectionError("network"),
    }
    assert run(stage).num_new == 6
    assert stage.calls == {0: 1, 1: 2, 2: 1, 3: 3, 4: 1, 5: 1}
    assert pauses == [0.5, 0.5, 1.0]
    assert values(store) == list(range(22))


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_lasting_faults_fail_after_the_rest(retries: int, store: LocalStore) -> None:
    stage = ToyStage(store)
    for attempt in range(1, 9):
        stage.faults[1, attempt] = OSError("the disk is gone")
        stage.faults[4, attempt] = OSError("so is the other")
    with pytest.raises(StageError) as caught:
        run(stage, retries)
    assert str(caught.value) == (
        "2 of 6 shards failed, the others are kept; shard 1 (rows 4 to 7): the disk is gone; also "
        "shard 4 (rows 16 to 19); mend it and run the same command again"
    )
    assert stage.calls == {0: 1, 1: retries + 1, 2: 1, 3: 1, 4: retries + 1, 5: 1}
    assert not stage.is_sealed()
    assert store.list(LEDGER) == ["000000.json", "000002.json", "000003.json", "000005.json"]
    again = ToyStage(store)
    assert run(again).num_new == 2
    assert again.calls == {1: 1, 4: 1} and values(store) == list(range(22))


def test_faults_of_the_data_are_not_tried_again(store: LocalStore, pauses: list[float]) -> None:
    stage = ToyStage(store)
    stage.faults = {(2, 1): DataError("image 9 is another one"), (3, 1): OSError("once")}
    with pytest.raises(
        StageError, match=r"1 of 6 shards failed.*shard 2 \(rows 8 to 11\): image 9"
    ):
        run(stage)
    assert stage.calls == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1}
    assert not stage.is_sealed() and pauses == [0.5]


def test_a_bug_keeps_its_traceback_and_what_was_done(store: LocalStore) -> None:
    stage = ToyStage(store)
    stage.faults = {(2, 1): ZeroDivisionError()}
    with pytest.raises(ZeroDivisionError):
        run(stage)
    assert [stage.calls[k] for k in range(3)] == [1, 1, 1]
    assert store.list(LEDGER) == ["000000.json", "000001.json"] and not stage.is_sealed()


def test_an_executor_that_loses_shards_is_found(store: LocalStore) -> None:
    class Forgetful:
        name = "forgetful"

        def map(
            self, open_stage: Callable[[], Work], shards: list[Shard], tell: Tell
        ) -> Iterator[Commits]:
            work = open_stage()
            kept = (shard for shard in reversed(shards) if shard.index not in (1, 3))
            yield from (run_phases(work, shard) for shard in kept)

    stage = ToyStage(store)
    with pytest.raises(StageError, match=r"executor 'forgetful' left out shards .*\[1, 3\]"):
        run_stage(stage, Forgetful(), ledgers(stage), Silent())
    assert not stage.is_sealed() and len(store.list(LEDGER)) == 4


def test_commits_in_any_order(store: LocalStore, tmp_path: Path) -> None:
    class Backwards:
        name = "backwards"

        def map(
            self, open_stage: Callable[[], Work], shards: list[Shard], tell: Tell
        ) -> Iterator[Commits]:
            work = open_stage()
            return (run_phases(work, shard) for shard in reversed(shards))

    stage = ToyStage(store)
    result = run_stage(stage, Backwards(), ledgers(stage), Silent()).outputs[NAME]
    assert [commit.index for commit in result.commits] == list(range(6))
    forward = LocalStore(str(tmp_path / "forward"))
    run(ToyStage(forward))
    assert files(store) == files(forward)


def test_entries_of_other_settings_do_not_count(store: LocalStore) -> None:
    run(ToyStage(store))
    other = ToyStage(store, factor=3)
    with pytest.raises(MismatchError, match="factor is 1 there, 3 now"):
        run(other)
    ledger = Ledger(store, LEDGER, other.plan().fingerprint)
    assert ledger.entries() == {} and other.calls == {}
    assert len(Ledger(store, LEDGER, ToyStage(store).plan().fingerprint).entries()) == 6


TORN: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not text": lambda data: b"\xff\xfe\0",
    "a list": lambda data: b"[]",
    "no index": lambda data: data.replace(b'"index"', b'"indexx"'),
    "a word for a number": lambda data: data.replace(b'"index": 3', b'"index": "x"'),
    "no fingerprint": lambda data: data.replace(b'"fingerprint"', b'"f"'),
    "fewer rows": lambda data: data.replace(b'"rows": 4', b'"rows": 3'),
    "another shard": lambda data: data.replace(b'"index": 3', b'"index": 30'),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_a_torn_entry_is_done_again(tear: Callable[[bytes], bytes], store: LocalStore) -> None:
    run(ToyStage(store))
    before = files(store)
    key = f"{LEDGER}/000003.json"
    assert tear(before[key]) != before[key]
    store.put(key, tear(before[key]))
    (store.root / f"{NAME}/seal.json").unlink()
    stage = ToyStage(store)
    assert run(stage).num_new == 1
    assert stage.calls == {3: 1} and files(store) == before


def test_other_files_beside_the_ledger_are_left_alone(store: LocalStore) -> None:
    store.put(f"{LEDGER}/000001.part", b"no entry")
    store.put(f"{LEDGER}/notes.json", json_bytes({"fingerprint": "x"}))
    assert run(ToyStage(store)).num_new == 6
    assert store.get(f"{LEDGER}/000001.part") == b"no entry"


def test_a_shard_without_entry_is_adopted_or_replaced(store: LocalStore) -> None:
    """As a driver killed between data and ledger leaves it."""
    run(ToyStage(store))
    before = files(store)
    for name in (f"{NAME}/seal.json", *(f"{LEDGER}/{k:06d}.json" for k in (0, 1, 5))):
        (store.root / name).unlink()
    adopted, damaged, short = (shard_path(store, k) for k in (0, 1, 5))
    unchanged = adopted.stat().st_mtime_ns
    data = bytearray(damaged.read_bytes())
    data[7] ^= 1
    damaged.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-1])
    stage = ToyStage(store)
    assert run(stage).num_new == 3
    assert stage.calls == {0: 1, 1: 1, 5: 1} and files(store) == before
    assert adopted.stat().st_mtime_ns == unchanged


def test_the_first_writer_wins_and_the_ledger_says_so(store: LocalStore) -> None:
    """A sound object of other bytes (another device's rounding): its hash is recorded."""
    stage = ToyStage(store)
    stage.begin()
    written = write_shard(store, stage.spec, 2, np.full((4, 3, 2), 0.5, np.float16))
    result = run(stage)
    assert (result.commits[2].num_bytes, result.commits[2].digest) == written
    assert values(store)[8:12] == [0.5] * 4


def test_another_partition_is_refused(store: LocalStore) -> None:
    run(ToyStage(store, shard_rows=8))
    stage = ToyStage(store)
    with pytest.raises(MismatchError, match=r"chunk_shape is \[8, 3, 2\], expected \[4, 3, 2\]"):
        run(stage)
    assert stage.calls == {}


def test_entries_of_another_partition_do_not_count(store: LocalStore) -> None:
    run(ToyStage(store, shard_rows=2))
    for path in (store.root / NAME).glob("*.json"):
        path.unlink()
    stage = ToyStage(store)
    assert run(stage).num_new == 6  # two rows are a whole shard there and the last one here
    assert values(store) == list(range(22))


def test_progress_is_told(store: LocalStore) -> None:
    told: list[Any] = []

    class Listener:
        def start(self, title: str, total: int, done: int, unit: str) -> None:
            told.append((title, total, done, unit))

        def advance(self, count: int, **facts: float) -> None:
            told.append((count, facts))

        def workers(self, states: Mapping[str, str]) -> None:
            assert list(states) == ["local"]

        def finish(self) -> None:
            told.append("finished")

    def step(rows: int, shards: int, seconds: float) -> tuple[int, dict[str, float]]:
        return rows, {"shards": shards, "encode_s": seconds}

    stage = ToyStage(store)
    stage.faults = {(5, 1): DataError("x")}
    with pytest.raises(StageError):
        run_stage(stage, LocalExecutor(0), ledgers(stage), Listener())
    # The seconds of a phase are summed over the run, and shown to a tenth.
    steps = [step(4, n, round(0.25 * n, 1)) for n in range(1, 6)]
    assert told == [(NAME, 22, 0, "images"), *steps, "finished"]
    told.clear()
    run_stage(ToyStage(store), LocalExecutor(0), ledgers(stage), Listener())
    assert told == [(NAME, 22, 20, "images"), step(2, 6, 0.2), "finished"]


@dataclasses.dataclass
class TwoOutputs:
    """Two arrays of one pass: the second holds the doubled numbers of the first."""

    store: LocalStore
    asked: list[tuple[int, frozenset[str]]] = dataclasses.field(default_factory=list)
    bad_shard: int = -1
    name: str = "two"

    @property
    def outputs(self) -> tuple[Renamed, ...]:
        return Renamed(self.store, "latents.one.8", 1), Renamed(self.store, "latents.two.8", 2)

    def open(self, wanted: Wanted) -> Work:
        def work(shard: Shard) -> Commits:
            self.asked.append((shard.index, wanted[shard.index]))
            if shard.index == self.bad_shard:
                raise DataError("bad")
            chosen = [output for output in self.outputs if output.name in wanted[shard.index]]
            return tuple(output.fill(shard) for output in chosen)

        return SimpleWork(work)


class Renamed(ArrayOutput):
    """A toy array below the store's folder, filled with row number times `factor`."""

    def __init__(self, store: LocalStore, name: str, factor: int):
        layout = RecordLayout((2,), "float32", 4)
        super().__init__(store.url, ArraySpec(name, 22, layout, {"factor": factor}))

    def fill(self, shard: Shard) -> Commit:
        rows = np.arange(shard.start, shard.stop, dtype=np.float32) * self.spec.manifest["factor"]
        records = np.repeat(rows[:, None], 2, axis=1)
        stored = write_shard(self.store, self.spec, shard.index, records)
        return Commit(shard.index, shard.num_rows, *stored, output=self.name)


def run_two(stage: TwoOutputs) -> dict[str, OutputResult]:
    named = {output.name: ledger_of(stage.store, output) for output in stage.outputs}
    return dict(run_stage(stage, LocalExecutor(0), named, Silent()).outputs)


def test_one_pass_fills_what_each_output_lacks(store: LocalStore) -> None:
    run_two(TwoOutputs(store))
    before = files(store)
    one, two = "latents.one.8", "latents.two.8"
    for key in (f"{one}/seal.json", f"{one}/c/1/0", f"{two}/seal.json", f"ledger/{two}/000001.json",
                f"{two}/c/4/0"):  # fmt: skip
        (store.root / key).unlink()
    stage = TwoOutputs(store)
    result = run_two(stage)
    assert stage.asked == [(1, frozenset({one, two})), (4, frozenset({two}))]
    assert {name: output.num_new for name, output in result.items()} == {one: 1, two: 2}
    assert files(store) == before
    array = open_sealed(store, two, "x")
    rows = as_rows(array.read_shard(5, array.new_buffer()), array.spec.layout)
    assert rows.tolist() == [[40, 40], [42, 42]]


def test_a_complete_output_is_sealed_beside_a_failed_one(store: LocalStore) -> None:
    run_two(TwoOutputs(store))
    for key in ("latents.one.8/seal.json", "latents.two.8/seal.json", "latents.two.8/c/2/0"):
        (store.root / key).unlink()
    with pytest.raises(StageError, match="1 of 1 shards failed"):
        run_two(TwoOutputs(store, bad_shard=2))
    assert store.size("latents.one.8/seal.json") and not store.size("latents.two.8/seal.json")


class Phases:
    """A Work that notes who is in which phase, on which thread."""

    def __init__(self, bad: tuple[str, int] | None = None):
        self.inside: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.threads: dict[str, set[int]] = {}
        self.bad = bad

    def _phase(self, name: str, shard: Shard) -> str:
        self.inside[name] += 1
        self.most[name] = max(self.most[name], self.inside[name])
        self.threads.setdefault(name, set()).add(threading.get_ident())
        threading.Event().wait(0.002)
        self.inside[name] -= 1
        if self.bad == (name, shard.index):
            raise DataError(f"{name} {shard.index}")
        return f"{name} {shard.index}"

    def load(self, shard: Shard) -> str:
        return self._phase("load", shard)

    def compute(self, shard: Shard, loaded: str) -> str:
        assert loaded == f"load {shard.index}"
        return self._phase("compute", shard)

    def store(self, shard: Shard, computed: str) -> Commits:
        assert computed == f"compute {shard.index}"
        self._phase("store", shard)
        return (Commit(shard.index, shard.num_rows, 0, "", output="x"),)


def test_the_pipeline_equals_the_phases_in_turn() -> None:
    shards = list(split_rows(20, 2))
    work = Phases()
    with Pipeline(work) as pipeline:
        futures = [pipeline.submit(shard) for shard in shards]
        overlapped = [future.result() for future in futures]
        assert pipeline.state() == "idle"
    assert overlapped == [run_phases(Phases(), shard) for shard in shards]
    assert work.most == {"load": 1, "compute": 1, "store": 1}
    assert [len(ids) for ids in work.threads.values()] == [1, 1, 1]
    assert len(set.union(*work.threads.values())) == 3


@pytest.mark.parametrize("phase", ["load", "compute", "store"])
def test_a_fault_in_the_pipeline_is_of_its_shard_alone(phase: str) -> None:
    shards = split_rows(6, 2)
    with Pipeline(Phases(bad=(phase, 1))) as pipeline:
        futures = [pipeline.submit(shard) for shard in shards]
        with pytest.raises(DataError, match=f"{phase} 1"):
            futures[1].result()
        assert [futures[i].result()[0].index for i in (0, 2)] == [0, 2]


def test_older_records_hold_a_sha256(store: LocalStore) -> None:
    entry = {"fingerprint": "f", "index": 3, "rows": 4, "num_bytes": 9, "sha256": "ab"}
    store.put("ledger/x/000003.json", json_bytes(entry))
    assert Ledger(store, "ledger/x", "f").entries() == {3: Commit(3, 4, 9, "sha256:ab")}


def test_a_refused_output_leaves_nothing_of_the_others(store: LocalStore) -> None:
    """The first output is new, the second is made otherwise: not even metadata is written."""
    stage = TwoOutputs(store)
    other = Renamed(store, "latents.two.8", 7)
    other.begin()
    before = files(store)
    with pytest.raises(MismatchError, match=r"latents.two.8 was made .*factor is 7 there, 2 now"):
        run_two(stage)
    assert files(store) == before and stage.asked == []


def test_a_sealed_array_without_its_ledger_is_complete(store: LocalStore) -> None:
    run_two(TwoOutputs(store))
    shutil.rmtree(store.root / "ledger")
    before = files(store)
    stage = TwoOutputs(store)
    assert [output.num_new for output in run_two(stage).values()] == [0, 0]
    assert stage.asked == [] and files(store) == before
    (store.root / "latents.one.8/c/3/0").unlink()
    assert [output.num_new for output in run_two(stage).values()] == [1, 0]
    assert stage.asked == [(3, frozenset({"latents.one.8"}))]
