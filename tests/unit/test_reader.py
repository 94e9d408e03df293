"""The trainer's reader: the records of plain indexing, in the canonical order, and its failures."""

from __future__ import annotations

import copy
import io
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fsspec.implementations.local import LocalFileSystem

from repa_pipeline.data import fetch
from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    open_sealed,
)
from repa_pipeline.data.objects import LocalStore, ObjectStore, RemoteStore
from repa_pipeline.data.order import Order, rank_slice
from repa_pipeline.data.reader import Reader, Records
from repa_pipeline.data.shards import CONTAINERS, RecordLayout, pack_shard
from repa_pipeline.errors import DamagedError, StageError, StoreError
from repa_pipeline.testing.caches import write_shards

NUM_ROWS, SHARD_ROWS = 203, 8
NAMES = ("latents", "features.a", "features.bb")
KINDS: dict[str, tuple[tuple[int, ...], str]] = {
    "latents": ((4, 2, 2), "float16"),
    "features.a": ((3, 5), "int8"),
    "features.bb": ((7,), "uint8"),
}
# As files, by ranges from a store, from a local copy that the first epoch makes.
WAYS = ("files", "store", "copy")
Values = npt.NDArray[np.generic]


def make_array(store: LocalStore, name: str, container: str, seed: int) -> Values:
    """Writes a sealed array and gives its values as zarr or tarfile read them."""
    shape, dtype = KINDS[name.removesuffix(".flip")]
    layout = RecordLayout(shape, dtype, SHARD_ROWS, container)
    spec = ArraySpec(name, NUM_ROWS, layout, {"name": name})
    generator = np.random.default_rng([seed, *name.encode()])
    values = generator.integers(-100, 100, (NUM_ROWS, *shape)).astype(dtype)
    write_shards(store, spec, values)
    plain = read_plainly(store.root / name, container)
    assert plain.tobytes() == values.tobytes()
    return plain


def read_plainly(folder: Path, container: str) -> Values:
    if container == "zarr":
        import zarr

        plain: Values = zarr.open(str(folder), mode="r")[:]
        return plain
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.append(np.load(io.BytesIO(file.read()), allow_pickle=False))
    return np.stack(found)


class Cache:
    """Three sealed arrays over the same rows, their mirrored views, and the values of all."""

    def __init__(self, folder: Path, container: str = "zarr"):
        self.store = LocalStore(str(folder))
        self.plain = [make_array(self.store, name, container, 0) for name in NAMES]
        self.mirrored = [make_array(self.store, f"{name}.flip", container, 1) for name in NAMES]

    def open(self, way: str = "files", view: str = "") -> list[SealedArray]:
        store: ObjectStore = self.store
        if way != "files":
            store = RemoteStore(f"file://{self.store.root}", LocalFileSystem())
        return [open_sealed(store, name + view, "x") for name in NAMES]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cache]:
    return {kind: Cache(tmp_path_factory.mktemp(kind), kind) for kind in CONTAINERS}


@pytest.fixture(scope="module")
def cache(caches: dict[str, Cache]) -> Cache:
    return caches["zarr"]


@pytest.fixture
def own_cache(cache: Cache, tmp_path: Path) -> Cache:
    """A copy, to damage."""
    own = copy.copy(cache)
    own.store = LocalStore(str(shutil.copytree(cache.store.root, tmp_path / "cache")))
    return own


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("repa-reader")]


def make_order(**changes: int) -> Order:
    values = {"num_rows": NUM_ROWS, "shard_rows": SHARD_ROWS, "batch_size": 12, "seed": 5}
    return Order(**{**values, "window": 4, **changes})


def read(cache: Cache, order: Order, first: int, last: int, **options: Any) -> list[Records]:
    way = options.pop("way", "files")
    with Reader(cache.open(way), order, first_step=first, last_step=last, **options) as reader:
        return [records.copy() for records in reader]


