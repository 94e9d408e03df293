"""Metrics against closed forms and plain loops."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from repa_pipeline.errors import (
    ConfigError,
    DataError,
    MismatchError,
    MissingError,
    UnknownNameError,
)
from repa_pipeline.metrics import precision_recall as pr
from repa_pipeline.metrics import statistics
from repa_pipeline.metrics.frechet import FrechetReference, frechet_distance
from repa_pipeline.metrics.inception_score import inception_score
from repa_pipeline.metrics.kid import BLOCK_ROWS, kid
from repa_pipeline.metrics.networks import find_network_weights, load_network
from repa_pipeline.metrics.resize import tf1_bilinear_resize
from repa_pipeline.metrics.statistics import RunningStatistics


def correlated(num_rows: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(num_rows, width)) @ rng.normal(size=(width, width)) + 5
    return mixed.astype(np.float32)


def running(features: np.ndarray) -> RunningStatistics:
    found = RunningStatistics()
    found.update(features)
    return found


# statistics


def test_statistics_equal_numpy_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK_ROWS", 64)
    features = correlated(500, 12, seed=0)
    found = RunningStatistics()
    for part in np.split(features, [1, 77, 300]):
        found.update(part)
    mu, sigma = found.finalize()
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-11)
    assert found.n == 500 and mu.dtype == sigma.dtype == np.float64


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_statistics_merge_in_any_order(order: tuple[int, ...]) -> None:
    features = correlated(300, 7, seed=1)
    parts = [running(part) for part in np.split(features, [50, 60])]
    merged = RunningStatistics()
    for index in order:
        merged.merge(parts[index])
    mu, sigma = merged.finalize()
    want_mu, want_sigma = running(features).finalize()
    np.testing.assert_allclose(mu, want_mu, rtol=1e-13)
    np.testing.assert_allclose(sigma, want_sigma, rtol=1e-11)


def test_statistics_merge_leaves_its_argument_alone_and_repeats_bit_for_bit() -> None:
    first, second = running(correlated(90, 5, seed=2)), running(correlated(80, 5, seed=3))
    results = []
    for _ in range(2):
        merged = RunningStatistics()
        for part in (first, second, RunningStatistics()):
            merged.merge(part)
        results.append(merged.scatter.tobytes())
    assert results[0] == results[1]
    assert (first.n, second.n) == (90, 80)


def test_statistics_refuse_bad_features() -> None:
    with pytest.raises(DataError, match="NaN"):
        running(np.array([[1.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(DataError, match="at least 2"):
        running(np.ones((1, 3))).finalize()
    with pytest.raises(MismatchError, match="width 4"):
        running(np.ones((2, 3))).merge(running(np.ones((2, 4))))


# Frechet distance


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    mu1, mu2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    var1, var2 = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.25])
    want = 5.0 + np.square(np.sqrt(var1) - np.sqrt(var2)).sum()
    assert frechet_distance(mu1, np.diag(var1), mu2, np.diag(var2)) == pytest.approx(want)


def test_frechet_distance_equals_the_general_eigenvalues_and_is_symmetric() -> None:
    one, two = running(correlated(400, 9, 4)).finalize(), running(correlated(300, 9, 5)).finalize()
    roots = np.sqrt(np.linalg.eigvals(one[1] @ two[1]).real).sum()
    difference = one[0] - two[0]
    want = difference @ difference + np.trace(one[1]) + np.trace(two[1]) - 2 * roots
    assert frechet_distance(*one, *two) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(*two, *one) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-8)


def test_svd_form_with_few_features_equals_the_eigenvalue_form() -> None:
    reference = FrechetReference(*running(correlated(300, 40, seed=6)).finalize())
    few = correlated(25, 40, seed=7)
    by_svd = reference.distance_from_features(few)
    by_eigenvalues = reference.distance(*running(few).finalize())
    assert by_svd.distance == pytest.approx(by_eigenvalues.distance, rel=1e-6)
    assert by_svd.clipped == 0 and -1e-6 < by_eigenvalues.clipped < 0


def test_many_features_take_the_eigenvalue_form() -> None:
    reference = FrechetReference(*running(correlated(300, 6, seed=6)).finalize())
    samples = correlated(50, 6, seed=8)
    want = reference.distance(*running(samples).finalize())
    assert reference.distance_from_features(samples) == want


def test_the_quick_factor_gives_what_eigenvectors_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cholesky's factor of a positive definite covariance; with few rows there is none."""
    samples = running(correlated(300, 24, 1)).finalize()

    def by_eigenvectors(_: object) -> np.ndarray:
        raise np.linalg.LinAlgError("no factor")

    quick = FrechetReference(*running(correlated(300, 24, 0)).finalize())
    few = FrechetReference(*running(correlated(12, 24, 0)).finalize())
    monkeypatch.setattr(np.linalg, "cholesky", by_eigenvectors)
    slow = FrechetReference(quick.mu, quick.sigma)
    assert not np.allclose(quick._factor, slow._factor)
    assert quick.distance(*samples).distance == pytest.approx(
        slow.distance(*samples).distance, rel=1e-11
    )
    for ours, plain in zip(quick.gradient(*samples), slow.gradient(*samples), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-9)
    rows = correlated(10, 24, 2)
    assert quick.distance_from_features(rows).distance == pytest.approx(
        slow.distance_from_features(rows).distance, rel=1e-11
    )
    again = FrechetReference(few.mu, few.sigma)
    assert few.distance(*samples).distance == pytest.approx(again.distance(*samples).distance)


