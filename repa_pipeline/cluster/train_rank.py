"""A rank of a run as Ray Train starts it: it finds its place, and runs what every rank runs.

Imported in workers, and in the driver once Ray's environment is set (session.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.util import get_node_ip_address

from repa_pipeline import __version__
from repa_pipeline.cluster.actors import Failure, failure
from repa_pipeline.cluster.board import ToldLines, ToldProgress
from repa_pipeline.cluster.carry import Source, install
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import ConfigError, RepaError

LISTEN_EVERY_S = 1.0

# (settings, where progress goes, whether to save and end after this step) -> exit code.
RankFunction = Callable[[TrainConfig, Progress | None, Callable[[], bool]], int]


@dataclasses.dataclass(frozen=True)
class RankSpec:
    """What every rank is given.

    folder is its working folder where it exists, must_see what must exist on its machine.
    """

    function: RankFunction
    config: TrainConfig
    board: Any
    version: str
    folder: str
    modules: Mapping[str, Source]
    must_see: tuple[str, ...] = ()


class RankFailed(Exception):
    """A rank ended with an error; `ends_run` when starting it again could not help."""

    def __init__(self, failed: Failure, ends_run: bool):
        super().__init__(failed, ends_run)
        self.failed, self.ends_run = failed, ends_run

    def __str__(self) -> str:
        return f"{type(self.failed.error).__name__}: {self.failed.error}"


def ends_run(error: BaseException) -> bool:
    """Whether an error would come again: the user's to mend, or a bug.

    Torch raises RuntimeError for a lost peer, a broken device and its own misuse alike.
    """
    import torch

    if isinstance(error, RepaError | torch.OutOfMemoryError):
        return True
    return not isinstance(error, RuntimeError | OSError)


def run_rank(given: Mapping[str, Any]) -> int:
    """One rank, from its start to its exit code; raises RankFailed."""
    spec: RankSpec = given["spec"]
    # Relative paths of the settings are the driver's; on other machines it may not exist.
    with contextlib.suppress(OSError):
        os.chdir(spec.folder)
    try:
        _check_machine(spec)
        install(spec.modules)
        _take_place()
        with _telling(spec.board) as progress, _listening(spec.board) as asked:
            return spec.function(spec.config, progress, asked)
    except Exception as error:
        raise RankFailed(failure(error), ends_run(error)) from None


def _check_machine(spec: RankSpec) -> None:
    """Raises ConfigError for another version, or a disk that others do not share."""
    host = socket.gethostname()
    if __version__ != spec.version:
        raise ConfigError(
            f"the worker on {host} has repa_pipeline {__version__}, the driver {spec.version}: "
            "install the same version on every node"
        )
    for path in spec.must_see:
        if not os.path.exists(path):
            raise ConfigError(
                f"the worker on {host} does not see {os.path.dirname(path)}: runs must be in a "
                "folder that all nodes share (--workspace, --runs-dir), or give --checkpoints URL"
            )


def _take_place() -> None:
    """Sets the variables that torch.distributed reads, as torchrun does."""
    context = ray.train.get_context()
    with socket.socket() as free:
        free.bind(("", 0))
        address = get_node_ip_address(), free.getsockname()[1]  # type: ignore[no-untyped-call]
    host, port = broadcast_from_rank_zero(address)
    device = ray.train.torch.get_device()
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        # A rank's device is that of its local number; Ray has its own way of giving them out.
        LOCAL_RANK=str(device.index or 0 if device.type == "cuda" else context.get_local_rank()),
    )


@contextlib.contextmanager
def _telling(board: Any) -> Iterator[Progress | None]:
    """Inside, what rank 0 prints goes to the board; the value is its progress."""
    context = ray.train.get_context()
    if context.get_world_rank():
        yield None
        return
    board.tell.remote("ranks", context.get_world_size())
    with (
        contextlib.redirect_stdout(ToldLines(board, "out")),
        contextlib.redirect_stderr(ToldLines(board, "err")),
    ):
        yield ToldProgress(board)


@contextlib.contextmanager
def _listening(board: Any) -> Iterator[Callable[[], bool]]:
    """Inside, the value says whether the driver, or a node that will go away, asks to end."""
    asked = threading.Event()
    over = threading.Event()

    def listen() -> None:
        # The group ends while this waits for an answer: then nobody needs one.
        with contextlib.suppress(RayError, RuntimeError):
            while not over.wait(LISTEN_EVERY_S) and not asked.is_set():
                # The second of them waits for all ranks, which is why it is not for the loop.
                if ray.get(board.is_asked_to_end.remote()) or ray.train.get_preemption_info():
                    asked.set()

    threading.Thread(target=listen, name="listen", daemon=True).start()
    try:
        yield asked.is_set
    finally:
        over.set()
