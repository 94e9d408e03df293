"""Where images come from: a folder, webdataset tars, or the embedded digits.

open_source("train/")                          class sub-folders, or images of one class
open_source("shards/")                         a directory of .tar, .tar.gz, .tgz
open_source("train-{0000..0009}.tar.gz")       braces, globs, one tar, lists joined by '::'
open_source("s3://bucket/train-*.tar")         any of these on a file system fsspec knows
open_source("embedded:digits")                 no files at all
"""

from __future__ import annotations

import functools

from repa_pipeline.data import digits
from repa_pipeline.data.files import Entry, Files, changed, open_filesystem
from repa_pipeline.data.folder import FolderSource
from repa_pipeline.data.items import Item, Source, finish_items, is_image_name, num_classes
from repa_pipeline.data.patterns import TAR_SUFFIXES, is_tar_name, names_tars, split_list
from repa_pipeline.data.scratch import default_scratch_dir
from repa_pipeline.data.tars import TarSource, find_tars
from repa_pipeline.errors import DataError, MissingError, UnknownNameError

__all__ = ["Item", "Source", "num_classes", "open_source"]

_EMBEDDED = {
    "embedded:digits": digits.train_indices,
    "embedded:digits-heldout": digits.heldout_indices,
}


def open_source(
    url: str, *, scratch_dir: str | None = None, scratch_limit_bytes: int = 50 * 2**30
) -> Source:
    """Opens a source of images; lists at most one directory or glob, reads no image.

    scratch_dir: where a .tar.gz is unpacked (default $REPA_SCRATCH, or `repa-scratch` in the
    machine's temporary folder), at most `scratch_limit_bytes` at a time. What `read` needs
    follows from the url, so a worker may read items that another process listed.

    Raises MissingError when nothing is there, DataError when it is unclear what is meant,
    ConfigError or UnknownNameError for a url nobody can open.
    """
    if url.startswith("embedded:"):
        return EmbeddedSource(url)
    scratch = (scratch_dir or default_scratch_dir(), scratch_limit_bytes)
    is_list = len(split_list(url)) > 1
    if is_list or ((names_tars(url) or is_tar_name(url)) and not _is_folder(url)):
        return TarSource(url, *find_tars(url), *scratch)
    files = Files(*open_filesystem(url))
    top = _entries(files, url)
    names = _tars_of_folder(top, url)
    return TarSource(url, files, names, *scratch) if names else FolderSource(url, files, top)


def _is_folder(url: str) -> bool:
    filesystem, path = open_filesystem(url)
    return bool(filesystem.isdir(path))


def _entries(files: Files, url: str) -> list[Entry]:
    try:
        return files.entries(sizes=False)
    except FileNotFoundError:
        hint = "a pattern must end in .tar, .tar.gz or .tgz" if "{" in url else "check the path"
        raise MissingError(f"no image source at '{url}': {hint}") from None
    except NotADirectoryError:
        raise DataError(
            f"'{url}' is a file: expected a folder of images, or tars (.tar, .tar.gz, .tgz)"
        ) from None


def _tars_of_folder(top: list[Entry], url: str) -> list[str]:
    tars = [entry.name for entry in top if not entry.is_folder and is_tar_name(entry.name)]
    others = [e.name for e in top if e.is_folder or is_image_name(e.name)]
    if tars and others:
        suffix = next(suffix for suffix in TAR_SUFFIXES if tars[0].lower().endswith(suffix))
        raise DataError(
            f"'{url}' holds tars ('{tars[0]}') beside images or folders ('{others[0]}'): "
            f"name the tars by a pattern ('{url.rstrip('/')}/*{suffix}') or move them"
        )
    return tars


class EmbeddedSource:
    """scikit-learn's digits: `embedded:digits` to train on, `embedded:digits-heldout` for tests."""

    class_names: tuple[str, ...] | None = tuple(str(digit) for digit in range(10))
    remarks: tuple[str, ...] = ()

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


def _png(index: int) -> bytes:
    return digits.digit_png(index)
