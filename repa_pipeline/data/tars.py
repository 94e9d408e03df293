"""Webdataset tars as a source of images: listed once, then read by byte range.

A `.tar.gz` cannot be read by range, so it is unpacked once into the scratch folder (scratch.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO

from repa_pipeline.data.files import Descriptors, Files, changed, open_filesystem
from repa_pipeline.data.items import Item, finish_items
from repa_pipeline.data.patterns import (
    common_parent,
    expand_braces,
    has_glob,
    is_gzipped,
    is_tar_name,
    split_list,
)
from repa_pipeline.data.scratch import Scratch
from repa_pipeline.data.tarscan import is_header_of, scan_tar
from repa_pipeline.errors import ConfigError, DataError, MissingError

_HEADER_BYTES = 512


class TarSource:
    """Samples of webdataset tars below one root. Safe to read from several threads."""

    class_names: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()

    def __init__(
        self, url: str, files: Files, names: Sequence[str], scratch_dir: str, scratch_limit: int
    ):
        self.url = url
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
                found = [item for name in self._names for item in self._scan(name)]
                if not found:
                    raise MissingError(f"no samples in the {len(self._names)} tars of {self.url}")
                self._items = finish_items(found)
            return list(self._items)

    def read(self, item: Item) -> bytes:
        """The image's bytes, its tar header checked.

        Raises DamagedError when the tar is gone, short or another one; StageError when it cannot
        be unpacked.
        """
        start, length = item.offset - _HEADER_BYTES, item.num_bytes + _HEADER_BYTES
        zipped = is_gzipped(item.path)
        if start < 0:
            raise changed(f"no tar member has its data at byte {item.offset} of {item.path}")
        if zipped or self._files.is_local:
            data = self._descriptors.read_range(
                item.path, lambda: self._open_fd(item.path), start, length, touch=zipped
            )
        else:
            data = self._files.read_range(item.path, start, length)
        if not is_header_of(data[:_HEADER_BYTES], item.num_bytes):
            raise changed(f"{item.path} has no member of {item.num_bytes} bytes at {item.offset}")
        return data[_HEADER_BYTES:]

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


def find_tars(url: str) -> tuple[Files, list[str]]:
    """The tars that a single name, a brace or glob pattern, or a '::' list of these stands for.

    Returns their file system, rooted at the deepest directory in front of all wildcards, and
    their names below it. Raises MissingError when a name or pattern matches nothing, DataError
    when a tar is named twice, ConfigError when the parts are on different file systems.
    """
    opened = [open_filesystem(part) for part in _parts(url)]
    filesystem = opened[0][0]
    if any(type(other) is not type(filesystem) for other, _ in opened):
        raise ConfigError(f"the tars of '{url}' are on different file systems: use one at a time")
    patterns = [path for _, path in opened]
    files = Files(filesystem, common_parent(patterns))
    paths = [path for pattern in patterns for path in _match(filesystem, pattern)]
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"tar {path} is named twice by '{url}': name it once")
        seen.add(path)
    return files, [files.name(path) for path in paths]


def _parts(url: str) -> list[str]:
    return [name for part in split_list(url) for name in expand_braces(part)]


def _match(filesystem: Any, pattern: str) -> list[str]:
    if filesystem.isfile(pattern):
        return [pattern]
    found = sorted(filesystem.glob(pattern)) if has_glob(pattern) else []
    found = [path for path in found if is_tar_name(path) and filesystem.isfile(path)]
    if not found:
        raise MissingError(f"no tar at '{pattern}': check the path or pattern, or copy the data")
    return found
