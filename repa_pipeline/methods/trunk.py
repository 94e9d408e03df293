"""What the methods of SiT and DiT share: one state, the latents, and a transformer of MODELS."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.errors import ConfigError
from repa_pipeline.methods import METHODS, auto_method
from repa_pipeline.methods.base import Batch, Inputs, Phase
from repa_pipeline.models import ModelSpec, build_model

# losses of each sample by name, all minimised; the tokens that were asked for
Denoised = tuple[dict[str, Tensor], Tensor | None]


class TrunkMethod:
    """A method whose subclass says how it denoises (`denoise`), and answers a sampler."""

    family: ClassVar[str]

    def __init__(self, config: TrainConfig, model: ModelSpec, inputs: Inputs):
        self.config = config
        self.model = model
        self.inputs = inputs
        known = {spec.family for spec in METHODS.values()}
        if model.family != self.family and model.family in known:
            fitting = auto_method(model.family, aligned=bool(inputs.features))
            raise ConfigError(
                f"model {model.name} is no {self.family}: train it with --method {fitting}"
            )

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

    def denoise(
        self, model: nn.Module, batch: Batch, t: Tensor, noise: States, capture: int | None = None
    ) -> Denoised:
        """Losses [B] of each sample by name, and the tokens after block `capture` where asked."""
        raise NotImplementedError

    def loss(
        self, model: nn.Module, ema: nn.Module, batch: Batch, t: Tensor, noise: States
    ) -> dict[str, Tensor]:
        losses, _ = self.denoise(model, batch, t, noise)
        return {"loss": mean_sum(losses), **losses}

    def run_trunk(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: Tensor, capture: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The trunk's answer, and the tokens after block `capture` where asked."""
        trunk = model.get_submodule("trunk")
        if capture is None:
            return trunk(x, t, cond), None
        answer, tokens = trunk(x, t, cond, capture=capture)
        return answer, tokens


def mean_sum(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the means of losses [B]: a scalar."""
    return torch.stack([values.mean() for values in losses.values()]).sum()
