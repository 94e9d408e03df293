"""One array of the cache: zarr metadata, its shards and the seal that says it is complete.

    NAME/zarr.json    written first; attributes hold the manifest (settings that decide bytes)
    NAME/c/K/0/...    shard K (data/shards.py)
    NAME/seal.json    written last: manifest, fingerprint and the sha256 of every shard

A reader opens sealed arrays only. zarr itself is not needed to read or write one, so a training
machine can do without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.objects import LocalStore, ObjectStore, get_json, json_bytes
from repa_pipeline.data.shards import RecordLayout, pack_shard, read_records
from repa_pipeline.errors import DamagedError, MismatchError, MissingError

FORMAT_VERSION = 1
_FILLS: Mapping[str, Any] = {"float16": "NaN", "float32": "NaN", "int8": -128, "uint8": 0}


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
        return fingerprint({"manifest": dict(self.manifest), **partition})

    def shard_key(self, shard: int) -> str:
        return f"{self.name}/c/{shard}" + "/0" * len(self.layout.shape)

    def zarr_metadata(self) -> dict[str, Any]:
        """zarr.json (zarr v3 core specification, sharding_indexed codec)."""
        layout = self.layout
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        one_byte = np.dtype(layout.dtype).itemsize == 1
        inner = {"name": "bytes"} if one_byte else little
        sharding = {
            "chunk_shape": [1, *layout.shape],
            "codecs": [inner, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.num_rows, *layout.shape],
            "data_type": layout.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [layout.shard_rows, *layout.shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _FILLS[layout.dtype],
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": dict(self.manifest),
            "storage_transformers": [],
        }


def begin_array(store: ObjectStore, spec: ArraySpec) -> None:
    """Writes zarr.json, or checks that the one that stands there is of the same settings.

    Raises MismatchError naming the first setting that differs.
    """
    key = f"{spec.name}/zarr.json"
    if store.put_new(key, json_bytes(spec.zarr_metadata())):
        return
    _check_metadata(store, spec)


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


def _check_metadata(store: ObjectStore, spec: ArraySpec) -> None:
    """zarr.json must describe the array of `spec`; keys that zarr added are left alone."""
    where = f"{store.url}/{spec.name}"
    stored = get_json(store, f"{spec.name}/zarr.json")
    check_same_manifest(where, stored.get("attributes", {}), spec)
    wanted = json.loads(json.dumps(spec.zarr_metadata()))
    difference = first_difference({key: stored.get(key) for key in wanted}, wanted)
    if difference:
        name, got, expected = difference
        raise MismatchError(
            f"{where}/zarr.json says {name} is {got!r}, expected {expected!r}: the array was made "
            "with another partition or is damaged; remove that folder, or use another --workspace"
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
    """Packs and creates shard `shard`; returns (bytes, sha256) of what is stored.

    A sound object that stands there already (another worker finished first) is kept and its hash
    returned; a damaged one, which no ledger vouches for, is replaced.
    """
    data = pack_shard(records, spec.layout)
    key = spec.shard_key(shard)
    if not store.put_new(key, data):
        standing = store.get(key)
        try:
            read_records(standing, len(records), spec.layout, key)
            return len(standing), hashlib.sha256(standing).hexdigest()
        except DamagedError:
            store.put(key, data)
    return len(data), hashlib.sha256(data).hexdigest()


def seal_array(store: ObjectStore, spec: ArraySpec, shards: list[dict[str, Any]]) -> None:
    """Writes the seal; `shards` is [{index, rows, num_bytes, sha256}] in order, all of them."""
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
                    f"{shard['num_bytes']} bytes; remove it and run the encoding command again"
                )

    def new_buffer(self) -> bytearray:
        """A buffer that holds any shard of this array."""
        return bytearray(self.spec.layout.shard_bytes(self.spec.layout.shard_rows))

    def read_shard(self, shard: int, buffer: bytearray) -> npt.NDArray[np.uint8]:
        """Reads shard `shard` into `buffer` and verifies it.

        Returns uint8 [rows, record_bytes], a view of `buffer`. Raises DamagedError when the shard
        is missing, short, long or fails a checksum.
        """
        layout = self.spec.layout
        rows = layout.rows_of(shard, self.spec.num_rows)
        key = self.spec.shard_key(shard)
        view = memoryview(buffer)[: layout.shard_bytes(rows)]
        try:
            got = self.store.read_into(key, view)
        except MissingError as error:
            raise DamagedError(
                f"{self.where}: shard {shard} is missing ({key}); run the encoding command again"
            ) from error
        if got != len(view):
            raise DamagedError(
                f"{self.store.url}/{key} is truncated or foreign: got "
                f"{got if got < len(view) else f'more than {len(view)}'} bytes, expected "
                f"{len(view)}; remove it and run the encoding command again"
            )
        return read_records(view, rows, layout, f"{self.store.url}/{key}")


def open_sealed(store: ObjectStore, name: str, made_by: str) -> SealedArray:
    """Opens array `name`; `made_by` is the command that makes it, for the error's advice.

    Raises MissingError when absent or unsealed, DamagedError or MismatchError when the seal is
    damaged, foreign or of another format version.
    """
    key = f"{name}/seal.json"
    if store.size(key) is None:
        begun = store.size(f"{name}/zarr.json") is not None
        state = "unfinished (no seal)" if begun else "absent"
        raise MissingError(f"{store.url}/{name} is {state}: run `repa {made_by}` first")
    seal = get_json(store, key)
    if seal.get("format_version") != FORMAT_VERSION:
        raise MismatchError(
            f"{store.url}/{key} has format version {seal.get('format_version')!r}, this package "
            f"reads {FORMAT_VERSION}: use the package version that wrote it"
        )
    digest = seal.pop("seal_sha256", None)
    try:
        layout = RecordLayout(tuple(seal["record_shape"]), seal["dtype"], seal["shard_rows"])
        spec = ArraySpec(name, seal["num_rows"], layout, seal["manifest"])
    except (KeyError, TypeError) as error:
        raise DamagedError(
            f"{store.url}/{key} is not a seal of this package ({error}): remove it and run "
            f"`repa {made_by}` again"
        ) from error
    if digest != fingerprint(seal):
        raise DamagedError(
            f"{store.url}/{key} is damaged, its checksum is not the recorded one: remove it and "
            f"run `repa {made_by}` again"
        )
    _check_metadata(store, spec)
    return SealedArray(store, spec, tuple(seal["shards"]))
