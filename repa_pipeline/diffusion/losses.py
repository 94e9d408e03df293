"""The two losses of REPA: denoising (section 2) and alignment (section 3.2, equation 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repa_pipeline.diffusion.interpolant import States


def denoising_loss(prediction: States | Tensor, target: States | Tensor) -> Tensor:
    """Mean squared error of each sample, float32 [B]; several states' errors are added.

    prediction, target: one state [B, ...] or a tuple of states.
    """
    predictions = (prediction,) if isinstance(prediction, Tensor) else prediction
    targets = (target,) if isinstance(target, Tensor) else target
    errors = [
        (ours.float() - theirs.float()).square().flatten(1).mean(dim=1)
        for ours, theirs in zip(predictions, targets, strict=True)
    ]
    return torch.stack(errors).sum(dim=0)


def alignment_per_sample(projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Minus the mean cosine similarity over the tokens and teachers of each sample, float32 [B].

    projected, targets: per teacher [B, T, D]; T and D may differ between teachers. Normalised in
    float32, because half precision overflows in the norm.
    """
    similarities = [
        (F.normalize(ours.float(), dim=-1) * F.normalize(theirs.float(), dim=-1)).sum(-1).mean(-1)
        for ours, theirs in zip(projected, targets, strict=True)
    ]
    return -torch.stack(similarities).mean(dim=0)


def alignment_loss(projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Minus the mean cosine similarity over tokens, samples and teachers; a scalar in [-1, 1].

    projected, targets: per teacher [B, T, D]; gradients flow to `projected`.
    """
    return alignment_per_sample(projected, targets).mean()
