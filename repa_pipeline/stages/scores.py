"""Features and a reference -> the numbers: distances, inception score, precision, recall, KID.

All from the stored rows in index order, so that a rerun is equal to the bit. Of the features one
shard is held, and the pool features of all samples (400 MB at 50,000 x 2,048) for precision,
recall and KID.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from repa_pipeline.config_evaluate import ScoreConfig
from repa_pipeline.errors import DataError
from repa_pipeline.metrics.frechet import FrechetReference, FrechetResult
from repa_pipeline.metrics.inception_score import block_score
from repa_pipeline.metrics.kid import kid_of_subsets
from repa_pipeline.metrics.networks import Widths
from repa_pipeline.metrics.precision_recall import precision_recall
from repa_pipeline.metrics.standard_errors import (
    METHODS,
    distance_error,
    mean_error,
    share_error,
)
from repa_pipeline.metrics.statistics import RunningStatistics
from repa_pipeline.stages.judge import Judged, Rows
from repa_pipeline.stages.reference import STATISTICS_ROWS
from repa_pipeline.stages.reference_file import Float64, Reference

NEIGHBOURS = 3
# The numbers of a result in the order in which people are told them.
METRICS_IN_ORDER = (
    *("frechet_distance", "spatial_frechet_distance", "inception_score"),
    *("precision", "recall", "kid"),
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The metrics by name (None where the network or the reference has no such features), their
    standard errors, and how they were computed."""

    metrics: dict[str, float | None]
    standard_errors: dict[str, Any]
    clipped: dict[str, float | None]
    kid: dict[str, Any] | None


def check_counts(config: ScoreConfig, num_samples: int, widths: Widths) -> None:
    """Raises DataError, before any forward pass, where the samples are too few for a number."""
    if num_samples <= NEIGHBOURS:
        raise DataError(
            f"scoring {num_samples} samples: at least {NEIGHBOURS + 1} of each are needed for "
            f"precision and recall with k = {NEIGHBOURS}, and 2 for a covariance"
        )
    if config.allow_few:
        return
    for part, width in (("pool", widths.pool), ("spatial", widths.spatial)):
        if num_samples < width:
            raise DataError(
                f"Fréchet distance of {num_samples:,} samples in {width:,} {part} features: "
                f"expected at least {width:,}, with fewer the covariance is singular; make more "
                "samples, or give --allow-few"
            )
    if widths.logits and num_samples < config.is_split:
        raise DataError(
            f"inception score of {num_samples:,} samples in blocks of {config.is_split:,}: "
            "expected at least one block; make more samples, set --is-split, or give --allow-few"
        )


def compute_scores(config: ScoreConfig, judged: Judged, reference: Reference) -> Scores:
    """The numbers of `judged` against `reference`."""
    metrics: dict[str, float | None] = {}
    errors: dict[str, float | None] = {}
    clipped: dict[str, float | None] = {}
    spatial = reference if judged.widths.spatial else None
    for name, part, mu, sigma in (
        ("frechet_distance", "pool", reference.mu, reference.sigma),
        ("spatial_frechet_distance", "spatial", *_spatial(spatial)),
    ):
        found, error = None, None
        if mu is not None and sigma is not None:
            found, error = _distance(config, judged, part, mu, sigma)
        metrics[name] = found.distance if found else None
        clipped[name] = found.clipped if found else None
        errors[name] = error
    metrics["inception_score"], errors["inception_score"] = _inception_score(config, judged)
    pool = judged.first_pool(judged.num_rows)
    mode: Any = config.pr_mode
    shares = precision_recall(reference.rows, pool, k=NEIGHBOURS, mode=mode)
    for name, share, count in zip(
        ("precision", "recall"), shares, (len(pool), len(reference.rows)), strict=True
    ):
        metrics[name], errors[name] = share, share_error(share, count) if config.blocks else None
    metrics["kid"], kid = _kid(config, reference.rows, pool)
    told = {
        name: {"value": error, "method": METHODS[name]}
        for name, error in errors.items()
        if error is not None
    }
    return Scores(metrics, told, clipped, kid)


def _spatial(reference: Reference | None) -> tuple[Float64 | None, Float64 | None]:
    return (None, None) if reference is None else (reference.mu_s, reference.sigma_s)


def _distance(
    config: ScoreConfig, judged: Judged, part: str, mu: Float64, sigma: Float64
) -> tuple[FrechetResult, float | None]:
    """The distance of one part of the features, and its standard error."""
    whole = FrechetReference(mu, sigma)
    width = len(mu)
    if judged.num_rows < width:
        rows = np.concatenate(list(judged.parts(part, STATISTICS_ROWS)))
        return whole.distance_from_features(rows), None
    blocks = _block_statistics(judged, part, max(1, config.blocks))
    total = RunningStatistics()
    for block in blocks:
        total.merge(block)
    found = whole.distance(*total.finalize())
    return found, distance_error(whole, total, blocks) if config.blocks else None


def _block_statistics(judged: Judged, part: str, num_blocks: int) -> list[RunningStatistics]:
    """Statistics of consecutive blocks of samples, as equal as can be."""
    bounds = [judged.num_rows * k // num_blocks for k in range(num_blocks + 1)]
    blocks = [RunningStatistics() for _ in range(num_blocks)]
    start = 0
    for rows in judged.parts(part, STATISTICS_ROWS):
        for k, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
            inside = rows[max(low - start, 0) : max(high - start, 0)]
            if len(inside):
                blocks[k].update(inside)
        start += len(rows)
    return [block for block in blocks if block.n]


def _inception_score(config: ScoreConfig, judged: Judged) -> tuple[float | None, float | None]:
    if not judged.widths.logits:
        return None, None
    scores = [block_score(logits) for logits in judged.parts("logits", config.is_split)]
    return float(np.mean(scores)), mean_error(scores) if config.blocks else None


def _kid(
    config: ScoreConfig, reference: Rows, samples: Rows
) -> tuple[float | None, dict[str, Any] | None]:
    if not config.kid_subsets:
        return None, None
    found = kid_of_subsets(
        reference,
        samples,
        subsets=config.kid_subsets,
        size=config.kid_size,
        seed=config.kid_seed,
    )
    told = {**found._asdict(), "seed": config.kid_seed, "kernel": "(x.y / D + 1)^3, unbiased"}
    return found.mean, told
