"""Parquet files with image bytes (the Hugging Face layout) as a source of images.

Rows are read in random order, and a parquet file cannot be: each is unpacked once into the
scratch folder (scratch.py) as records of 8 bytes length and the image's bytes. Items point there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from repa_pipeline.data.files import Descriptors, Files, changed
from repa_pipeline.data.items import Item, finish_items
from repa_pipeline.data.remote import in_parallel
from repa_pipeline.data.scratch import CHUNK_BYTES, UNPACK_THREADS, Scratch
from repa_pipeline.errors import DataError, MissingError, RepaError

_LENGTH = struct.Struct("<Q")
_BATCH_ROWS = 16
_BUFFER_BYTES = 2**20
_MAX_RATIO = 1000
_RECORDS_VERSION = "-images1"
_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img")
_LABEL_NAMES = ("label", "cls", "labels", "fine_label")
_UNLABELLED = -1


@dataclasses.dataclass(frozen=True)
class _Table:
    """What the footer of a file says, and its labels.

    leaf: column of the images' bytes as pyarrow names it. labels: one a row, None where none is
    given.
    """

    leaf: str
    label_column: str | None
    class_names: tuple[str, ...] | None
    labels: tuple[int | None, ...]


class ParquetSource:
    """Rows of parquet files below one root. Safe to use from several threads.

    The `path` field of Hugging Face sets repeats, so a key is "<file name>/<row>", the file name
    without its directories. A row without image bytes is an item of 0 bytes.
    """

    def __init__(
        self, url: str, files: Files, names: Sequence[str], scratch_dir: str, scratch_limit: int
    ):
        self.url = url
        self.is_remote = not files.is_local
        self.remarks: tuple[str, ...] = ()
        self._files = files
        self._names = sorted(names)
        self._scratch = Scratch(scratch_dir, scratch_limit, on_evict=self._forget)
        self._name_of_key: dict[str, str] = {}
        self._descriptors = Descriptors()
        self._lock = threading.Lock()
        self._items: list[Item] | None = None
        self._class_names: tuple[str, ...] | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the ClassLabel that the files' metadata describe, None without one."""
        self.items()
        return self._class_names

    def items(self) -> list[Item]:
        """Every row, sorted by file then row; reads the footers, then unpacks every file.

        Raises DataError for what is no parquet file with images and integer labels, MissingError
        when a file is gone or has no rows, StageError when it cannot be unpacked.
        """
        with self._lock:
            if self._items is None:
                self._items = self._list()
            return list(self._items)

    def read(self, item: Item) -> bytes:
        """The row's image bytes, their stored length checked; unpacks the file if need be.

        Raises DamagedError when the file is gone or another one; StageError when it cannot be
        unpacked.
        """
        start = item.offset - _LENGTH.size
        if start < 0:
            raise changed(f"{item.path} has no image at byte {item.offset}")
        data = self._descriptors.read_range(
            item.path,
            lambda: self._open_fd(item.path),
            start,
            _LENGTH.size + item.num_bytes,
            touch=True,
        )
        if _LENGTH.unpack_from(data)[0] != item.num_bytes:
            raise changed(f"{item.path} has no image of {item.num_bytes} bytes at {item.offset}")
        return data[_LENGTH.size :]

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        """Unpacked files are local: every row alone."""
        return [[i] for i in range(len(items))]

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        return [self.read(item) for item in items]

    def _list(self) -> list[Item]:
        tables = in_parallel(self._table, self._names)
        for name, table in zip(self._names, tables, strict=True):
            if table.class_names != tables[0].class_names:
                raise DataError(
                    f"{name} and {self._names[0]} have different class names: name files of one "
                    "data set by a pattern"
                )
        pairs = list(zip(self._names, tables, strict=True))
        listed = in_parallel(lambda pair: self._rows(*pair), pairs, UNPACK_THREADS)
        found = [item for items in listed for item in items]
        if not found:
            raise MissingError(f"no rows in the {len(self._names)} parquet files of {self.url}")
        self._check_bytes(found, tables[0].leaf)
        self._class_names = tables[0].class_names
        column = tables[0].label_column
        self.remarks = () if column in (None, "label") else (f"labels from column '{column}'",)
        return finish_items(found)

    def _check_bytes(self, items: list[Item], leaf: str) -> None:
        if not any(item.num_bytes for item in items):
            raise DataError(
                f"column '{leaf}' of {self.url} holds no bytes in any of {len(items)} rows: "
                "images that are only named by their path cannot be read, embed them"
            )

    def _table(self, name: str) -> _Table:
        try:
            with self._files.open(name) as file, _as_damage(name):
                return _read_table(file, name)
        except FileNotFoundError:
            raise MissingError(
                f"no parquet file {self._files.path(name)}: check the path or pattern '{self.url}'"
            ) from None

    def _rows(self, name: str, table: _Table) -> list[Item]:
        base = name.rpartition("/")[2]
        with os.fdopen(self._open_fd(name), "rb", buffering=0) as file:
            places = list(_places(file.fileno(), len(table.labels), name))
        return [
            Item(f"{base}/{row}", label, name, offset, num_bytes)
            for row, (label, (offset, num_bytes)) in enumerate(
                zip(table.labels, places, strict=True)
            )
        ]

    def _open_fd(self, name: str) -> int:
        key = self._files.version(name) + _RECORDS_VERSION
        self._name_of_key[key] = name
        return self._scratch.open_unpacked(key, name, lambda: self._files.open(name), image_records)

    def _forget(self, key: str) -> None:
        self._descriptors.forget(self._name_of_key.get(key, ""))


