"""Stored bytes to the device, beside what the device computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Upload:
    """Arrays of one step after another -> tensors on `device`, for CUDA on a stream of its own.

    The arrays given in a call may be overwritten from the end of the next call on. On the CPU the
    tensors share the arrays' memory.
    """

    def __init__(self, device: str):
        self._device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        self._previous: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def __call__(self, arrays: Sequence[npt.NDArray[np.generic]]) -> tuple[Tensor, ...]:
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        if self._stream is None:
            return tensors
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        computing.wait_event(done)
        for copy in copies:
            copy.record_stream(computing)
        # Copies wait for nothing that is computed, so this one is over long before.
        if self._previous is not None:
            self._previous.synchronize()
        self._previous = done
        return copies
