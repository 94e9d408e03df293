"""From stored images to an encoder's input, and its position embedding to another grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from repa_pipeline.encoders.rules import PREPROCESS, Preprocess
from repa_pipeline.errors import MismatchError

__all__ = ["PREPROCESS", "Preprocess", "preprocess", "resample_pos_embed"]


def preprocess(images: Tensor, rule: Preprocess) -> Tensor:
    """Normalises and resizes a batch as the encoder's authors do.

    images uint8 [B, 3, R, R] -> float32 [B, 3, S, S] on the same device, S = R * size_at_256 / 256.
    Bicubic without antialias, as the reference hands DINOv2, CLIP and I-JEPA their input. Raises
    MismatchError on another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise MismatchError(
            f"images are {images.dtype} {list(images.shape)}: expected uint8 [B, 3, R, R]"
        )
    mean = torch.tensor(rule.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(rule.std, device=images.device).view(3, 1, 1)
    normalised = (images.float() / 255 - mean) / std
    height, width = (round(rule.scaled(side)) for side in images.shape[2:])
    if (height, width) == tuple(images.shape[2:]):
        return normalised
    return F.interpolate(normalised, size=(height, width), mode="bicubic")


def resample_pos_embed(pos: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Resamples a square grid's position embedding, bicubic with antialias.

    pos [1, P + N, D] with P prefix tokens that stay as they are -> [1, P + rows * columns, D].
    timm's `resample_abs_pos_embed`; DINOv2's own interpolation gives a different target. Raises
    MismatchError when N is not a square.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed

    num_patches = pos.shape[1] - num_prefix_tokens
    if math.isqrt(max(num_patches, 0)) ** 2 != num_patches or num_patches <= 0:
        raise MismatchError(
            f"position embedding has {pos.shape[1]} rows: expected {num_prefix_tokens} prefix "
            "tokens and a square number of patches; give weights made for this encoder"
        )
    resampled: Tensor = resample_abs_pos_embed(
        pos, new_size=list(grid), num_prefix_tokens=num_prefix_tokens
    )
    return resampled
