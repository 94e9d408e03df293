"""Exponential moving averages of a module's parameters: what is sampled and evaluated."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from repa_pipeline.errors import MismatchError

# Values that one group of tensors has at least: few kernel calls, little memory beside.
_GROUP_VALUES = 2**22


class Ema:
    """A frozen copy of a module that follows it: `average += (1 - decay) * (new - average)`.

    `module` is the averaged copy itself (eval mode, no gradients), ready for a forward pass.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999):
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def update(self, module: nn.Module) -> None:
        """Moves the average towards `module`; see `update_averages`."""
        update_averages([self], module)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged state, by the module's own names."""
        return dict(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what state_dict() gave; every name must match."""
        self.module.load_state_dict(state)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into `module`, whose names must match."""
        module.load_state_dict(self.module.state_dict())


@torch.no_grad()
def update_averages(
    averages: Sequence[Ema], module: nn.Module, advance: Tensor | None = None
) -> None:
    """Moves all averages of `module` towards its parameters, many tensors a kernel.

    Buffers are copied. advance: a scalar on the device, 1 to move and 0 to stay, so that nobody
    waits for the device to learn which; None moves. Parameters are matched by name and must have
    the averages' dtype and device. Raises MismatchError when the names differ.
    """
    new = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for average in averages:
        own = dict(average.module.named_parameters())
        if own.keys() != new.keys():
            raise MismatchError(
                f"the averaged module has {len(own)} parameters and the given one {len(new)}, "
                "by other names: give the module that Ema was made from"
            )
        weight: Tensor | float = 1.0 - average.decay
        if advance is not None:
            weight = advance * weight
        for group in _groups(own):
            _move([own[name] for name in group], [new[name] for name in group], weight)
        for kept, other in zip(average.module.buffers(), module.buffers(), strict=True):
            kept.copy_(other)


def _move(averages: list[Tensor], new: list[Tensor], weight: Tensor | float) -> None:
    """average += weight * (new - average): exactly still where they are equal."""
    if averages[0].device.type == "cpu":
        # There memory is what takes the time, not the kernels' number: read and written once.
        for average, other in zip(averages, new, strict=True):
            average.lerp_(other, weight)
        return
    steps = torch._foreach_sub(new, averages)
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(averages, steps)


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The names in order, cut where a group has enough values."""
    group: list[str] = []
    num_values = 0
    for name, tensor in tensors.items():
        group.append(name)
        num_values += tensor.numel()
        if num_values >= _GROUP_VALUES:
            yield group
            group, num_values = [], 0
    if group:
        yield group
