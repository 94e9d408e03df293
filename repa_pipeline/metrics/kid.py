"""Kernel distance (Binkowski et al. 2018): unbiased at every number of samples, unlike FID."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from repa_pipeline.errors import DataError, MismatchError

BLOCK_ROWS = 2048


class KidResult(NamedTuple):
    """Mean and standard deviation over `subsets` random subsets of `size` rows of each set."""

    mean: float
    std: float
    subsets: int
    size: int


def kid_of_subsets(
    reference: NDArray[np.floating],
    samples: NDArray[np.floating],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> KidResult:
    """KID as it is published: the mean over random subsets, drawn as torch-fidelity draws them.

    reference [N, D], samples [M, D]. Sets smaller than `size` give subsets of the smaller one's
    size. The deviation says how far one subset lies from another, not how sure the mean is.
    Raises MismatchError when the widths differ, DataError with fewer than two rows.
    """
    n, m = _counts(reference, samples)
    size = min(size, n, m)
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        ours = samples[random.choice(m, size, replace=False)]
        theirs = reference[random.choice(n, size, replace=False)]
        found.append(kid(theirs, ours))
    return KidResult(float(np.mean(found)), float(np.std(found)), subsets, size)


def kid(reference: NDArray[np.floating], samples: NDArray[np.floating]) -> float:
    """Squared maximum mean discrepancy, kernel (x.y / D + 1)^3, unbiased, over all pairs.

    reference [N, D], samples [M, D], N and M at least 2; float64 inside, never the whole kernel
    matrix. May be slightly negative. Raises MismatchError when the widths differ.
    """
    n, m = _counts(reference, samples)
    within_reference = _kernel_sum(reference, reference) - _kernel_diagonal(reference)
    within_samples = _kernel_sum(samples, samples) - _kernel_diagonal(samples)
    across = _kernel_sum(reference, samples)
    return within_reference / (n * (n - 1)) + within_samples / (m * (m - 1)) - 2 * across / (n * m)


def _counts(reference: NDArray[np.floating], samples: NDArray[np.floating]) -> tuple[int, int]:
    if reference.shape[1:] != samples.shape[1:] or reference.ndim != 2:
        raise MismatchError(
            f"features of shapes {reference.shape} and {samples.shape}: expected [N, D] and [M, D]"
        )
    n, m = len(reference), len(samples)
    if min(n, m) < 2:
        raise DataError(f"KID of {n} against {m} images: at least 2 of each are needed")
    return n, m


def _kernel_sum(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    total = 0.0
    for row in range(0, len(x), BLOCK_ROWS):
        rows = x[row : row + BLOCK_ROWS].astype(np.float64)
        for column in range(0, len(y), BLOCK_ROWS):
            columns = y[column : column + BLOCK_ROWS].astype(np.float64)
            kernel = rows @ columns.T / x.shape[1] + 1
            total += float((kernel * kernel * kernel).sum())
    return total


def _kernel_diagonal(x: NDArray[np.floating]) -> float:
    kernel = np.square(x.astype(np.float64)).sum(axis=1) / x.shape[1] + 1
    return float((kernel * kernel * kernel).sum())
