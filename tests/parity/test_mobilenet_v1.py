"""MobileNetV1 from the quantised file against the outputs recorded for it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from repa_pipeline.errors import DamagedError, MismatchError, MissingError
from repa_pipeline.metrics.mobilenet_v1 import MobileNetV1, load
from repa_pipeline.metrics.networks import NETWORKS, FeatureNetwork, load_network
from repa_pipeline.quantised import load_quantised, tf_same_conv2d

NAME = "mobilenet_v1_1.0_uint8"


@pytest.fixture(scope="module")
def weights(shared: Path) -> Path:
    return shared / "data" / "weights" / f"{NAME}.safetensors"


@pytest.fixture(scope="module")
def network(weights: Path) -> FeatureNetwork:
    return load_network("mobilenet-v1", weights=str(weights))


@pytest.fixture(scope="module")
def expected(shared: Path) -> dict[str, Any]:
    recorded = json.loads((shared / "data" / "verification.json").read_text())
    found: dict[str, Any] = recorded["reference_outputs"][NAME]
    return found


@pytest.fixture(scope="module")
def banana(shared: Path) -> Tensor:
    with tarfile.open(shared / "data" / "imagenet48" / "imagenet48.tar") as archive:
        (name,) = [n for n in archive.getnames() if "n07753592_banana" in n and n.endswith(".jpg")]
        member = archive.extractfile(name)
        assert member is not None
        image = Image.open(io.BytesIO(member.read())).convert("RGB")
    pixels = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def test_recorded_outputs_are_reproduced(
    network: FeatureNetwork, expected: dict[str, Any], banana: Tensor
) -> None:
    features = network.features(banana)
    assert features.logits is not None
    top = features.logits[0].topk(3)
    assert top.indices.tolist() == expected["top3"]
    assert top.values.tolist() == pytest.approx(expected["top3_logits"], abs=1e-3)
    assert features.pool.shape == (1, 1024) and features.pool.dtype == torch.float32
    assert float(features.pool.mean()) == pytest.approx(expected["feature_mean"], abs=1e-5)


def test_the_last_map_has_the_recorded_spread(
    weights: Path, expected: dict[str, Any], banana: Tensor
) -> None:
    with torch.no_grad():
        last = load(NETWORKS["mobilenet-v1"], weights).maps(banana)[-1]
    assert list(last.shape[1:]) == expected["feature_shape"]
    assert float(last.std()) == pytest.approx(expected["feature_std"], abs=1e-5)


def test_weights_hash_is_the_published_one(shared: Path, network: FeatureNetwork) -> None:
    described = json.loads((shared / "data" / "weights" / f"{NAME}.json").read_text())
    assert network.weights_sha256 == described["sha256"]


def test_spatial_features_are_the_first_channels_in_order_y_x_channel(
    network: FeatureNetwork, weights: Path, banana: Tensor
) -> None:
    spatial = network.features(banana).spatial
    assert spatial is not None and spatial.shape == (1, 14 * 14 * 7)
    with torch.no_grad():
        block = load(NETWORKS["mobilenet-v1"], weights).maps(banana)[10]
    assert spatial[0].reshape(14, 14, 7)[3, 5, 2] == block[0, 2, 3, 5]
    assert float(spatial.std()) > 0.1
    assert MobileNetV1(spatial_channels=0)(banana[..., :32, :32]).spatial is None


def test_features_do_not_depend_on_the_batch(network: FeatureNetwork, banana: Tensor) -> None:
    flipped = banana.flip(-1)
    both = network.features(torch.cat([banana, flipped])).pool
    alone = torch.cat([network.features(banana).pool, network.features(flipped).pool])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
    assert not both.requires_grad


def test_other_images_are_refused(network: FeatureNetwork, banana: Tensor) -> None:
    for wrong in (banana.float(), banana[0], banana[:, :1], banana[..., :100]):
        with pytest.raises(MismatchError, match=r"expected uint8 \[B, 3, R, R\]"):
            network.features(wrong)


def test_an_encoder_serves_as_a_network(shared: Path, banana: Tensor) -> None:
    from repa_pipeline.encoders.base import load_encoder

    path = str(shared / "data" / "weights" / "mobilenet_v2_1.0_int8.safetensors")
    network = load_network("encoder:mobilenet-v2", weights=path)
    for size in (224, 128):
        images = banana[..., :size, :size]
        encoder = load_encoder("mobilenet-v2", resolution=size, weights=path)
        found = network.features(images)
        torch.testing.assert_close(found.pool, encoder.tokens(images).mean(1), rtol=0, atol=0)
        assert found.spatial is None and found.logits is None
    assert network.weights_sha256 == encoder.weights_sha256


def test_the_weights_of_another_network_are_refused(shared: Path) -> None:
    other = shared / "data" / "weights" / "mobilenet_v2_1.0_int8.safetensors"
    with pytest.raises(MismatchError, match="MobileNetV1"):
        load(NETWORKS["mobilenet-v1"], other)


def test_dequantisation_by_hand(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stored = {
        "a.q": torch.tensor([[[[0]]], [[[200]]]], dtype=torch.uint8),
        "a.scale": torch.tensor([0.5]),
        "a.zp": torch.tensor([100], dtype=torch.int32),
        "a.bias": torch.tensor([1.0, 2.0]),
        "b.q": torch.tensor([[[[-3]]], [[[4]]]], dtype=torch.int8),
        "b.scale": torch.tensor([0.1, 2.0]),
    }
    save_file(stored, tmp_path / "q.safetensors")
    state = load_quantised(tmp_path / "q.safetensors")
    assert state.keys() == {"a.weight", "a.bias", "b.weight"}
    assert state["a.weight"].flatten().tolist() == [-50.0, 50.0]
    assert state["b.weight"].flatten().tolist() == pytest.approx([-0.3, 8.0])
    save_file({"a.q": stored["a.q"]}, tmp_path / "q.safetensors")
    with pytest.raises(DamagedError, match="a.scale"):
        load_quantised(tmp_path / "q.safetensors")
    (tmp_path / "q.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DamagedError, match="safetensors"):
        load_quantised(tmp_path / "q.safetensors")
    with pytest.raises(MissingError):
        load_quantised(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "padding"),
    [
        (8, 1, 1, (1, 1)),
        (8, 2, 1, (0, 1)),
        (7, 2, 1, (1, 1)),
        (8, 1, 2, (2, 2)),
        (8, 2, 2, (1, 2)),
    ],
)
def test_same_padding(size: int, stride: int, dilation: int, padding: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, size, size, generator=generator)
    weight, bias = torch.randn(6, 2, 3, 3, generator=generator), torch.arange(6.0)
    found = tf_same_conv2d(x, weight, bias, stride, dilation, 2)
    want = F.conv2d(F.pad(x, padding + padding), weight, bias, stride, 0, dilation, 2)
    assert found.shape[-1] == -(-size // stride)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
