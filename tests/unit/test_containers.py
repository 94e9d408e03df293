"""Arrays in either container: the same rows through the same functions, all damage found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    array_names,
    begin_array,
    fingerprint,
    open_sealed,
    read_spec,
    seal_array,
    write_shard,
)
from repa_pipeline.data.objects import LocalStore, json_bytes, open_store
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader
from repa_pipeline.data.shards import RecordLayout, as_rows, pack_shard
from repa_pipeline.errors import DamagedError, MismatchError, MissingError

CONTAINERS = ["zarr", "webdataset"]
DTYPES = ["float16", "float32", "int8", "uint8", "uint16"]
NUM_ROWS, SHARD_ROWS = 19, 8
NAME = "features.x.64"
MANIFEST = {"kind": "features", "scale": (0.5, 2.0), "prepare": {"crop": "adm"}}
Records = npt.NDArray[np.generic]


def make_spec(container: str, dtype: str = "float16", shape: tuple[int, ...] = (2, 3)) -> ArraySpec:
    return ArraySpec(NAME, NUM_ROWS, RecordLayout(shape, dtype, SHARD_ROWS, container), MANIFEST)


def make_records(spec: ArraySpec, seed: int = 0) -> Records:
    size = spec.num_rows * spec.layout.record_bytes
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return data.view(spec.layout.dtype).reshape(spec.num_rows, *spec.layout.shape)


def part_of(records: Records, shard: int) -> Records:
    return records[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]


def write_all(store: LocalStore, spec: ArraySpec, records: Records) -> list[dict[str, Any]]:
    begin_array(store, spec)
    entries = []
    for k in range(spec.num_shards):
        num_bytes, digest = write_shard(store, spec, k, part_of(records, k))
        rows = len(part_of(records, k))
        entries.append({"index": k, "rows": rows, "num_bytes": num_bytes, "digest": digest})
    return entries


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "cache"))


@pytest.fixture(params=CONTAINERS)
def sealed(request: pytest.FixtureRequest, store: LocalStore) -> SealedArray:
    spec = make_spec(request.param)
    seal_array(store, spec, write_all(store, spec, make_records(spec)))
    return open_sealed(store, NAME, "cache-features")


def path_of(array: SealedArray, shard: int) -> Path:
    return Path(array.store.url) / array.spec.shard_key(shard)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", [(2, 3), (5,)])
def test_round_trip(container: str, dtype: str, shape: tuple[int, ...], store: LocalStore) -> None:
    spec = make_spec(container, dtype, shape)
    records = make_records(spec)
    seal_array(store, spec, write_all(store, spec, records))
    array = open_sealed(store, NAME, "x")
    array.check_present()
    assert array.spec.layout == spec.layout and array.spec.fingerprint == spec.fingerprint
    buffer = array.new_buffer()
    for k in range(3):
        array.verify_shard(k, buffer)
        read = array.read_shard(k, buffer)
        assert read.base is not None and np.shares_memory(read, np.frombuffer(buffer, np.uint8))
        assert as_rows(read, spec.layout).tobytes() == part_of(records, k).tobytes()
    files = [p for p in store.root.rglob("*") if p.is_file() and p.suffix != ".json"]
    assert sum(p.stat().st_size for p in files) == spec.num_bytes and len(files) == 3


def test_objects_of_the_webdataset_container(store: LocalStore) -> None:
    spec = make_spec("webdataset")
    seal_array(store, spec, write_all(store, spec, make_records(spec)))
    names = ["000000.tar", "000001.tar", "000002.tar", "array.json", "seal.json"]
    assert store.list(NAME) == names and spec.metadata_key == f"{NAME}/array.json"
    assert json.loads(store.get(spec.metadata_key)) == {
        "format_version": 1,
        "container": "webdataset",
        "shape": [19, 2, 3],
        "dtype": "float16",
        "shard_rows": 8,
        "attributes": json.loads(json.dumps(MANIFEST)),
    }


def test_plain_webdataset_reads_all_shards(store: LocalStore) -> None:
    webdataset = pytest.importorskip("webdataset")
    spec = make_spec("webdataset", "int8")
    records = make_records(spec)
    seal_array(store, spec, write_all(store, spec, records))
    urls = f"{store.root}/{NAME}/{{000000..000002}}.tar"
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [int(sample["__key__"]) for sample in samples] == list(range(NUM_ROWS))
    assert np.array_equal(np.stack([sample["npy"] for sample in samples]), records)


def test_the_trainer_reads_the_same_from_both(tmp_path: Path) -> None:
    batches = []
    for container in CONTAINERS:
        store, spec = LocalStore(str(tmp_path / container)), make_spec(container)
        seal_array(store, spec, write_all(store, spec, make_records(spec)))
        order = Order(NUM_ROWS, SHARD_ROWS, 4, seed=0)
        steps = order.steps_per_epoch
        array = open_sealed(store, NAME, "x")
        with Reader([array], order, first_step=0, last_step=steps) as reader:
            batches.append([batch.arrays[0].tobytes() for batch in reader])
    assert batches[0] == batches[1] and len(batches[0]) == steps > 3


def change_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("shard", [1, 2])
def test_a_changed_byte_anywhere_is_found(shard: int, sealed: SealedArray) -> None:
    path, layout, first = path_of(sealed, shard), sealed.spec.layout, shard * SHARD_ROWS
    sound, rows = path.read_bytes(), layout.rows_of(shard, NUM_ROWS)
    for position in [*range(0, len(sound), 61), len(sound) - 1]:
        change_byte(path, position)
        row = position // layout.stride
        wrong = rf"row {first + row} fails its" if row < rows else "(index|end of the tar) is dam"
        for check in (sealed.verify_shard, sealed.read_shard):
            with pytest.raises(DamagedError, match=rf"\(shard {shard}, rows .*: .*{wrong}") as e:
                check(shard, sealed.new_buffer())
        assert str(e.value).endswith("run `repa repair`")
        path.write_bytes(sound)
    sealed.verify_shard(shard, sealed.new_buffer())


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "short": (lambda p: p.write_bytes(p.read_bytes()[:-9]), r"got \d+ bytes, expected \d+; run"),
    "long": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "got more than"),
    "empty": (lambda p: p.write_bytes(b""), "got 0 bytes"),
    "missing": (lambda p: p.unlink(), "is missing; run `repa repair`"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "rows 8, 9, .* 15 fail their"),
    "rubbish": (lambda p: p.write_bytes(b"ab" * (p.stat().st_size // 2)), "rows 8, 9, "),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_other_damage(damage: Callable[[Path], Any], message: str, sealed: SealedArray) -> None:
    damage(path_of(sealed, 1))
    for check in (sealed.verify_shard, sealed.read_shard):
        with pytest.raises(DamagedError, match=message) as caught:
            check(1, sealed.new_buffer())
        assert f"{sealed.spec.shard_key(1)} (shard 1, rows 8 to 15)" in str(caught.value)
    sealed.verify_shard(0, sealed.new_buffer())
    sealed.verify_shard(2, sealed.new_buffer())
    if "fail" not in message and "rows" not in message:
        with pytest.raises(DamagedError, match=r"shard 1 is .*; run `repa repair`"):
            sealed.check_present()


def test_a_sound_but_other_shard_is_found(sealed: SealedArray) -> None:
    """Every checksum right, the rows those of another run: only the seal's digest tells."""
    other = make_records(sealed.spec, seed=1)
    path_of(sealed, 1).write_bytes(pack_shard(part_of(other, 1), sealed.spec.layout, SHARD_ROWS))
    for check in (sealed.verify_shard, sealed.read_shard):
        with pytest.raises(DamagedError, match="is another shard than the sealed one: its digest"):
            check(1, sealed.new_buffer())


