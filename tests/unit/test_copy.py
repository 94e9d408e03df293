"""`repa copy`: equal bytes at the other end, nothing half done, nothing foreign touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.commands_care import copy
from repa_pipeline.config_care import CopyConfig
from repa_pipeline.data.array import open_sealed
from repa_pipeline.data.index import read_index
from repa_pipeline.data.objects import LocalStore, open_store
from repa_pipeline.data.shards import pack_shard
from repa_pipeline.engine.contracts import Commit
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    MissingError,
    StoreError,
    UnknownNameError,
)
from repa_pipeline.observe import Silent
from repa_pipeline.stages.copy import Copied, copy_cache
from repa_pipeline.testing.caches import ToyTeacher, write_array, write_toy_cache

LATENTS, TOKENS, OTHER = "latents.tiny-kl.64", "features.toy-vit.64", "features.other.64"
SCALE = f"{TOKENS}.scale"
NUM_SHARDS = 4  # of 6 rows, the last of 4


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A workspace with three arrays, the scales of one, ledgers, and a run beside the cache."""
    folder = tmp_path / "from"
    teachers = (ToyTeacher(), ToyTeacher("other"))
    write_toy_cache(folder, num_rows=22, shard_rows=6, teachers=teachers)
    store = open_store(str(folder)).child("cache")
    scales = np.random.default_rng(0).random((22, 16)).astype(np.float16)
    write_array(store, SCALE, scales, 6, {"kind": "scale"})
    for name in (LATENTS, TOKENS, OTHER, SCALE):
        array = open_sealed(store, name, "x")
        ledger = Ledger(store, f"ledger/{name}", array.spec.fingerprint)
        for entry in array.shards:
            ledger.record(Commit(**entry))
    (folder / "runs/r").mkdir(parents=True)
    (folder / "runs/r/run.json").write_text("{}")
    (folder / "cache/verify").mkdir()
    (folder / "cache/verify/report.json").write_text("{}")
    return folder


@pytest.fixture
def memory() -> Iterator[str]:
    import fsspec

    yield "memory://repa-copy"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/repa-copy"):
        filesystem.rm("/repa-copy", recursive=True)


def run(origin: Path | str, target: Path | str, **changes: Any) -> Copied:
    config = CopyConfig(origin=str(origin), target=str(target), **changes)
    return copy_cache(config, Silent())


def files(workspace: Path) -> dict[str, bytes]:
    found = (path for path in sorted(workspace.rglob("*")) if path.is_file())
    return {path.relative_to(workspace).as_posix(): path.read_bytes() for path in found}


def cache_of(origin: Path) -> dict[str, bytes]:
    """What a copy of it must hold."""
    everything = files(origin).items()
    return {name: data for name, data in everything if name[:4] != "runs" and "verify" not in name}


def shard_key(name: str, shard: int) -> str:
    return f"{name}/c/{shard}" + "/0" * {LATENTS: 3, SCALE: 1}.get(name, 2)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def test_there_and_back_every_byte_is_equal(origin: Path, memory: str, tmp_path: Path) -> None:
    there = run(origin, memory)
    there.check()
    assert there.arrays == (SCALE, OTHER, TOKENS, LATENTS)
    assert (there.num_shards, there.num_new) == (16, 16)
    back = run(memory, tmp_path / "back")
    assert (back.num_shards, back.num_new, back.damage, back.left_out) == (16, 16, (), ())
    assert files(tmp_path / "back") == cache_of(origin)
    read_index(open_store(memory).child("cache"))