def test_negative_eigenvalues_are_clipped_and_reported() -> None:
    reference = FrechetReference(np.zeros(2), np.diag([4.0, -0.5]))
    assert reference.clipped == pytest.approx(-0.5)
    result = FrechetReference(np.zeros(2), np.eye(2)).distance(np.zeros(2), np.diag([4.0, -0.25]))
    assert result.clipped == pytest.approx(-0.25)
    assert result.distance == pytest.approx(2 + 3.75 - 2 * 2)


def test_frechet_distance_refuses_what_does_not_fit() -> None:
    with pytest.raises(MismatchError, match="width 3 against a reference of width 2"):
        FrechetReference(np.zeros(2), np.eye(2)).distance(np.zeros(3), np.eye(3))
    with pytest.raises(MismatchError, match=r"expected \[D\]"):
        FrechetReference(np.zeros(2), np.eye(3))
    with pytest.raises(DataError, match="NaN"):
        FrechetReference(np.zeros(2), np.full((2, 2), np.nan))


# Inception score


def test_inception_score_closed_forms() -> None:
    certain = np.where(np.eye(4), 1000.0, 0.0)
    assert inception_score(certain, 4) == pytest.approx(4)
    assert inception_score(certain, 2) == pytest.approx(2)
    assert inception_score(certain, 3) == pytest.approx((3 + 1) / 2)
    assert inception_score(np.zeros((10, 7)), 5) == pytest.approx(1)


def test_inception_score_equals_a_plain_loop() -> None:
    logits = np.random.default_rng(9).normal(size=(53, 6)).astype(np.float32) * 3
    scores = []
    for start in range(0, 53, 20):
        p = np.exp(logits[start : start + 20].astype(np.float64))
        p /= p.sum(axis=1, keepdims=True)
        scores.append(np.exp(np.mean([(row * np.log(row / p.mean(axis=0))).sum() for row in p])))
    assert inception_score(logits, 20) == pytest.approx(np.mean(scores), rel=1e-12)
    with pytest.raises(DataError, match="0 images"):
        inception_score(logits[:0], 20)


# precision and recall


def plain_precision_recall(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[Any, Any]:
    def radius(points: np.ndarray, index: int) -> float:
        others = np.delete(points, index, axis=0)
        return float(np.sort(np.square(others - points[index]).sum(axis=1))[k - 1])

    def inside(point: np.ndarray, points: np.ndarray, radii: list[float]) -> bool:
        return any(np.square(point - p).sum() <= r for p, r in zip(points, radii, strict=True))

    reference_radii = [radius(reference, i) for i in range(len(reference))]
    sample_radii = [radius(samples, i) for i in range(len(samples))]
    precision = np.mean([inside(s, reference, reference_radii) for s in samples])
    recall = np.mean([inside(r, samples, sample_radii) for r in reference])
    return precision, recall


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mode", ["float32", "float64"])
def test_precision_recall_equals_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, mode: pr.Mode, k: int
) -> None:
    monkeypatch.setattr(pr, "TILE_ROWS", 20)
    monkeypatch.setattr(pr, "CHUNK_ROWS", 7)
    rng = np.random.default_rng(10)
    reference = rng.normal(size=(45, 4)).astype(np.float32)
    samples = (rng.normal(size=(52, 4)) * 0.9 + 0.3).astype(np.float32)
    found = pr.precision_recall(reference, samples, k=k, mode=mode)
    assert found == pytest.approx(plain_precision_recall(reference, samples, k))
    assert 0.2 < found[0] < 1 and 0.2 < found[1] < 1


def half_distance(u: np.ndarray, v: np.ndarray) -> np.float16:
    u, v = u.astype(np.float16), v.astype(np.float16)
    norm_u = np.float16((u * u).astype(np.float64).sum())
    norm_v = np.float16((v * v).astype(np.float64).sum())
    product = np.float16((u.astype(np.float64) * v.astype(np.float64)).sum())
    return max(np.float16(norm_u - np.float16(2) * product) + norm_v, np.float16(0))


