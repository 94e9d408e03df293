"""`repa verify`: every kind of damage is found and named; a stopped one goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.commands_care import verify
from repa_pipeline.config_care import VerifyConfig
from repa_pipeline.data.array import fingerprint, open_sealed
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.data.shards import pack_shard
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import DamagedError, MissingError, StoreError, UnknownNameError
from repa_pipeline.observe import Silent
from repa_pipeline.stages.verify import Report, verify_cache
from repa_pipeline.testing.caches import write_array, write_toy_cache
from repa_pipeline.testing.encoded import encode_tiny_cache, tiny_parts

ARRAYS = (
    "features.tiny-teacher.16",
    "features.tiny-teacher.16.flip",
    "features.tiny-teacher.16.flip.scale",
    "features.tiny-teacher.16.scale",
    "latents.tiny-kl.16",
    "latents.tiny-kl.16.flip",
)
NUM_SHARDS = 6  # of 4 rows, the last of 2
LATENTS = "latents.tiny-kl.16"
RECORD_BYTES = 8 * 2 * 2 * 2


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound cache."""
    folder: Path = tmp_path_factory.mktemp("calm")
    with tiny_parts(folder):
        encode_tiny_cache(folder)
    return folder


@pytest.fixture
def cache(calm: Path, tmp_path: Path) -> Path:
    """The cache's folder in a workspace of its own."""
    return Path(shutil.copytree(calm / "work/cache", tmp_path / "work/cache"))


def config_of(cache: Path, **changes: Any) -> VerifyConfig:
    return VerifyConfig(workspace=str(cache.parent), **changes)


def run(cache: Path, **changes: Any) -> Report:
    return verify_cache(config_of(cache, **changes), LocalExecutor(0), Silent())


def shard_file(cache: Path, index: int, name: str = LATENTS) -> Path:
    (found,) = (path for path in (cache / name / "c" / str(index)).rglob("*") if path.is_file())
    return found


