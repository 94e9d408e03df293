"""Memory of batches that is used again and again; page-locked on request."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.errors import StageError
from repa_pipeline.text import size

_ALIGN = 64


class Buffers:
    """uint8 [rows, record_bytes] for each array of a batch, in one piece of memory of their own.

    With `pin` it is page-locked for the current CUDA device. Raises StageError when the system
    does not allow that much.
    """

    def __init__(self, rows: int, record_bytes: Sequence[int], pin: bool = False):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        sizes = [-(-rows * width // _ALIGN) * _ALIGN for width in record_bytes]
        memory = mmap.mmap(-1, max(_ALIGN, sum(sizes)), flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        parts, start = [], 0
        for width, num_bytes in zip(record_bytes, sizes, strict=True):
            flat = (
                np.frombuffer(memory, np.uint8, rows * width, start) if rows else np.empty(0, "u1")
            )
            parts.append(flat.reshape(rows, width))
            start += num_bytes
        self.parts: tuple[npt.NDArray[np.uint8], ...] = tuple(parts)
        self._lock = _PageLock(memory) if pin else None

    def close(self) -> None:
        if self._lock:
            self._lock.end()
            self._lock = None


class _PageLock:
    """Page-locked memory: a CUDA device copies from it on its own."""

    def __init__(self, memory: mmap.mmap):
        import torch

        self._cuda: Any = torch.cuda  # its Python part has no types
        self._runtime = self._cuda.cudart()
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        error = int(self._runtime.cudaHostRegister(self._address, len(memory), 0))
        if error:
            raise StageError(
                f"the system does not lock {size(len(memory))} more of memory for the reader "
                f"(CUDA error {error}): raise `ulimit -l`, or give a smaller --read-ahead-gb"
            )

    def end(self) -> None:
        self._cuda.synchronize()  # a copy from it may be under way
        self._runtime.cudaHostUnregister(self._address)
