"""REPA: denoising plus alignment with a frozen teacher (arXiv 2410.06940, section 3).

The tokens after block `align_depth` go through a projector for each teacher; the loss is
denoising + lambda * (minus the mean cosine similarity with the teacher's tokens).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.codec import require
from repa_pipeline.diffusion.interpolant import States, interpolate
from repa_pipeline.diffusion.losses import alignment_per_sample, denoising_loss
from repa_pipeline.encoders import ENCODERS
from repa_pipeline.errors import ConfigError, MismatchError
from repa_pipeline.methods.base import Batch, FeatureInfo, Inputs, Phase
from repa_pipeline.methods.sit import SiTMethod
from repa_pipeline.models import ModelSpec
from repa_pipeline.models.projector import build_projector


class RepaMethod(SiTMethod):
    """SiT with one projector a teacher; the projectors do not run while sampling."""

    def __init__(self, config: TrainConfig, model: ModelSpec, inputs: Inputs):
        super().__init__(config, model, inputs)
        if not inputs.features:
            raise ConfigError("method repa needs a teacher: cache one, or train --method sit")
        self.depth = config.align_depth or model.align_depth
        if self.depth > model.depth:
            raise ConfigError(
                f"align_depth {self.depth} is beyond the {model.depth} blocks of "
                f"{model.name}: use a smaller --align-depth"
            )
        self.grid = model.grid(inputs.latent_size)
        for feature in inputs.features:
            self._check(feature)

    def build(self) -> nn.Module:
        # The trunk first: the vanilla twin of the same seed then starts from the same weights.
        trunk = self.build_trunk()
        widths = [feature.width for feature in self.inputs.features]
        projectors = nn.ModuleList(
            build_projector(self.model.width, self.config.projector_width, width)
            for width in widths
        )
        return nn.ModuleDict({"trunk": trunk, "projectors": projectors})

    def phases(self) -> tuple[Phase, ...]:
        aligned = Phase(uses_features=True)
        if not self.config.align_steps:
            return (aligned,)
        return (aligned, Phase(self.config.align_steps, idle=("projectors",)))

    def loss(
        self, model: nn.Module, ema: nn.Module, batch: Batch, t: Tensor, noise: States
    ) -> dict[str, Tensor]:
        if not batch.features:
            return super().loss(model, ema, batch, t, noise)
        (x_t,), target = interpolate(self.path, self.states(batch), noise, t)
        trunk, projectors = model.get_submodule("trunk"), model.get_submodule("projectors")
        velocity, tokens_BTD = trunk(x_t, t, batch.cond, capture=self.depth)
        denoising = denoising_loss((velocity,), target)
        projected = [project(tokens_BTD) for project in projectors.children()]
        targets = [
            pool_tokens(tokens, info.grid, self.grid)
            for tokens, info in zip(batch.features, self.inputs.features, strict=True)
        ]
        alignment = alignment_per_sample(projected, targets)
        total = denoising.mean() + self.config.align_coeff * alignment.mean()
        return {"loss": total, "denoising": denoising, "alignment": alignment}

    def _check(self, feature: FeatureInfo) -> None:
        stored = f"the codec of {feature.name}"
        require(feature.preserves, frozenset({"direction"}), "the cosine objective", stored)
        if feature.grid == self.grid:
            return
        multiple = all(a % b == 0 for a, b in zip(feature.grid, self.grid, strict=True))
        if multiple and self.config.align_resize == "pool":
            return
        advice = "or use --align-resize pool" if multiple else "or another --model"
        raise MismatchError(
            f"{feature.name} has a token grid of {_size(feature.grid)}, {self.model.name} has "
            f"{_size(self.grid)}: use an encoder that fits "
            f"({', '.join(self._fitting()) or 'none in the table'}), {advice}"
        )

    def _fitting(self) -> list[str]:
        names = []
        for name, spec in ENCODERS.items():
            try:
                fits = spec.grid(self.inputs.resolution) == self.grid
            except ConfigError:
                fits = False
            if fits:
                names.append(name)
        return names


def pool_tokens(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Average-pools tokens [B, T, D] of `grid` to the grid `to`, which divides it."""
    if grid == to:
        return tokens
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    pooled = F.avg_pool2d(maps, (grid[0] // to[0], grid[1] // to[1]))
    return pooled.flatten(2).transpose(1, 2)


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