def flip_bytes(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for at in places:
        data[at] ^= 4
    path.write_bytes(data)


def test_a_sound_cache_verifies(cache: Path) -> None:
    report = run(cache)
    report.check()
    assert (report.arrays, report.unfinished, report.damage) == (ARRAYS, (), ())
    assert (report.num_shards, report.num_records) == (6 * NUM_SHARDS, 6 * 22)
    shards = [p for p in cache.rglob("*") if p.is_file() and "c" in p.relative_to(cache).parts]
    assert report.num_bytes == sum(path.stat().st_size for path in shards)


Damage = Callable[[Path], None]


def swap(cache: Path) -> None:
    first, second = shard_file(cache, 1), shard_file(cache, 2)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


SHARD_DAMAGE: dict[str, tuple[Damage, list[tuple[int, str]]]] = {
    "record": (
        lambda cache: flip_bytes(shard_file(cache, 1), RECORD_BYTES + 9),
        [(1, "(shard 1, rows 4 to 7): row 5 fails its crc32c checksum; run `repa repair`")],
    ),
    "two records": (
        lambda cache: flip_bytes(shard_file(cache, 5), 0, RECORD_BYTES + 4),
        [(5, "(shard 5, rows 20 to 21): rows 20, 21 fail their crc32c checksum; run")],
    ),
    "crc": (
        lambda cache: flip_bytes(shard_file(cache, 0), RECORD_BYTES + 1),
        [(0, "(shard 0, rows 0 to 3): row 0 fails its crc32c checksum")],
    ),
    "shard index": (
        lambda cache: flip_bytes(shard_file(cache, 3), -9),
        [(3, "(shard 3, rows 12 to 15): the shard index is damaged")],
    ),
    "truncated": (
        lambda cache: os.truncate(shard_file(cache, 4), 339),
        [(4, "(shard 4, rows 16 to 19) is truncated or foreign: got 339 bytes, expected 340")],
    ),
    "too long": (
        lambda cache: os.truncate(shard_file(cache, 4), 341),
        [(4, "truncated or foreign: got more than 340 bytes")],
    ),
    "removed": (
        lambda cache: shard_file(cache, 2).unlink(),
        [(2, "(shard 2, rows 8 to 11) is missing")],
    ),
    "swapped": (
        swap,
        [(1, "is another shard than the sealed one"), (2, "is another shard than the sealed one")],
    ),
}


@pytest.mark.parametrize("kind", SHARD_DAMAGE)
def test_damaged_shards_are_named(kind: str, cache: Path) -> None:
    break_it, expected = SHARD_DAMAGE[kind]
    break_it(cache)
    report = run(cache)
    assert [(d.array, d.kind, d.shard) for d in report.damage] == [
        (LATENTS, "shard", index) for index, _ in expected
    ]
    for damage, (index, what) in zip(report.damage, expected, strict=True):
        assert what in damage.what and f"{LATENTS}/c/{index}/0/0/0" in damage.what
        assert (damage.start, damage.stop) == (4 * index, min(4 * index + 4, 22))
    assert report.num_shards == 6 * NUM_SHARDS - len(expected)  # everything else was finished
    with pytest.raises(DamagedError, match=f"^damaged in {len(expected)} place"):
        report.check()
    written = json.loads((cache / "verify/report.json").read_text())
    assert [found["shard"] for found in written["damage"]] == [index for index, _ in expected]


def test_all_damage_is_printed_before_the_one_line(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard_file(cache, 2).unlink()
    flip_bytes(shard_file(cache, 0, ARRAYS[0]), 3)
    with pytest.raises(DamagedError, match=r"^damaged in 2 places \(.*report.json has all\), the"):
        verify(config_of(cache))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "row 0 fails" in lines[0] and "is missing" in lines[1]
    shutil.rmtree(cache / LATENTS)
    shutil.rmtree(cache / ARRAYS[0])
    verify(config_of(cache))
    told = capsys.readouterr().out
    assert told.startswith("verified: 4 arrays, 24 shards, 88 records, ")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_seal_metadata_ledger_and_strays(cache: Path) -> None:
    edit_json(cache / ARRAYS[0] / "seal.json", num_rows=21)
    edit_json(cache / ARRAYS[1] / "zarr.json", shape=[21, 4, 16])
    (cache / ARRAYS[2] / "zarr.json").unlink()
    (cache / "ledger" / ARRAYS[3] / "000001.json").write_bytes(b'{"index": 1,')
    (cache / "ledger" / ARRAYS[3] / "000004.json").unlink()
    (cache / LATENTS / "notes.txt").write_text("mine")
    old = cache / LATENTS / "c/0/.tmp-pod7-1-1"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    (cache / LATENTS / "c/1/.tmp-pod7-1-2").write_bytes(b"of a writer at work")
    (cache / "ledger" / LATENTS / "000006.json").write_text("{}")
    report = run(cache)
    found = [(d.array, d.kind, d.key) for d in report.damage]
    assert found == [
        (ARRAYS[0], "seal", ""),
        (ARRAYS[1], "metadata", ""),
        (ARRAYS[2], "metadata", ""),
        (ARRAYS[3], "ledger", ""),
        (LATENTS, "stray", f"{LATENTS}/c/0/.tmp-pod7-1-1"),
        (LATENTS, "stray", f"ledger/{LATENTS}/000006.json"),
    ]
    assert report.foreign == (f"{LATENTS}/notes.txt",)  # of somebody: no damage
    whats = [damage.what for damage in report.damage]
    assert "the seal is damaged; run `repa repair`" in whats[0]
    assert "zarr.json says shape is [21, 4, 16], the seal [22, 4, 16]; run" in whats[1]
    assert "zarr.json is missing; run `repa repair`" in whats[2]
    assert "records 1, 4 are missing, torn or not what the seal says" in whats[3]
    assert report.num_shards == 6 * NUM_SHARDS  # all of them verified all the same


def test_rows_and_index(cache: Path, calm: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    edit_json(cache / "manifest.json", num_classes=4)
    (damage,) = run(cache, array=(LATENTS,)).damage
    assert damage.kind == "index" and "manifest.json is missing or damaged; remove" in damage.what
    unsummed = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    (cache / "manifest.json").write_text(json.dumps({**unsummed, "rows_digest": "0" * 64}))
    (damage,) = run(cache, array=(LATENTS,)).damage
    assert damage.kind == "index" and "does not have the digest of its rows" in damage.what
    edit_json(cache / "manifest.json", format_version=2)
    (damage,) = run(cache, array=(LATENTS,)).damage
    assert damage.kind == "version" and "use the package version that wrote it" in damage.what
    (cache / "manifest.json").write_text(json.dumps(manifest))
    flip_bytes(cache / "index.parquet", 400)
    (damage,) = run(cache, array=(LATENTS,)).damage
    assert "remove index.parquet and manifest.json and run `repa index --source " in damage.what
    assert (
        "--exif upright --max-pixels 178956970 --permutation-seed 0 --shard-rows 4" in damage.what
    )
    (cache / "manifest.json").write_text("{")
    (damage,) = run(cache, array=(LATENTS,)).damage
    assert "run `repa index` with the settings it was made with" in damage.what
    # An index of other rows of the same count: each array is told from it.
    other = cache.parent / "other"
    write_toy_cache(other, num_rows=22, shard_rows=4)
    for name in ("manifest.json", "index.parquet"):
        shutil.copy(other / "cache" / name, cache / name)
    found = run(cache).damage
    assert [(d.array, d.kind) for d in found] == [(name, "rows") for name in ARRAYS]
    assert "belongs to other rows than the index: rows_digest is '" in found[0].what


def test_unfinished_arrays_are_named_and_what_they_have_is_read(cache: Path) -> None:
    for index in (1, 5):
        (cache / "ledger" / LATENTS / f"{index:06d}.json").unlink()
    (cache / LATENTS / "seal.json").unlink()
    report = run(cache)
    report.check()
    assert report.unfinished == (
        f"{LATENTS} is unfinished: 4 of 6 shards recorded; run `repa encode-latents --autoencoder "
        "tiny-kl`",
    )
    assert report.num_shards == 6 * NUM_SHARDS - 2
    flip_bytes(shard_file(cache, 1), 0)  # not recorded: whoever finishes the array sees to it
    flip_bytes(shard_file(cache, 2), 0)
    (damage,) = run(cache).damage
    assert (damage.shard, damage.kind) == (2, "shard")


def test_an_array_of_which_nothing_can_be_known(cache: Path) -> None:
    (cache / LATENTS / "seal.json").unlink()
    (cache / LATENTS / "zarr.json").write_text("{}")
    report = run(cache)
    (damage,) = report.damage
    assert (damage.array, damage.kind, report.num_shards) == (LATENTS, "metadata", 30)
    assert "without a seal nothing can be known of it: make it again" in damage.what
    path = cache / ARRAYS[0] / "seal.json"
    edit_json(path, format_version=2)
    found = run(cache, array=(ARRAYS[0],)).damage
    assert [d.kind for d in found] == ["version"] and "has format version 2" in found[0].what


def test_seals_and_ledgers_of_old(tmp_path: Path) -> None:
    """A seal with the sha256 of whole objects, and no ledger: as they were once written."""
    import hashlib

    write_toy_cache(tmp_path, num_rows=16)
    cache = tmp_path / "cache"
    name = "latents.tiny-kl.64"
    path = cache / name / "seal.json"
    seal = json.loads(path.read_text())
    del seal["seal_sha256"]
    for entry in seal["shards"]:
        del entry["digest"]
        data = shard_file(cache, entry["index"], name).read_bytes()
        entry["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps({**seal, "seal_sha256": fingerprint(seal)}))
    run(cache).check()
    array = open_sealed(LocalStore(str(cache)), name, "x")
    records = np.zeros((8, *array.spec.layout.shape), np.float16)
    shard_file(cache, 1, name).write_bytes(pack_shard(records, array.spec.layout, 8))
    (damage,) = run(cache).damage
    assert damage.shard == 1 and "is another shard than the sealed one" in damage.what


def test_webdataset_containers_verify(tmp_path: Path) -> None:
    with tiny_parts(tmp_path):
        encode_tiny_cache(tmp_path, format="webdataset", flip=False, codec="fp16")
    cache = tmp_path / "work/cache"
    report = run(cache)
    report.check()
    assert (report.num_shards, report.num_records) == (12, 44)
    flip_bytes(cache / LATENTS / "000003.tar", 700)
    (damage,) = run(cache).damage
    assert damage.shard == 3 and "row 12 fails its crc32c checksum" in damage.what


def test_unknown_arrays_and_absent_caches(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=rf"no array 'x' in .*known are {ARRAYS[0]}, "):
        run(cache, array=("x",))
    with pytest.raises(MissingError, match="no cache at .*: run `repa encode-latents` first"):
        run(tmp_path / "nothing/cache")
    assert run(cache, array=(LATENTS, LATENTS)).arrays == (LATENTS,)


@dataclasses.dataclass
class Reads:
    """The shards that were read."""

    keys: list[str] = dataclasses.field(default_factory=list)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    counted = Reads()
    read_into = LocalStore.read_into

    def read(self: LocalStore, key: str, buffer: memoryview) -> int:
        counted.keys.append(key)
        return read_into(self, key, buffer)

    monkeypatch.setattr(LocalStore, "read_into", read)
    yield counted


class Stop(Silent):
    """Interrupts after so many shards."""

    def __init__(self, after: int):
        self.left = after

    def advance(self, count: int, **facts: float) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


def test_a_stopped_verify_goes_on(cache: Path, reads: Reads) -> None:
    flip_bytes(shard_file(cache, 0, ARRAYS[0]), 3)
    with pytest.raises(KeyboardInterrupt):
        verify_cache(config_of(cache), LocalExecutor(0), Stop(8))
    records = sorted((cache / "verify").rglob("0*.json"))
    done = {path.parent.name + "/c/" + str(int(path.stem)) for path in records}
    assert 8 <= len(done) < 36
    reads.keys.clear()
    report = run(cache)
    read = {key[: key.index("/c/") + 4] for key in reads.keys}
    assert len(reads.keys) == 36 - len(done) and not read & done
    # What was found before the stop is in the report, the damage too.
    assert report.num_shards == 35
    assert [(d.array, d.shard) for d in report.damage] == [(ARRAYS[0], 0)]
    reads.keys.clear()
    run(cache)  # that one was finished: disks rot, so the next reads everything
    assert len(reads.keys) == 36


def test_again_and_a_new_seal_start_over(cache: Path, reads: Reads) -> None:
    for changes in ({"again": True}, {}):
        with pytest.raises(KeyboardInterrupt):
            verify_cache(config_of(cache), LocalExecutor(0), Stop(20))
        if not changes:
            for name in ARRAYS:
                seal = json.loads((cache / name / "seal.json").read_text())
                del seal["seal_sha256"]
                seal["shards"][0]["digest"] = "rows-crc32c:" + "0" * 64
                seal["seal_sha256"] = fingerprint(seal)
                (cache / name / "seal.json").write_text(json.dumps(seal))
        reads.keys.clear()
        report = run(cache, **changes)
        assert len(reads.keys) == 36
    assert {(d.kind, d.shard) for d in report.damage} == {("ledger", None), ("shard", 0)}


def test_what_cannot_be_read_is_not_called_damaged(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into = LocalStore.read_into

    def read(self: LocalStore, key: str, buffer: memoryview) -> int:
        if key.startswith(f"{LATENTS}/c/3/"):
            raise StoreError("503 after 5 tries")
        if key.startswith(f"{LATENTS}/c/4/"):
            raise OSError(5, "Input/output error")
        return read_into(self, key, buffer)

    monkeypatch.setattr(LocalStore, "read_into", read)
    report = run(cache)
    (damage,) = report.damage
    assert damage.shard == 4 and "cannot be read" in damage.what
    assert len(report.unread) == 1 and "(shard 3): 503 after 5 tries" in report.unread[0]
    with pytest.raises(StoreError, match="1 shard could not be read, the others are verified"):
        dataclasses.replace(report, damage=()).check()
    monkeypatch.undo()
    report = run(cache)  # goes on with that one; what was found damaged stands until a new round
    assert report.num_shards == 35 and report.unread == ()
    run(cache).check()


@pytest.mark.parametrize("key", ["manifest.json", f"{LATENTS}/seal.json", f"{LATENTS}/zarr.json"])
def test_a_store_that_does_not_answer_is_no_damage(
    key: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = LocalStore.get

    def fail(self: LocalStore, asked: str) -> bytes:
        if asked == key:
            raise StoreError("503 after 5 tries")
        return get(self, asked)

    monkeypatch.setattr(LocalStore, "get", fail)
    with pytest.raises(StoreError, match="503"):
        run(cache)
    if key.endswith("zarr.json"):
        (cache / LATENTS / "seal.json").unlink()
        with pytest.raises(StoreError, match="503"):
            run(cache)


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_and_threads(threads: int, cache: Path, reads: Reads) -> None:
    """As many threads as asked, each with one buffer that holds any shard."""
    buffers: dict[int, int] = {}
    read_into = LocalStore.read_into

    def read(self: LocalStore, key: str, buffer: memoryview) -> int:
        buffers[id(buffer.obj)] = len(buffer.obj)  # type: ignore[arg-type]
        time.sleep(0.002)
        return read_into(self, key, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "read_into", read)
        run(cache, array=(LATENTS,), read_threads=threads).check()
    assert len(buffers) <= threads and set(buffers.values()) == {340}


def test_a_cache_that_cannot_be_written_to(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: LocalStore, key: str, data: Any) -> None:
        raise PermissionError(13, "Permission denied", key)

    monkeypatch.setattr(LocalStore, "put", refuse)
    verify(config_of(cache))
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("cannot be written to, no records were kept")
    assert told[1].startswith("verified: 6 arrays, 36 shards")
    flip_bytes(shard_file(cache, 2), 0)
    with pytest.raises(DamagedError, match=r"^damaged in 1 place, the first: .*row 8 fails"):
        verify(config_of(cache))


def test_the_plan_writes_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(config_of(cache, dry_run=True))
    assert capsys.readouterr().out.count("6 shards, ") == 6
    assert not (cache / "verify").exists()


def test_arrays_of_different_shards_are_verified_together(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, num_rows=16)
    store = LocalStore(str(tmp_path / "cache"))
    records = np.ones((16, 3), np.float16)
    write_array(store, "features.other.64", records, 5, {"kind": "features"})
    report = run(tmp_path / "cache")
    report.check()
    assert report.num_shards == 2 + 2 + 4


KILLED = """
import sys
from repa_pipeline.config_care import VerifyConfig
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.observe import Silent
from repa_pipeline.stages.verify import verify_cache
import time
read = LocalStore.read_into
def slow(self, key, buffer):
    time.sleep(0.1)
    return read(self, key, buffer)
LocalStore.read_into = slow
verify_cache(VerifyConfig(workspace=sys.argv[1]), LocalExecutor(0), Silent())
"""


def test_a_killed_verify_goes_on(cache: Path, reads: Reads) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(cache.parent)])
    deadline = time.monotonic() + 60
    while len(list((cache / "verify").rglob("0*.json"))) < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    done = len(list((cache / "verify").rglob("0*.json")))
    report = run(cache)
    report.check()
    assert report.num_shards == 36 and len(reads.keys) == 36 - done < 27
