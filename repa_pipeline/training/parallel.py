"""The loss as a module of its own, so that DDP sees the forward pass; what is compiled of it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.methods.base import Batch, Method
from repa_pipeline.training.world import World


class StepLoss(nn.Module):
    """`method.loss` of `model`; the averaged copy is no part of it."""

    def __init__(self, method: Method, model: nn.Module, ema: nn.Module):
        super().__init__()
        self.model = model
        self._fixed = (method, ema)

    def forward(self, batch: Batch, t: Tensor, noise: States) -> dict[str, Tensor]:
        method, ema = self._fixed
        return method.loss(self.model, ema, batch, t, noise)


def shared_loss(
    method: Method, model: nn.Module, ema: nn.Module, world: World, accumulates: bool
) -> nn.Module:
    """(batch, t, noise) -> losses; gradients are averaged over the ranks on the way back.

    Parameters without `requires_grad` are not waited for: make it anew when that changes.
    accumulates: whether any rank takes several micro-batches a step.
    """
    loss = StepLoss(method, model, ema)
    if world.size == 1:
        return loss
    # A static graph is learnt on the first way back, which must then be shared.
    return DistributedDataParallel(loss, static_graph=not accumulates, gradient_as_bucket_view=True)


def gradients_shared(loss: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Inside, a way back hands gradients to the other ranks, or with `now` False keeps them."""
    if now or not isinstance(loss, DistributedDataParallel):
        return contextlib.nullcontext()
    return loss.no_sync()


def prepare_blocks(config: TrainConfig, model: nn.Module, compile: bool) -> None:
    """Compiles the trunk's blocks one by one, all from one code, and sets what they recompute.

    The parts keep their names and parameters.
    """
    for _, module in model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = config.gradient_checkpointing
    if compile:
        compile_blocks(model)


def compile_blocks(model: nn.Module, dynamic: bool | None = None) -> None:
    """Compiles every block of a trunk, all from one code; dynamic False: for each shape anew."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == "blocks":
            for block in module:
                block.compile(dynamic=dynamic)
