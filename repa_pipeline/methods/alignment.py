"""Alignment with frozen teachers, for any method of a trunk (REPA, arXiv 2410.06940, section 3).

The tokens after block `align_depth` go through a projector for each teacher; lambda times the
objective between them and the teachers' tokens, averaged over the teachers, is added to the loss.
Put in front of a method's class: `class RepaMethod(Aligned, SiTMethod)`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.codec import require
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.diffusion.targets import pool_tokens
from repa_pipeline.encoders import ENCODERS
from repa_pipeline.errors import ConfigError, MismatchError
from repa_pipeline.methods.base import Batch, FeatureInfo, Inputs, Phase
from repa_pipeline.methods.parts import (
    OBJECTIVES,
    PROJECTORS,
    TARGETS,
    align_weight,
    needs_of_parts,
)
from repa_pipeline.methods.trunk import TrunkMethod, mean_sum
from repa_pipeline.models import ModelSpec
from repa_pipeline.tables import resolve


class Aligned(TrunkMethod):
    """One projector a teacher; the projectors do not run while sampling.

    name, twin: the method's name, and that of the one without a teacher.
    """

    name: ClassVar[str]
    twin: ClassVar[str]

    def __init__(self, config: TrainConfig, model: ModelSpec, inputs: Inputs):
        super().__init__(config, model, inputs)
        if not inputs.features:
            raise ConfigError(
                f"method {self.name} needs a teacher: cache one, or train --method {self.twin}"
            )
        self.depth = config.align_depth or model.align_depth
        if self.depth > model.depth:
            raise ConfigError(
                f"align_depth {self.depth} is beyond the {model.depth} blocks of "
                f"{model.name}: use a smaller --align-depth"
            )
        if config.align_schedule != "constant" and not config.align_steps:
            raise ConfigError(
                f"align_schedule {config.align_schedule} falls to 0 at a step that was not given: "
                "say it with --align-steps"
            )
        self.grid = model.grid(inputs.latent_size)
        self.target = resolve(TARGETS[config.align_target].function)
        self.objective = resolve(OBJECTIVES[config.align_objective].function)
        for feature in inputs.features:
            self._check(feature)

    def build(self) -> nn.Module:
        # The trunk first: the vanilla twin of the same seed then starts from the same weights.
        trunk = self.build_trunk()
        projectors = nn.ModuleList(
            resolve(PROJECTORS[self.config.projector].loader)(
                width=self.model.width,
                teacher_width=feature.width,
                grid=self.grid,
                hidden_width=self.config.projector_width,
            )
            for feature in self.inputs.features
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
        losses, tokens_BTD = self.denoise(model, batch, t, noise, capture=self.depth)
        each = {}
        heads = model.get_submodule("projectors").children()
        for info, head, stored in zip(self.inputs.features, heads, batch.features, strict=True):
            target = self.target(pool_tokens(stored, info.grid, self.grid))
            projected, temperature = head(tokens_BTD), self.config.align_temperature
            each[info.name] = self.objective(projected, target, temperature)
        alignment = torch.stack(list(each.values())).mean(dim=0)
        total = mean_sum(losses) + align_weight(self.config, batch.step) * alignment.mean()
        values = {"loss": total, **losses, "alignment": alignment}
        if len(each) > 1:
            values |= {f"alignment/{name}": value for name, value in each.items()}
        return values

    def _check(self, feature: FeatureInfo) -> None:
        for part, needs in needs_of_parts(self.config).items():
            require(feature.preserves, needs, part, f"the codec of {feature.name}")
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


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
