"""Scale late: raw latents to the model's space and back, by the numbers of a manifest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scale_by(raw: Tensor, scale: Sequence[float], shift: Sequence[float]) -> Tensor:
    """(raw - shift) * scale, each per channel or one for all; float32 [B, C, h, w] -> the same."""
    return (raw - _per_channel(shift, raw)) * _per_channel(scale, raw)


def unscale_by(scaled: Tensor, scale: Sequence[float], shift: Sequence[float]) -> Tensor:
    """The inverse of `scale_by`."""
    return scaled / _per_channel(scale, scaled) + _per_channel(shift, scaled)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(tuple(values), dtype=like.dtype, device=like.device).view(-1, 1, 1)
