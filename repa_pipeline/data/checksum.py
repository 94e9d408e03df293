"""crc32c, the checksum of records: of any buffer, without a copy or the interpreter's lock."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c as _crc32c

Crcs = npt.NDArray[np.uint32]
_ZEROS_BYTES = 2**20


def crc32c(data: Any, value: int = 0) -> int:
    """The crc32c of a contiguous buffer; with `value` of what that is the crc32c of, then data."""
    return _crc32c(data, value)


def join(first: Crcs, second: Crcs, second_bytes: int) -> Crcs:
    """The crc32c of a + b from those of a and of b; b has `second_bytes` bytes."""
    bits = (first[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    moved = np.bitwise_xor.reduce(np.where(bits == 1, _columns(second_bytes), 0), axis=1)
    joined: Crcs = moved.astype(np.uint32) ^ second
    return joined


@functools.lru_cache(maxsize=64)
def _columns(num_bytes: int) -> Crcs:
    """uint32 [32]: what each bit of a crc32c becomes when `num_bytes` follow; that is linear."""
    still = _after_zeros(0, num_bytes)
    return np.array([_after_zeros(1 << bit, num_bytes) ^ still for bit in range(32)], np.uint32)


def _after_zeros(value: int, num_bytes: int) -> int:
    zeros = bytes(min(num_bytes, _ZEROS_BYTES))
    while num_bytes:
        count = min(num_bytes, len(zeros))
        value = _crc32c(zeros[:count], value)
        num_bytes -= count
    return value