class Watch:
    """What happens to local stores, in order: (operation, key)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[str, str]] = []
        for name in ("put", "put_new", "read_into"):
            monkeypatch.setattr(LocalStore, name, self._noting(name))

    def _noting(self, name: str) -> Any:
        original = getattr(LocalStore, name)

        def note(store: LocalStore, key: str, *arguments: Any) -> Any:
            self.seen.append((name, f"{Path(store.url).parent.name}:{key}"))
            return original(store, key, *arguments)

        return note

    def keys(self, *operations: str, of: str = "") -> list[str]:
        return [
            key.partition(":")[2]
            for name, key in self.seen
            if name in operations and key.startswith(of)
        ]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def test_seals_go_last_and_scales_first(origin: Path, tmp_path: Path, watch: Watch) -> None:
    run(origin, tmp_path / "to", copy_threads=3).check()
    written = watch.keys("put", "put_new", of="to:")
    assert written[:2] == ["index.parquet", "manifest.json"]
    for name in (LATENTS, TOKENS, OTHER, SCALE):
        at = written.index(f"{name}/seal.json")
        own = [
            k for k, key in enumerate(written) if key.startswith((f"{name}/", f"ledger/{name}/"))
        ]
        assert len(own) == 2 * NUM_SHARDS + 2 and max(own) == at
    assert written.index(f"{SCALE}/seal.json") < written.index(f"{TOKENS}/seal.json")


def test_a_second_copy_finds_nothing_to_do(
    origin: Path, tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CopyConfig(origin=str(origin), target=str(tmp_path / "to"))
    copy(config)
    told = capsys.readouterr().out
    assert told.startswith("copied: 4 arrays, 16 shards (16 new), ") and ", read back\n" in told
    before = files(tmp_path / "to")
    watch.seen.clear()
    copy(config)
    assert capsys.readouterr().out.startswith("nothing to do: 4 arrays, 16 shards (0 new), ")
    assert watch.keys("read_into", of="from:") == [] and watch.keys("put") == []
    assert len(watch.keys("read_into", of="to:")) == 16  # looked at, not believed
    assert files(tmp_path / "to") == before


class Stop(Silent):
    """Interrupts after so many shards."""

    def __init__(self, after: int):
        self.left = after

    def advance(self, count: int, **facts: float) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 6, 15, 16])
def test_a_stopped_copy_goes_on(origin: Path, tmp_path: Path, watch: Watch, after: int) -> None:
    target = tmp_path / "to"
    config = CopyConfig(origin=str(origin), target=str(target), copy_threads=2)
    with pytest.raises(KeyboardInterrupt):
        copy_cache(config, Stop(after))
    done = [path for path in (target / "cache").rglob("*") if "/c/" in str(path) and path.is_file()]
    for seal in (target / "cache").rglob("seal.json"):  # none of an incomplete array
        assert sum(seal.parent in path.parents for path in done) == NUM_SHARDS
    assert len(list((target / "cache").rglob("seal.json"))) == (after - 1) // NUM_SHARDS
    watch.seen.clear()
    copied = copy_cache(config, Silent())
    assert (copied.num_shards, copied.num_new) == (16, 16 - len(done))
    assert len(watch.keys("read_into", of="from:")) == 16 - len(done)
    assert files(target) == cache_of(origin)


KILLED = """
import sys, time
from repa_pipeline.config_care import CopyConfig
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.observe import Silent
from repa_pipeline.stages.copy import copy_cache
put_new = LocalStore.put_new
def slow(self, key, data):
    time.sleep(0.1)
    return put_new(self, key, data)
