"""The webdataset container: a shard is a tar whose members all have the same size.

Row r of the cache is member `RRRRRRRRR.npy` (nine digits): a ustar header, a .npy header, the
record, zeros up to a multiple of 512. Equal members put record i of a shard at a fixed offset.
Two blocks of zeros end the tar. tarfile, GNU tar and webdataset read it like any other.

The crc32c of what follows a header stands as eight hex digits in the twelve bytes that ustar
leaves unused at the header's end, so a shard can be checked without its seal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.checksum import Crcs, crc32c, join

_BLOCK_BYTES = 512
_CRC_AT = 500
END = bytes(2 * _BLOCK_BYTES)

Table = npt.NDArray[np.uint8]


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """Magic, version 1.0, length and header of a C-ordered array (numpy's .npy format).

    Written here because numpy's own padding changed between versions.
    """
    descr = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}".encode()
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def record_offset(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes between the start of a member's header and its record."""
    return _BLOCK_BYTES + len(npy_header(shape, dtype))


def stride(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes from one member to the next."""
    content = _content_bytes(shape, dtype)
    return _BLOCK_BYTES + -(-content // _BLOCK_BYTES) * _BLOCK_BYTES


def member_header(row: int, num_bytes: int, crc: int) -> bytes:
    """512 bytes (POSIX ustar): name, mode 0644, uid, gid and mtime 0, and the content's crc32c."""
    empty = b"".join(
        (
            (b"%09d.npy" % row).ljust(100, b"\0"),
            b"0000644\0" + b"0000000\0" * 2,
            b"%011o\0" % num_bytes + b"00000000000\0",
            b" " * 8 + b"0" + bytes(100) + b"ustar\x0000" + bytes(235),
            b"%08x\0\0\0\0" % crc,
        )
    )
    return empty[:148] + b"%06o\0 " % sum(empty) + empty[156:]


def pack_records(
    table: Table, records: npt.NDArray[np.generic], first_row: int
) -> npt.NDArray[np.uint32]:
    """Fills table uint8 [n, stride] with the members of records [n, ...].

    Returns the crc32c of every member: header, content and padding.
    """
    shape, dtype = records.shape[1:], records.dtype.name
    start, size = record_offset(shape, dtype), math.prod(shape) * records.dtype.itemsize
    table[:, _BLOCK_BYTES:start] = np.frombuffer(npy_header(shape, dtype), np.uint8)
    table[:, start + size :] = 0
    num_bytes = _content_bytes(shape, dtype)
    headers, contents = np.empty((2, len(records)), np.uint32)
    for i, member in enumerate(table):
        record = member[start : start + size].view(records.dtype).reshape(shape)
        np.copyto(record, records[i])
        contents[i] = crc32c(member[_BLOCK_BYTES:])
        header = member_header(first_row + i, num_bytes, int(contents[i]))
        headers[i] = crc32c(header)
        member[:_BLOCK_BYTES] = np.frombuffer(header, np.uint8)
    return join(headers, contents, table.shape[1] - _BLOCK_BYTES)


def check_members(
    heads: Table,
    records: Iterable[Any],
    tails: Table,
    rows: Sequence[int],
    shape: tuple[int, ...],
    dtype: str,
) -> tuple[Crcs, npt.NDArray[np.bool_]]:
    """Checks members in three parts: (crc32c of each whole one, bool: which are sound).

    heads: uint8 [n, record_offset]; records: n contiguous buffers; tails: their padding. A sound
    member has, to the bit, the header that belongs to its row and content, and the .npy header of
    this shape and dtype.
    """
    num_bytes, npy = _content_bytes(shape, dtype), npy_header(shape, dtype)
    start = crc32c(npy)
    headers, contents = np.empty((2, len(rows)), np.uint32)
    sound = np.empty(len(rows), np.bool_)
    for i, (head, record, tail) in enumerate(zip(heads, records, tails, strict=True)):
        has_npy = head[_BLOCK_BYTES:].tobytes() == npy
        before = start if has_npy else crc32c(head[_BLOCK_BYTES:])
        contents[i] = crc32c(tail, crc32c(record, before))
        header = head[:_BLOCK_BYTES].tobytes()
        headers[i] = crc32c(header)
        sound[i] = has_npy and header == member_header(rows[i], num_bytes, int(contents[i]))
    return join(headers, contents, stride(shape, dtype) - _BLOCK_BYTES), sound


def named_crcs(heads: Table, shape: tuple[int, ...], dtype: str) -> Crcs:
    """The crc32c of whole members from their heads, which name that of their content.

    A header that names none gives another value than any sound member's.
    """
    headers, contents = np.empty((2, len(heads)), np.uint32)
    for i, head in enumerate(heads):
        header = head[:_BLOCK_BYTES].tobytes()
        headers[i] = crc32c(header)
        named = header[_CRC_AT : _CRC_AT + 8]
        contents[i] = int(named, 16) if _is_hex(named) else 0
    return join(headers, contents, stride(shape, dtype) - _BLOCK_BYTES)


def _is_hex(text: bytes) -> bool:
    return not text.strip(b"0123456789abcdef")


def _content_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return len(npy_header(shape, dtype)) + math.prod(shape) * np.dtype(dtype).itemsize
