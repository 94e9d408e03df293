"""One array of the cache: metadata, its shards and the seal that says it is complete.

    NAME/zarr.json    written first; attributes hold the manifest (settings that decide bytes)
    NAME/c/K/0/...    shard K (data/shards.py)
    NAME/seal.json    written last: manifest, fingerprint and the digest of every shard

With container "webdataset" the metadata is NAME/array.json and shard K is NAME/00000K.tar. A
reader opens sealed arrays only. zarr itself is not needed to read or write one, so a training
machine can do without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data import containers
from repa_pipeline.data.containers import METADATA_FILES
from repa_pipeline.data.names import KINDS
from repa_pipeline.data.objects import LocalStore, ObjectStore, get_json, json_bytes
from repa_pipeline.data.shards import DIGEST, REPAIR, RecordLayout, check_shard, pack_into
from repa_pipeline.errors import DamagedError, MismatchError, MissingError

FORMAT_VERSION = 1
_CACHE_ARRAYS = tuple(f"{kind}." for kind in KINDS)
_SHA256 = "sha256:"
_packing = threading.local()


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest; equal manifests, and only those, have equal fingerprints."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """What an array is: name, row count, record layout and the manifest of what decides it."""

    name: str
    num_rows: int
    layout: RecordLayout
    manifest: Mapping[str, Any]

    @property
    def num_shards(self) -> int:
        return self.layout.num_shards(self.num_rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shard objects."""
        rows = (self.layout.rows_of(k, self.num_rows) for k in range(self.num_shards))
        return sum(self.layout.shard_bytes(n) for n in rows)

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the bytes of every shard: manifest, layout and partition."""
        partition = {"num_rows": self.num_rows, **dataclasses.asdict(self.layout)}
        if self.layout.container == "zarr":  # as fingerprints were before there was another
            del partition["container"]
        return fingerprint({"manifest": dict(self.manifest), **partition})

    @property
    def metadata_key(self) -> str:
        return f"{self.name}/{METADATA_FILES[self.layout.container]}"

    def shard_key(self, shard: int) -> str:
        if self.layout.container == "webdataset":
            return f"{self.name}/{shard:06d}.tar"
        return f"{self.name}/c/{shard}" + "/0" * len(self.layout.shape)

    @property
    def advice(self) -> str:
        """What to do about a damaged shard."""
        again = "remove it and run the command that made it again"
        return REPAIR if self.name.startswith(_CACHE_ARRAYS) else again

    def metadata(self) -> dict[str, Any]:
        """What the object at `metadata_key` holds."""
        return containers.describe(self.num_rows, self.layout, self.manifest)


def begin_array(store: ObjectStore, spec: ArraySpec) -> None:
    """Writes the metadata, or checks that what stands there is of the same settings.

    Raises MismatchError naming the first setting that differs.
    """
    _check_container(store, spec)
    if not store.put_new(spec.metadata_key, json_bytes(spec.metadata())):
        _check_metadata(store, spec, get_json(store, spec.metadata_key))


def check_standing(store: ObjectStore, spec: ArraySpec) -> None:
    """As `begin_array`, without writing: whether what stands there, if anything, is this array."""
    _check_container(store, spec)
    with contextlib.suppress(MissingError):
        _check_metadata(store, spec, get_json(store, spec.metadata_key))


def _check_container(store: ObjectStore, spec: ArraySpec) -> None:
    for container, file in METADATA_FILES.items():
        other = container != spec.layout.container
        if other and store.size(f"{spec.name}/{file}") is not None:
            raise MismatchError(
                f"{store.url}/{spec.name} was made with another container: {container} there, "
                f"{spec.layout.container} now; set --format {container}, remove that folder, or "
                "use another --workspace"
            )


def check_same_manifest(where: str, stored: Mapping[str, Any], spec: ArraySpec) -> None:
    """Raises MismatchError when `stored` is not the manifest of `spec`, naming the difference."""
    wanted = json.loads(json.dumps(dict(spec.manifest)))
    difference = first_difference(stored, wanted)
    if difference:
        name, got, expected = difference
        raise MismatchError(
            f"{where} was made with other settings: {name} is {got!r} there, {expected!r} now; "
            "set it back, remove that folder, or use another --workspace"
        )


def _check_metadata(store: ObjectStore, spec: ArraySpec, stored: Mapping[str, Any]) -> None:
    """`stored` must describe the array of `spec`; keys that zarr added are left alone."""
    attributes = stored.get("attributes")
    where = f"{store.url}/{spec.name}"
    check_same_manifest(where, attributes if isinstance(attributes, Mapping) else {}, spec)
    wanted = json.loads(json.dumps(spec.metadata()))
    difference = first_difference({key: stored.get(key) for key in wanted}, wanted)
    if difference:
        name, got, expected = difference
        raise MismatchError(
            f"{store.url}/{spec.metadata_key} says {name} is {got!r}, expected {expected!r}: the "
            "array was made with another partition or is damaged; remove that folder, or use "
            "another --workspace"
        )


def first_difference(got: Any, expected: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: (dotted path, got, expected)."""
    if isinstance(got, Mapping) and isinstance(expected, Mapping):
        for key in sorted({*got, *expected}):
            inner = f"{path}.{key}" if path else str(key)
            found = first_difference(got.get(key), expected.get(key), inner)
            if found:
                return found
        return None
    return None if got == expected else (path, got, expected)


