"""DiT: noise prediction with a learned variance on DDPM's chain (DiT, arXiv 2212.09748).

The trainer's times in [0, 1] become timesteps floor(1000 t).
"""

from __future__ import annotations

from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.ddpm import diffuse, timesteps_of, variational_loss
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.diffusion.losses import denoising_loss
from repa_pipeline.errors import ConfigError
from repa_pipeline.methods.base import Batch, Inputs
from repa_pipeline.methods.trunk import Denoised, TrunkMethod
from repa_pipeline.models import ModelSpec


class DiTMethod(TrunkMethod):
    """One state, the latents; loss = mean squared error of the noise + variational term."""

    family = "dit"

    def __init__(self, config: TrainConfig, model: ModelSpec, inputs: Inputs):
        super().__init__(config, model, inputs)
        if (config.path, config.weighting) != ("linear", "uniform"):
            raise ConfigError(
                f"path {config.path} and weighting {config.weighting} are of SiT: {model.name} has "
                "DDPM's noise levels, evenly drawn; leave --path and --weighting out"
            )

    def denoise(
        self, model: nn.Module, batch: Batch, t: Tensor, noise: States, capture: int | None = None
    ) -> Denoised:
        timesteps, (e,) = timesteps_of(t), noise
        x_t = diffuse(batch.latents, e, timesteps)
        answer, tokens = self.run_trunk(model, x_t, timesteps, batch.cond, capture)
        predicted, v = answer.chunk(2, dim=1)
        losses = {
            "denoising": denoising_loss(predicted, e),
            "variational": variational_loss(batch.latents, e, timesteps, predicted, v),
        }
        return losses, tokens

    def predict_noise(
        self, model: nn.Module, states: States, timesteps: Tensor, cond: Tensor
    ) -> States:
        answer, _ = self.run_trunk(model, states[0], timesteps, cond)
        predicted, v = answer.chunk(2, dim=1)
        return predicted, v