@pytest.mark.parametrize("key", ["sha256", "digest"])
def test_seals_with_a_sha256_of_the_object_still_verify(key: str, store: LocalStore) -> None:
    spec = make_spec("zarr")
    records = make_records(spec)
    entries = []
    for entry in write_all(store, spec, records):
        digest = hashlib.sha256(store.get(spec.shard_key(entry["index"]))).hexdigest()
        del entry["digest"]
        entries.append({**entry, key: digest if key == "sha256" else f"sha256:{digest}"})
    seal_array(store, spec, entries)
    array = open_sealed(store, NAME, "x")
    buffer = array.new_buffer()
    for k in range(3):
        array.verify_shard(k, buffer)
        assert as_rows(array.read_shard(k, buffer), spec.layout).tobytes() == (
            part_of(records, k).tobytes()
        )
    change_byte(path_of(array, 0), 3)
    with pytest.raises(DamagedError, match="row 0 fails its crc32c"):
        array.verify_shard(0, buffer)
    path_of(array, 1).write_bytes(pack_shard(part_of(make_records(spec, 1), 1), spec.layout))
    with pytest.raises(DamagedError, match="its digest is sha256:.*, the seal says sha256:"):
        array.verify_shard(1, buffer)


def test_a_seal_of_the_first_release_opens(store: LocalStore) -> None:
    """Written out here: no container, no digests."""
    spec = make_spec("zarr")
    begin_array(store, spec)
    shards = []
    for k in range(3):
        data = bytes(pack_shard(part_of(make_records(spec), k), spec.layout))
        store.put(spec.shard_key(k), data)
        entry = {"index": k, "rows": 8 if k < 2 else 3, "num_bytes": len(data)}
        shards.append({**entry, "sha256": hashlib.sha256(data).hexdigest()})
    manifest = json.loads(json.dumps(MANIFEST))
    partition = {"num_rows": 19, "dtype": "float16", "shard_rows": 8}
    seal = {
        "format_version": 1,
        "fingerprint": fingerprint({"manifest": manifest, "shape": [2, 3], **partition}),
        "manifest": manifest,
        "record_shape": [2, 3],
        **partition,
        "shards": shards,
    }
    store.put(f"{NAME}/seal.json", json_bytes({**seal, "seal_sha256": fingerprint(seal)}))
    array = open_sealed(store, NAME, "x")
    assert array.spec.fingerprint == seal["fingerprint"]
    array.check_present()
    for k in range(3):
        array.verify_shard(k, array.new_buffer())


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_stands_decides(container: str, store: LocalStore) -> None:
    """A sound shard of another worker is kept, one that fails a check replaced."""
    spec = make_spec(container)
    first = write_shard(store, spec, 1, part_of(make_records(spec), 1))
    standing = store.get(spec.shard_key(1))
    other = part_of(make_records(spec, seed=1), 1)
    assert write_shard(store, spec, 1, other) == first
    assert store.get(spec.shard_key(1)) == standing
    store.put(spec.shard_key(1), standing[:100] + b"?" + standing[101:])
    second = write_shard(store, spec, 1, other)
    assert second != first and second[0] == len(standing)
    assert store.get(spec.shard_key(1)) == pack_shard(other, spec.layout, SHARD_ROWS)


