"""Byte ranges that lie close together in one remote file are asked for in one request.

A request costs about as much time as the transfer of 1 MiB, so a smaller gap is read and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from repa_pipeline.data.items import Item, Source
from repa_pipeline.data.patterns import is_unpacked

MAX_GAP_BYTES = 2**20
MAX_REQUEST_BYTES = 16 * 2**20


class Extent(NamedTuple):
    """Bytes start..stop of a file."""

    path: str
    start: int
    stop: int


def coalesce(extents: Sequence[Extent | None]) -> list[list[int]]:
    """Positions of the extents that one request reads, every position exactly once.

    Extents of one file are joined over gaps of at most MAX_GAP_BYTES into requests of at most
    MAX_REQUEST_BYTES (a longer extent is a request of its own); None stays alone. Groups are in
    the order of their first position, positions in the order of the bytes.
    """
    ranges = sorted((extent, i) for i, extent in enumerate(extents) if extent is not None)
    groups = [[i] for i, extent in enumerate(extents) if extent is None]
    current: Extent | None = None
    for extent, i in ranges:
        if current is not None and _fits(current, extent):
            groups[-1].append(i)
            current = current._replace(stop=max(current.stop, extent.stop))
        else:
            groups.append([i])
            current = extent
    return sorted(groups, key=min)


def read_extents(fetch: Callable[[int, int], bytes], extents: Sequence[Extent]) -> list[bytes]:
    """The bytes of extents of one file by a single `fetch(start, num_bytes)`.

    Where the file ends early, and `fetch` bears that, the pieces are short.
    """
    start = min(extent.start for extent in extents)
    data = memoryview(fetch(start, max(extent.stop for extent in extents) - start))
    return [bytes(data[extent.start - start : extent.stop - start]) for extent in extents]


def count_gets(source: Source, items: Sequence[Item]) -> int:
    """Requests for bytes when `items` are read together once; 0 for a local source.

    A file that is unpacked is downloaded whole, counted as requests of MAX_REQUEST_BYTES of its
    unpacked size.
    """
    if not source.is_remote:
        return 0
    unpacked: dict[str, int] = {}
    ranged = []
    for item in items:
        if is_unpacked(item.path):
            end = item.offset + item.num_bytes
            unpacked[item.path] = max(unpacked.get(item.path, 1), end)
        else:
            ranged.append(item)
    downloads = sum(-(-end // MAX_REQUEST_BYTES) for end in unpacked.values())
    return len(source.groups(ranged)) + downloads


def _fits(current: Extent, extent: Extent) -> bool:
    return (
        extent.path == current.path
        and extent.start - current.stop <= MAX_GAP_BYTES
        and max(extent.stop, current.stop) - current.start <= MAX_REQUEST_BYTES
    )
