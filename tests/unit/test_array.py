"""An array on disk: other zarr readers and writers agree with ours, damage has its own error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest

from repa_pipeline.data.array import (
    ArraySpec,
    SealedArray,
    begin_array,
    fingerprint,
    first_difference,
    open_sealed,
    seal_array,
    write_shard,
)
from repa_pipeline.data.objects import LocalStore, json_bytes
from repa_pipeline.data.shards import RecordLayout, as_rows
from repa_pipeline.errors import DamagedError, MismatchError, MissingError
from repa_pipeline.testing.caches import write_shards

NUM_ROWS, SHARD_ROWS, SHAPE = 19, 8, (2, 3)
MANIFEST: dict[str, Any] = {"kind": "latents", "scale": (0.5, 2.0), "prepare": {"crop": "adm"}}
FILLS = {"float16": math.nan, "float32": math.nan, "int8": -128, "uint8": 0, "uint16": 0}
DTYPES = list(FILLS)


def make_spec(dtype: str = "float16", num_rows: int = NUM_ROWS, **manifest: Any) -> ArraySpec:
    layout = RecordLayout(SHAPE, dtype, SHARD_ROWS)
    return ArraySpec("features.x.64", num_rows, layout, {**MANIFEST, **manifest})


def make_records(dtype: str, num_rows: int = NUM_ROWS, seed: int = 0) -> npt.NDArray[np.generic]:
    values = np.random.default_rng(seed).normal(size=(num_rows, *SHAPE)) * 20
    return values.astype(dtype)


def commit(store: LocalStore, spec: ArraySpec, records: npt.NDArray[np.generic]) -> None:
    write_shards(store, spec, records)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "cache"))


@pytest.fixture
def sealed(store: LocalStore) -> LocalStore:
    commit(store, make_spec(), make_records("float16"))
    return store


def read_all(array: SealedArray) -> npt.NDArray[np.generic]:
    layout = array.spec.layout
    shards = range(array.spec.num_shards)
    return np.concatenate(
        [as_rows(array.read_shard(k, array.new_buffer()), layout) for k in shards]
    )


@pytest.mark.parametrize("num_rows", [19, 16, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_readers_agree(dtype: str, num_rows: int, store: LocalStore) -> None:
    zarr = pytest.importorskip("zarr")
    spec, records = make_spec(dtype, num_rows), make_records(dtype, num_rows)
    commit(store, spec, records)
    ours = open_sealed(store, spec.name, "cache-features")
    assert ours.spec.num_rows == num_rows and ours.spec.layout == spec.layout
    assert read_all(ours).tobytes() == records.tobytes()
    path = store.root / spec.name
    plain = zarr.open(str(path), mode="r")
    assert plain.shape == records.shape and plain.dtype == records.dtype
    assert plain[:].tobytes() == records.tobytes()
    assert plain[num_rows - 1].tobytes() == records[num_rows - 1].tobytes()
    assert dict(plain.attrs) == json.loads(json.dumps(spec.manifest))
    assert spec.num_bytes == sum(f.stat().st_size for f in (path / "c").rglob("*") if f.is_file())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorstore_agrees(dtype: str, store: LocalStore) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    spec, records = make_spec(dtype), make_records(dtype)
    commit(store, spec, records)
    kvstore = {"driver": "file", "path": f"{store.root}/{spec.name}/"}
    read = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    assert read.shape == records.shape
    assert np.asarray(read.read().result()).tobytes() == records.tobytes()


@pytest.mark.parametrize("shape", [(256,), (8,), (4, 2, 2)])
def test_other_ranks_open_with_zarr_and_tensorstore(
    shape: tuple[int, ...], store: LocalStore
) -> None:
    """A scale has one value a token: records of one dimension."""
    zarr, tensorstore = pytest.importorskip("zarr"), pytest.importorskip("tensorstore")
    layout = RecordLayout(shape, "float16", SHARD_ROWS)
    spec = ArraySpec("features.x.64.scale", NUM_ROWS, layout, {"kind": "scale"})
    records = np.random.default_rng(0).normal(size=(NUM_ROWS, *shape)).astype("float16")
    commit(store, spec, records)
    assert read_all(open_sealed(store, spec.name, "x")).tobytes() == records.tobytes()
    path = f"{store.root}/{spec.name}/"
    assert zarr.open(path, mode="r")[:].tobytes() == records.tobytes()
    kvstore = {"driver": "file", "path": path}
    read = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    assert np.asarray(read.read().result()).tobytes() == records.tobytes()


def write_with_zarr(path: Path, spec: ArraySpec, records: npt.NDArray[np.generic]) -> None:
    zarr = pytest.importorskip("zarr")
    from zarr.codecs import Crc32cCodec

    array = zarr.create_array(
        str(path),
        shape=records.shape,
        chunks=(1, *SHAPE),
        shards=(SHARD_ROWS, *SHAPE),
        dtype=records.dtype,
        compressors=[Crc32cCodec()],
        fill_value=FILLS[spec.layout.dtype],
        attributes=dict(spec.manifest),
    )
    array[:] = records


@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_writes_the_same(dtype: str, store: LocalStore, tmp_path: Path) -> None:
    """Shards byte for byte, the short last one too; zarr.json as a value."""
    spec = make_spec(dtype)
    records = make_records(dtype)
    for record in records.reshape(NUM_ROWS, -1):
        record[0] = record[0] or 1  # not the fill value in every place: zarr would leave it out
    commit(store, spec, records)
    write_with_zarr(tmp_path / "zarr", spec, records)
    for k in range(3):
        key = spec.shard_key(k).removeprefix(spec.name)
        assert key == f"/c/{k}/0/0"
        theirs = (tmp_path / "zarr" / key.lstrip("/")).read_bytes()
        assert store.get(spec.shard_key(k)) == theirs
    theirs_json = json.loads((tmp_path / "zarr" / "zarr.json").read_text())
    assert json.loads(store.get(f"{spec.name}/zarr.json")) == theirs_json


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_record_equal_to_the_fill_value_has_its_place(dtype: str, store: LocalStore) -> None:
    zarr = pytest.importorskip("zarr")
    spec, records = make_spec(dtype), make_records(dtype)
    records[[0, 9, 18]] = FILLS[dtype]
    commit(store, spec, records)
    assert store.size(spec.shard_key(1)) == spec.layout.shard_bytes(8)
    ours = read_all(open_sealed(store, spec.name, "x"))
    assert ours.tobytes() == records.tobytes()
    plain = zarr.open(str(store.root / spec.name), mode="r")[:]
    assert np.array_equal(plain, records, equal_nan=dtype.startswith("float"))


def shard_file(store: LocalStore, shard: int) -> Path:
    return store.root / make_spec().shard_key(shard)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


STRIDE = RecordLayout(SHAPE, "float16", SHARD_ROWS).stride
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "payload": (lambda path: flip(path, STRIDE * 2 + 3), "fails its crc32c"),
    "checksum": (lambda path: flip(path, STRIDE * 2 - 1), "fails its crc32c"),
    "index": (lambda path: flip(path, -4 - 16 * SHARD_ROWS + 9), "the shard index is damaged"),
    "index checksum": (lambda path: flip(path, -1), "the shard index is damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), r"got \d+ bytes, expec"),
    "empty": (lambda path: path.write_bytes(b""), r"got 0 bytes, expected \d+"),
    "extended": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "got more than"),
    "missing": (lambda path: path.unlink(), r"is missing; run"),
    "foreign": (lambda path: path.write_bytes(b"PK\3\4" * 9), "got 36 bytes, expected"),
    "same size": (
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        r"rows \d.* fail their crc32c",
    ),
}


@pytest.mark.parametrize("shard", [1, 2])
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_line_with_file_and_way_out(
    damage: Callable[[Path], Any], message: str, shard: int, sealed: LocalStore
) -> None:
    damage(shard_file(sealed, shard))
    array = open_sealed(sealed, "features.x.64", "cache-features")
    with pytest.raises(DamagedError, match=message) as caught:
        array.read_shard(shard, array.new_buffer())
    text = str(caught.value)
    rows = "rows 8 to 15" if shard == 1 else "rows 16 to 18"
    assert f"/features.x.64/c/{shard}/0/0 (shard {shard}, {rows})" in text and "\n" not in text
    assert text.endswith("; run `repa repair`")
    buffer = array.new_buffer()
    assert len(array.read_shard(0, buffer)) == SHARD_ROWS


def test_a_buffer_may_hold_rubbish(sealed: LocalStore) -> None:
    array = open_sealed(sealed, "features.x.64", "x")
    buffer = array.new_buffer()
    buffer[:] = b"\xaa" * len(buffer)
    for shard in (0, 2, 1, 2):
        read = as_rows(array.read_shard(shard, buffer), array.spec.layout)
        start = shard * SHARD_ROWS
        assert np.array_equal(read, make_records("float16")[start : start + SHARD_ROWS])


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_bytes(json_bytes(value))


SEAL_EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "num_rows": lambda seal: seal.update(num_rows=18),
    "dtype": lambda seal: seal.update(dtype="int16"),
    "record_shape": lambda seal: seal.update(record_shape=[3, 2]),
    "shard_rows": lambda seal: seal.update(shard_rows=0),
    "a shard's hash": lambda seal: seal["shards"][0].update(digest="0" * 64),
    "a shard left out": lambda seal: seal["shards"].pop(),
    "manifest": lambda seal: seal["manifest"].update(kind="features"),
    "fingerprint": lambda seal: seal.update(fingerprint="0" * 64),
    "digest": lambda seal: seal.pop("seal_sha256"),
    "foreign": lambda seal: [seal.pop(key) for key in list(seal) if key != "format_version"],
}


@pytest.mark.parametrize("rows", [1, 2])
def test_records_outlive_the_buffer_they_were_read_into(rows: int, sealed: LocalStore) -> None:
    array = open_sealed(sealed, "features.x.64", "cache-features")
    buffer = array.new_buffer()
    kept = as_rows(array.read_shard(0, buffer)[:rows], array.spec.layout)
    array.read_shard(1, buffer)
    np.testing.assert_array_equal(kept, make_records("float16")[:rows])


@pytest.mark.parametrize("change", SEAL_EDITS.values(), ids=SEAL_EDITS)
def test_a_tampered_seal(change: Callable[[dict[str, Any]], Any], sealed: LocalStore) -> None:
    edit(sealed.root / "features.x.64/seal.json", change)
    with pytest.raises(DamagedError, match="seal.json is .* run `repa cache-features` again") as e:
        open_sealed(sealed, "features.x.64", "cache-features")
    assert "remove it" in str(e.value)


def test_a_seal_of_another_format_version(sealed: LocalStore) -> None:
    edit(sealed.root / "features.x.64/seal.json", lambda seal: seal.update(format_version=2))
    with pytest.raises(MismatchError, match="version 2, this package reads 1: use the package ver"):
        open_sealed(sealed, "features.x.64", "x")


def test_a_torn_seal(sealed: LocalStore) -> None:
    path = sealed.root / "features.x.64/seal.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedError, match="seal.json is not JSON"):
        open_sealed(sealed, "features.x.64", "x")


def test_no_seal(sealed: LocalStore) -> None:
    (sealed.root / "features.x.64/seal.json").unlink()
    with pytest.raises(MissingError, match=r"unfinished \(no seal\): run `repa cache-features`"):
        open_sealed(sealed, "features.x.64", "cache-features")
    shutil.rmtree(sealed.root / "features.x.64")
    with pytest.raises(MissingError, match="features.x.64 is absent: run `repa cache-features`"):
        open_sealed(sealed, "features.x.64", "cache-features")


def test_a_foreign_zarr_array(store: LocalStore) -> None:
    spec = make_spec()
    zarr = pytest.importorskip("zarr")
    path = store.root / spec.name
    zarr.create_array(str(path), shape=(19, 2, 3), chunks=(8, 2, 3), dtype="float16")[:] = 1
    with pytest.raises(MissingError, match="unfinished"):
        open_sealed(store, spec.name, "cache-features")
    with pytest.raises(MismatchError, match="kind is None there, 'latents' now; .* remove that"):
        begin_array(store, spec)
    (path / "zarr.json").write_text('{"zarr_format": 3}')
    with pytest.raises(MismatchError, match="kind is None there"):
        begin_array(store, spec)


def test_other_settings_are_named(sealed: LocalStore) -> None:
    begin_array(sealed, make_spec())
    for other, message in (
        (make_spec(kind="features"), "kind is 'latents' there, 'features' now"),
        (make_spec(prepare={"crop": "adm", "exif": "raw"}), "prepare.exif is None there, 'raw'"),
        (make_spec(scale=(1.0,)), r"scale is \[0.5, 2.0\] there, \[1.0\] now"),
        (make_spec(num_rows=20), r"zarr.json says shape is \[19, 2, 3\], expected \[20, 2, 3\]"),
        (make_spec("float32"), "zarr.json says data_type is 'float16', expected 'float32'"),
    ):
        with pytest.raises(MismatchError, match=message):
            begin_array(sealed, other)
    layout = dataclasses.replace(make_spec().layout, shard_rows=16)
    with pytest.raises(MismatchError, match=r"chunk_shape is \[8, 2, 3\], expected \[16, 2, 3\]"):
        begin_array(sealed, dataclasses.replace(make_spec(), layout=layout))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["attributes"].update(kind="x"), "kind is 'x' there, 'latents' now"),
        (lambda meta: meta.update(data_type="int16"), "data_type is 'int16', expected 'float16'"),
        (lambda meta: meta.update(shape=[20, 2, 3]), r"shape is \[20, 2, 3\], expected \[19"),
        (lambda meta: meta.update(fill_value=0), "fill_value is 0, expected 'NaN'"),
    ],
)
def test_zarr_json_and_seal_must_agree(change: Any, message: str, sealed: LocalStore) -> None:
    edit(sealed.root / "features.x.64/zarr.json", change)
    with pytest.raises(MismatchError, match=message):
        open_sealed(sealed, "features.x.64", "x")


def test_zarr_may_rewrite_its_metadata(sealed: LocalStore) -> None:
    edit(
        sealed.root / "features.x.64/zarr.json", lambda m: m.update(dimension_names=["n", "c", "d"])
    )
    assert open_sealed(sealed, "features.x.64", "x").spec.num_rows == NUM_ROWS


def test_a_seal_needs_all_shards(store: LocalStore) -> None:
    with pytest.raises(ValueError, match="1 of 3 shards"):
        seal_array(store, make_spec(), [{"index": 0}])


def digest_of(records: npt.NDArray[np.generic]) -> str:
    crcs = b"".join(google_crc32c.value(r.tobytes()).to_bytes(4, "little") for r in records)
    return "rows-crc32c:" + hashlib.sha256(crcs).hexdigest()


def test_the_first_sound_shard_stays(store: LocalStore) -> None:
    spec, records = make_spec(), make_records("float16")
    first = write_shard(store, spec, 0, records[:8])
    stored = store.get(spec.shard_key(0))
    assert first == (len(stored), digest_of(records[:8]))
    other = make_records("float16", seed=1)[:8]
    assert write_shard(store, spec, 0, other) == first
    assert store.get(spec.shard_key(0)) == stored


@pytest.mark.parametrize("damage", [d for name, (d, _) in DAMAGES.items() if name != "missing"])
def test_a_damaged_shard_is_replaced(damage: Callable[[Path], Any], sealed: LocalStore) -> None:
    path = shard_file(sealed, 1)
    sound = path.read_bytes()
    damage(path)
    records = make_records("float16")[8:16]
    got = write_shard(sealed, make_spec(), 1, records)
    assert path.read_bytes() == sound
    assert got == (len(sound), digest_of(records))


def test_a_shard_is_written_whole(store: LocalStore) -> None:
    for shard, count in ((0, 7), (2, 8), (0, 0)):
        with pytest.raises(ValueError, match=f"{count} records for a shard of"):
            write_shard(store, make_spec(), shard, make_records("float16")[:count])


def test_fingerprints_of_existing_arrays_stand() -> None:
    """As the first release of the format made them: no container among what is hashed."""
    partition = {"num_rows": 19, "shape": [2, 3], "dtype": "float16", "shard_rows": 8}
    assert make_spec().fingerprint == fingerprint({"manifest": MANIFEST, **partition})
    tar = dataclasses.replace(make_spec().layout, container="webdataset")
    other = dataclasses.replace(make_spec(), layout=tar)
    assert other.fingerprint == fingerprint(
        {"manifest": MANIFEST, **partition, "container": "webdataset"}
    )


def test_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert make_spec(scale=(0.5,)).fingerprint != make_spec(scale=(0.25,)).fingerprint
    assert make_spec(num_rows=3).fingerprint != make_spec().fingerprint
    assert make_spec("float32").fingerprint != make_spec().fingerprint
    assert make_spec().fingerprint == make_spec(scale=[0.5, 2.0]).fingerprint


def test_first_difference() -> None:
    assert first_difference({"a": {"b": [1]}}, {"a": {"b": [1]}}) is None
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert first_difference({"b": 1}, {"a": 1, "b": 2}) == ("a", None, 1)
    assert first_difference({"a": {}}, {"a": 0}) == ("a", {}, 0)
