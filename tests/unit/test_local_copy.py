"""The local copy of a remote cache: within its limit, healed, shared, and harmless when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from repa_pipeline.data import fetch, local_copy
from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    open_sealed,
)
from repa_pipeline.data.local_copy import Busy, LocalCopy
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.errors import DamagedError, StageError
from repa_pipeline.testing.caches import write_shards

NUM_ROWS, SHARD_ROWS = 92, 8
ORDER = Order(NUM_ROWS, SHARD_ROWS, 10, seed=1, window=3)
VALUES = np.random.default_rng(0).integers(-100, 100, (NUM_ROWS, 40, 5)).astype(np.int8)


class CountingStore(LocalStore):
    """A cache whose requests for shards are counted; `before` is called at each."""

    gets = 0
    before: Callable[[], None] | None = None

    def read_range_into(self, key: str, start: int, buffer: memoryview) -> None:
        self.gets += 1
        if self.before:
            self.before()
        super().read_range_into(key, start, buffer)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    store = CountingStore(str(tmp_path / "remote"))
    spec = ArraySpec("a", NUM_ROWS, RecordLayout((40, 5), "int8", SHARD_ROWS), {})
    write_shards(store, spec, VALUES)
    return store


@pytest.fixture
def array(store: CountingStore) -> SealedArray:
    return open_sealed(store, "a", "x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def read(array: SealedArray, folder: Path, limit: int, epochs: range = range(1)) -> Reader:
    """Reads whole epochs and checks every value."""
    steps = ORDER.steps_per_epoch
    with Reader(
        [array],
        ORDER,
        first_step=epochs.start * steps,
        last_step=epochs.stop * steps,
        local_copy=str(folder),
        local_copy_bytes=limit,
    ) as reader:
        for records in reader:
            assert records.arrays[0].tobytes() == VALUES[ORDER.rows(records.step)].tobytes()
    return reader


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))


def total(folder: Path) -> int:
    with LocalCopy(str(folder), 1).locked():
        return sum(path.stat().st_size for path in folder.iterdir())


def test_the_second_epoch_comes_from_the_copy(
    store: CountingStore, array: SealedArray, folder: Path
) -> None:
    first = read(array, folder, 10**9)
    assert store.gets == array.spec.num_shards == len(copies(folder))
    assert first.num_store_bytes == array.spec.num_bytes
    second = read(array, folder, 10**9, range(1, 3))
    assert store.gets == array.spec.num_shards and second.num_store_bytes == 0
    # A copy is the object, byte for byte, and nothing else is left there.
    objects = sorted((store.root / "a/c").glob("*/0/0"))
    assert sorted(map(Path.read_bytes, copies(folder))) == sorted(map(Path.read_bytes, objects))
    assert {path.suffix for path in folder.iterdir()} == {".shard", ""}
    assert oct(folder.stat().st_mode & 0o777) == "0o700"


def test_the_folder_never_grows_above_its_limit(
    store: CountingStore, array: SealedArray, folder: Path
) -> None:
    limit = 4 * array.shard_bytes(0)
    sizes: list[int] = []
    store.before = lambda: sizes.append(total(folder))
    read(array, folder, limit, range(3))
    assert max(sizes) == limit and total(folder) <= limit
    assert len(copies(folder)) == 4
    assert store.gets > array.spec.num_shards
    # A smaller limit holds from the next copy on; one below a shard means no copies.
    read(array, folder, array.shard_bytes(0), range(1))
    assert total(folder) <= array.shard_bytes(0)
    gets = store.gets
    read(array, folder / "other", 100)
    assert store.gets >= gets + array.spec.num_shards and not copies(folder / "other")


def test_the_longest_unused_goes_first(array: SealedArray, folder: Path) -> None:
    copy = LocalCopy(str(folder), 3 * array.shard_bytes(0))

    def put(shard: int) -> None:
        writing = copy.begin(array, shard)
        assert writing is not None
        writing.write(memoryview(bytes(array.shard_bytes(shard))), 0)
        writing.end(True)
        past = 10**9 + shard
        os.utime(copy._path(array, shard, ".shard"), (past, past))

    for shard in (0, 1, 2):
        put(shard)
    fd = copy.open(array, 0)
    assert fd is not None
    os.close(fd)
    put(3)
    assert [shard for shard in range(5) if os.path.exists(copy._path(array, shard, ".shard"))] == [
        0,
        2,
        3,
    ]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_a_damaged_copy_is_fetched_again(
    damage: str, store: CountingStore, array: SealedArray, folder: Path
) -> None:
    read(array, folder, 10**9)
    sound = [path.read_bytes() for path in copies(folder)]
    for i in (2, 5):
        data = bytearray(sound[i])
        data[700] ^= 1
        content = {
            "flip": bytes(data),
            "truncate": sound[i][:900],
            "empty": b"",
            "foreign": sound[7],
        }
        copies(folder)[i].write_bytes(content[damage])
    gets = store.gets
    read(array, folder, 10**9, range(1, 2))
    assert store.gets == gets + 2
    assert [path.read_bytes() for path in copies(folder)] == sound


def test_a_damaged_object_is_not_kept(
    store: CountingStore, array: SealedArray, folder: Path
) -> None:
    path = store.root / "a/c/4/0/0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="a/c/4/0/0 .*row 32 fails its crc32c"):
        read(array, folder, 10**9)
    assert store.gets <= array.spec.num_shards + 1
    copy = LocalCopy(str(folder), 10**9)
    assert copy.open(array, 4) is None
    assert not list(folder.glob("*.part"))


def test_one_writes_and_the_others_wait(
    store: CountingStore, array: SealedArray, folder: Path
) -> None:
    """Ranks of one machine: each object crosses the network once."""
    threads = [
        threading.Thread(target=read, args=(array, folder, 10**9), name=f"rank {rank}")
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.gets == array.spec.num_shards == len(copies(folder))


def test_one_who_waits_too_long_asks_the_store(
    store: CountingStore, array: SealedArray, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_S", 0.05)
    copy = LocalCopy(str(folder), 10**9)
    writing = copy.begin(array, 3)
    assert writing is not None
    with pytest.raises(Busy):
        copy.begin(array, 3)
    read(array, folder, 10**9)
    assert store.gets == array.spec.num_shards == len(copies(folder)) + 1
    writing.end(False)
    assert not list(folder.glob("*.part"))


def test_a_full_disk_ends_the_copy_and_not_the_reading(
    array: SealedArray, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_copy.os, "pwrite", full)
    read(array, folder, 10**9)
    assert not copies(folder) and not list(folder.glob("*.part"))


def test_a_folder_that_cannot_be_made(array: SealedArray, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StageError, match="cannot write the local copy at .*file/copy: Not a dir"):
        read(array, tmp_path / "file/copy", 10**9)


OTHER = """
import os, signal, sys
from pathlib import Path
from repa_pipeline.data.array import open_sealed
from repa_pipeline.data.local_copy import Writing
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader

