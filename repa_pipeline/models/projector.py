"""The alignment head: tokens of the trunk to the width of a teacher (REPA, section 3.2)."""

from __future__ import annotations

from torch import nn

PROJECTOR_WIDTH = 2048


def build_projector(
    width: int, projector_width: int = PROJECTOR_WIDTH, teacher_width: int = 768
) -> nn.Sequential:
    """A three-layer MLP with SiLU between, [..., width] -> [..., teacher_width].

    Linear layers sit at keys 0, 2 and 4, as in the reference's checkpoints, and start as the
    trunk's do: Xavier uniform weights, zero biases.
    """
    projector = nn.Sequential(
        nn.Linear(width, projector_width),
        nn.SiLU(),
        nn.Linear(projector_width, projector_width),
        nn.SiLU(),
        nn.Linear(projector_width, teacher_width),
    )
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return projector
