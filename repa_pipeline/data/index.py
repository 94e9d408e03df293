"""The rows of a cache: which image is row i, its class, and where its bytes are.

index.parquet   one line a row in storage order, then the excluded images (row = -1)
manifest.json   counts, classes, digests; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes
from repa_pipeline.data.tables import BLOCK_BYTES, TableRows, blocks_of, table_bytes
from repa_pipeline.errors import DamagedError, MissingError

INDEX, EXCLUDED = "index.parquet", "excluded"
FORMAT_VERSION = 1
# Columns of index.parquet in the order they are stored, and their arrow types.
_TYPES = {
    "row": "int64",
    "key": "string",
    "label": "int32",
    "path": "string",
    "offset": "int64",
    "num_bytes": "int64",
    "width": "int32",
    "height": "int32",
    "notes": "string",
    "digest": "string",
    EXCLUDED: "string",
}
_COLUMNS = ("key", "label", "path", "offset", "num_bytes", "width", "height", "notes", "digest")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One image of the source, as indexed.

    digest: blake2b-128 of the encoded bytes, hex. excluded: why the image cannot be used, or None.
    """

    key: str
    label: int
    path: str
    offset: int
    num_bytes: int
    width: int
    height: int
    notes: str
    digest: str
    excluded: str | None = None


class Index:
    """The rows in storage order, and the manifest that describes them.

    Rows are read by row group when asked for, so memory does not grow with the data set.
    """

    def __init__(self, manifest: Mapping[str, Any], store: ObjectStore | None = None):
        self.manifest = manifest
        self._store = store
        self._rows: TableRows | None = None

    def __eq__(self, other: object) -> bool:
        # The manifest holds the hash of all rows.
        return isinstance(other, Index) and self.manifest == other.manifest

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_rows(self) -> int:
        return int(self.manifest["num_rows"])

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All rows at once: for small sets and tests."""
        return self.rows(0, self.num_rows)

    def rows(self, start: int, stop: int) -> tuple[Entry, ...]:
        """Rows [start, stop). Raises DamagedError when the file's own checksums fail."""
        return tuple(Entry(**row) for row in self._table().rows(start, stop, (*_COLUMNS, EXCLUDED)))

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Arrow tables of a few thousand rows each with `columns`, in order."""
        if self._store is None:
            raise ValueError("a planned index has no rows")
        # Read in large blocks: a request for each row group would be thousands.
        table = TableRows(self._store, INDEX, read_ahead=BLOCK_BYTES)
        return table.batches(columns, self.num_rows)

    def _table(self) -> TableRows:
        if self._store is None:
            raise ValueError("a planned index has no rows")
        if self._rows is None:
            self._rows = TableRows(self._store, INDEX)
        return self._rows


def content_digest(data: bytes) -> str:
    """blake2b-128 of an image's encoded bytes, hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def rows_digest(entries: list[Entry]) -> str:
    """sha256 over (key, label, content) of the rows in storage order."""
    total = hashlib.sha256()
    for entry in entries:
        total.update(f"{entry.key}\t{entry.label}\t{entry.digest}\n".encode())
    return total.hexdigest()


def write_index(
    store: ObjectStore, rows: list[Entry], excluded: list[Entry], manifest: dict[str, Any]
) -> None:
    """Writes index.parquet, then manifest.json with the row digest."""
    everything = rows + excluded
    columns: dict[str, Any] = {name: [getattr(e, name) for e in everything] for name in _COLUMNS}
    columns["row"] = list(range(len(rows))) + [-1] * len(excluded)
    columns[EXCLUDED] = [entry.excluded for entry in everything]
    data = table_bytes(columns, _TYPES)
    store.put(INDEX, data)
    complete = {
        "format_version": FORMAT_VERSION,
        "index_sha256": hashlib.sha256(data).hexdigest(),
        "num_rows": len(rows),
        "rows_digest": rows_digest(rows),
        **manifest,
    }
    complete["manifest_sha256"] = _digest(complete)
    store.put("manifest.json", json_bytes(complete))


def read_manifest(store: ObjectStore) -> dict[str, Any]:
    """The manifest; raises MissingError without one, DamagedError for a foreign one."""
    if store.size("manifest.json") is None:
        raise MissingError(f"no cache at {store.url}: run `repa encode-latents` first")
    manifest = get_json(store, "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DamagedError(
            f"{store.url}/manifest.json has format version {manifest.get('format_version')!r}, "
            f"this package reads {FORMAT_VERSION}: use the package version that wrote it"
        )
    # Caches made before manifests carried their own checksum have none.
    if "manifest_sha256" in manifest and manifest["manifest_sha256"] != _digest(manifest):
        raise DamagedError(
            f"{store.url}/manifest.json is damaged, its checksum is not the recorded one: restore "
            "it from a copy, or remove it and run `repa index` again"
        )
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest's other entries."""
    others = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_index(store: ObjectStore) -> Index:
    """The finished index; raises DamagedError when the file is not the one sealed."""
    manifest = read_manifest(store)
    total = hashlib.sha256()
    for block in blocks_of(store, INDEX):
        total.update(block)
    if total.hexdigest() != manifest["index_sha256"]:
        raise DamagedError(
            f"{store.url}/{INDEX} is not the file that manifest.json describes: "
            "remove both and run `repa index` again"
        )
    return Index(manifest, store)


def open_index(store: ObjectStore) -> Index:
    """As `read_index`, for workers: trusts the driver's check of the whole file."""
    return Index(read_manifest(store), store)


def read_labels(store: ObjectStore) -> npt.NDArray[np.int64]:
    """int64 [num_rows]: the class of every row."""
    index = read_index(store)
    # pyarrow's own to_numpy would import pandas, for which every rank would wait.
    chunks = (chunk for batch in index.batches(["label"]) for chunk in batch["label"].chunks)
    labels: npt.NDArray[np.int64] = np.concatenate([np.from_dlpack(c) for c in chunks]).astype(
        np.int64
    )
    return labels
