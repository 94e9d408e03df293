"""What is done to a teacher's tokens before the trunk is aligned with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# iREPA (arXiv 2512.10794), spatial normalisation of the target
GAMMA = 0.6
_EPSILON = 1e-6


def plain_tokens(tokens: Tensor) -> Tensor:
    """The tokens [B, T, D] themselves, as in REPA."""
    return tokens


def spatial_normalise(tokens: Tensor) -> Tensor:
    """(z - 0.6 mean_T) / (std_T + 1e-6) of tokens [B, T, D], mean and std over an image's tokens.

    What all tokens of an image share is mostly taken off, so that what differs from place to
    place is aligned (iREPA, arXiv 2512.10794). Needs the tokens' length, not their direction alone.
    """
    std, mean = torch.std_mean(tokens, 1, correction=0, keepdim=True)
    return (tokens - GAMMA * mean) / (std + _EPSILON)


def pool_tokens(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Average-pools tokens [B, T, D] of `grid` to the grid `to`, which divides it.

    A mean of tokens needs their length, not their direction alone.
    """
    if grid == to:
        return tokens
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    pooled = F.avg_pool2d(maps, (grid[0] // to[0], grid[1] // to[1]))
    return pooled.flatten(2).transpose(1, 2)
