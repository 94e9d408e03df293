"""The webdataset container: a shard is a tar whose members all have the same size.

Row r of the cache is member `RRRRRRRRR.npy` (nine digits): a ustar header, a .npy header, the
record, zeros up to a multiple of 512. Equal members put record i of a shard at a fixed offset.
Two blocks of zeros end the tar. tarfile, GNU tar and webdataset read it like any other.

The crc32c of what follows a header stands as eight hex digits in the twelve bytes that ustar
leaves unused at the header's end, so a shard can be checked without its seal.
"""

from __future__ import annotations

import math

import google_crc32c
import numpy as np
import numpy.typing as npt

_BLOCK_BYTES = 512
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
    crcs = np.empty(len(records), np.uint32)
    for i, member in enumerate(table):
        member[start : start + size] = np.frombuffer(records[i].tobytes(), np.uint8)
        content = member[_BLOCK_BYTES:].tobytes()
        header = member_header(first_row + i, num_bytes, google_crc32c.value(content))
        member[:_BLOCK_BYTES] = np.frombuffer(header, np.uint8)
        crcs[i] = google_crc32c.extend(google_crc32c.value(header), content)
    return crcs


def check_records(
    table: Table, shape: tuple[int, ...], dtype: str, first_row: int
) -> tuple[npt.NDArray[np.uint32], list[int]]:
    """Checks members uint8 [n, stride]: (crc32c of each, positions of the damaged ones).

    A sound member has, to the bit, the header that belongs to its row and content, and the .npy
    header of this shape and dtype.
    """
    num_bytes, npy = _content_bytes(shape, dtype), npy_header(shape, dtype)
    crcs, damaged = np.empty(len(table), np.uint32), []
    for i, member in enumerate(table):
        header, content = member[:_BLOCK_BYTES].tobytes(), member[_BLOCK_BYTES:].tobytes()
        expected = member_header(first_row + i, num_bytes, google_crc32c.value(content))
        if header != expected or not content.startswith(npy):
            damaged.append(i)
        crcs[i] = google_crc32c.extend(google_crc32c.value(header), content)
    return crcs, damaged


def _content_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return len(npy_header(shape, dtype)) + math.prod(shape) * np.dtype(dtype).itemsize
