"""The alignment heads of PROJECTORS: tokens of the trunk to the width of a teacher."""

from __future__ import annotations

from torch import Tensor, nn

PROJECTOR_WIDTH = 2048


def build_projector(
    width: int, projector_width: int = PROJECTOR_WIDTH, teacher_width: int = 768
) -> nn.Sequential:
    """A three-layer MLP with SiLU between, [..., width] -> [..., teacher_width] (REPA, 3.2).

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


def build_mlp(
    *, width: int, teacher_width: int, grid: tuple[int, int], hidden_width: int
) -> nn.Module:
    """The loader of the entry `mlp`."""
    return build_projector(width, hidden_width, teacher_width)


class ConvProjector(nn.Conv2d):
    """One 3x3 convolution over the token grid, [B, T, width] -> [B, T, teacher_width].

    The projector of iREPA (arXiv 2512.10794), zero-padded; it starts as torch's convolutions do.
    `hidden_width` is the MLP's and means nothing here.
    """

    def __init__(self, *, width: int, teacher_width: int, grid: tuple[int, int], hidden_width: int):
        super().__init__(width, teacher_width, kernel_size=3, padding=1)
        self.grid = grid

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        maps = tokens_BTD.transpose(1, 2).reshape(len(tokens_BTD), -1, *self.grid)
        return super().forward(maps).flatten(2).transpose(1, 2)
