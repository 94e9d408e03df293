"""The trainer's reader on a real S3 server: the plain values through bad days, few requests."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from repa_pipeline.data import fetch
from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    open_sealed,
)
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader
from repa_pipeline.data.retry import RetryPolicy
from repa_pipeline.data.shards import CONTAINERS, RecordLayout
from repa_pipeline.errors import DamagedError, StoreError
from repa_pipeline.testing.caches import write_shards
from repa_pipeline.testing.faults import (
    QUICK,
    Chance,
    FaultProxy,
    Rule,
    Script,
    delay,
    reset,
    server_error,
    slow_down,
    throttle,
    truncate,
)

pytestmark = pytest.mark.slow

NUM_ROWS, SHARD_ROWS = 90, 16
ORDER = Order(NUM_ROWS, SHARD_ROWS, 10, seed=2, window=2)
TOKENS = np.random.default_rng(0).integers(-127, 128, (NUM_ROWS, 16, 96)).astype(np.int8)
SCALES = np.random.default_rng(1).random((NUM_ROWS, 16)).astype(np.float16)
VALUES = {"features.t": TOKENS, "features.t.scale": SCALES}
# 6 shards of each; those of tokens, 24,640 bytes, in two ranges but for the short last one.
GETS = 6 * 2 - 1 + 6


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RANGE_BYTES", 16_000)


def write(store: ObjectStore, container: str = "zarr") -> None:
    for name, values in VALUES.items():
        layout = RecordLayout(values.shape[1:], values.dtype.name, SHARD_ROWS, container)
        write_shards(store, ArraySpec(name, NUM_ROWS, layout, {}), values)


def arrays_at(bucket: str, retry: RetryPolicy = QUICK) -> list[SealedArray]:
    store = open_store(f"{bucket}/cache", retry=retry)
    return [open_sealed(store, name, "x") for name in VALUES]


def read(arrays: list[SealedArray], epochs: range = range(1), copy: str | None = None) -> Reader:
    """Reads whole epochs and checks every value."""
    steps = ORDER.steps_per_epoch
    with Reader(
        arrays,
        ORDER,
        first_step=epochs.start * steps,
        last_step=epochs.stop * steps,
        read_threads=4,
        local_copy=copy,
        local_copy_bytes=10**9,
    ) as reader:
        for records in reader:
            for array, values in zip(records.arrays, VALUES.values(), strict=True):
                assert array.tobytes() == values[ORDER.rows(records.step)].tobytes()
    return reader


def shard_gets(proxy: FaultProxy) -> Counter[str]:
    return Counter(exchange.path for exchange in proxy.exchanges if ".json" not in exchange.path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_epoch_in_as_few_requests_as_planned(
    container: str, bucket: str, proxy: FaultProxy
) -> None:
    write(open_store(f"{bucket}/cache", retry=QUICK), container)
    arrays = arrays_at(bucket)
    proxy.exchanges.clear()
    reader = read(arrays)
    assert {exchange.method for exchange in proxy.exchanges} == {"GET"}
    assert sum(shard_gets(proxy).values()) == GETS
    assert reader.num_store_bytes == sum(array.spec.num_bytes for array in arrays)


def test_bad_days(bucket: str, proxy: FaultProxy) -> None:
    """503, 500, truncated, reset, late and slow answers to most requests: the values are right."""
    write(open_store(f"{bucket}/cache", retry=QUICK))
    arrays = arrays_at(bucket)
    proxy.exchanges.clear()
    faults = [slow_down(), server_error(), truncate(), reset(), delay(0.05), throttle(10**6)]
    proxy.script = Chance(1, 0.7, faults)
    read(arrays)
    assert len(proxy.faults()) == len(faults) and len(proxy.exchanges) > GETS


def test_a_stalled_range_is_asked_for_again(bucket: str, proxy: FaultProxy) -> None:
    """A deadline per range: the others go on, and the range is there a second later."""
    write(open_store(f"{bucket}/cache", retry=QUICK))
    arrays = arrays_at(bucket, dataclasses.replace(QUICK, silence_seconds=0.5))
    proxy.script = Script(Rule(delay(60.0), method="GET", path="features.t/c/", times=2))
    read(arrays)
    assert proxy.faults() == {"delay": 2}


def test_a_dead_store_is_one_clear_error(bucket: str, proxy: FaultProxy) -> None:
    write(open_store(f"{bucket}/cache", retry=QUICK))
    arrays = arrays_at(bucket, dataclasses.replace(QUICK, attempts=3))
    proxy.script = Script(Rule(slow_down(), path="features.t/c/", times=None))
    with pytest.raises(StoreError, match="^GET s3://.*/features.t/c/.*: tried 3 times .*SlowDown"):
        read(arrays)


def test_damage_names_shard_and_rows(bucket: str) -> None:
    store = open_store(f"{bucket}/cache", retry=QUICK)
    write(store)
    key = "features.t/c/2/0/0"
    sound = store.get(key)
    data = bytearray(sound)
    data[1540 * 3 + 9] ^= 1
    cases = {
        "row 35 fails its crc32c checksum": bytes(data),
        "is truncated or foreign: .* ends at byte 24000": sound[:24_000],
        "is another shard than the sealed one": store.get("features.t/c/3/0/0"),
    }
    for message, content in cases.items():
        store.put(key, content)
        where = r"s3://.*/features.t/c/2/0/0 \(shard 2, rows 32 to 47\)"
        with pytest.raises(DamagedError, match=f"{where}.*{message}"):
            read(arrays_at(bucket))
    store.delete(key)
    with pytest.raises(DamagedError, match=f"{where} is missing"):
        read(arrays_at(bucket))


def test_the_second_epoch_makes_no_requests(bucket: str, proxy: FaultProxy, tmp_path: Path) -> None:
    write(open_store(f"{bucket}/cache", retry=QUICK))
    arrays, copy = arrays_at(bucket), str(tmp_path / "copy")
    read(arrays, range(1), copy)
    proxy.exchanges.clear()
    proxy.script = Script(Rule(slow_down(), times=None))
    reader = read(arrays, range(1, 3), copy)
    assert not proxy.exchanges and reader.num_store_bytes == 0
