"""Networks with random weights, for probes and benchmarks: speed does not depend on the values.

Beside a loader `load` its module has a `build` (beside `load_x` a `build_x`) that makes the network
on a device without its weights: `build(spec, resolution, device)` of an encoder, `build(spec,
device)` of an autoencoder. Both kinds of network use this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from repa_pipeline.errors import MissingError
from repa_pipeline.tables import resolve
from repa_pipeline.weights import load_config, resolve_weights

SEED = 0
RANDOM = "random"  # in place of the sha256 of a weights file


def find_build(loader: str) -> Callable[..., Any] | None:
    """The `build` beside the function that `loader` ("module:function") names; None without one."""
    module, _, function = loader.partition(":")
    try:
        found: Callable[..., Any] = resolve(f"{module}:{function.replace('load', 'build', 1)}")
    except AttributeError:
        return None
    return found if "load" in function else None


def build_random(build: Callable[[str], nn.Module], device: torch.device) -> nn.Module:
    """`build(device)` with seeded random weights; the state of torch's generators is kept."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        network = build(str(device))
    fill_randomly(network)
    return network


@torch.no_grad()
def fill_randomly(network: nn.Module, seed: int = SEED) -> None:
    """Seeded weights that keep activations finite: uniform of variance 1 / fan-in for matrices
    and kernels, 0 for biases, 1 for the other vectors (scales of norms and layers)."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0 if name.endswith("bias") else 1)
            continue
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        limit = math.sqrt(3 * parameter.shape[0] / parameter.numel())
        parameter.uniform_(-limit, limit, generator=generators[device])


def local_config(kind: str, name: str, weights: str | None) -> Mapping[str, Any]:
    """The `config` in the metadata of an entry's local weights file.

    Raises MissingError when the entry names no file, or the file has no `config`.
    """
    if weights is None:
        raise MissingError(unbuildable(kind, name, "its table entry has no `config`"))
    config = load_config(resolve_weights(kind, name, weights, None, "", None))
    if not config:
        raise MissingError(unbuildable(kind, name, f"{weights} has no metadata `config`"))
    return config


def unbuildable(kind: str, name: str, why: str) -> str:
    """What to say of a network that cannot be had without its weights."""
    return (
        f"{kind} '{name}' cannot be built without its weights ({why}): set `[{kind}s.{name}] "
        f'weights = "PATH"` in repa.toml, or give its rate where a rate is wanted'
    )
