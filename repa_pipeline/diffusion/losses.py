"""The losses of REPA: denoising (section 2) and alignment (section 3.2, equation 8).

The objectives of alignment are entries of OBJECTIVES (methods/parts.py). Noise prediction with a
learned variance is in ddpm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repa_pipeline.diffusion.interpolant import States

# As of F.normalize.
_LEAST_NORM = 1e-12


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


def cosine_alignment(projected: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Minus the mean cosine similarity over the tokens of each sample, float32 [B].

    projected, target: [B, T, D]. Computed in float32, because half precision overflows in the
    norm. The temperature is not used.
    """
    ours, theirs = projected.float(), target.float()
    # Sums are divided, not tokens: half the memory is written that normalised tokens take.
    ours_BT, theirs_BT = (
        torch.linalg.vector_norm(x, dim=-1).clamp_min(_LEAST_NORM) for x in (ours, theirs)
    )
    cosine_BT: Tensor = (ours * theirs).sum(-1) / ours_BT / theirs_BT
    return -cosine_BT.mean(-1)


def nt_xent_alignment(projected: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross entropy of each sample, float32 [B], at least 0.

    Each projected token must find its own target among all targets of the same image, by cosine
    similarity over `temperature`. The negatives are the other tokens of the image, not of the
    batch, so that a sample's value depends on no other sample: not on micro-batches, not on ranks.
    projected, target: [B, T, D].
    """
    # Autocast would round the similarities to half precision.
    with torch.autocast(projected.device.type, enabled=False):
        ours, theirs = (F.normalize(x.float(), dim=-1) for x in (projected, target))
        logits_BTT = ours @ theirs.transpose(1, 2) / temperature
        found_BT = logits_BTT.diagonal(dim1=1, dim2=2) - logits_BTT.logsumexp(dim=2)
        return -found_BT.mean(dim=1)


def alignment_per_sample(projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """`cosine_alignment`, averaged over the teachers, float32 [B].

    projected, targets: per teacher [B, T, D]; T and D may differ between teachers.
    """
    pairs = zip(projected, targets, strict=True)
    return torch.stack([cosine_alignment(*pair, temperature=1.0) for pair in pairs]).mean(dim=0)


def alignment_loss(projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Minus the mean cosine similarity over tokens, samples and teachers; a scalar in [-1, 1].

    projected, targets: per teacher [B, T, D]; gradients flow to `projected`.
    """
    return alignment_per_sample(projected, targets).mean()