def image_records(packed: BinaryIO, name: str) -> Iterator[bytes]:
    """The images of a parquet file as records (8 bytes length, bytes), in pieces of about 8 MiB.

    Reads a few rows at a time: memory grows with a page of the file, not with the file. A row
    without bytes is a record of length 0. Raises DataError when the file is damaged.
    """
    with _as_damage(name):
        file = _open(packed)
        leaf = _image_leaf(file.schema_arrow, name)
        pending = bytearray()
        for batch in file.iter_batches(_BATCH_ROWS, columns=[leaf], use_threads=False):
            for value in _leaf_values(batch.column(0)):
                data = value.as_buffer() if value.is_valid else b""
                pending += _LENGTH.pack(len(data))
                pending += memoryview(data)
                if len(pending) >= CHUNK_BYTES:
                    yield bytes(pending)
                    pending.clear()
        yield bytes(pending)


def _open(packed: BinaryIO) -> Any:
    import pyarrow.parquet

    # Buffered: without it a whole column chunk, that is all images of a row group, is in memory.
    return pyarrow.parquet.ParquetFile(packed, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _leaf_values(column: Any) -> Any:
    import pyarrow.compute
    import pyarrow.types

    # Not .field(): a null struct hides what its child holds.
    is_struct = pyarrow.types.is_struct(column.type)
    return pyarrow.compute.struct_field(column, "bytes") if is_struct else column


def _read_table(file: BinaryIO, name: str) -> _Table:
    opened = _open(file)
    schema = opened.schema_arrow
    leaf = _image_leaf(schema, name)
    _check_ratio(opened.metadata, leaf, name)
    features = _features(schema)
    column = _label_column(schema, features)
    class_names = _class_names(features.get(column)) if column is not None else None
    if column is None:
        labels: list[int | None] = [None] * opened.metadata.num_rows
    else:
        _check_integers(schema, column, name)
        values = opened.read(columns=[column], use_threads=False).column(column).to_pylist()
        labels = [None if value == _UNLABELLED else value for value in values]
    return _Table(leaf, column, class_names, tuple(labels))


def _image_leaf(schema: Any, name: str) -> str:
    """The column of image bytes: one that the metadata calls an image, else by name and type."""
    declared = [n for n, f in _features(schema).items() if _is_feature(f, "Image")]
    for column in (*sorted(declared, key=lambda n: n != "image"), *_IMAGE_NAMES):
        leaf = _bytes_leaf(schema, column)
        if leaf is not None:
            return leaf
    raise DataError(
        f"{name} has no column of image bytes: found {', '.join(schema.names)}; expected "
        f"one of {', '.join(_IMAGE_NAMES)}, binary or a struct with binary 'bytes'"
    )


def _bytes_leaf(schema: Any, column: str) -> str | None:
    import pyarrow.types

    if schema.get_field_index(column) < 0:
        return None
    kind = schema.field(column).type
    leaf = column
    if pyarrow.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return None
        kind, leaf = kind.field("bytes").type, f"{column}.bytes"
    is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    return leaf if is_bytes else None


def _label_column(schema: Any, features: dict[str, Any]) -> str | None:
    named = [name for name in _LABEL_NAMES if schema.get_field_index(name) >= 0]
    declared = [name for name, f in features.items() if _is_feature(f, "ClassLabel")]
    return next(iter([*named, *declared]), None)


def _features(schema: Any) -> dict[str, Any]:
    """The columns' features as the `datasets` library wrote them, {} without any."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_feature(feature: Any, kind: str) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == kind


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if _is_feature(feature, "ClassLabel") else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def _check_integers(schema: Any, column: str, name: str) -> None:
    import pyarrow.types

    kind = schema.field(column).type
    if not pyarrow.types.is_integer(kind):
        raise DataError(f"column '{column}' of {name} holds {kind}: expected integer labels")


def _check_ratio(metadata: Any, leaf: str, name: str) -> None:
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for i in range(row_group.num_columns):
            column = row_group.column(i)
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if column.path_in_schema == leaf and unpacked > _MAX_RATIO * max(packed, 1):
                raise DataError(
                    f"column '{leaf}' of {name} unpacks to {unpacked} bytes from {packed}, more "
                    f"than {_MAX_RATIO} times as much: no images do, use another file"
                )


def _places(fd: int, num_rows: int, name: str) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of every image of an unpacked file."""
    start, end = 0, os.fstat(fd).st_size
    for _ in range(num_rows):
        header = os.pread(fd, _LENGTH.size, start)
        if len(header) < _LENGTH.size:
            raise changed(f"{name} has fewer images than its footer says")
        (num_bytes,) = _LENGTH.unpack(header)
        yield start + _LENGTH.size, num_bytes
        start += _LENGTH.size + num_bytes
    if start != end:
        raise changed(f"{name} has more images than its footer says")


@contextlib.contextmanager
def _as_damage(name: str) -> Iterator[None]:
    """What pyarrow says about a damaged file as a DataError; errors of a store pass."""
    import pyarrow

    try:
        yield
    except (RepaError, FileNotFoundError):
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a whole parquet file: {error}; copy it again") from None
