"""A copy of what training changes, taken in one go, so that a thread can write it in peace.

    copies = Snapshots()
    frozen = copies.take(content)    # blocks for one copy off the device; then training may go on

The copies lie in one block of host memory that every further snapshot uses again, pinned where
the tensors come from a CUDA device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


class Snapshots:
    """Takes snapshots, each into the memory of the one before: use one at a time.

    The memory is as large as the largest snapshot: of a training state, model, EMA and the two
    moments of AdamW, 16 bytes a parameter.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._is_for_cuda = self._is_pinned = False

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory held."""
        return self._block.numel()

    def take(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """A deep copy of `content` whose tensors lie on the CPU, valid until the next `take`.

        Tensors that share memory share it in the copy, so that both are saved as equal bytes.
        Returns when everything is copied: the originals may be changed.
        """
        tensors = list(_tensors_in(content))
        storages = {_key(tensor): tensor.untyped_storage() for tensor in tensors}
        on_cuda = [s.device for s in storages.values() if s.device.type == "cuda"]
        self._reserve(sum(_aligned(s.nbytes()) for s in storages.values()), bool(on_cuda))
        copies = self._copy(storages)
        for device in set(on_cuda):
            torch.cuda.current_stream(device).synchronize()
        # deepcopy takes what the memo holds for a tensor, and copies the containers around it.
        memo: dict[int, Any] = {id(t): _view_like(t, copies[_key(t)]) for t in tensors}
        return copy.deepcopy(dict(content), memo)

    def close(self) -> None:
        """Gives the memory back."""
        if self._is_pinned:
            _cudart().cudaHostUnregister(self._block.data_ptr())
        self._block = torch.empty(0, dtype=torch.uint8)
        self._is_for_cuda = self._is_pinned = False

    def _reserve(self, num_bytes: int, for_cuda: bool) -> None:
        if num_bytes <= self.num_bytes and self._is_for_cuda >= for_cuda:
            return
        self.close()
        self._block = torch.empty(num_bytes, dtype=torch.uint8)
        self._is_for_cuda = for_cuda
        if for_cuda and num_bytes:
            # Registered as it is: torch's own pinned memory comes in powers of two. Where the
            # system refuses, the copies are right and slower.
            status = _cudart().cudaHostRegister(self._block.data_ptr(), num_bytes, 0)
            self._is_pinned = int(status) == 0

    def _copy(self, storages: Mapping[Any, torch.UntypedStorage]) -> dict[Any, Tensor]:
        """Every storage in its place of the block, as a flat uint8 tensor of its own storage."""
        block: Any = self._block.numpy()
        start = 0
        copies = {}
        for key, storage in storages.items():
            count = storage.nbytes()
            target = torch.empty(0, dtype=torch.uint8)
            if count:
                target = torch.frombuffer(block, dtype=torch.uint8, count=count, offset=start)
                flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
                target.copy_(flat.set_(storage), non_blocking=True)
            copies[key] = target
            start += _aligned(count)
        return copies


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _tensors_in(inner)


def _key(tensor: Tensor) -> tuple[str, int, int]:
    """What tensors that share memory have in common."""
    storage = tensor.untyped_storage()
    return str(storage.device), storage.data_ptr(), storage.nbytes()


def _view_like(tensor: Tensor, flat: Tensor) -> Tensor:
    view = torch.empty(0, dtype=tensor.dtype)
    place = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return view.set_(flat.untyped_storage(), *place)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