def write_shard(
    store: ObjectStore, spec: ArraySpec, shard: int, records: npt.NDArray[np.generic]
) -> tuple[int, str]:
    """Packs and creates shard `shard`; returns (bytes, digest) of what is stored.

    records: all rows of the shard, [rows, *shape]. A sound object that stands there already
    (another worker finished first) is kept and its digest returned; a damaged one, which no
    ledger vouches for, is replaced. Any number of threads may write at once.
    """
    layout, key, first_row = spec.layout, spec.shard_key(shard), shard * spec.layout.shard_rows
    rows = layout.rows_of(shard, spec.num_rows)
    if len(records) != rows:
        raise ValueError(f"{key}: {len(records)} records for a shard of {rows} rows")
    data = _packing_buffer(layout.shard_bytes(rows))
    digest = pack_into(data, records, layout, first_row)
    if not store.put_new(key, data):
        standing = store.get(key)
        try:
            return len(standing), check_shard(standing, rows, layout, key, first_row)[1]
        except DamagedError:
            store.put(key, data)
    return len(data), digest


def _packing_buffer(num_bytes: int) -> memoryview:
    """Memory of this thread, kept from shard to shard: fresh pages cost more than packing."""
    held: bytearray = getattr(_packing, "buffer", bytearray())
    if len(held) < num_bytes:
        held = _packing.buffer = bytearray(num_bytes)
    return memoryview(held)[:num_bytes]


def seal_array(store: ObjectStore, spec: ArraySpec, shards: list[dict[str, Any]]) -> None:
    """Writes the seal; `shards` is [{index, rows, num_bytes, digest}] in order, all of them."""
    if [entry["index"] for entry in shards] != list(range(spec.num_shards)):
        raise ValueError(f"cannot seal {spec.name}: {len(shards)} of {spec.num_shards} shards")
    seal = {
        "format_version": FORMAT_VERSION,
        "fingerprint": spec.fingerprint,
        "manifest": dict(spec.manifest),
        "num_rows": spec.num_rows,
        "record_shape": list(spec.layout.shape),
        "dtype": spec.layout.dtype,
        "shard_rows": spec.layout.shard_rows,
        "shards": shards,
    }
    if spec.layout.container != "zarr":
        seal["container"] = spec.layout.container
    store.put(f"{spec.name}/seal.json", json_bytes({**seal, "seal_sha256": fingerprint(seal)}))