def copy_options(way: str, folder: Path) -> dict[str, Any]:
    if way != "copy":
        return {"way": way}
    return {"way": way, "local_copy": str(folder / "copy"), "local_copy_bytes": 10**9}


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranges a shard."""
    monkeypatch.setattr(fetch, "RANGE_BYTES", 50)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_equals_plain_indexing(
    container: str,
    way: str,
    lanes: int,
    caches: dict[str, Cache],
    tmp_path: Path,
    small_ranges: None,
) -> None:
    """Over an epoch and a half, the last batch of an epoch and the short last shard included."""
    cache, order = caches[container], make_order(lanes=lanes)
    assert order.steps_per_epoch == 16 and NUM_ROWS % SHARD_ROWS
    batches = read(cache, order, 0, 25, **copy_options(way, tmp_path))
    assert [batch.step for batch in batches] == list(range(25))
    for batch in batches:
        assert batch.rows.tolist() == order.rows(batch.step).tolist()
        for got, plain in zip(batch.arrays, cache.plain, strict=True):
            assert got.dtype == plain.dtype and got.shape == (12, *plain.shape[1:])
            assert got.tobytes() == plain[batch.rows].tobytes()


def views(step: int) -> npt.NDArray[np.bool_]:
    """Step 3 has one view alone."""
    drawn = np.random.default_rng(step).random(12) < 0.4
    return drawn if step != 3 else np.ones(12, np.bool_)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_each_row_from_its_view(
    container: str,
    way: str,
    world_size: int,
    caches: dict[str, Cache],
    tmp_path: Path,
    small_ranges: None,
) -> None:
    cache, order = caches[container], make_order(lanes=3)
    options = {"mirrored": cache.open(way, ".flip"), "views": views, "world_size": world_size}
    options |= copy_options(way, tmp_path)
    ranks = [read(cache, order, 2, 20, rank=rank, **options) for rank in range(world_size)]
    for step, parts in zip(range(2, 20), zip(*ranks, strict=True), strict=True):
        rows, flipped = order.rows(step), views(step)
        for i, (plain, mirrored) in enumerate(zip(cache.plain, cache.mirrored, strict=True)):
            expected = plain[rows]
            expected[flipped] = mirrored[rows[flipped]]
            got = np.concatenate([part.arrays[i] for part in parts])
            assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_ranks_read_the_global_batch(world_size: int, cache: Cache) -> None:
    order = make_order(lanes=2)
    whole = read(cache, order, 10, 20)
    ranks = [read(cache, order, 10, 20, rank=r, world_size=world_size) for r in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        sizes = [len(part.rows) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert np.concatenate([part.rows for part in parts]).tolist() == batch.rows.tolist()
        for i, array in enumerate(batch.arrays):
            joined = np.concatenate([part.arrays[i] for part in parts])
            assert joined.tobytes() == array.tobytes()


def test_a_rank_without_rows(cache: Cache) -> None:
    batches = read(cache, make_order(batch_size=2), 0, 3, rank=0, world_size=3)
    assert [len(batch.rows) for batch in batches] == [0, 0, 0]
    assert batches[0].arrays[0].shape == (0, 4, 2, 2)


def test_resume_at_any_step_is_the_tail(cache: Cache) -> None:
    order = make_order(lanes=3)
    whole = read(cache, order, 0, 34)
    for first in range(0, 35):
        tail = read(cache, order, first, 34)
        assert [batch.step for batch in tail] == list(range(first, 34))
        for got, expected in zip(tail, whole[first:], strict=True):
            assert got.rows.tolist() == expected.rows.tolist()
            for a, b in zip(got.arrays, expected.arrays, strict=True):
                assert a.tobytes() == b.tobytes()


def count_bytes(order: Order, arrays: list[SealedArray], shards: set[int]) -> int:
    return sum(array.shard_bytes(shard) for array in arrays for shard in shards)


def test_a_resumed_reader_reads_what_is_still_needed(cache: Cache) -> None:
    order = make_order()
    arrays = cache.open("store")
    for first in (0, 7, 15):
        with Reader(arrays, order, first_step=first, last_step=16) as reader:
            assert [records.step for records in reader] == list(range(first, 16))
        needed = {int(row) // SHARD_ROWS for step in range(first, 16) for row in order.rows(step)}
        assert reader.num_bytes == reader.num_store_bytes == count_bytes(order, arrays, needed)
    # Of a file single records are read.
    with Reader(cache.open(), order, first_step=15, last_step=16) as reader:
        list(reader)
    strides = [array.spec.layout.stride for array in arrays]
    assert reader.num_store_bytes == 0
    assert 12 * sum(strides) <= reader.num_bytes < count_bytes(order, arrays, needed) / 2


def first_step_of(order: Order, shard: int) -> int:
    steps = range(order.steps_per_epoch)
    return next((s for s in steps if shard in order.rows(s) // order.shard_rows), -1)


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replace(path: Path) -> None:
    """A sound shard of other records."""
    layout = RecordLayout((3, 5), "int8", SHARD_ROWS)
    path.write_bytes(pack_shard(np.ones((SHARD_ROWS, 3, 5), np.int8), layout))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "record": (lambda path: flip_bit(path, 2 * 19 + 3), "row {row} fails its crc32c checksum; "),
    "checksum": (lambda path: flip_bit(path, 3 * 19 - 1), "row {row} fails its crc32c checksum; "),
    "index": (lambda path: flip_bit(path, -1), "the shard index is damaged; "),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated or foreign"),
    "missing": (lambda path: path.unlink(), "is missing; "),
    "replaced": (replace, "is another shard than the sealed one: its digest is rows-crc32c:"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_raised_at_the_batch_that_needs_it(
    damage: str, way: str, own_cache: Cache, tmp_path: Path, small_ranges: None
) -> None:
    order = make_order()
    shard = max(range(25), key=lambda k: first_step_of(order, k))
    expected = first_step_of(order, shard)
    assert expected > 8
    do, message = DAMAGES[damage]
    do(own_cache.store.root / f"features.a/c/{shard}/0/0")
    where = f"features.a/c/{shard}/0/0 .shard {shard}, rows {8 * shard} to {8 * shard + 7}.:? "
    match = where + message.format(row=8 * shard + 2) + ".*run `repa repair`"
    options = copy_options(way, tmp_path)
    arrays = own_cache.open(options.pop("way"))
    seen = []
    with Reader(arrays, order, first_step=0, last_step=16, **options) as reader:
        with pytest.raises(DamagedError, match=match):
            for batch in reader:
                seen.append(batch.step)
                assert np.array_equal(batch.arrays[1], own_cache.plain[1][batch.rows])
        with pytest.raises(DamagedError, match=match):
            next(iter(reader))
    assert seen == list(range(expected))


def test_a_replaced_shard_is_found_by_who_reads_few_of_its_rows(own_cache: Cache) -> None:
    order = make_order()
    replace(own_cache.store.root / "features.a/c/3/0/0")
    found = 0
    for rank in range(6):
        part = order.epoch(0)[:, rank_slice(12, rank, 6)]
        if 3 in part // SHARD_ROWS:
            found += 1
            with pytest.raises(DamagedError, match="c/3/0/0 .* is another shard than the sealed"):
                read(own_cache, order, 0, 16, rank=rank, world_size=6)
    assert found > 2


class Moody(RemoteStore):
    """A store whose answers to ranges are `mood`'s business."""

    mood: Callable[[str, memoryview], None]

    def read_range_into(self, key: str, start: int, buffer: memoryview) -> None:
        super().read_range_into(key, start, buffer)
        self.mood(key, buffer)


