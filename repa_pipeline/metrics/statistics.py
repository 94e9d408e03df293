"""Mean and covariance of features that arrive in blocks, on many workers.

Each worker keeps one (n, mean, scatter) triple; triples merge. Floating point addition does not
commute with regrouping, so bit-equal reruns need equal blocks, merged in index order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from repa_pipeline.errors import DataError, MismatchError

BLOCK_ROWS = 4096  # bounds the float64 copy of one update: 64 MiB at 2,048 features


@dataclass
class RunningStatistics:
    """Count, mean [D] and scatter [D, D] (sum of outer products about the mean), float64.

    `RunningStatistics()` is empty and takes its width from the first rows.
    """

    n: int = 0
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    scatter: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def update(self, features: NDArray[np.floating]) -> None:
        """Adds rows; features [N, D], any float type, best at least 500 rows a call.

        Raises DataError when a feature is not finite, MismatchError when the width differs.
        """
        if features.ndim != 2:
            raise MismatchError(f"features have shape {features.shape}: expected [N, D]")
        for start in range(0, len(features), BLOCK_ROWS):
            rows = features[start : start + BLOCK_ROWS].astype(np.float64)
            mean = rows.mean(axis=0)
            if not np.isfinite(mean).all():
                raise DataError("features hold NaN or infinity: check the images and the network")
            rows -= mean
            self.merge(RunningStatistics(len(rows), mean, rows.T @ rows))

    def merge(self, other: RunningStatistics) -> None:
        """Adds the rows of another triple, in place (Chan et al. 1979, pairwise update)."""
        if other.n == 0:
            return
        if self.n == 0:
            self.n, self.mean, self.scatter = other.n, other.mean.copy(), other.scatter.copy()
            return
        if self.mean.shape != other.mean.shape:
            raise MismatchError(
                f"features of width {len(other.mean)} cannot join statistics of width "
                f"{len(self.mean)}: use one network for both"
            )
        total = self.n + other.n
        delta = other.mean - self.mean
        self.scatter += other.scatter + np.outer(delta, delta) * (self.n * other.n / total)
        self.mean = self.mean + delta * (other.n / total)
        self.n = total

    def without(self, part: RunningStatistics) -> RunningStatistics:
        """The triple of the rows that are not in `part`, which was merged into this one."""
        left = self.n - part.n
        if left <= 0:
            raise DataError(f"{part.n} of {self.n} images left out: none is left")
        mean = (self.mean * self.n - part.mean * part.n) / left
        delta = part.mean - mean
        scatter = self.scatter - part.scatter - np.outer(delta, delta) * (left * part.n / self.n)
        return RunningStatistics(left, mean, scatter)

    def finalize(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean [D] and covariance [D, D] over N - 1, float64, as np.cov.

        Raises DataError with fewer than two rows.
        """
        if self.n < 2:
            raise DataError(f"covariance of {self.n} images: at least 2 are needed")
        return self.mean.copy(), self.scatter / (self.n - 1)