remote, folder, limit, kill_after = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
write, left = Writing.write, [kill_after]

def dying(self, data, offset):
    left[0] -= 1
    if left[0] == 0:
        write(self, data[:400], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, data, offset)

Writing.write = dying
array = open_sealed(LocalStore(remote), "a", "x")
order = Order(92, 8, 10, seed=int(sys.argv[5]), window=3)
options = {"local_copy": folder, "local_copy_bytes": limit, "last_step": 40, "first_step": 0}
with Reader([array], order, read_threads=2, **options) as reader:
    for records in reader:
        print(records.step, *records.rows, records.arrays[0].tobytes().hex())
"""


def start(
    store: CountingStore, folder: Path, limit: int, kill_after: int, seed: int
) -> subprocess.Popen[str]:
    arguments = [str(store.root), str(folder), str(limit), str(kill_after), str(seed)]
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_killed_while_it_writes(store: CountingStore, array: SealedArray, folder: Path) -> None:
    limit = 5 * array.shard_bytes(0)
    for kill_after in (1, 3):
        process = start(store, folder, limit, kill_after, 0)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert list(folder.glob("*.part"))
    # What it left is neither read nor counted for ever.
    read(array, folder, limit, range(2))
    assert not list(folder.glob("*.part"))
    assert len(copies(folder)) == 5 and total(folder) <= limit


def test_processes_share_it(store: CountingStore, array: SealedArray, folder: Path) -> None:
    limit = 5 * array.shard_bytes(0)
    processes = [start(store, folder, limit, -1, seed) for seed in (3, 4)]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        lines = output.splitlines()
        assert len(lines) == 40
        for line in lines:
            _, *rows, data = line.split()
            assert bytes.fromhex(data) == VALUES[list(map(int, rows))].tobytes()
    assert total(folder) <= limit and not list(folder.glob("*.part"))
