"""Exponential moving average of a module's parameters: what is sampled and evaluated."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from repa_pipeline.errors import MismatchError


class Ema:
    """A frozen copy of a module that follows it: `average = decay * average + (1 - decay) * new`.

    `module` is the averaged copy itself (eval mode, no gradients), ready for a forward pass.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999):
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards `module`'s parameters; its buffers are copied.

        Parameters are matched by name and must have the average's dtype and device. Raises
        MismatchError when the names differ.
        """
        average, new = dict(self.module.named_parameters()), dict(module.named_parameters())
        if average.keys() != new.keys():
            raise MismatchError(
                f"the averaged module has {len(average)} parameters and the given one {len(new)}, "
                "by other names: give update() the module that Ema was made from"
            )
        torch._foreach_lerp_(
            list(average.values()), [new[name].detach() for name in average], 1.0 - self.decay
        )
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)

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
