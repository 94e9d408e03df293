"""How far a score lies from itself on other samples of the same kind: standard errors.

Fréchet distances: delete-a-block jackknife. The samples are cut into G consecutive blocks; d_g is
the distance with block g left out (its statistics subtracted, no feature read again), and
se^2 = (G - 1) / G * sum((d_g - mean d)^2). The reference is held fixed. The change of the distance
is taken to first order, by its gradient: one eigendecomposition for all blocks, and the bias of
FID in N does not enter.
Inception score: the spread of the blocks it is the mean of, over the root of their number.
Precision and recall: sqrt(p (1 - p) / N), what a bootstrap over images gives with the manifolds
held fixed; of recall that leaves out how the samples' manifold varies.
None of them says how scores differ between seeds of training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from repa_pipeline.metrics.frechet import FrechetReference
from repa_pipeline.metrics.statistics import RunningStatistics

MIN_BLOCKS = 2
METHODS = {
    "frechet_distance": "jackknife over consecutive blocks of samples, reference fixed",
    "spatial_frechet_distance": "jackknife over consecutive blocks of samples, reference fixed",
    "inception_score": "spread of its blocks",
    "precision": "bootstrap over samples, manifold of the reference fixed",
    "recall": "bootstrap over reference images, manifold of the samples fixed",
}


def distance_error(
    reference: FrechetReference, whole: RunningStatistics, blocks: Sequence[RunningStatistics]
) -> float | None:
    """Standard error of the Fréchet distance; `blocks` merge to `whole`.

    None with fewer than two blocks, or with blocks so small that one left out leaves no two rows.
    """
    if len(blocks) < MIN_BLOCKS or min(whole.n - block.n for block in blocks) < 2:
        return None
    mean, covariance = whole.finalize()
    by_mean, by_covariance = reference.gradient(mean, covariance)
    changes = []
    for block in blocks:
        mean_left, covariance_left = whole.without(block).finalize()
        change = by_mean @ (mean_left - mean)
        changes.append(float(change + np.vdot(by_covariance, covariance_left - covariance)))
    return jackknife_error(changes)


def jackknife_error(values: Sequence[float]) -> float:
    """Standard error from the values with one block left out each."""
    spread = np.square(np.asarray(values) - np.mean(values)).sum()
    return float(np.sqrt((len(values) - 1) / len(values) * spread))


def mean_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None for fewer than two."""
    if len(values) < MIN_BLOCKS:
        return None
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` images."""
    return float(np.sqrt(share * (1 - share) / count))
