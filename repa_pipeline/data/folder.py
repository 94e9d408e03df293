"""A folder of images as a source: one sub-folder a class, or images directly in it (one class)."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator

from repa_pipeline.data.files import Entry, Files
from repa_pipeline.data.items import IMAGE_EXTENSIONS, Item, finish_items, is_image_name
from repa_pipeline.errors import DataError, MissingError


class FolderSource:
    """Images below a folder. Class ids follow the sorted names of its direct sub-folders.

    top: what lies directly in the folder (sizes are not used).
    """

    def __init__(self, url: str, files: Files, top: list[Entry]):
        self.url = url
        self.remarks: tuple[str, ...] = ()
        self._files = files
        self._is_flat = any(not e.is_folder and is_image_name(e.name) for e in top)
        self._folders = [entry.name for entry in top if entry.is_folder]
        self.class_names = None if self._is_flat else tuple(self._folders)
        self._lock = threading.Lock()
        self._items: list[Item] | None = None

    def items(self) -> list[Item]:
        """Every image, sorted by path; the key is the path below the root.

        Raises MissingError when there is no image, DataError when images lie both directly in
        the folder and in sub-folders.
        """
        with self._lock:
            if self._items is None:
                self._items = self._list()
            return list(self._items)

    def read(self, item: Item) -> bytes:
        """The whole file; raises DamagedError when it is gone or has another size."""
        return self._files.read(item.path, item.num_bytes)

    def _list(self) -> list[Item]:
        found = [
            Item(path, label, path, -1, size)
            for label, folder in enumerate(self._folders)
            for path, size in _walk(self._files, folder, ())
        ]
        if self._is_flat and found:
            raise DataError(
                f"{self.url} holds images directly and in sub-folders ('{found[0].path}'): "
                "expected one or the other, move some"
            )
        if self._is_flat:
            top = self._files.entries()
            images = [e for e in top if not e.is_folder and is_image_name(e.name)]
            found = [Item(e.name, None, e.name, -1, e.num_bytes) for e in images]
        if not found:
            raise MissingError(
                f"no images in {self.url}: expected class sub-folders, images, or tars "
                f"(extensions {', '.join(sorted(IMAGE_EXTENSIONS))})"
            )
        self.remarks = () if self._is_flat else self._remarks(found)
        return finish_items(found)

    def _remarks(self, items: list[Item]) -> tuple[str, ...]:
        num_images = Counter(item.label for item in items)
        empty = tuple(
            f"class folder '{name}' has no images: kept as class {label} without images"
            for label, name in enumerate(self._folders)
            if not num_images[label]
        )
        if all(item.path.count("/") > 1 for item in items):
            names = ", ".join(f"'{name}'" for name in self._folders[:3])
            return (
                *empty,
                f"no image lies directly in a class folder ({names}): one level too high?",
            )
        return empty


def _walk(files: Files, folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every image below a folder; follows links, refuses a link to above."""
    if files.is_local:
        real = os.path.realpath(files.path(folder))
        if real in above:
            raise DataError(
                f"folder {files.path(folder)} is a link to a folder above it: remove it"
            )
        above = (*above, real)
    for entry in files.entries(folder):
        name = f"{folder}/{entry.name}"
        if entry.is_folder:
            yield from _walk(files, name, above)
        elif is_image_name(entry.name):
            yield name, entry.num_bytes