@dataclasses.dataclass(frozen=True)
class SealedArray:
    """A complete array, open for reading."""

    store: ObjectStore
    spec: ArraySpec
    shards: tuple[Mapping[str, Any], ...]

    @property
    def where(self) -> str:
        return f"{self.store.url}/{self.spec.name}"

    def check_present(self) -> None:
        """Raises DamagedError when a shard is missing or of another size; reads no data.

        For local stores; a remote one would need a request a shard.
        """
        if not isinstance(self.store, LocalStore):
            return
        for shard in self.shards:
            key = self.spec.shard_key(shard["index"])
            size = self.store.size(key)
            if size != shard["num_bytes"]:
                got = "missing" if size is None else f"{size} bytes, truncated or foreign"
                raise DamagedError(
                    f"{self.where}: shard {shard['index']} is {got} ({key}), expected "
                    f"{shard['num_bytes']} bytes; {self.spec.advice}"
                )

    def new_buffer(self) -> bytearray:
        """A buffer that holds any shard of this array."""
        return bytearray(self.spec.layout.shard_bytes(self.spec.layout.shard_rows))

    def read_shard(self, shard: int, buffer: bytearray) -> npt.NDArray[np.uint8]:
        """Reads shard `shard` into `buffer` and verifies it.

        Returns uint8 [rows, record_bytes], a view of `buffer`. Raises DamagedError when the shard
        is missing, short, long, fails a checksum or is not the one that was sealed. (Of a shard
        sealed with its sha256, which is slow, the records' checksums alone are verified here.)
        """
        data = self._load(shard, buffer)
        spec, where = self.spec, self.where_of(shard)
        rows, first_row = self.rows_of(shard)
        records, digest = check_shard(data, rows, spec.layout, where, first_row, spec.advice)
        self.check_digest(shard, digest)
        return records

    def check_digest(self, shard: int, digest: str) -> None:
        """Raises DamagedError when the records' digest is not the sealed one, if that is kept."""
        sealed = stored_digest(self.shards[shard])
        if sealed.startswith(DIGEST) and digest != sealed:
            raise self._foreign(shard, digest)

    def verify_shard(self, shard: int, buffer: bytearray) -> None:
        """Raises DamagedError unless shard `shard` is to the bit what was sealed.

        The message names the shard, the rows and what is wrong. `buffer` is overwritten.
        """
        self.read_shard(shard, buffer)
        rows, _ = self.rows_of(shard)
        if stored_digest(self.shards[shard]).startswith(_SHA256):
            data = memoryview(buffer)[: self.spec.layout.shard_bytes(rows)]
            digest = _SHA256 + hashlib.sha256(data).hexdigest()
            if digest != stored_digest(self.shards[shard]):
                raise self._foreign(shard, digest)

    def rows_of(self, shard: int) -> tuple[int, int]:
        """How many rows a shard has, and which is its first."""
        layout = self.spec.layout
        return layout.rows_of(shard, self.spec.num_rows), shard * layout.shard_rows

    def where_of(self, shard: int) -> str:
        """A shard in messages."""
        rows, first = self.rows_of(shard)
        key = self.spec.shard_key(shard)
        return f"{self.store.url}/{key} (shard {shard}, rows {first} to {first + rows - 1})"

    def _load(self, shard: int, buffer: bytearray) -> memoryview:
        """The shard's bytes; DamagedError when it is missing or of another length."""
        view = memoryview(buffer)[: self.shard_bytes(shard)]
        try:
            got = self.store.read_into(self.spec.shard_key(shard), view)
        except MissingError as error:
            raise self.missing(shard) from error
        if got != len(view):
            raise self.truncated(shard, got if got < len(view) else f"more than {len(view)}")
        return view

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard object."""
        return self.spec.layout.shard_bytes(self.rows_of(shard)[0])

    def missing(self, shard: int) -> DamagedError:
        """The error of a shard that is not there."""
        return DamagedError(f"{self.where_of(shard)} is missing; {self.spec.advice}")

    def truncated(self, shard: int, got: object) -> DamagedError:
        """The error of a shard that has `got` bytes."""
        return DamagedError(
            f"{self.where_of(shard)} is truncated or foreign: got {got} bytes, expected "
            f"{self.shard_bytes(shard)}; {self.spec.advice}"
        )

    def _foreign(self, shard: int, digest: str) -> DamagedError:
        sealed = stored_digest(self.shards[shard])
        return DamagedError(
            f"{self.where_of(shard)} is another shard than the sealed one: its digest is {digest}, "
            f"the seal says {sealed}; {self.spec.advice}"
        )


def stored_digest(entry: Mapping[str, Any]) -> str:
    """The digest a seal gives a shard; "sha256:HEX" of the whole object in seals of old."""
    return str(entry["digest"]) if "digest" in entry else f"{_SHA256}{entry['sha256']}"


def array_names(store: ObjectStore) -> list[str]:
    """Sorted names of the arrays of a cache, sealed or begun; one listing."""
    return [name for name in store.list("") if name.startswith(_CACHE_ARRAYS)]


def read_spec(store: ObjectStore, name: str) -> ArraySpec:
    """The spec of array `name`, sealed or not, from its metadata.

    Raises MissingError without metadata, MismatchError when it is not of this package.
    """
    for container, file in METADATA_FILES.items():
        try:
            stored = get_json(store, f"{name}/{file}")
        except MissingError:
            continue
        try:
            spec = ArraySpec(name, *containers.parse(container, stored))
            spec.metadata()
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise MismatchError(
                f"{store.url}/{name}/{file} does not describe an array of this package "
                f"({error!r}): remove that folder"
            ) from error
        _check_metadata(store, spec, stored)
        return spec
    files = " or ".join(METADATA_FILES.values())
    raise MissingError(f"{store.url}/{name} is absent: expected {files} there")


def open_sealed(store: ObjectStore, name: str, made_by: str) -> SealedArray:
    """Opens array `name`; `made_by` is the command that makes it, for the error's advice.

    Raises MissingError when absent or unsealed, DamagedError or MismatchError when the seal is
    damaged, foreign or of another format version.
    """
    key = f"{name}/seal.json"
    try:
        seal = get_json(store, key)
    except MissingError:
        begun = any(store.size(f"{name}/{file}") is not None for file in METADATA_FILES.values())
        state = "unfinished (no seal)" if begun else "absent"
        advice = f"run `repa {made_by}` first"
        raise MissingError(f"{store.url}/{name} is {state}: {advice}") from None
    if seal.get("format_version") != FORMAT_VERSION:
        raise MismatchError(
            f"{store.url}/{key} has format version {seal.get('format_version')!r}, this package "
            f"reads {FORMAT_VERSION}: use the package version that wrote it"
        )
    spec = parse_seal(f"{store.url}/{key}", name, seal, made_by)
    _check_metadata(store, spec, get_json(store, spec.metadata_key))
    return SealedArray(store, spec, tuple(seal["shards"]))


def parse_seal(where: str, name: str, seal: dict[str, Any], made_by: str) -> ArraySpec:
    """The spec of the array that a seal is of; takes its checksum, `seal_sha256`, out of `seal`.

    where, made_by: for messages. Raises DamagedError for what is no seal or fails its checksum.
    """
    digest = seal.pop("seal_sha256", None)
    try:
        shape, container = tuple(seal["record_shape"]), seal.get("container", "zarr")
        layout = RecordLayout(shape, seal["dtype"], seal["shard_rows"], container)
        spec = ArraySpec(name, seal["num_rows"], layout, seal["manifest"])
    except (KeyError, TypeError) as error:
        raise DamagedError(
            f"{where} is not a seal of this package ({error}): run `repa repair`, or remove it and "
            f"run `repa {made_by}` again"
        ) from error
    if digest != fingerprint(seal):
        raise DamagedError(
            f"{where} is damaged, its checksum is not the recorded one: run `repa repair`, or "
            f"remove it and run `repa {made_by}` again"
        )
    return spec
