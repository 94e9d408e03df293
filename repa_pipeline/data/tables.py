"""Parquet tables in a store, written in small row groups and read by row group.

A worker that needs 512 of a million rows reads their row groups; pages carry checksums.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.errors import DamagedError, MissingError

GROUP_ROWS = 2048
BLOCK_BYTES = 2**23
_READ_AHEAD = 2**16


def table_bytes(columns: Mapping[str, Sequence[Any]], types: Mapping[str, str]) -> bytes:
    """A parquet file with `columns` in the order of `types` (arrow type names)."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in types.items()])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({name: columns[name] for name in types}, schema=schema),
        buffer,
        row_group_size=GROUP_ROWS,
        write_page_checksum=True,
    )
    return buffer.getvalue()


class TableRows:
    """Rows of a parquet object by position; holds one row group at a time. Thread-safe."""

    def __init__(self, store: ObjectStore, key: str, read_ahead: int = _READ_AHEAD):
        import pyarrow.parquet

        self._where = f"{store.url}/{key}"
        self._lock = threading.Lock()
        with self._damage():
            self._file = pyarrow.parquet.ParquetFile(
                io.BufferedReader(_ObjectFile(store, key), read_ahead),
                page_checksum_verification=True,
            )
        metadata = self._file.metadata
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._held: tuple[int, Any] | None = None

    def rows(self, start: int, stop: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows [start, stop) as dictionaries of `columns`."""
        found: list[dict[str, Any]] = []
        with self._lock:
            for group, first in enumerate(self._starts[:-1]):
                last = self._starts[group + 1]
                if first < stop and start < last:
                    table = self._group(group).select(list(columns))
                    begin = max(start, first) - first
                    part = table.slice(begin, min(stop, last) - first - begin)
                    found += part.to_pylist()
        return found

    def batches(self, columns: Sequence[str], stop: int) -> Iterator[Any]:
        """Arrow tables of a row group each with `columns`, rows [0, stop) in order."""
        for group, first in enumerate(self._starts[:-1]):
            if first >= stop:
                return
            with self._lock, self._damage():
                table = self._file.read_row_group(group, list(columns), use_threads=False)
            yield table.slice(0, stop - first)

    def _group(self, group: int) -> Any:
        if self._held is None or self._held[0] != group:
            # Without threads: a pool still alive at exit can abort the process after its work.
            with self._damage():
                self._held = group, self._file.read_row_group(group, use_threads=False)
        return self._held[1]

    def _damage(self) -> _Damage:
        return _Damage(self._where)


class _Damage:
    """Turns what pyarrow raises for a damaged file into DamagedError."""

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException) or (
            isinstance(error, OSError) and "checksum" in str(error).lower()
        ):
            raise DamagedError(
                f"{self._where} is damaged ({error}): remove it and manifest.json and run "
                "`repa index` again"
            ) from error


class _ObjectFile(io.RawIOBase):
    """An object as a seekable file, read by range."""

    def __init__(self, store: ObjectStore, key: str):
        self._store, self._key, self._position = store, key, 0
        size = store.size(key)
        if size is None:
            raise MissingError(f"no object {store.url}/{key}")
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            buffer[:count] = self._store.read_range(self._key, self._position, count)
            self._position += count
        return count


def blocks_of(store: ObjectStore, key: str) -> Iterator[bytes]:
    """An object's bytes in blocks of some megabytes; raises MissingError."""
    size = store.size(key)
    if size is None:
        raise MissingError(f"no object {store.url}/{key}")
    for start in range(0, size, BLOCK_BYTES):
        yield store.read_range(key, start, min(BLOCK_BYTES, size - start))
