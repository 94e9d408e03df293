"""The rows of a cache: which image is row i, its class, and where its bytes are.

index.parquet   one line a row in storage order, then the excluded images (row = -1)
manifest.json   counts, classes, digests; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes
from repa_pipeline.errors import DamagedError, MissingError

FORMAT_VERSION = 1
_COLUMNS = ("key", "label", "path", "offset", "num_bytes", "width", "height", "notes", "digest")


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Index:
    """The rows in storage order, and the manifest that describes them."""

    entries: tuple[Entry, ...]
    manifest: Mapping[str, Any]

    @property
    def num_rows(self) -> int:
        return int(self.manifest["num_rows"])


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
    import pyarrow
    import pyarrow.parquet

    everything = rows + excluded
    columns: dict[str, Any] = {name: [getattr(e, name) for e in everything] for name in _COLUMNS}
    columns["row"] = list(range(len(rows))) + [-1] * len(excluded)
    columns["excluded"] = [entry.excluded for entry in everything]
    schema = pyarrow.schema(
        [("row", pyarrow.int64()), ("key", pyarrow.string()), ("label", pyarrow.int32())]
        + [("path", pyarrow.string()), ("offset", pyarrow.int64()), ("num_bytes", pyarrow.int64())]
        + [("width", pyarrow.int32()), ("height", pyarrow.int32()), ("notes", pyarrow.string())]
        + [("digest", pyarrow.string()), ("excluded", pyarrow.string())]
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), buffer)
    data = buffer.getvalue()
    store.put("index.parquet", data)
    complete = {
        "format_version": FORMAT_VERSION,
        "index_sha256": hashlib.sha256(data).hexdigest(),
        "num_rows": len(rows),
        "rows_digest": rows_digest(rows),
        **manifest,
    }
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
    return manifest


def read_index(store: ObjectStore) -> Index:
    """All rows in storage order; raises DamagedError when the file is not the one sealed."""
    manifest = read_manifest(store)
    table = _read_table(store, manifest).to_pylist()
    rows = [row for row in table if row.pop("row") >= 0]
    return Index(tuple(Entry(**row) for row in rows), manifest)


def read_labels(store: ObjectStore) -> npt.NDArray[np.int64]:
    """int64 [num_rows]: the class of every row."""
    manifest = read_manifest(store)
    table = _read_table(store, manifest)
    kept = table["row"].to_numpy() >= 0
    labels: npt.NDArray[np.int64] = table["label"].to_numpy()[kept].astype(np.int64)
    return labels


def _read_table(store: ObjectStore, manifest: Mapping[str, Any]) -> Any:
    import pyarrow.parquet

    data = store.get("index.parquet")
    if hashlib.sha256(data).hexdigest() != manifest["index_sha256"]:
        raise DamagedError(
            f"{store.url}/index.parquet is not the file that manifest.json describes: "
            "remove both and run `repa index` again"
        )
    # Without threads: a pool still alive at exit can abort the process after its work is done.
    return pyarrow.parquet.read_table(io.BytesIO(data), use_threads=False)
