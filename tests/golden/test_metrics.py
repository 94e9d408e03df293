"""The metrics against the published evaluation suite's own outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from repa_pipeline.metrics.frechet import FrechetReference, frechet_distance
from repa_pipeline.metrics.inception_score import inception_score
from repa_pipeline.metrics.precision_recall import precision_recall
from repa_pipeline.metrics.resize import tf1_bilinear_resize
from repa_pipeline.metrics.statistics import RunningStatistics

Golden = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    with np.load(shared / "golden" / "adm_metrics.npz", allow_pickle=False) as stored:
        return dict(stored)


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    running = RunningStatistics()
    running.update(features)
    return running.finalize()


@pytest.mark.parametrize(("kind", "expected"), [("pool", "fid"), ("spatial", "sfid")])
def test_frechet_distance(golden: Golden, kind: str, expected: str) -> None:
    reference, samples = golden[f"ref_{kind}"], golden[f"smp_{kind}"]
    want = float(golden[f"expect_{expected}"])
    both = (*statistics(reference), *statistics(samples))
    assert frechet_distance(*both) == pytest.approx(want, rel=1e-6)
    cached = FrechetReference(*statistics(reference))
    assert cached.distance_from_features(samples).distance == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("split_size", [5000, 100])
def test_inception_score(golden: Golden, split_size: int) -> None:
    logits = golden["smp_pool"] @ golden["softmax_w"]
    want = float(golden[f"expect_is_split_{split_size}"])
    assert inception_score(logits, split_size) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("mode", "key"), [("float64", "fp64"), ("adm_fp16", "adm_fp16")])
def test_precision_recall(golden: Golden, mode: str, key: str) -> None:
    precision, recall = precision_recall(golden["ref_pool"], golden["smp_pool"], mode=mode)
    assert precision == pytest.approx(float(golden[f"expect_precision_{key}"]), abs=1e-6)
    assert recall == pytest.approx(float(golden[f"expect_recall_{key}"]), abs=1e-6)


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_tensorflow_resize(shared: Path, size: int) -> None:
    with np.load(shared / "golden" / "tf_resize.npz", allow_pickle=False) as stored:
        images, want = stored[f"im{size}"], stored[f"resized{size}"]
    resized = tf1_bilinear_resize(images, 299)
    assert resized.shape == (1, 299, 299, 3) and resized.dtype == np.float32
    np.testing.assert_allclose(resized[:, ::9, ::9], want, rtol=1e-6)


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_the_resize_inside_the_fid_network(shared: Path, size: int) -> None:
    """torch-fidelity's, which images pass through when `inception-v3` scores them."""
    with np.load(shared / "golden" / "tf_resize.npz", allow_pickle=False) as stored:
        images, want = stored[f"im{size}"], stored[f"resized{size}"]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    made = interpolate_bilinear_2d_like_tensorflow1x(pixels, (299, 299), align_corners=False)
    resized = made.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(resized[:, ::9, ::9], want, rtol=1e-6, atol=1e-5)