LocalStore.put_new = slow
copy_cache(CopyConfig(origin=sys.argv[1], target=sys.argv[2]), Silent())
"""


def test_a_killed_copy_goes_on(origin: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(origin), str(target)])
    deadline = time.monotonic() + 60
    while len(list(target.rglob("c/*/**/0"))) < 12:  # folders count as well
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (target / "cache" / LATENTS / "seal.json").exists()
    run(origin, target).check()
    assert {n: d for n, d in files(target).items() if ".tmp-" not in n} == cache_of(origin)


def test_damage_of_the_origin_is_named_and_not_copied(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = cache_of(origin)
    path = origin / "cache" / shard_key(TOKENS, 1)
    data = path.read_bytes()
    flip(path, 100)
    gone = origin / "cache" / shard_key(LATENTS, 3)
    kept = gone.read_bytes()
    gone.unlink()
    with pytest.raises(DamagedError, match="the origin is damaged in 2 places, which were not"):
        copy(CopyConfig(origin=str(origin), target=str(tmp_path / "to")))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and all(line.startswith("not copied: ") for line in told)
    assert "(shard 1, rows 6 to 11): row 6 fails its crc32c checksum; run `repa repair`" in told[0]
    assert "(shard 3, rows 18 to 21) is missing" in told[1]
    there = files(tmp_path / "to")
    missing = {f"cache/{shard_key(TOKENS, 1)}", f"cache/{shard_key(LATENTS, 3)}"}
    missing |= {f"cache/ledger/{TOKENS}/000001.json", f"cache/ledger/{LATENTS}/000003.json"}
    missing |= {f"cache/{name}/seal.json" for name in (TOKENS, LATENTS)}
    assert sound.keys() - there.keys() == missing  # everything else is there
    path.write_bytes(data)
    gone.write_bytes(kept)
    assert run(origin, tmp_path / "to").num_new == 2
    assert files(tmp_path / "to") == sound


def test_damaged_seals_and_indexes_are_refused(origin: Path, tmp_path: Path) -> None:
    flip(origin / "cache" / TOKENS / "seal.json", 40)
    flip(origin / "cache" / LATENTS / "zarr.json", 40)  # the seal knows what it should be
    copied = run(origin, tmp_path / "to")
    assert len(copied.damage) == 1 and f"{TOKENS}/seal.json: the seal is dam" in copied.damage[0]
    assert set(copied.arrays) == {LATENTS, OTHER, SCALE}
    open_sealed(LocalStore(str(tmp_path / "to/cache")), LATENTS, "x")
    flip(origin / "cache/index.parquet", 400)
    with pytest.raises(DamagedError, match="remove index.parquet and manifest.json and run"):
        run(origin, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def put_other_shard(target: Path) -> None:
    """A sound shard of the right size, of other records."""
    spec = open_sealed(LocalStore(str(target / "cache")), TOKENS, "x").spec
    records = np.ones((6, *spec.layout.shape), np.float16)
    path = target / "cache" / shard_key(TOKENS, 1)
    path.write_bytes(pack_shard(records, spec.layout, 6))


def put_other_metadata(target: Path) -> None:
    path = target / "cache" / TOKENS / "zarr.json"
    stored = json.loads(path.read_text())
    stored["attributes"]["encoder"] = "x"
    path.write_text(json.dumps(stored))


FOREIGN = {
    shard_key(TOKENS, 1): put_other_shard,
    shard_key(TOKENS, 2): lambda target: os.truncate(target / "cache" / shard_key(TOKENS, 2), 9),
    "manifest.json": lambda target: flip(target / "cache/manifest.json", 20),
    "index.parquet": lambda target: flip(target / "cache/index.parquet", 20),
    f"{TOKENS} was made with other settings: encoder is 'x' there": put_other_metadata,
    f"{TOKENS}/seal.json": lambda target: flip(target / "cache" / TOKENS / "seal.json", 20),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_target_that_holds_something_else_is_left_alone(
    origin: Path, tmp_path: Path, what: str
) -> None:
    target = tmp_path / "to"
    run(origin, target)
    FOREIGN[what](target)
    before = files(target)
    with pytest.raises(MismatchError, match=rf"{what}.* another (--)?workspace"):
        run(origin, target)
    assert files(target) == before


def test_what_is_written_is_read_back(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that stores one bit of one shard wrongly, and one that stores a part."""
    put_new = LocalStore.put_new

    def wrong(self: LocalStore, key: str, data: Any) -> bool:
        stored = bytearray(data)
        if key == shard_key(LATENTS, 2):
            stored[7] ^= 1
        return put_new(self, key, stored)

    def short(self: LocalStore, key: str, data: Any) -> bool:
        return put_new(self, key, bytes(data)[: -1 if key == shard_key(LATENTS, 2) else None])

    for target, store_it, verify in (
        ("a", wrong, "read"),
        ("b", short, "read"),
        ("c", short, "size"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "put_new", store_it)
            with pytest.raises(StoreError, match="reads back otherwise|another size than what was"):
                run(origin, tmp_path / target, verify=verify)
        assert not (tmp_path / target / "cache" / LATENTS / "seal.json").exists()
        assert not (tmp_path / target / "cache/ledger" / LATENTS / "000002.json").exists()


def test_sizes_alone_read_nothing_back(origin: Path, tmp_path: Path, watch: Watch) -> None:
    run(origin, tmp_path / "to", verify="size").check()
    assert len(watch.keys("read_into", of="from:")) == 16
    assert watch.keys("read_into", of="to:") == []
    assert files(tmp_path / "to") == cache_of(origin)


def test_a_lost_answer_is_no_failure(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may say that an object stands already when the first attempt wrote it."""
    put_new = LocalStore.put_new
    monkeypatch.setattr(LocalStore, "put_new", lambda *a: put_new(*a) and False)
    run(origin, tmp_path / "to").check()
    assert files(tmp_path / "to") == cache_of(origin)


def test_chosen_and_unfinished_arrays(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(origin, tmp_path / "one", array=(OTHER,)).check()
    names = {name.split("/")[1] for name in files(tmp_path / "one")}
    assert names == {"index.parquet", "manifest.json", "ledger", OTHER}
    with pytest.raises(UnknownNameError, match="no array 'x' in"):
        run(origin, tmp_path / "to", array=("x",))
    (origin / "cache" / OTHER / "seal.json").unlink()
    with pytest.raises(MissingError, match=f"{OTHER} is unfinished"):
        run(origin, tmp_path / "to", array=(OTHER,))
    copy(CopyConfig(origin=str(origin), target=str(tmp_path / "to"), dry_run=True))
    assert "unfinished, left out: features.other.64\n" in capsys.readouterr().out
    assert not (tmp_path / "to").exists()
    copied = run(origin, tmp_path / "to")
    assert copied.left_out == (OTHER,) and OTHER not in copied.arrays
    assert not (tmp_path / "to/cache" / OTHER).exists()


def test_a_copy_needs_two_workspaces(origin: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="repa copy FROM TO"):
        copy_cache(CopyConfig(origin=str(origin)), Silent())
    with pytest.raises(ConfigError, match="are the same workspace"):
        run(origin, origin)
    with pytest.raises(MissingError, match="no cache at"):
        run(tmp_path / "nothing", tmp_path / "to")


def test_an_array_without_a_ledger_gets_one(origin: Path, tmp_path: Path) -> None:
    expected = cache_of(origin)
    shutil.rmtree(origin / "cache/ledger" / LATENTS)
    (origin / "cache/ledger" / TOKENS / "000001.json").write_text("{")
    run(origin, tmp_path / "to").check()
    assert files(tmp_path / "to") == expected


def test_a_named_array_takes_its_scale_along(origin: Path, tmp_path: Path) -> None:
    copied = run(origin, tmp_path / "to", array=(TOKENS,))
    copied.check()
    assert copied.arrays == (SCALE, TOKENS)
    assert run(origin, tmp_path / "other", array=(OTHER, LATENTS)).arrays == (OTHER, LATENTS)
    assert run(origin, tmp_path / "scale", array=(SCALE,)).arrays == (SCALE,)
    (origin / "cache" / SCALE / "seal.json").unlink()
    with pytest.raises(MissingError, match=f"{SCALE} is unfinished"):
        run(origin, tmp_path / "more", array=(TOKENS,))
