"""What an aligned method is put together from, as tables of data: importing it needs no torch.

PROJECTORS: from the trunk's tokens to a teacher's width. TARGETS: what the teacher's tokens are
turned into first. OBJECTIVES: how the two are compared. SCHEDULES: lambda over the steps. A new one
is a function and one entry, here or in a plugin's table of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.tables import Table


@dataclass(frozen=True)
class ProjectorSpec:
    """An alignment head; the loader is called with width, teacher_width, grid (of the trunk) and
    hidden_width (--projector-width), and gives a module [B, T, width] -> [B, T, teacher_width]."""

    name: str
    loader: str


@dataclass(frozen=True)
class TargetSpec:
    """A target: the function takes tokens [B, T, D] to targets of the same shape.

    needs: what of a token it needs, of "direction" and "magnitude".
    """

    name: str
    function: str
    needs: frozenset[str]


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective: the function takes (projected, target, temperature), the first two [B, T, D],
    to what is minimised, float32 [B], a value of each sample alone.

    needs: what of a target's token it needs, of "direction" and "magnitude".
    """

    name: str
    function: str
    needs: frozenset[str]


_DIRECTION = frozenset({"direction"})
_BOTH = frozenset({"direction", "magnitude"})

PROJECTORS: Table[ProjectorSpec] = Table(
    "projector",
    [
        ProjectorSpec("mlp", "repa_pipeline.models.projector:build_mlp"),
        ProjectorSpec("conv", "repa_pipeline.models.projector:ConvProjector"),
    ],
)

TARGETS: Table[TargetSpec] = Table(
    "target",
    [
        TargetSpec("tokens", "repa_pipeline.diffusion.targets:plain_tokens", _DIRECTION),
        TargetSpec("spatial-norm", "repa_pipeline.diffusion.targets:spatial_normalise", _BOTH),
    ],
)

OBJECTIVES: Table[ObjectiveSpec] = Table(
    "objective",
    [
        ObjectiveSpec("cosine", "repa_pipeline.diffusion.losses:cosine_alignment", _DIRECTION),
        ObjectiveSpec("nt-xent", "repa_pipeline.diffusion.losses:nt_xent_alignment", _DIRECTION),
    ],
)

# The share of lambda at each share of --align-steps.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda passed: 1.0,
    "linear": lambda passed: 1.0 - passed,
    "cosine": lambda passed: 0.5 * (1.0 + math.cos(math.pi * passed)),
}


def needs_of_parts(config: TrainConfig) -> dict[str, frozenset[str]]:
    """What each chosen part needs of a stored token, by what a user calls the part."""
    needs = {
        f"the {config.align_objective} objective": OBJECTIVES[config.align_objective].needs,
        f"the {config.align_target} target": TARGETS[config.align_target].needs,
    }
    if config.align_resize == "pool":
        needs["a mean of tokens (--align-resize pool)"] = _BOTH
    return needs


def align_weight(config: TrainConfig, step: int) -> float:
    """lambda at optimiser step `step`, counted from 0."""
    passed = min(step / config.align_steps, 1.0) if config.align_steps else 0.0
    return config.align_coeff * SCHEDULES[config.align_schedule](passed)
