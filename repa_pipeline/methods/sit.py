"""The vanilla twin: a SiT trained on the velocity alone (SiT, arXiv 2401.08740)."""

from __future__ import annotations

from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.interpolant import PATHS, States, interpolate
from repa_pipeline.diffusion.losses import denoising_loss
from repa_pipeline.methods.base import Batch, Inputs, Phase
from repa_pipeline.models import ModelSpec, build_model


class SiTMethod:
    """One state, the latents; loss = mean squared error of the velocity."""

    def __init__(self, config: TrainConfig, model: ModelSpec, inputs: Inputs):
        self.config = config
        self.model = model
        self.inputs = inputs
        self.path = PATHS[config.path]

    @property
    def null_label(self) -> int:
        return self.inputs.num_classes

    def build(self) -> nn.Module:
        return nn.ModuleDict({"trunk": self.build_trunk()})

    def build_trunk(self) -> nn.Module:
        """The transformer itself."""
        return build_model(
            self.model,
            input_size=self.inputs.latent_size,
            in_channels=self.inputs.latent_channels,
            num_classes=self.inputs.num_classes,
            qk_norm=self.config.qk_norm,
        )

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        size = self.inputs.latent_size
        return ((self.inputs.latent_channels, size, size),)

    def states(self, batch: Batch) -> States:
        return (batch.latents,)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(),)

    def loss(
        self, model: nn.Module, ema: nn.Module, batch: Batch, t: Tensor, noise: States
    ) -> dict[str, Tensor]:
        (x_t,), target = interpolate(self.path, self.states(batch), noise, t)
        velocity = model.get_submodule("trunk")(x_t, t, batch.cond)
        denoising = denoising_loss((velocity,), target)
        return {"loss": denoising.mean(), "denoising": denoising}

    def velocity(self, model: nn.Module, states: States, t: Tensor, cond: Tensor) -> States:
        return (model.get_submodule("trunk")(states[0], t, cond),)
