"""Records of a shard straight to where they are wanted, each checked on the way.

From a file: a `preadv` puts a run of records into their places, and their checksums are computed
while they are still in the core's own cache. A record is copied once, by the system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.array import SealedArray
from repa_pipeline.data.checksum import Crcs
from repa_pipeline.data.shards import (
    Table,
    check_records,
    check_sound,
    digest_of,
    split_records,
    unread_crcs,
)

_RUN_BYTES = 2**20
_MOST_PIECES = 512  # of one call; systems take 1024

Place = npt.NDArray[np.uint8]


class Wanted:
    """The records that are wanted of a shard, and the memory that each goes to.

    records: int64 [n] ascending, positions in the shard; places: n contiguous uint8
    [record_bytes]. The checksums of all the shard's records are collected, so that a shard which
    is sound in itself and not the sealed one is found.
    """

    def __init__(
        self,
        array: SealedArray,
        shard: int,
        records: npt.NDArray[np.int64],
        places: Sequence[Place],
    ):
        self.array = array
        self.shard = shard
        self.records = records
        self.places = places
        self.num_rows, self._first_row = array.rows_of(shard)
        self._crcs: Crcs = np.zeros(self.num_rows, np.uint32)

    def from_file(self, fd: int, start: int, stop: int) -> int:
        """Reads records start..stop of the open shard; returns the bytes read.

        Of those that are not wanted only the stored checksums are read. Raises DamagedError
        naming the damaged rows, or for a file that ends early.
        """
        layout = self.array.spec.layout
        low, high = np.searchsorted(self.records, (start, stop)).tolist()
        pieces = 1 + bool(layout.record_offset) + bool(layout.tail_bytes)
        most = max(1, min(_RUN_BYTES // layout.stride, _MOST_PIECES // pieces))
        num_bytes, damaged = 0, []
        for a, b in _runs(self.records, low, high, most):
            first, places = int(self.records[a]), self.places[a:b]
            heads = np.empty((b - a, layout.record_offset), np.uint8)
            tails = np.empty((b - a, layout.tail_bytes), np.uint8)
            parts = [part for trio in zip(heads, places, tails, strict=True) for part in trio]
            self._fill(fd, [part for part in parts if len(part)], first * layout.stride)
            num_bytes += (b - a) * layout.stride
            damaged += self._check(first, heads, places, tails)
        self._check_sound(damaged)
        others = np.setdiff1d(np.arange(start, stop), self.records[low:high], assume_unique=True)
        return num_bytes + self._look_at(fd, others)

    def from_memory(self, data: memoryview, start: int, stop: int) -> None:
        """As `from_file`, of the bytes of records start..stop, all of which are checked."""
        layout = self.array.spec.layout
        low, high = np.searchsorted(self.records, (start, stop)).tolist()
        table = np.frombuffer(data, np.uint8).reshape(stop - start, layout.stride)
        heads, records, tails = split_records(table, layout)
        self._check_sound(self._check(start, heads, list(records), tails))
        for k in range(low, high):
            np.copyto(self.places[k], records[self.records[k] - start])

    def check_end(self, end: bytes) -> None:
        """Checks what stands behind the records, and that the shard is the sealed one.

        Raises DamagedError; every record must have been read.
        """
        self._check_sound([], end == self.array.spec.layout.end(self.num_rows))
        self.array.check_digest(self.shard, digest_of(self._crcs))

    def _check(self, first: int, heads: Table, records: Sequence[Place], tails: Table) -> list[int]:
        row = self._first_row + first
        crcs, damaged = check_records(
            self.array.spec.layout, range(row, row + len(records)), heads, records, tails
        )
        self._crcs[first : first + len(records)] = crcs
        return damaged

    def _look_at(self, fd: int, records: npt.NDArray[np.int64]) -> int:
        """Takes the stored checksums of records that are not wanted; returns the bytes read."""
        layout = self.array.spec.layout
        heads = np.empty((len(records), layout.record_offset), np.uint8)
        tails = np.empty((len(records), layout.tail_bytes), np.uint8)
        # A tar's header names the checksum of what follows it, so that its padding is not needed.
        blocks, offset = (heads, 0) if layout.record_offset else (tails, layout.record_bytes)
        for block, record in zip(blocks, records.tolist(), strict=True):
            self._fill(fd, [block], record * layout.stride + offset)
        self._crcs[records] = unread_crcs(layout, heads, tails)
        return blocks.size

    def _fill(self, fd: int, parts: list[Any], offset: int) -> None:
        wanted = sum(map(len, parts))
        while got := os.preadv(fd, parts, offset):
            if got == wanted:
                return
            # Some network file systems stop early.
            wanted, offset = wanted - got, offset + got
            while got >= len(parts[0]):
                got -= len(parts.pop(0))
            parts[0] = parts[0][got:]
        raise self.array.truncated(self.shard, offset)

    def _check_sound(self, damaged: Sequence[int], is_end_sound: bool = True) -> None:
        spec = self.array.spec
        where = self.array.where_of(self.shard)
        check_sound(spec.layout, damaged, is_end_sound, where, spec.advice)


def _runs(
    records: npt.NDArray[np.int64], low: int, high: int, most: int
) -> Iterator[tuple[int, int]]:
    """Cuts low..high where records do not follow each other, and into runs of at most `most`."""
    gaps = np.flatnonzero(np.diff(records[low:high]) != 1) + 1 + low
    bounds = [low, *gaps.tolist(), high]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        for a in range(start, stop, most):
            yield a, min(a + most, stop)
