"""Where images come from: open_source tells the kind of a source from its url.

open_source("train/")                        class sub-folders, or images of one class
open_source("shards/")                       a directory of tars, of parquet files or of zips
open_source("train-{0000..0009}.tar.gz")     braces, globs, one archive, lists joined by '::'
open_source("data/train-*.parquet")          the Hugging Face layout; hf://datasets/NAME too
open_source("imagenet256/")                  the reference's images/ + vae-sd/ + dataset.json
open_source("imagenet256.zip")               the same in a zip, or class sub-folders
open_source("s3://bucket/train-*.tar")       any of these on a file system fsspec knows
open_source("embedded:digits")               no files at all
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from repa_pipeline.data import digits
from repa_pipeline.data.archives import archives_of_folder, find_archives
from repa_pipeline.data.files import Entry, Files, changed
from repa_pipeline.data.folder import FolderSource
from repa_pipeline.data.items import Item, Source, finish_items, num_classes
from repa_pipeline.data.parquet import ParquetSource
from repa_pipeline.data.patterns import archive_kind, names_archives, split_list
from repa_pipeline.data.refset import refset_of
from repa_pipeline.data.remote import open_filesystem
from repa_pipeline.data.scratch import default_scratch_dir
from repa_pipeline.data.tars import TarSource
from repa_pipeline.data.tree import FolderTree, Tree
from repa_pipeline.data.zipfiles import ZipTree
from repa_pipeline.errors import DataError, MissingError, UnknownNameError

__all__ = ["Item", "Source", "num_classes", "open_source"]

_EMBEDDED = {
    "embedded:digits": digits.train_indices,
    "embedded:digits-heldout": digits.heldout_indices,
}
# Where a data set of the Hugging Face hub keeps its parquet files.
_HUB_FOLDER = "data"


def open_source(
    url: str, *, scratch_dir: str | None = None, scratch_limit_bytes: int = 50 * 2**30
) -> Source:
    """Opens a source of images; lists a few directories or globs at most, reads no image.

    scratch_dir: where a .tar.gz or a parquet file is unpacked (default $REPA_SCRATCH, or
    `repa-scratch-UID` in the machine's temporary folder), at most `scratch_limit_bytes` at a time.
    What `read` needs follows from the url, so a worker may read items that another process
    listed.

    Raises MissingError when nothing is there, DataError when it is unclear what is meant,
    ConfigError or UnknownNameError for a url nobody can open, StoreError when a server fails.
    """
    if url.startswith("embedded:"):
        return EmbeddedSource(url)
    scratch = (scratch_dir or default_scratch_dir(), scratch_limit_bytes)
    is_list = len(split_list(url)) > 1
    if is_list or (names_archives(url) and not Files(*open_filesystem(url)).is_folder()):
        return _open_archives(url, *find_archives(url), *scratch)
    files = Files(*open_filesystem(url))
    tree = FolderTree(files)
    names = archives_of_folder(_top(tree, url), url) or _archives_of_hub(files, tree, url)
    return _open_archives(url, files, names, *scratch) if names else _open_tree(url, tree)


def _open_archives(
    url: str, files: Files, names: list[str], scratch_dir: str, scratch_limit: int
) -> Source:
    kind = archive_kind(names[0])
    if kind == "tar":
        return TarSource(url, files, names, scratch_dir, scratch_limit)
    if kind == "parquet":
        return ParquetSource(url, files, names, scratch_dir, scratch_limit)
    return ZipSource(url, ZipTree(files, names))


def _open_tree(url: str, tree: Tree) -> Source:
    return refset_of(url, tree) or FolderSource(url, tree)


def _top(tree: FolderTree, url: str) -> list[Entry]:
    try:
        return tree.top()
    except FileNotFoundError:
        ends = "a pattern must end in .tar, .tar.gz, .tgz, .parquet or .zip"
        hint = ends if "{" in url else "check the path"
        raise MissingError(f"no image source at '{url}': {hint}") from None
    except NotADirectoryError:
        raise DataError(
            f"'{url}' is a file: expected a folder of images, or archives (.tar, .tar.gz, .tgz, "
            ".parquet, .zip)"
        ) from None


def _archives_of_hub(files: Files, tree: FolderTree, url: str) -> list[str]:
    """Parquet files in `data/`, when nothing else in the folder can be images."""
    top = tree.top()
    if [entry.name for entry in top if entry.is_folder] != [_HUB_FOLDER]:
        return []
    entries = files.entries(_HUB_FOLDER, sizes=False)
    if any(entry.is_folder for entry in entries):
        return []
    names = archives_of_folder(entries, f"{url.rstrip('/')}/{_HUB_FOLDER}")
    return [f"{_HUB_FOLDER}/{name}" for name in names if archive_kind(name) == "parquet"]


class ZipSource:
    """A reference set or class sub-folders in zips, told apart when they are listed.

    A worker that reads what another process listed never asks for the central directory.
    """

    def __init__(self, url: str, tree: ZipTree):
        self.url = url
        self.is_remote = tree.is_remote
        self._tree = tree

    @functools.cached_property
    def _listed(self) -> Source:
        return _open_tree(self.url, self._tree)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the class folders, None for a reference set or images of one class."""
        return self._listed.class_names

    @property
    def remarks(self) -> tuple[str, ...]:
        return self._listed.remarks

    def items(self) -> list[Item]:
        """Every image, sorted by zip then offset; raises what RefSet and FolderSource do."""
        return self._listed.items()

    def read(self, item: Item) -> bytes:
        """The member's bytes, sizes and crc32 checked; raises DamagedError or StoreError."""
        return self._tree.read(item)

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        return self._tree.groups(items)

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        return self._tree.read_group(items)


class EmbeddedSource:
    """scikit-learn's digits: `embedded:digits` to train on, `embedded:digits-heldout` for tests."""

    class_names: tuple[str, ...] | None = tuple(str(digit) for digit in range(10))
    remarks: tuple[str, ...] = ()
    is_remote = False

    def __init__(self, url: str):
        if url not in _EMBEDDED:
            raise UnknownNameError(f"unknown source '{url}': known are {', '.join(_EMBEDDED)}")
        self.url = url

    @functools.cached_property
    def _items(self) -> list[Item]:
        labels = digits.labels()
        return finish_items(
            [
                Item(f"digit-{i:04d}", int(labels[i]), f"digit-{i:04d}.png", -1, len(_png(i)))
                for i in map(int, _EMBEDDED[self.url]())
            ]
        )

    def items(self) -> list[Item]:
        """Every digit of the part, in the order of scikit-learn."""
        return list(self._items)

    def read(self, item: Item) -> bytes:
        """The digit as a PNG file; raises DamagedError when the item is none of ours."""
        number = item.key.removeprefix("digit-")
        if not number.isdecimal():
            raise changed(f"'{item.key}' is no embedded digit")
        return _png(int(number))

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        return [[i] for i in range(len(items))]

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        return [self.read(item) for item in items]


def _png(index: int) -> bytes:
    return digits.digit_png(index)
