"""The fixed-record shard: a zarr v3 shard object that is also readable by plain offsets.

Record i of a shard lies at i * (record_bytes + 4), its crc32c (little endian) behind it. At the
end stands zarr's shard index: (offset, length) as two uint64 a record, then the crc32c of the
index. A short last shard has 2**64 - 1 in the entries of the records it does not hold.
"""

from __future__ import annotations

import dataclasses
import math

import google_crc32c
import numpy as np
import numpy.typing as npt

from repa_pipeline.errors import DamagedError

_CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """Shape and dtype of one row, and how many rows a full shard holds."""

    shape: tuple[int, ...]
    dtype: str
    shard_rows: int

    @property
    def record_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def stride(self) -> int:
        return self.record_bytes + _CRC_BYTES

    def shard_bytes(self, num_rows: int) -> int:
        """Bytes of a shard object that holds `num_rows` rows."""
        return num_rows * self.stride + self.shard_rows * 16 + _CRC_BYTES

    def num_shards(self, num_rows: int) -> int:
        return -(-num_rows // self.shard_rows)

    def rows_of(self, shard: int, num_rows: int) -> int:
        """Rows held by shard `shard` of an array with `num_rows` rows."""
        return min(self.shard_rows, num_rows - shard * self.shard_rows)


def pack_shard(records: npt.NDArray[np.generic], layout: RecordLayout) -> bytearray:
    """Builds a shard object from its rows.

    records: [n, *layout.shape] of layout.dtype, 1 <= n <= layout.shard_rows.
    """
    num_rows = len(records)
    if records.shape[1:] != layout.shape or records.dtype != np.dtype(layout.dtype):
        raise ValueError(f"records {records.shape} {records.dtype} do not fit {layout}")
    body = num_rows * layout.stride
    shard = bytearray(layout.shard_bytes(num_rows))
    table = np.frombuffer(shard, np.uint8, body).reshape(num_rows, layout.stride)
    payload = np.ascontiguousarray(records).view(np.uint8).reshape(num_rows, -1)
    table[:, : layout.record_bytes] = payload
    crcs = np.array([_crc(row) for row in payload], "<u4")
    table[:, layout.record_bytes :] = crcs.view(np.uint8).reshape(num_rows, _CRC_BYTES)
    index = _index_bytes(num_rows, layout)
    shard[body : body + len(index)] = index
    shard[body + len(index) :] = google_crc32c.value(index).to_bytes(_CRC_BYTES, "little")
    return shard


def read_records(
    shard: memoryview | bytes | bytearray, num_rows: int, layout: RecordLayout, where: str
) -> npt.NDArray[np.uint8]:
    """Checks every byte of a shard and gives a view of its records, without a copy.

    Returns uint8 [num_rows, record_bytes]; row i is record i. Raises DamagedError naming `where`
    and the first damaged record for a wrong length, checksum or index.
    """
    expected = layout.shard_bytes(num_rows)
    if len(shard) != expected:
        raise DamagedError(
            f"{where} is truncated or foreign: got {len(shard)} bytes, expected {expected}; "
            "remove it and run the encoding command again"
        )
    body = num_rows * layout.stride
    table = np.frombuffer(shard, np.uint8, body).reshape(num_rows, layout.stride)
    stored = np.ascontiguousarray(table[:, layout.record_bytes :]).view("<u4")[:, 0]
    for row in range(num_rows):
        if _crc(table[row, : layout.record_bytes]) != int(stored[row]):
            raise DamagedError(
                f"{where}: record {row} fails its crc32c checksum; "
                "remove the file and run the encoding command again"
            )
    index = bytes(memoryview(shard)[body : expected - _CRC_BYTES])
    tail = int.from_bytes(memoryview(shard)[expected - _CRC_BYTES :], "little")
    if index != _index_bytes(num_rows, layout) or google_crc32c.value(index) != tail:
        raise DamagedError(
            f"{where}: the shard index is damaged; remove the file and run the "
            "encoding command again"
        )
    return table[:, : layout.record_bytes]


def as_rows(records: npt.NDArray[np.uint8], layout: RecordLayout) -> npt.NDArray[np.generic]:
    """Copies uint8 [n, record_bytes] into a contiguous [n, *shape] of the layout's dtype."""
    flat = np.ascontiguousarray(records).view(np.dtype(layout.dtype))
    return flat.reshape(len(records), *layout.shape)


def _index_bytes(num_rows: int, layout: RecordLayout) -> bytes:
    index = np.full((layout.shard_rows, 2), _ABSENT, "<u8")
    index[:num_rows, 0] = np.arange(num_rows, dtype=np.uint64) * np.uint64(layout.stride)
    index[:num_rows, 1] = layout.stride
    return index.tobytes()


def _crc(record: npt.NDArray[np.uint8]) -> int:
    # The library takes bytes alone; the copy costs a tenth of the checksum.
    return int(google_crc32c.value(record.tobytes()))
