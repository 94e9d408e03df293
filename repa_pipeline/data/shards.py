"""The fixed-record shard: record i lies at a fixed offset and has a checksum of its own.

Container "zarr": a zarr v3 shard object. Record i lies at i * (record_bytes + 4), its crc32c
(little endian) behind it. At the end stands zarr's shard index: (offset, length) as two uint64 a
record, then the crc32c of the index. A short last shard has 2**64 - 1 in the entries of the
records it does not hold. Container "webdataset": a tar (data/tarshards.py).

The digest of a shard, "rows-crc32c:HEX", is the sha256 of its records' checksums.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data import tarshards
from repa_pipeline.data.checksum import Crcs, crc32c
from repa_pipeline.errors import DamagedError, UnknownNameError

CONTAINERS = ("zarr", "webdataset")
DIGEST = "rows-crc32c:"
REPAIR = "run `repa repair`"
_CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)
_MOST_ROWS_NAMED = 8

Buffer = memoryview | bytes | bytearray
Table = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """Shape and dtype of one row, how many rows a full shard holds, and the shard's container."""

    shape: tuple[int, ...]
    dtype: str
    shard_rows: int
    container: str = "zarr"

    def __post_init__(self) -> None:
        if self.container not in CONTAINERS:
            raise UnknownNameError(
                f"unknown container {self.container!r}: this package knows {', '.join(CONTAINERS)}"
            )

    @property
    def record_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def record_offset(self) -> int:
        """Bytes from i * stride to record i."""
        if self.container == "zarr":
            return 0
        return tarshards.record_offset(self.shape, self.dtype)

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        if self.container == "zarr":
            return self.record_bytes + _CRC_BYTES
        return tarshards.stride(self.shape, self.dtype)

    @property
    def tail_bytes(self) -> int:
        """Bytes behind a record that belong to it: its checksum, or a tar's padding."""
        return self.stride - self.record_offset - self.record_bytes

    def end(self, num_rows: int) -> bytes:
        """What stands behind the last record of a shard of `num_rows` rows."""
        return _zarr_index(num_rows, self) if self.container == "zarr" else tarshards.END

    def shard_bytes(self, num_rows: int) -> int:
        """Bytes of a shard object that holds `num_rows` rows."""
        zarr_end = self.shard_rows * 16 + _CRC_BYTES
        end = zarr_end if self.container == "zarr" else len(tarshards.END)
        return num_rows * self.stride + end

    def num_shards(self, num_rows: int) -> int:
        return -(-num_rows // self.shard_rows)

    def rows_of(self, shard: int, num_rows: int) -> int:
        """Rows held by shard `shard` of an array with `num_rows` rows."""
        return min(self.shard_rows, num_rows - shard * self.shard_rows)


def pack_shard(
    records: npt.NDArray[np.generic], layout: RecordLayout, first_row: int = 0
) -> bytearray:
    """A shard object in fresh memory; arguments as for `pack_into`."""
    shard = bytearray(layout.shard_bytes(len(records)))
    pack_into(memoryview(shard), records, layout, first_row)
    return shard


def pack_into(
    shard: memoryview, records: npt.NDArray[np.generic], layout: RecordLayout, first_row: int = 0
) -> str:
    """Builds a shard object from its rows in `shard`, all of whose bytes it sets.

    shard: layout.shard_bytes(n) writable bytes. records: [n, *layout.shape] of layout.dtype, in
    any memory order, 1 <= n <= layout.shard_rows; the first is row `first_row` of the array.
    Returns the shard's digest.
    """
    if records.shape[1:] != layout.shape or records.dtype != np.dtype(layout.dtype):
        raise ValueError(f"records {records.shape} {records.dtype} do not fit {layout}")
    table, end = _split(shard, len(records), layout)
    if layout.container == "webdataset":
        crcs = tarshards.pack_records(table, records, first_row)
    else:
        crcs = _pack_zarr_records(table, records)
    shard[table.size :] = end
    return digest_of(crcs)


def check_shard(
    shard: Buffer,
    num_rows: int,
    layout: RecordLayout,
    where: str,
    first_row: int = 0,
    advice: str = REPAIR,
) -> tuple[Table, str]:
    """Checks every byte of a shard: (its records, its digest).

    Returns uint8 [num_rows, record_bytes], a view of `shard`, row i being record i. Raises
    DamagedError naming `where`, the damaged rows (counted from `first_row`) and `advice` for a
    wrong length, checksum or index.
    """
    expected = layout.shard_bytes(num_rows)
    if len(shard) != expected:
        raise DamagedError(
            f"{where} is truncated or foreign: got {len(shard)} bytes, expected {expected}; "
            f"{advice}"
        )
    table, end = _split(shard, num_rows, layout)
    rows = range(first_row, first_row + num_rows)
    heads, records, tails = split_records(table, layout)
    crcs, damaged = check_records(layout, rows, heads, records, tails)
    check_sound(layout, damaged, bytes(memoryview(shard)[table.size :]) == end, where, advice)
    return records, digest_of(crcs)


def split_records(table: Table, layout: RecordLayout) -> tuple[Table, Table, Table]:
    """Views of table uint8 [n, stride]: what stands before each record, records, and behind."""
    start, stop = layout.record_offset, layout.record_offset + layout.record_bytes
    return table[:, :start], table[:, start:stop], table[:, stop:]


def check_records(
    layout: RecordLayout, rows: Sequence[int], heads: Table, records: Iterable[Any], tails: Table
) -> tuple[Crcs, list[int]]:
    """Checks records, wherever they lie: (crc32c of each, rows of the damaged ones).

    heads, tails: uint8 [n, ...], what stands before and behind each record in its shard;
    records: n contiguous buffers; rows: which they are. The crc32c are those that make a digest.
    """
    if layout.container == "webdataset":
        crcs, sound = tarshards.check_members(
            heads, records, tails, rows, layout.shape, layout.dtype
        )
    else:
        crcs = np.fromiter(map(crc32c, records), np.uint32, len(rows))
        sound = crcs == _stored_crcs(tails)
    return crcs, [rows[i] for i in np.flatnonzero(~sound).tolist()]


def unread_crcs(layout: RecordLayout, heads: Table, tails: Table) -> Crcs:
    """The crc32c that `check_records` would find for sound records, without reading them."""
    if layout.container == "webdataset":
        return tarshards.named_crcs(heads, layout.shape, layout.dtype)
    return _stored_crcs(tails)


def check_sound(
    layout: RecordLayout, damaged: Sequence[int], is_end_sound: bool, where: str, advice: str
) -> None:
    """Raises DamagedError naming damaged rows, or the end of a shard."""
    if damaged:
        raise DamagedError(f"{where}: {_name_rows(damaged)} crc32c checksum; {advice}")
    if not is_end_sound:
        what = "shard index" if layout.container == "zarr" else "end of the tar"
        raise DamagedError(f"{where}: the {what} is damaged; {advice}")


def read_records(
    shard: Buffer, num_rows: int, layout: RecordLayout, where: str, first_row: int = 0
) -> Table:
    """The records of a shard, checked: uint8 [num_rows, record_bytes]; see `check_shard`."""
    return check_shard(shard, num_rows, layout, where, first_row)[0]


def as_rows(records: Table, layout: RecordLayout) -> npt.NDArray[np.generic]:
    """Copies uint8 [n, record_bytes] into a contiguous [n, *shape] of the layout's dtype."""
    # Not ascontiguousarray, which leaves a single record where it lies: in the reader's buffer.
    flat = np.array(records, order="C").view(np.dtype(layout.dtype))
    return flat.reshape(len(records), *layout.shape)


def _split(shard: Buffer, num_rows: int, layout: RecordLayout) -> tuple[Table, bytes]:
    """The records' part of a shard as uint8 [num_rows, stride], and what must stand behind it."""
    body = num_rows * layout.stride
    table = np.frombuffer(shard, np.uint8, body).reshape(num_rows, layout.stride)
    return table, layout.end(num_rows)


def _pack_zarr_records(table: Table, records: npt.NDArray[np.generic]) -> Crcs:
    crcs = np.empty(len(records), "<u4")
    for i, place in enumerate(table):
        # From any memory order; its checksum is taken while it is in the processor's cache.
        record = place[:-_CRC_BYTES]
        np.copyto(record.view(records.dtype).reshape(records.shape[1:]), records[i])
        crcs[i] = crc32c(record)
    table[:, -_CRC_BYTES:] = crcs.view(np.uint8).reshape(-1, _CRC_BYTES)
    return crcs


def _stored_crcs(tails: Table) -> Crcs:
    return np.ascontiguousarray(tails).view("<u4")[:, 0]


def _zarr_index(num_rows: int, layout: RecordLayout) -> bytes:
    entries = np.full((layout.shard_rows, 2), _ABSENT, "<u8")
    entries[:num_rows, 0] = np.arange(num_rows, dtype=np.uint64) * np.uint64(layout.stride)
    entries[:num_rows, 1] = layout.stride
    index = entries.tobytes()
    return index + int(crc32c(index)).to_bytes(_CRC_BYTES, "little")


def digest_of(crcs: Crcs) -> str:
    """A shard's digest from the crc32c of all its records."""
    return DIGEST + hashlib.sha256(crcs.astype("<u4").tobytes()).hexdigest()


def _name_rows(rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]} fails its"
    more = len(rows) - _MOST_ROWS_NAMED
    named = ", ".join(str(row) for row in rows[:_MOST_ROWS_NAMED])
    return f"rows {named}{f' and {more} more' if more > 0 else ''} fail their"
