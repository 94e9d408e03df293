"""The archives (tars, parquet files, zips) that a url or a folder stands for."""

from __future__ import annotations

import re
from typing import Any

from repa_pipeline.data.files import Entry, Files
from repa_pipeline.data.items import is_image_name
from repa_pipeline.data.patterns import (
    ARCHIVE_SUFFIXES,
    archive_kind,
    common_parent,
    expand_braces,
    has_glob,
    split_list,
)
from repa_pipeline.data.remote import in_parallel, open_filesystem, retried
from repa_pipeline.errors import ConfigError, DataError, MissingError

# Hugging Face's folders of images may describe them in a parquet file beside.
_METADATA_NAME = "metadata.parquet"
_SPLIT = re.compile(r"(.+?)-\d+-of-\d+|(train|training|validation|valid|val|test|dev)(?![a-z])")


def find_archives(url: str) -> tuple[Files, list[str]]:
    """The archives that a single name, a brace or glob pattern, or a '::' list of these stands for.

    Returns their file system, rooted at the deepest directory in front of all wildcards, and
    their names below it, all of one kind. Raises MissingError when a name or pattern matches
    nothing, DataError when an archive is named twice or they are of several kinds, ConfigError
    when the parts are on different file systems.
    """
    parts = [name for part in split_list(url) for name in expand_braces(part)]
    opened = [open_filesystem(part) for part in parts]
    filesystem = opened[0][0]
    if any(type(other) is not type(filesystem) for other, _ in opened):
        raise ConfigError(f"the parts of '{url}' are on different file systems: use one at a time")
    patterns = [path for _, path in opened]
    files = Files(filesystem, common_parent(patterns))
    matches = in_parallel(lambda pattern: _match(filesystem, files, pattern), patterns)
    paths = [path for match in matches for path in match]
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"{archive_kind(path)} {path} is named twice by '{url}': name it once")
        seen.add(path)
    _check_one_kind(paths, url)
    return files, [files.name(path) for path in paths]


def archives_of_folder(top: list[Entry], url: str) -> list[str]:
    """The archives directly in a folder, when they are what it holds, else [].

    Zips beside images or folders are passed over. Raises DataError when the folder holds tars or
    parquet files beside images or folders, several kinds, or parquet files of several splits.
    """
    names = [e.name for e in top if not e.is_folder and archive_kind(e.name)]
    others = [e.name for e in top if e.is_folder or is_image_name(e.name)]
    if others:
        names = [n for n in names if archive_kind(n) != "zip" and n != _METADATA_NAME]
    if not names:
        return []
    kind = _check_one_kind(names, url)
    if others:
        suffix = next(s for s in ARCHIVE_SUFFIXES[kind] if names[0].lower().endswith(s))
        raise DataError(
            f"'{url}' holds {_plural(kind)} ('{names[0]}') beside images or folders "
            f"('{others[0]}'): name the {_plural(kind)} by a pattern "
            f"('{url.rstrip('/')}/*{suffix}') or move them"
        )
    if kind == "parquet":
        _check_one_split(names, url)
    return names


def _check_one_kind(names: list[str], url: str) -> str:
    first_of_kind = {archive_kind(name) or "": name for name in reversed(names)}
    if len(first_of_kind) > 1:
        found = ", ".join(f"'{name}'" for name in sorted(first_of_kind.values()))
        raise DataError(f"'{url}' holds several kinds of archives ({found}): name one of them")
    return next(iter(first_of_kind))


def _check_one_split(names: list[str], url: str) -> None:
    first_of_split: dict[str, str] = {}
    for name in names:
        match = _SPLIT.match(name)
        first_of_split.setdefault("" if match is None else match[1] or match[2], name)
    if len(first_of_split) > 1:
        found = ", ".join(f"'{name}'" for name in first_of_split.values())
        split = "train" if "train" in first_of_split else next(filter(None, first_of_split))
        raise DataError(
            f"'{url}' holds several splits ({found}): name one by a pattern "
            f"('{url.rstrip('/')}/{split}-*.parquet')"
        )


def _match(filesystem: Any, files: Files, pattern: str) -> list[str]:
    if files.is_file(files.name(pattern)):
        return [pattern]
    found: list[str] = []
    if has_glob(pattern):
        globbed = retried(f"listing {pattern}", lambda: filesystem.glob(pattern, detail=True))
        found = sorted(p for p, info in globbed.items() if info["type"] == "file")
    found = [path for path in found if archive_kind(path)]
    if not found:
        kind = archive_kind(pattern) or "tar, parquet file or zip"
        raise MissingError(f"no {kind} at '{pattern}': check the path or pattern, or copy the data")
    return found


def _plural(kind: str) -> str:
    return "parquet files" if kind == "parquet" else f"{kind}s"