def moody_arrays(cache: Cache, mood: Callable[[str, memoryview], None]) -> list[SealedArray]:
    store = Moody(f"file://{cache.store.root}", LocalFileSystem())
    store.mood = mood
    return [open_sealed(store, name, "x") for name in NAMES]


def test_a_range_damaged_on_its_way_is_asked_for_again(cache: Cache) -> None:
    asked: dict[str, int] = {}

    def mangle(key: str, buffer: memoryview) -> None:
        asked[key] = asked.get(key, 0) + 1
        if asked[key] == 1 and "features.a" in key:
            buffer[5] ^= 4

    order, arrays = make_order(), moody_arrays(cache, mangle)
    with Reader(arrays, order, first_step=0, last_step=16) as reader:
        for batch in reader:
            assert np.array_equal(batch.arrays[1], cache.plain[1][batch.rows])
    assert {count for key, count in asked.items() if "features.a" in key} == {2}
    assert {count for key, count in asked.items() if "features.a" not in key} == {1}


def test_a_dead_store_is_raised_at_the_batch_that_needs_it(cache: Cache) -> None:
    order = make_order()
    shard = max(range(25), key=lambda k: first_step_of(order, k))

    def die(key: str, buffer: memoryview) -> None:
        if f"/c/{shard}/" in key:
            raise StoreError("GET x: tried 10 times")

    seen = []
    with Reader(moody_arrays(cache, die), order, first_step=0, last_step=16) as reader:
        with pytest.raises(StoreError, match="tried 10 times"):
            for batch in reader:
                seen.append(batch.step)
    assert seen == list(range(first_step_of(order, shard)))


