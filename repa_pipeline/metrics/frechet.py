"""Frechet distance between two Gaussians fitted to features: FID on pool, sFID on spatial ones.

    |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With S1 = A A^T the last trace is the sum of the square roots of the eigenvalues of the symmetric
A^T S2 A. `scipy.linalg.sqrtm` of S1 S2 is not used: it is slow, and wrong on ill-conditioned pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from repa_pipeline.errors import DataError, MismatchError
from repa_pipeline.metrics.statistics import RunningStatistics

Float64Array = NDArray[np.float64]


class FrechetResult(NamedTuple):
    """The distance, and the sum (zero or below) of the eigenvalues of A^T S A that were clipped."""

    distance: float
    clipped: float


class FrechetReference:
    """Reference statistics with their factor computed once, for many distances.

    mu [D], sigma [D, D], any float type. `clipped` is the sum (zero or below) of the negative
    eigenvalues of sigma. Raises MismatchError on shapes that do not fit, DataError on NaN.
    """

    def __init__(self, mu: NDArray[np.floating], sigma: NDArray[np.floating]) -> None:
        self.mu, self.sigma = _checked(mu, sigma)
        self._factor, self.clipped = _factor(self.sigma)

    def distance(self, mu: NDArray[np.floating], sigma: NDArray[np.floating]) -> FrechetResult:
        """Distance to the Gaussian (mu [D], sigma [D, D]); float64 throughout."""
        mu, sigma = _checked(mu, sigma)
        self._check_width(len(mu))
        product = self._factor.T @ sigma @ self._factor
        values = np.linalg.eigvalsh((product + product.T) / 2)
        trace_root = np.sqrt(np.maximum(values, 0)).sum()
        distance = self._assemble(mu, np.trace(sigma), trace_root)
        return FrechetResult(distance, float(np.minimum(values, 0).sum()))

    def gradient(
        self, mu: NDArray[np.floating], sigma: NDArray[np.floating]
    ) -> tuple[Float64Array, Float64Array]:
        """Derivatives of the distance to (mu [D], sigma [D, D]) by mu [D] and by sigma [D, D].

        With S1 = A A^T they are 2 (mu - mu1) and I - A (A^T S A)^(-1/2) A^T; directions without
        variance are left out of the root.
        """
        mu, sigma = _checked(mu, sigma)
        self._check_width(len(mu))
        product = self._factor.T @ sigma @ self._factor
        values, vectors = np.linalg.eigh((product + product.T) / 2)
        kept = values > values.max() * len(values) * np.finfo(np.float64).eps
        scaled = self._factor @ vectors[:, kept] / values[kept] ** 0.25
        return 2 * (mu - self.mu), np.eye(len(mu)) - scaled @ scaled.T

    def distance_from_features(self, features: NDArray[np.floating]) -> FrechetResult:
        """Distance to the Gaussian fitted to features [N, D], covariance over N - 1.

        With N < D the covariance is singular: the singular values of the centred features times
        the factor give the trace directly, cheaper and without clipped noise.
        """
        self._check_width(features.shape[1])
        if len(features) >= features.shape[1]:
            statistics = RunningStatistics()
            statistics.update(features)
            return self.distance(*statistics.finalize())
        if len(features) < 2:
            raise DataError(f"covariance of {len(features)} images: at least 2 are needed")
        rows = features.astype(np.float64)
        mu = rows.mean(axis=0)
        rows = (rows - mu) / np.sqrt(len(rows) - 1)
        singular = np.linalg.svd(rows @ self._factor, compute_uv=False)
        return FrechetResult(self._assemble(mu, np.square(rows).sum(), singular.sum()), 0.0)

    def _assemble(self, mu: Float64Array, trace: float, trace_root: float) -> float:
        difference = self.mu - mu
        return float(difference @ difference + np.trace(self.sigma) + trace - 2 * trace_root)

    def _check_width(self, width: int) -> None:
        if width != len(self.mu):
            raise MismatchError(
                f"features of width {width} against a reference of width {len(self.mu)}: "
                "use the network (and the resolution) that made the reference"
            )


def frechet_distance(
    mu1: NDArray[np.floating],
    sigma1: NDArray[np.floating],
    mu2: NDArray[np.floating],
    sigma2: NDArray[np.floating],
) -> float:
    """Frechet distance of two Gaussians; mu [D], sigma [D, D], float64 inside."""
    return FrechetReference(mu1, sigma1).distance(mu2, sigma2).distance


def _factor(sigma: Float64Array) -> tuple[Float64Array, float]:
    """A with A A^T = sigma, and the sum of the negative eigenvalues that were left out of it.

    Of a positive definite sigma Cholesky's, at a hundredth of the cost of eigenvectors; any other
    factor differs from it by a rotation, which moves no eigenvalue of A^T S A.
    """
    try:
        return np.linalg.cholesky(sigma).astype(np.float64, copy=False), 0.0
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)
        clipped = float(np.minimum(values, 0).sum())
        return vectors * np.sqrt(np.maximum(values, 0)), clipped


def _checked(
    mu: NDArray[np.floating], sigma: NDArray[np.floating]
) -> tuple[Float64Array, Float64Array]:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise MismatchError(
            f"mean of shape {mu.shape} with covariance of shape {sigma.shape}: "
            "expected [D] and [D, D]"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError("mean or covariance hold NaN or infinity: compute the statistics again")
    return mu.astype(np.float64), sigma.astype(np.float64)
