"""Names of many archives in one string: brace and glob patterns, lists joined by '::'."""

from __future__ import annotations

import itertools
import re

ARCHIVE_SUFFIXES = {
    "tar": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
    "zip": (".zip",),
}
_GLOB = re.compile(r"[*?\[]")
_INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def archive_kind(name: str) -> str | None:
    """ "tar", "parquet" or "zip" by the end of a name or pattern, else None."""
    lower = name.lower()
    return next((kind for kind, ends in ARCHIVE_SUFFIXES.items() if lower.endswith(ends)), None)


def is_gzipped(name: str) -> bool:
    """Whether a tar's name says that it is compressed."""
    return name.lower().endswith((".gz", ".tgz"))


def is_unpacked(path: str) -> bool:
    """Whether images of this file are read from a copy unpacked into the scratch folder."""
    return path.lower().endswith((".gz", ".tgz", ".parquet"))


def names_archives(url: str) -> bool:
    """Whether a url stands for archives: every part is an archive's name or ends in a wildcard."""
    parts = [name for part in url.split("::") for name in expand_braces(part)]
    names = [part.rpartition("/")[2] for part in parts]
    return all(archive_kind(name) is not None or has_glob(name) for name in names)


def has_glob(pattern: str) -> bool:
    """Whether a pattern has wildcards that need a listing."""
    return _GLOB.search(pattern) is not None


def split_list(url: str) -> list[str]:
    """The parts of a list joined by '::', or the url alone.

    fsspec chains its file systems with '::' too (`simplecache::s3://...`): it is a list of ours
    only if every part is an archive.
    """
    return url.split("::") if names_archives(url) else [url]


def expand_braces(pattern: str) -> list[str]:
    """Expands `{0000..0009}` (the width is kept) and `{a,b}`, nested ones too, in order."""
    braces = next(
        (m for m in _INNERMOST_BRACES.finditer(pattern) if _alternatives(m.group(1))), None
    )
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    expanded = (expand_braces(before + word + after) for word in _alternatives(braces.group(1)))
    return list(dict.fromkeys(itertools.chain.from_iterable(expanded)))


def _alternatives(inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",") if "," in inside else []
    first, last = int(numbers[1]), int(numbers[2])
    padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups())
    width = max(map(len, numbers.groups())) if padded else 1
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def fixed_parent(pattern: str) -> str:
    """The directory part of a path in front of the first component with a wildcard."""
    components = pattern.split("/")[:-1]
    fixed = list(itertools.takewhile(lambda component: not has_glob(component), components))
    return "/".join(fixed)


def common_parent(paths: list[str]) -> str:
    """The deepest directory that holds all the paths or patterns."""
    parents = [fixed_parent(path).split("/") for path in paths]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))
    return "/".join(level[0] for level in levels)
