"""The vanilla twin: a SiT trained on the velocity alone (SiT, arXiv 2401.08740)."""

from __future__ import annotations

from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.interpolant import PATHS, States, interpolate
from repa_pipeline.diffusion.losses import denoising_loss
from repa_pipeline.methods.base import Batch, Inputs
from repa_pipeline.methods.trunk import Denoised, TrunkMethod
from repa_pipeline.models import ModelSpec


class SiTMethod(TrunkMethod):
    """One state, the latents; loss = mean squared error of the velocity."""

    family = "sit"

    def __init__(self, config: TrainConfig, model: ModelSpec, inputs: Inputs):
        super().__init__(config, model, inputs)
        self.path = PATHS[config.path]

    def denoise(
        self, model: nn.Module, batch: Batch, t: Tensor, noise: States, capture: int | None = None
    ) -> Denoised:
        (x_t,), target = interpolate(self.path, self.states(batch), noise, t)
        velocity, tokens = self.run_trunk(model, x_t, t, batch.cond, capture)
        return {"denoising": denoising_loss((velocity,), target)}, tokens

    def velocity(self, model: nn.Module, states: States, t: Tensor, cond: Tensor) -> States:
        return (self.run_trunk(model, states[0], t, cond)[0],)
