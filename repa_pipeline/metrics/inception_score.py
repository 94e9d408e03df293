"""Inception score (Salimans et al. 2016) over consecutive blocks in file order, as ADM's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repa_pipeline.errors import DataError, MismatchError


def inception_score(logits: NDArray[np.floating], split_size: int = 5000) -> float:
    """Mean over blocks of exp(mean KL(p(y|x) || p(y))).

    logits [N, K], before the softmax, in file order and not shuffled; the last block may be
    shorter and counts as much as the others. At most K. Raises DataError without images.
    """
    if logits.ndim != 2:
        raise MismatchError(f"logits have shape {logits.shape}: expected [N, K]")
    if len(logits) == 0:
        raise DataError("inception score of 0 images: at least 1 is needed")
    starts = range(0, len(logits), split_size)
    scores = [block_score(logits[start : start + split_size]) for start in starts]
    return float(np.mean(scores))


def block_score(logits: NDArray[np.floating]) -> float:
    """exp(mean KL(p(y|x) || p(y))) of one block of logits [n, K]."""
    logits_NK = logits.astype(np.float64)
    log_p_NK = logits_NK - _log_sum_exp(logits_NK, axis=1)
    log_marginal_1K = _log_sum_exp(log_p_NK, axis=0) - np.log(len(log_p_NK))
    divergence_N = (np.exp(log_p_NK) * (log_p_NK - log_marginal_1K)).sum(axis=1)
    return float(np.exp(divergence_N.mean()))


def _log_sum_exp(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    peak = values.max(axis=axis, keepdims=True)
    total = np.exp(values - peak).sum(axis=axis, keepdims=True)
    result: NDArray[np.float64] = peak + np.log(total)
    return result