@pytest.mark.parametrize("container", CONTAINERS)
def test_many_threads_write_what_one_does(container: str, tmp_path: Path) -> None:
    """Shards of two sizes and kinds at once, every shard by two threads."""
    layout = RecordLayout((64, 65), "float16", 16, container)
    small = RecordLayout((9,), "float16", 16, container)
    specs = [ArraySpec(f"{NAME}{i}", 12 * 16, (layout, small)[i % 2], {}) for i in range(4)]
    records = [make_records(spec, seed) for seed, spec in enumerate(specs)]
    one, many = LocalStore(str(tmp_path / "one")), LocalStore(str(tmp_path / "many"))

    def write(store: LocalStore, i: int, k: int) -> tuple[int, str]:
        return write_shard(store, specs[i], k, records[i][k * 16 : (k + 1) * 16])

    tasks = [(i, k) for k in range(12) for i in range(4)] * 2
    with ThreadPoolExecutor(6) as pool:
        written = list(pool.map(lambda task: write(many, *task), tasks))
    assert written == [write(one, *task) for task in tasks]
    for i, k in tasks:
        assert many.get(specs[i].shard_key(k)) == one.get(specs[i].shard_key(k))


class Addresses(LocalStore):
    """Notes where in memory the objects lay that were written."""

    def __init__(self, url: str):
        super().__init__(url)
        self.seen: set[int] = set()

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        if not key.endswith(".json"):
            self.seen.add(np.frombuffer(data, np.uint8).ctypes.data)
        return super().put_new(key, data)


