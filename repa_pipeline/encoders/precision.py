"""How a frozen network computes: in float32 or bf16, compiled or not. For autoencoders too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from repa_pipeline.errors import ConfigError

FLOAT32, BF16 = "float32", "bf16"
DTYPES = (FLOAT32, BF16)

P = ParamSpec("P")
R = TypeVar("R")


def check_dtype(dtype: str) -> str:
    """`dtype` itself; raises ConfigError when it is not one of DTYPES."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is '{dtype}': expected {' or '.join(DTYPES)}")
    return dtype


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """The context a network runs in: bf16 autocast, or nothing at all for float32."""
    if dtype == FLOAT32:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def compiled(function: Callable[P, R], wanted: bool) -> Callable[P, R]:
    """`function`, through torch.compile when wanted: built at its first call, for each shape."""
    return torch.compile(function, dynamic=False) if wanted else function