def test_adm_arithmetic_rounds_to_float16_at_every_step() -> None:
    rng = np.random.default_rng(11)
    u, v = rng.uniform(0, 3, (9, 16)).astype(np.float32), rng.uniform(0, 3, (8, 16))
    v = v.astype(np.float32)
    blocks = list(pr._distance_blocks(u, v, "adm_fp16"))
    want = np.array([[half_distance(a, b) for b in v] for a in u], dtype=np.float32)
    np.testing.assert_array_equal(blocks[0][2], want)
    exact = np.square(u[:, None] - v).sum(axis=2)
    assert np.abs(want - exact).max() > 1e-3


def test_a_tile_that_overflows_float16_is_done_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pr, "TILE_ROWS", 10)
    monkeypatch.setattr(pr, "CHUNK_ROWS", 4)
    features = np.random.default_rng(12).normal(size=(20, 8)).astype(np.float32)
    features[17] *= 300
    blocks = {}
    for rows, columns, squared in pr._distance_blocks(features, features, "adm_fp16"):
        plain = pr._plain_distances_to(features[columns], np.float32)(features[rows])
        blocks[rows.start // 10, columns.start // 10] = bool(np.array_equal(squared, plain))
    assert blocks == {(0, 0): False, (0, 1): True, (1, 0): True, (1, 1): True}


def test_large_features_within_float16_stay_in_float16() -> None:
    features = np.full((2, 4), 70.0, dtype=np.float32)
    features[1] += 0.01
    assert 2.1 * 2 * 4 * 70**2 > pr.HALF_MAX
    (_, _, squared), *_ = pr._distance_blocks(features, features, "adm_fp16")
    assert squared[0, 1] == 0 < pr._plain_distances_to(features, np.float64)(features)[0, 1]


def test_precision_recall_refuses() -> None:
    points = np.zeros((4, 2), dtype=np.float32)
    with pytest.raises(DataError, match="at least 4"):
        pr.precision_recall(points, points[:3])
    with pytest.raises(ConfigError, match="adm_fp16"):
        pr.precision_recall(points, points, mode="half")  # type: ignore[arg-type]
    with pytest.raises(MismatchError):
        pr.precision_recall(points, points[:, :1])


# KID


def test_kid_equals_a_plain_loop() -> None:
    x, y = correlated(12, 3, seed=13) / 5, correlated(9, 3, seed=14) / 5

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a.astype(np.float64) @ b.astype(np.float64)) / 3 + 1) ** 3

    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-10)


def test_kid_over_several_blocks_equals_the_whole_matrix() -> None:
    x, y = correlated(BLOCK_ROWS + 10, 3, seed=13) / 5, correlated(50, 3, seed=14) / 5
    grams = [(a.astype(np.float64) @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    n, m = len(x), len(y)
    want = (grams[0].sum() - np.trace(grams[0])) / (n * (n - 1))
    want += (grams[1].sum() - np.trace(grams[1])) / (m * (m - 1)) - 2 * grams[2].mean()
    assert kid(x, y) == pytest.approx(want, rel=1e-8)
    with pytest.raises(DataError, match="at least 2"):
        kid(x, y[:1])


# resize


def test_resize_to_the_same_size_changes_nothing() -> None:
    images = np.random.default_rng(15).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(tf1_bilinear_resize(images, 5), images.astype(np.float32))


def test_resize_has_no_half_pixel_offset() -> None:
    row = np.array([0, 100], dtype=np.uint8)
    image = np.broadcast_to(row[None, None, :, None], (1, 2, 2, 1))
    np.testing.assert_array_equal(tf1_bilinear_resize(image, 4)[0, 0, :, 0], [0, 50, 100, 100])
    with pytest.raises(MismatchError, match="uint8"):
        tf1_bilinear_resize(image.astype(np.float32), 4)  # type: ignore[arg-type]


# networks


def test_missing_network_weights_say_the_ways_out() -> None:
    with pytest.raises(MissingError) as unset:
        load_network("mobilenet-v1")
    with pytest.raises(MissingError) as absent:
        find_network_weights("mobilenet-v1", "nowhere.safetensors")
    for error in (unset, absent):
        assert '[networks.mobilenet-v1] weights = "PATH"' in str(error.value)
        assert "--network-weights PATH" in str(error.value)
    assert "nowhere.safetensors" in str(absent.value)


def test_unknown_networks_name_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mobilenet-v1'"):
        load_network("mobilenet-v2")
    with pytest.raises(UnknownNameError, match="unknown encoder 'dinov9'"):
        load_network("encoder:dinov9")


def test_the_table_imports_without_torch() -> None:
    code = "import sys, repa_pipeline.metrics.networks\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