def test_a_thread_packs_all_its_shards_in_one_place(tmp_path: Path) -> None:
    spec = make_spec("zarr", shape=(64, 64))
    stores = [Addresses(str(tmp_path / str(i))) for i in range(2)]
    both = threading.Barrier(2)

    def write(store: Addresses) -> None:
        write_all(store, spec, make_records(spec))
        both.wait()

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(store.seen) for store in stores] == [1, 1]
    assert stores[0].seen != stores[1].seen


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_other_container_is_refused(container: str, store: LocalStore) -> None:
    begin_array(store, make_spec(container))
    begin_array(store, make_spec(container))
    (other,) = set(CONTAINERS) - {container}
    with pytest.raises(MismatchError, match=f"{container} there, {other} now; set"):
        begin_array(store, make_spec(other))
    with pytest.raises(MismatchError, match="shape is .* expected .*another partition"):
        begin_array(store, dataclasses.replace(make_spec(container), num_rows=20))
    with pytest.raises(MismatchError, match="kind is 'features' there, 'x' now"):
        begin_array(store, dataclasses.replace(make_spec(container), manifest={"kind": "x"}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_begun_array_tells_its_spec(container: str, dtype: str, store: LocalStore) -> None:
    spec = make_spec(container, dtype, (3, 2, 1))
    begin_array(store, spec)
    read = read_spec(store, NAME)
    assert (read.name, read.num_rows, read.layout) == (NAME, NUM_ROWS, spec.layout)
    assert read.fingerprint == spec.fingerprint
    with pytest.raises(MissingError, match=r"unfinished \(no seal\): run `repa cache-features`"):
        open_sealed(store, NAME, "cache-features")


def drop(keys: Iterable[str]) -> Callable[[dict[str, Any]], Any]:
    return lambda stored: [stored.pop(key, None) for key in keys]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "change",
    [
        drop(["shape"]),
        drop(["attributes"]),
        drop(["data_type", "dtype"]),
        lambda stored: stored.update(shape=[]),
        lambda stored: stored.update(shape=["a", 2, 3]),
        lambda stored: stored.update(data_type="strange", dtype="strange"),
        lambda stored: stored.update(codecs=[], format_version=9),
        lambda stored: stored.update(chunk_grid={}, shard_rows=None),
    ],
)
def test_metadata_of_something_else(
    change: Callable[[dict[str, Any]], Any], container: str, store: LocalStore
) -> None:
    spec = make_spec(container)
    begin_array(store, spec)
    stored = json.loads(store.get(spec.metadata_key))
    change(stored)
    store.put(spec.metadata_key, json_bytes(stored))
    with pytest.raises(MismatchError, match=r"(array|zarr).json (does not describe|says) .*remove"):
        read_spec(store, NAME)


def test_no_metadata(store: LocalStore) -> None:
    with pytest.raises(MissingError, match="x.64 is absent: expected zarr.json or array.json"):
        read_spec(store, NAME)


@pytest.mark.parametrize("remote", [False, True])
def test_array_names(remote: bool, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/names" if remote else str(tmp_path / "names")
    store = open_store(url)
    assert array_names(store) == []
    names = ["features.x.64", "features.x.64.flip.scale", "latents.y.64"]
    for name, container in zip(names, ["zarr", "webdataset", "zarr"], strict=True):
        begin_array(store, dataclasses.replace(make_spec(container), name=name))
    for key in ("manifest.json", "index.parquet", "ledger/latents.y.64/000000.json"):
        store.put(key, b"{}")
    assert array_names(store) == names


def test_arrays_outside_a_cache_have_other_advice(store: LocalStore) -> None:
    spec = dataclasses.replace(make_spec("zarr"), name="images")
    entries = write_all(store, spec, make_records(spec))
    seal_array(store, spec, entries)
    array = open_sealed(store, "images", "sample")
    change_byte(path_of(array, 0), 0)
    with pytest.raises(DamagedError, match="remove it and run the command that made it again"):
        array.read_shard(0, array.new_buffer())
