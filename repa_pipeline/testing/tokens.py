"""Synthetic teacher tokens with the outlier channels that real vision transformers have.

tokens = outlier_tokens(4, 256, 768, "severe")
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# (share of the channels that are outliers, their gain)
OUTLIERS = {"none": (0.0, 1.0), "moderate": (0.01, 4.0), "severe": (0.004, 40.0)}


def outlier_tokens(
    num_images: int, num_tokens: int, width: int, outliers: str, *, seed: int = 0
) -> Tensor:
    """Tokens float32 [num_images, num_tokens, width]; `outliers` is a key of OUTLIERS.

    A Gaussian of power-law covariance (the k-th variance falls as 1 / k) in a random basis, part
    of it common to an image's tokens; LayerNorm with a gain and a bias a channel; then a few
    channels many times as large as the rest.
    """
    basis, state = _basis(seed, width)
    generator = np.random.default_rng()
    generator.bit_generator.state = state
    spread = np.arange(1, width + 1) ** -0.5
    shape = (num_images, num_tokens, width)
    own = generator.standard_normal(shape)
    common = generator.standard_normal((num_images, 1, width))
    tokens = ((0.8 * own + 0.6 * common) * spread) @ basis
    tokens -= tokens.mean(-1, keepdims=True)
    tokens /= tokens.std(-1, keepdims=True)
    tokens = tokens * generator.lognormal(0, 0.3, width) + 0.1 * generator.standard_normal(width)
    share, gain = OUTLIERS[outliers]
    tokens[..., generator.permutation(width)[: round(share * width)]] *= gain
    return torch.from_numpy(tokens.astype(np.float32))


@functools.lru_cache(maxsize=16)
def _basis(seed: int, width: int) -> tuple[npt.NDArray[np.float64], Any]:
    """A random basis, seconds of work for a wide one, and the generator's state after it."""
    generator = np.random.default_rng([seed, width])
    basis = np.linalg.qr(generator.standard_normal((width, width)))[0]
    return basis, generator.bit_generator.state
