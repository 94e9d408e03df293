"""Choosing where and with how many threads to compute."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from repa_pipeline.errors import ConfigError


def choose_device(name: str) -> str:
    """Settles a --device value; raises ConfigError for one this machine does not have."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device: got '{name}', expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got '{name}', expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu"
        )
    return name


def prepare_compute(threads: int, tf32: bool = False) -> None:
    """Sets the CPU compute threads (0: OMP_NUM_THREADS, else all cores) and switches TF32 off.

    float32 means float32: TF32 would change samples and scores without a word; it is on where
    `tf32` asks for it.
    """
    import torch

    torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or cpu_count())
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    _keep_freed_memory()


# glibc's malloc.h, mallopt(3): what is above a size is mapped by itself; how much more than it
# needs a heap takes; how much of it may lie free before it shrinks. Any of them, once set, stops
# glibc from adapting the first, so all are.
_MALLOC = {-3: 32 * 2**20, -2: 64 * 2**20, -1: 256 * 2**20}


def _keep_freed_memory() -> None:
    """Lets threads other than the main one keep what tensors give back.

    By default each of their heaps shrinks at once and grows again with the next tensor: on the CPU
    a tenth of a small model's time went into page faults. Elsewhere than on glibc nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option, value in _MALLOC.items():
            library.mallopt(option, value)


@contextlib.contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Inside, matrix products and convolutions of float32 are float32's or TF32's; afterwards what
    they were before."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
