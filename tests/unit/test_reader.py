"""The trainer's reader: the records of plain indexing, in the canonical order, and its failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    begin_array,
    open_sealed,
    seal_array,
    write_shard,
)
from repa_pipeline.data.objects import LocalStore, RemoteStore
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader, Records
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.errors import DamagedError

NUM_ROWS, SHARD_ROWS = 203, 8
Values = npt.NDArray[np.generic]


def make_array(store: LocalStore, name: str, shape: tuple[int, ...], dtype: str) -> Values:
    """Writes a sealed array and gives its values as plain zarr reads them."""
    layout = RecordLayout(shape, dtype, SHARD_ROWS)
    spec = ArraySpec(name, NUM_ROWS, layout, {"name": name})
    generator = np.random.default_rng(len(name))
    values = generator.integers(-100, 100, (NUM_ROWS, *shape)).astype(dtype)
    begin_array(store, spec)
    shards = []
    for k in range(spec.num_shards):
        part = values[k * SHARD_ROWS : (k + 1) * SHARD_ROWS]
        num_bytes, sha256 = write_shard(store, spec, k, part)
        shards.append({"index": k, "rows": len(part), "num_bytes": num_bytes, "sha256": sha256})
    seal_array(store, spec, shards)
    import zarr

    plain: Values = zarr.open(str(store.root / name), mode="r")[:]
    assert plain.tobytes() == values.tobytes()
    return plain


class Cache:
    """Three sealed arrays over the same rows, and their values."""

    def __init__(self, folder: Path):
        self.store = LocalStore(str(folder))
        self.plain = [
            make_array(self.store, "latents", (4, 2, 2), "float16"),
            make_array(self.store, "features.a", (3, 5), "int8"),
            make_array(self.store, "features.bb", (7,), "uint8"),
        ]

    def open(self) -> list[SealedArray]:
        return [open_sealed(self.store, n, "x") for n in ("latents", "features.a", "features.bb")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def own_cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "repa-reader"]


def make_order(**changes: int) -> Order:
    values = {"num_rows": NUM_ROWS, "shard_rows": SHARD_ROWS, "batch_size": 12, "seed": 5}
    return Order(**{**values, "window": 4, **changes})


def read(cache: Cache, order: Order, first: int, last: int, **options: Any) -> list[Records]:
    with Reader(cache.open(), order, first_step=first, last_step=last, **options) as reader:
        return list(reader)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_equals_plain_indexing(lanes: int, cache: Cache) -> None:
    """Over an epoch and a half, the last batch of an epoch included."""
    order = make_order(lanes=lanes)
    assert order.steps_per_epoch == 16
    batches = read(cache, order, 0, 25)
    assert [batch.step for batch in batches] == list(range(25))
    for batch in batches:
        assert batch.rows.tolist() == order.rows(batch.step).tolist()
        for got, plain in zip(batch.arrays, cache.plain, strict=True):
            assert got.dtype == plain.dtype and got.shape == (12, *plain.shape[1:])
            assert got.tobytes() == plain[batch.rows].tobytes()


def test_another_file_system_gives_the_same(cache: Cache) -> None:
    from fsspec.implementations.local import LocalFileSystem

    remote = RemoteStore(f"file://{cache.store.root}", LocalFileSystem())
    arrays = [open_sealed(remote, "features.a", "x")]
    with Reader(arrays, make_order(), first_step=0, last_step=20) as reader:
        for batch in reader:
            assert np.array_equal(batch.arrays[0], cache.plain[1][batch.rows])


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


def first_step_of(order: Order, shard: int) -> int:
    steps = range(order.steps_per_epoch)
    return next((s for s in steps if shard in order.rows(s) // order.shard_rows), -1)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_raised_at_the_batch_that_needs_it(damage: str, own_cache: Cache) -> None:
    order = make_order()
    shard = max(range(26), key=lambda k: first_step_of(order, k))
    expected = first_step_of(order, shard)
    assert expected > 8
    path = own_cache.store.root / f"features.a/c/{shard}/0/0"
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    seen = []
    with Reader(own_cache.open(), order, first_step=0, last_step=16, prefetch=3) as reader:
        with pytest.raises(DamagedError, match=f"features.a.*c/{shard}/0/0.* run `repa repair`"):
            for batch in reader:
                seen.append(batch.step)
                assert np.array_equal(batch.arrays[1], own_cache.plain[1][batch.rows])
        with pytest.raises(DamagedError):
            next(iter(reader))
    assert seen == list(range(expected))


def test_leaving_early_does_not_hang(cache: Cache) -> None:
    began = time.monotonic()
    for after in (0, 1, 3):
        with Reader(
            cache.open(), make_order(), first_step=0, last_step=10**6, prefetch=2
        ) as reader:
            for batch in reader:
                if batch.step == after:
                    break
    with pytest.raises(ZeroDivisionError):
        with Reader(cache.open(), make_order(), first_step=0, last_step=10**6) as reader:
            raise ZeroDivisionError
    assert time.monotonic() - began < 60


def test_a_second_iteration_ends_at_once(cache: Cache) -> None:
    with Reader(cache.open(), make_order(), first_step=0, last_step=3) as reader:
        assert len(list(reader)) == 3
        assert list(reader) == [] and list(reader) == []
    assert read(cache, make_order(), 5, 5) == []


def test_waiting_is_counted(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SealedArray.read_shard

    def slow(self: SealedArray, shard: int, buffer: bytearray) -> npt.NDArray[np.uint8]:
        time.sleep(0.01)
        return plain(self, shard, buffer)

    monkeypatch.setattr(SealedArray, "read_shard", slow)
    with Reader(cache.open()[:1], make_order(), first_step=0, last_step=1) as reader:
        next(iter(reader))
        assert 0.01 <= reader.wait_s


@pytest.mark.parametrize(
    ("lanes", "window", "batch_size", "world_size"),
    [(1, 1, 12, 1), (1, 4, 12, 1), (1, 4, 100, 1), (1, 16, 7, 2), (2, 3, 12, 1), (4, 2, 12, 3)],
)
def test_shards_in_memory(
    lanes: int,
    window: int,
    batch_size: int,
    world_size: int,
    cache: Cache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never more than lanes * (window + 2) shards an array, each read once an epoch and rank."""
    buffers: dict[str, int] = {}
    reads: list[tuple[str, int]] = []
    new_buffer, read_shard = SealedArray.new_buffer, SealedArray.read_shard

    def counted_buffer(self: SealedArray) -> bytearray:
        buffers[self.spec.name] = buffers.get(self.spec.name, 0) + 1
        return new_buffer(self)

    def counted_read(self: SealedArray, shard: int, buffer: bytearray) -> Any:
        reads.append((self.spec.name, shard))
        return read_shard(self, shard, buffer)

    monkeypatch.setattr(SealedArray, "new_buffer", counted_buffer)
    monkeypatch.setattr(SealedArray, "read_shard", counted_read)
    for seed in range(4):
        order = make_order(lanes=lanes, window=window, batch_size=batch_size, seed=seed)
        buffers.clear()
        reads.clear()
        read(cache, order, 0, 2 * order.steps_per_epoch, rank=world_size - 1, world_size=world_size)
        assert set(buffers) == {"latents", "features.a", "features.bb"}
        assert max(buffers.values()) <= lanes * (window + 2)
        assert max(reads.count(one) for one in set(reads)) <= 2
