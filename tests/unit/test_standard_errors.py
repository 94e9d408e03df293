"""Standard errors against the spread of scores over many sets of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from repa_pipeline.errors import DataError
from repa_pipeline.metrics.frechet import FrechetReference
from repa_pipeline.metrics.standard_errors import (
    distance_error,
    jackknife_error,
    mean_error,
    share_error,
)
from repa_pipeline.metrics.statistics import RunningStatistics

WIDTH, COUNT, BLOCKS = 6, 1200, 10


def statistics(rows: Any) -> RunningStatistics:
    found = RunningStatistics()
    found.update(rows)
    return found


def blocks_of(rows: Any, count: int = BLOCKS) -> tuple[RunningStatistics, list[RunningStatistics]]:
    blocks = [statistics(part) for part in np.array_split(rows, count)]
    total = RunningStatistics()
    for block in blocks:
        total.merge(block)
    return total, blocks


def test_a_part_subtracted_leaves_the_statistics_of_the_rest() -> None:
    rows = np.random.default_rng(0).standard_normal((300, WIDTH)) * [1, 2, 3, 4, 5, 6] + 7
    total, blocks = blocks_of(rows, 3)
    for k, block in enumerate(blocks):
        rest = total.without(block)
        want = np.delete(rows, slice(100 * k, 100 * k + 100), axis=0)
        mean, covariance = rest.finalize()
        assert rest.n == 200
        np.testing.assert_allclose(mean, want.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(want.T), rtol=1e-10, atol=1e-12)
    with pytest.raises(DataError, match="300 of 300 images left out: none is left"):
        total.without(total)


def test_the_error_of_a_distance_is_the_spread_over_sets() -> None:
    """200 sets of Gaussian samples, shifted and scaled against the reference."""
    generator = np.random.default_rng(1)
    reference = FrechetReference(np.zeros(WIDTH), np.diag(np.arange(1.0, WIDTH + 1)))
    distances, errors = [], []
    for _ in range(200):
        rows = generator.standard_normal((COUNT, WIDTH)) * 1.3 + 0.2
        total, blocks = blocks_of(rows)
        distances.append(reference.distance(*total.finalize()).distance)
        error = distance_error(reference, total, blocks)
        assert error is not None
        errors.append(error**2)
    spread = np.std(distances, ddof=1)
    assert np.sqrt(np.mean(errors)) == pytest.approx(spread, rel=0.2)
    assert np.mean(distances) > 1 and spread < 0.2


def test_the_gradient_is_that_of_the_distance() -> None:
    generator = np.random.default_rng(5)
    factor, other = generator.standard_normal((2, WIDTH, WIDTH))
    reference = FrechetReference(generator.standard_normal(WIDTH), factor @ factor.T)
    mu, sigma = generator.standard_normal(WIDTH), other @ other.T
    by_mu, by_sigma = reference.gradient(mu, sigma)
    step = 1e-6
    for k in range(WIDTH):
        for row in range(WIDTH):
            change = np.zeros((WIDTH, WIDTH))
            change[k, row] += step / 2
            change[row, k] += step / 2
            up, down = (reference.distance(mu, sigma + s * change).distance for s in (1, -1))
            assert by_sigma[k, row] == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-5)
        change = np.eye(WIDTH)[k] * step
        up, down = (reference.distance(mu + s * change, sigma).distance for s in (1, -1))
        assert by_mu[k] == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-6)


def test_to_first_order_is_as_good_as_all_distances_again() -> None:
    generator = np.random.default_rng(6)
    reference = FrechetReference(np.zeros(WIDTH), np.diag(np.arange(1.0, WIDTH + 1)))
    total, blocks = blocks_of(generator.standard_normal((COUNT, WIDTH)) * 1.3 + 0.2)
    again = [reference.distance(*total.without(b).finalize()).distance for b in blocks]
    assert distance_error(reference, total, blocks) == pytest.approx(
        jackknife_error(again), rel=0.02
    )


def test_the_error_shrinks_with_the_root_of_the_number() -> None:
    generator = np.random.default_rng(2)
    reference = FrechetReference(np.zeros(WIDTH), np.eye(WIDTH))
    errors = []
    for count in (1000, 16_000):
        found = []
        for _ in range(20):
            total, blocks = blocks_of(generator.standard_normal((count, WIDTH)) + 0.5)
            found.append(distance_error(reference, total, blocks))
        errors.append(np.sqrt(np.mean(np.square(np.array(found, float)))))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)


def test_closed_forms() -> None:
    values = np.random.default_rng(3).standard_normal(40)
    left_out = [float(np.delete(values, k).mean()) for k in range(40)]
    assert jackknife_error(left_out) == pytest.approx(values.std(ddof=1) / np.sqrt(40))
    assert mean_error(values.tolist()) == pytest.approx(values.std(ddof=1) / np.sqrt(40))
    assert mean_error([1.0]) is None
    assert share_error(0.5, 100) == 0.05 and share_error(1.0, 100) == 0


def test_a_share_spreads_as_said() -> None:
    draws = np.random.default_rng(4).random((2000, 400)) < 0.7
    assert share_error(0.7, 400) == pytest.approx(draws.mean(1).std(), rel=0.05)


def test_too_few_blocks_give_no_error() -> None:
    reference = FrechetReference(np.zeros(2), np.eye(2))
    total, blocks = blocks_of(np.random.default_rng(0).standard_normal((3, 2)), 1)
    assert distance_error(reference, total, blocks) is None
    total, blocks = blocks_of(np.random.default_rng(0).standard_normal((2, 2)), 2)
    assert distance_error(reference, total, blocks) is None
