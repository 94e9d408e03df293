"""How near decoded tokens are to the teacher's own."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from repa_pipeline.diffusion.targets import spatial_normalise


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """mean_cosine and worst_cosine: over tokens, 1 is exact; spatial_error: relative L2 error of
    the spatially normalised target, 0 is exact."""

    mean_cosine: float
    worst_cosine: float
    spatial_error: float


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
