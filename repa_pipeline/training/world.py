"""Which of how many ranks this process is, and what ranks tell each other.

A rank is started by `repa train` itself (training/launch.py), by torchrun or by Ray Train; all
three set the variables that torch.distributed reads. Without them a run is one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from repa_pipeline.device import choose_device
from repa_pipeline.errors import ConfigError

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclasses.dataclass(frozen=True)
class World:
    """A rank among `size` ranks; collectives do nothing where it is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; `tensor` is left alone."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def share(self, value: T) -> T:
        """Rank 0's value, a plain one, on every rank."""
        if self.size == 1:
            return value
        held: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(held, src=0)
        shared: T = held[0]
        return shared

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            self.sum(torch.zeros(1))


def world_of_environment() -> World:
    """What the starter of this process says of it; raises ConfigError for half of it."""
    given = [os.environ.get(name) for name in _VARIABLES]
    if given[1] is None:
        return World()
    try:
        rank, size, local_rank = (int(value or "") for value in given)
    except ValueError as error:
        said = ", ".join(f"{n}={v}" for n, v in zip(_VARIABLES, given, strict=True))
        raise ConfigError(
            f"the environment says {said}: expected three numbers, as torchrun sets them; unset "
            "WORLD_SIZE to train with one process"
        ) from error
    return World(rank, size, local_rank)


def rank_device(name: str) -> str:
    """Settles a --device value for this process: a rank has the CUDA device of its local number.

    Raises ConfigError for a device that this machine does not have.
    """
    world, device = world_of_environment(), choose_device(name)
    if world.size > 1 and device == "cuda":
        return choose_device(f"cuda:{world.local_rank}")
    return device


@contextlib.contextmanager
def joined(device: str) -> Iterator[World]:
    """Inside, the ranks of `world_of_environment` can reach each other.

    gloo carries CPU tensors, NCCL those of CUDA devices. A process group that the starter has made
    (Ray Train) is used and left.
    """
    world = world_of_environment()
    if world.size == 1 or dist.is_initialized():
        yield world
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def is_restarted_by_others() -> bool:
    """Whether this process is a rank whose starter may have started and ended one before it."""
    return "WORLD_SIZE" in os.environ


def never() -> bool:
    """No notice, ever."""
    return False


class Stopping:
    """Asks all ranks to stop together when one of them gets SIGTERM or a notice; on `with`.

    `asked()` must be called once a step by every rank. Ranks agree without waiting for each other:
    what one says at a step is known to all at the next.
    """

    def __init__(self, world: World, notice: Callable[[], bool] = never):
        self._world = world
        self._notice = notice
        self._came = False
        self._before: Any = None
        self._pending: tuple[Any, Tensor] | None = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._pending is not None and error is None:
            self._pending[0].wait()

    def ask(self) -> None:
        """As SIGTERM does."""
        self._came = True

    def heard(self) -> bool:
        """Whether this rank was asked, whatever the others know."""
        if not self._came and self._notice():
            self.ask()
        return self._came

    def asked(self) -> bool:
        """Whether to stop after this step."""
        came = self.heard()
        if self._world.size == 1:
            return came
        agreed = False
        if self._pending is not None:
            work, told = self._pending
            work.wait()
            agreed = bool(told.item())
        told = torch.tensor([came], dtype=torch.int32)
        self._pending = dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True), told
        return agreed

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
