"""What a source of images is: its items, the rules every kind of source shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from repa_pipeline.errors import DataError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image file of a source and where its bytes are.

    `path` is relative to the source's root; the bytes are `num_bytes` from `offset` on, and
    offset -1 means the whole file. In a `.tar.gz` the offset counts in the unpacked tar.
    """

    key: str
    label: int | None
    path: str
    offset: int
    num_bytes: int


class Source(Protocol):
    """Images with labels, listed once and read at random; safe to use from several threads."""

    @property
    def url(self) -> str:
        """As the user gave it."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether reading costs requests to a server."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of every class id, None where the source has no names."""
        ...

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines the user should see about this source; complete after `items()`."""
        ...

    def items(self) -> list[Item]:
        """Every image, sorted by path then offset; raises DataError or MissingError."""
        ...

    def read(self, item: Item) -> bytes:
        """The image file's bytes.

        Raises DamagedError when they are no longer what was listed, StoreError when a server
        fails for good.
        """
        ...

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        """Positions in `items` that one request reads together, every position exactly once."""
        ...

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        """The bytes of items that `groups` put together, each as `read` gives them."""
        ...


def is_image_name(name: str) -> bool:
    """Whether a file name has an image extension, in any case."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name


def finish_items(items: Sequence[Item]) -> list[Item]:
    """Sorts by path then offset and applies the rules on keys and labels.

    Without any label there is one class: every label becomes 0. Raises DataError when a key
    occurs twice, is not valid UTF-8, or when only some items have labels.
    """
    ordered = sorted(items, key=lambda item: (item.path, item.offset))
    first_of_key: dict[str, Item] = {}
    for item in ordered:
        _check_utf8(item)
        first = first_of_key.setdefault(item.key, item)
        if first is not item:
            raise DataError(
                f"key '{item.key}' occurs twice, in {_place(first)} and in {_place(item)}: "
                "keys must be unique, rename or remove one"
            )
    unlabelled = [item for item in ordered if item.label is None]
    if len(unlabelled) == len(ordered):
        return [dataclasses.replace(item, label=0) for item in ordered]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} of {len(ordered)} samples have no label, first '"
            f"{unlabelled[0].key}' in {_place(unlabelled[0])}: label all of them or none"
        )
    return ordered


def num_classes(items: Sequence[Item], class_names: Sequence[str] | None) -> int:
    """Number of classes: of the names, or the largest label plus one where there are none.

    Raises DataError on a missing or negative label, one beyond the names, or no items.
    """
    labels = [item.label for item in items if item.label is not None]
    if not labels or len(labels) != len(items):
        raise DataError(
            f"{len(labels)} of {len(items)} items have a label: expected all, and at least one item"
        )
    if min(labels) < 0:
        key = items[labels.index(min(labels))].key
        raise DataError(f"label {min(labels)} of '{key}' is negative: expected 0 or more")
    if class_names is None:
        return max(labels) + 1
    if max(labels) >= len(class_names):
        raise DataError(f"label {max(labels)}, but there are only {len(class_names)} class names")
    return len(class_names)


def _place(item: Item) -> str:
    return item.path if item.offset < 0 else f"{item.path} at byte {item.offset}"


def _check_utf8(item: Item) -> None:
    try:
        item.key.encode(), item.path.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"key {ascii(item.key)} in {ascii(item.path)} is not valid UTF-8: rename the file"
        ) from None