def test_leaving_does_not_wait_for_a_store_that_is_silent(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_LEAVE_S", 0.05)
    silent, answers = threading.Event(), threading.Event()

    def wait(key: str, buffer: memoryview) -> None:
        silent.set()
        answers.wait()

    with Reader(moody_arrays(cache, wait), make_order(), first_step=0, last_step=16) as reader:
        silent.wait()
    assert [t for t in threading.enumerate() if t.name.startswith("repa-reader")]
    answers.set()
    for thread in reader._fetcher._threads:
        thread.join()


def test_an_error_of_the_planner_is_raised(cache: Cache) -> None:
    def wrong(step: int) -> npt.NDArray[np.bool_]:
        raise ZeroDivisionError

    options = {"mirrored": cache.open("files", ".flip"), "views": wrong}
    with pytest.raises(ZeroDivisionError):
        read(cache, make_order(), 0, 3, **options)


def test_leaving_early_does_not_hang(cache: Cache) -> None:
    for after in (0, 1, 3):
        with Reader(cache.open(), make_order(), first_step=0, last_step=10**6) as reader:
            for batch in reader:
                if batch.step == after:
                    break
    with pytest.raises(ZeroDivisionError):
        with Reader(cache.open(), make_order(), first_step=0, last_step=10**6) as reader:
            raise ZeroDivisionError


def test_a_second_iteration_ends_at_once(cache: Cache) -> None:
    with Reader(cache.open(), make_order(), first_step=0, last_step=3) as reader:
        assert len(list(reader)) == 3
        assert list(reader) == [] and list(reader) == []
    assert read(cache, make_order(), 5, 5) == []


def test_waiting_is_counted(cache: Cache) -> None:
    arrays = moody_arrays(cache, lambda key, buffer: time.sleep(0.01))[:1]
    with Reader(arrays, make_order(), first_step=0, last_step=1) as reader:
        next(iter(reader))
        assert 0.01 <= reader.wait_s


# Memory.


@pytest.mark.parametrize("read_ahead_bytes", [0, 1, 10**9])
def test_a_batch_holds_until_the_next_but_one(read_ahead_bytes: int, cache: Cache) -> None:
    order = make_order(window=2)
    addresses = set()
    before: Records | None = None
    with Reader(
        cache.open(), order, first_step=0, last_step=80, read_ahead_bytes=read_ahead_bytes
    ) as reader:
        for batch in reader:
            time.sleep(0.001)  # the threads could write now
            for records in (batch, before or batch):
                for array, plain in zip(records.arrays, cache.plain, strict=True):
                    assert np.array_equal(array, plain[records.rows])
            before = batch
            addresses.add(batch.arrays[0].__array_interface__["data"][0])
        batch_bytes = 12 * (32 + 15 + 7)
        # All batches have one of a few buffers, when memory is not plenty.
        assert len(addresses) * batch_bytes <= reader.buffer_bytes
        assert len(addresses) < 16 or read_ahead_bytes == 10**9


@pytest.mark.parametrize(
    ("lanes", "window", "batch_size", "world_size"),
    [(1, 1, 12, 1), (1, 4, 12, 1), (1, 4, 100, 1), (1, 16, 7, 2), (2, 3, 12, 1), (4, 2, 12, 3)],
)
@pytest.mark.parametrize("way", WAYS)
def test_memory(
    way: str,
    lanes: int,
    window: int,
    batch_size: int,
    world_size: int,
    cache: Cache,
    tmp_path: Path,
) -> None:
    """Two windows of every lane, or one; a third where no shard of a store is read twice."""
    for seed in range(4):
        order = make_order(lanes=lanes, window=window, batch_size=batch_size, seed=seed)
        options = {"rank": world_size - 1, "world_size": world_size}
        options |= copy_options(way, tmp_path)
        arrays = cache.open(options.pop("way"))
        steps = 2 * order.steps_per_epoch
        row_bytes = (batch_size - (world_size - 1) * batch_size // world_size) * (32 + 15 + 7)
        # A batch may be cut by its window's end, and lanes be a row longer than others.
        window_batches = -(-lanes * window * SHARD_ROWS // batch_size) + 2
        window_batches = min(window_batches, order.steps_per_epoch)
        for read_ahead_bytes in (0, 1):
            with Reader(
                arrays,
                order,
                first_step=0,
                last_step=steps,
                read_ahead_bytes=read_ahead_bytes,
                **options,
            ) as reader:
                assert len(list(reader)) == steps
            num_windows = (1 if read_ahead_bytes else 2) + (way == "store")
            most = num_windows * window_batches + (2 if read_ahead_bytes else 4)
            assert reader.buffer_bytes <= most * row_bytes
            if way == "store":
                assert reader.num_bytes <= 2 * sum(array.spec.num_bytes for array in arrays)


def test_the_next_window_is_read_while_this_one_is_used(cache: Cache) -> None:
    order = make_order(window=4)
    arrays = cache.open("store")
    with Reader(arrays, order, first_step=0, last_step=16) as reader:
        next(iter(reader))
        # Without a further word: two windows of four shards, of which one is short.
        shards = {int(row) // SHARD_ROWS for step in range(5) for row in order.rows(step)}
        assert len(shards) == 9
        wait_until(lambda: reader.num_bytes >= count_bytes(order, arrays, shards))


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Cuda:
    """What page-locking asks of torch.cuda, without a device; `limit` registrations succeed."""

    def __init__(self, limit: int):
        self.limit = limit
        self.locked: dict[int, int] = {}
        self.num_locked = 0

    def cudart(self) -> Cuda:
        return self

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if len(self.locked) == self.limit:
            return 2
        assert address % 4096 == 0 and address not in self.locked
        self.locked[address] = num_bytes
        self.num_locked += 1
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def synchronize(self) -> None:
        pass


def test_pinned_batches_lie_in_locked_memory(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(1000)
    monkeypatch.setattr("torch.cuda", cuda)
    with Reader(cache.open(), make_order(), first_step=0, last_step=40, pin=True) as reader:
        for records in reader:
            for array, plain in zip(records.arrays, cache.plain, strict=True):
                assert array.tobytes() == plain[records.rows].tobytes()
                start = array.__array_interface__["data"][0]
                assert any(
                    at <= start and start + array.nbytes <= at + num_bytes
                    for at, num_bytes in cuda.locked.items()
                )
        # Each buffer is locked once, however often it is used.
        assert len(cuda.locked) == cuda.num_locked == reader.buffer_bytes / (12 * (32 + 15 + 7))
    assert not cuda.locked


def test_a_system_that_locks_no_more_memory(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(3)
    monkeypatch.setattr("torch.cuda", cuda)
    with pytest.raises(StageError, match="CUDA error 2.*ulimit -l.*--read-ahead-gb"):
        read(cache, make_order(), 0, 16, pin=True)
    assert not cuda.locked
