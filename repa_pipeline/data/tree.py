"""A tree of files that can be listed and read: a folder on any file system, or zips (zipfiles.py).

What images mean in it (classes, labels) is decided by folder.py and refset.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from repa_pipeline.data.files import Entry, Files
from repa_pipeline.data.items import Item
from repa_pipeline.data.remote import in_parallel
from repa_pipeline.errors import DataError


class Member(NamedTuple):
    """A file of a tree by its name below the root, and where its bytes are (as in an Item)."""

    name: str
    path: str
    offset: int
    num_bytes: int

    def item(self, key: str, label: int | None) -> Item:
        """The item of this file."""
        return Item(key, label, self.path, self.offset, self.num_bytes)


class Tree(Protocol):
    """Files below a root, hidden ones left out. Safe to use from several threads."""

    @property
    def is_remote(self) -> bool: ...

    def top(self) -> list[Entry]:
        """What lies directly in the root, sorted by name; sizes may be missing."""
        ...

    def top_files(self) -> list[Member]:
        """The files directly in the root, sorted by name."""
        ...

    def walk(self, folders: Sequence[str]) -> list[list[Member]]:
        """All files below each of these top folders, sorted by name."""
        ...

    def find(self, name: str) -> Member | None:
        """One file by its name below the root."""
        ...

    def read(self, item: Item) -> bytes: ...

    def groups(self, items: Sequence[Item]) -> list[list[int]]: ...

    def read_group(self, items: Sequence[Item]) -> list[bytes]: ...


class FolderTree:
    """A folder; every listing is one call a folder, 16 at a time."""

    def __init__(self, files: Files):
        self._files = files
        self.is_remote = not files.is_local
        self._lock = threading.Lock()
        self._top: list[Entry] | None = None

    def top(self) -> list[Entry]:
        """What lies directly in the folder; raises FileNotFoundError or NotADirectoryError."""
        with self._lock:
            if self._top is None:
                self._top = self._files.entries(sizes=False)
            return list(self._top)

    def top_files(self) -> list[Member]:
        entries = self.top() if self.is_remote else self._files.entries()
        return [Member(e.name, e.name, -1, e.num_bytes) for e in entries if not e.is_folder]

    def walk(self, folders: Sequence[str]) -> list[list[Member]]:
        """All files below each folder; follows links, refuses a link to a folder above it."""
        found: list[list[Member]] = [[] for _ in folders]
        above: list[tuple[int, str, tuple[str, ...]]] = [(i, f, ()) for i, f in enumerate(folders)]
        while above:
            listings = in_parallel(lambda job: self._list(job[1], job[2]), above)
            below = []
            for (i, folder, _), (chain, entries) in zip(above, listings, strict=True):
                for entry in entries:
                    name = f"{folder}/{entry.name}"
                    if entry.is_folder:
                        below.append((i, name, chain))
                    else:
                        found[i].append(Member(name, name, -1, entry.num_bytes))
            above = below
        return [sorted(members) for members in found]

    def find(self, name: str) -> Member | None:
        """One file, asked for by name; raises StoreError."""
        if not self._files.is_file(name):
            return None
        return Member(name, name, -1, self._files.size(name))

    def read(self, item: Item) -> bytes:
        """The whole file; raises DamagedError when it is gone or has another size."""
        return self._files.read(item.path, item.num_bytes)

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        """Every file is a request."""
        return [[i] for i in range(len(items))]

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        return [self.read(item) for item in items]

    def _list(self, folder: str, above: tuple[str, ...]) -> tuple[tuple[str, ...], list[Entry]]:
        if self._files.is_local:
            real = os.path.realpath(self._files.path(folder))
            if real in above:
                raise DataError(
                    f"folder {self._files.path(folder)} is a link to a folder above it: remove it"
                )
            above = (*above, real)
        return above, self._files.entries(folder)
