"""A tree of images as a source: one sub-folder a class, or images directly in it (one class)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from repa_pipeline.data.items import IMAGE_EXTENSIONS, Item, finish_items, is_image_name
from repa_pipeline.data.tree import Tree
from repa_pipeline.errors import DataError, MissingError


class FolderSource:
    """Images below a root. Class ids follow the sorted names of its direct sub-folders.

    tree: a folder, or zips; its top is listed here, everything else by `items`.
    """

    def __init__(self, url: str, tree: Tree):
        self.url = url
        self.is_remote = tree.is_remote
        self.remarks: tuple[str, ...] = ()
        self._tree = tree
        top = tree.top()
        self._is_flat = any(not e.is_folder and is_image_name(e.name) for e in top)
        self._folders = [entry.name for entry in top if entry.is_folder]
        self.class_names = None if self._is_flat else tuple(self._folders)
        self._lock = threading.Lock()
        self._items: list[Item] | None = None

    def items(self) -> list[Item]:
        """Every image, sorted by path; the key is the path below the root.

        Raises MissingError when there is no image, DataError when images lie both directly in
        the root and in sub-folders.
        """
        with self._lock:
            if self._items is None:
                self._items = self._list()
            return list(self._items)

    def read(self, item: Item) -> bytes:
        """The file's bytes; raises DamagedError when they are gone or others."""
        return self._tree.read(item)

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        return self._tree.groups(items)

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        return self._tree.read_group(items)

    def _list(self) -> list[Item]:
        found = [
            member.item(member.name, label)
            for label, members in enumerate(self._tree.walk(self._folders))
            for member in members
            if is_image_name(member.name)
        ]
        if self._is_flat and found:
            raise DataError(
                f"{self.url} holds images directly and in sub-folders ('{found[0].key}'): "
                "expected one or the other, move some"
            )
        if self._is_flat:
            images = [m for m in self._tree.top_files() if is_image_name(m.name)]
            found = [member.item(member.name, None) for member in images]
        if not found:
            raise MissingError(
                f"no images in {self.url}: expected class sub-folders, images "
                f"(extensions {', '.join(sorted(IMAGE_EXTENSIONS))}), or tars, parquet files or "
                "zips; those in sub-folders need a pattern"
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
        if all(item.key.count("/") > 1 for item in items):
            names = ", ".join(f"'{name}'" for name in self._folders[:3])
            return (
                *empty,
                f"no image lies directly in a class folder ({names}): one level too high?",
            )
        return empty
