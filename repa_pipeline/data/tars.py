"""Webdataset tars as a source of images: listed once, then read by byte range.

A `.tar.gz` cannot be read by range, so it is unpacked once into the scratch folder (scratch.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import BinaryIO

from repa_pipeline.data.coalesce import Extent, coalesce, read_extents
from repa_pipeline.data.files import Descriptors, Files, changed
from repa_pipeline.data.items import Item, finish_items
from repa_pipeline.data.patterns import is_gzipped
from repa_pipeline.data.remote import in_parallel
from repa_pipeline.data.scratch import UNPACK_THREADS, Scratch
from repa_pipeline.data.tarscan import is_header_of, scan_tar
from repa_pipeline.errors import MissingError

_HEADER_BYTES = 512


class TarSource:
    """Samples of webdataset tars below one root. Safe to read from several threads."""

    class_names: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()

    def __init__(
        self, url: str, files: Files, names: Sequence[str], scratch_dir: str, scratch_limit: int
    ):
        self.url = url
        self.is_remote = not files.is_local
        self._files = files
        self._names = sorted(names)
        self._scratch = Scratch(scratch_dir, scratch_limit, on_evict=self._forget)
        self._name_of_key: dict[str, str] = {}
        self._descriptors = Descriptors()
        self._lock = threading.Lock()
        self._items: list[Item] | None = None

    def items(self) -> list[Item]:
        """Every sample, sorted by tar then offset; unpacks what is compressed.

        Raises DataError (see `scan_tar` and `finish_items`), MissingError when there is none.
        """
        with self._lock:
            if self._items is None:
                threads = {"threads": UNPACK_THREADS} if any(map(is_gzipped, self._names)) else {}
                scanned = in_parallel(self._scan, self._names, **threads)
                found = [item for items in scanned for item in items]
                if not found:
                    raise MissingError(f"no samples in the {len(self._names)} tars of {self.url}")
                self._items = finish_items(found)
            return list(self._items)

    def read(self, item: Item) -> bytes:
        """The image's bytes, its tar header checked.

        Raises DamagedError when the tar is gone, short or another one; StageError when it cannot
        be unpacked.
        """
        extent = _extent(item)
        length = extent.stop - extent.start
        if self._is_ranged(item):
            data = self._files.read_range(item.path, extent.start, length)
        else:
            touch = is_gzipped(item.path)
            data = self._descriptors.read_range(
                item.path, lambda: self._open_fd(item.path), extent.start, length, touch=touch
            )
        return _payload(data, item)

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        return coalesce([_extent(item) if self._is_ranged(item) else None for item in items])

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        """As `read`, by one request where the items are of one remote tar."""
        extents = [_extent(item) for item in items]
        if len({e.path for e in extents}) != 1 or not all(map(self._is_ranged, items)):
            return [self.read(item) for item in items]
        path = extents[0].path
        pieces = read_extents(lambda start, n: self._files.read_range(path, start, n), extents)
        return [_payload(piece, item) for piece, item in zip(pieces, items, strict=True)]

    def _is_ranged(self, item: Item) -> bool:
        return self.is_remote and not is_gzipped(item.path)

    def _scan(self, name: str) -> list[Item]:
        with self._open_plain(name) as file:
            return scan_tar(file, name)

    def _open_plain(self, name: str) -> BinaryIO:
        try:
            if is_gzipped(name):
                return os.fdopen(self._open_fd(name), "rb")
            return self._files.open(name)
        except FileNotFoundError:
            raise MissingError(
                f"no tar {self._files.path(name)}: check the path or pattern '{self.url}'"
            ) from None

    def _open_fd(self, name: str) -> int:
        if not is_gzipped(name):
            return os.open(self._files.path(name), os.O_RDONLY | os.O_CLOEXEC)
        key = self._files.version(name)
        self._name_of_key[key] = name
        return self._scratch.open_unpacked(key, name, lambda: self._files.open(name))

    def _forget(self, key: str) -> None:
        self._descriptors.forget(self._name_of_key.get(key, ""))


def _extent(item: Item) -> Extent:
    """The member with its header."""
    if item.offset < _HEADER_BYTES:
        raise changed(f"no tar member has its data at byte {item.offset} of {item.path}")
    return Extent(item.path, item.offset - _HEADER_BYTES, item.offset + item.num_bytes)


def _payload(data: bytes, item: Item) -> bytes:
    if not is_header_of(data[:_HEADER_BYTES], item.num_bytes):
        raise changed(f"{item.path} has no member of {item.num_bytes} bytes at {item.offset}")
    return data[_HEADER_BYTES:]
