"""How near decoded tokens are to the teacher's own."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# iREPA (arXiv 2512.10794), spatial normalisation of the target
_GAMMA = 0.6
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """mean_cosine and worst_cosine: over tokens, 1 is exact; spatial_error: relative L2 error of
    the spatially normalised target, 0 is exact."""

    mean_cosine: float
    worst_cosine: float
    spatial_error: float


def spatial_normalise(tokens: Tensor) -> Tensor:
    """(z - 0.6 mean_T) / (std_T + 1e-6) of tokens [n, T, D], mean and std over an image's tokens.

    The shape of the target in iREPA (arXiv 2512.10794).
    """
    std, mean = torch.std_mean(tokens, 1, correction=0, keepdim=True)
    return (tokens - _GAMMA * mean) / (std + _EPSILON)


@torch.no_grad()
def fidelity(tokens: Tensor, decoded: Tensor) -> Fidelity:
    """Compares the teacher's tokens [n, T, D] with decoded ones, in float64, image by image.

    A zero token counts as cosine 1 where it is decoded to zero, else as 0. Without their scale
    (codec.py) decoded tokens have a cosine, but no meaningful spatial error.
    """
    cosines, error, size = [], 0.0, 0.0
    for given, got in zip(tokens.double(), decoded.double(), strict=True):
        lengths = given.norm(dim=-1) * got.norm(dim=-1)
        cosine = (given * got).sum(-1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
        both_zero = (given == 0).all(-1) & (got == 0).all(-1)
        cosines.append(cosine.masked_fill(both_zero, 1))
        target = spatial_normalise(given[None])
        error += float((spatial_normalise(got[None]) - target).square().sum())
        size += float(target.square().sum())
    found = torch.cat(cosines)
    relative = (error / size) ** 0.5 if size else float(error > 0)
    return Fidelity(float(found.mean()), float(found.min()), relative)
