"""Real small networks against the values measured for them (verification.json)."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from repa_pipeline.autoencoders.base import load_autoencoder
from repa_pipeline.encoders.base import load_encoder
from repa_pipeline.encoders.mobilenet_v2 import load_mobilenet_v2
from repa_pipeline.weights import file_sha256


@pytest.fixture(scope="module")
def expected(shared: pathlib.Path) -> dict[str, Any]:
    outputs: dict[str, Any] = json.loads((shared / "data" / "verification.json").read_text())
    return outputs["reference_outputs"]


@pytest.fixture(scope="module")
def banana(shared: pathlib.Path) -> Image.Image:
    with tarfile.open(shared / "data" / "imagenet48" / "imagenet48.tar") as tar:
        for member in tar:
            if "n07753592_banana" in member.name and member.name.endswith(".jpg"):
                data = tar.extractfile(member)
                assert data is not None
                return Image.open(io.BytesIO(data.read())).convert("RGB")
    raise AssertionError("no banana in imagenet48.tar")


def _resized(image: Image.Image, size: int) -> Tensor:
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def mobilenet(shared: pathlib.Path) -> str:
    return str(shared / "data" / "weights" / "mobilenet_v2_1.0_int8.safetensors")


@pytest.fixture(scope="module")
def taesd(shared: pathlib.Path) -> str:
    return str(shared / "data" / "weights" / "taesd_bf16.safetensors")


@torch.no_grad()
def test_mobilenet_v2(expected: dict[str, Any], banana: Image.Image, mobilenet: str) -> None:
    network = load_mobilenet_v2(mobilenet, output_stride=32)
    features = network.features(_resized(banana, 224) / 127.5 - 1)
    logits = network.logits(features)[0].topk(3)
    wanted = expected["mobilenet_v2_1.0_int8"]
    assert list(features.shape[1:]) == wanted["feature_shape"]
    assert features.mean().item() == pytest.approx(wanted["feature_mean"], abs=2e-6)
    assert features.std().item() == pytest.approx(wanted["feature_std"], abs=2e-6)
    assert logits.indices.tolist() == wanted["top3"]
    assert logits.values.tolist() == pytest.approx(wanted["top3_logits"], abs=1e-4)


@pytest.mark.parametrize(("name", "stride"), [("mobilenet-v2", 16), ("mobilenet-v2-os8", 8)])
@torch.no_grad()
def test_denser_map_holds_the_coarse_one(
    banana: Image.Image, mobilenet: str, name: str, stride: int
) -> None:
    """Dilation keeps every value of the stride-32 map; SAME padding places them at the end."""
    images = _resized(banana, 128)
    encoder = load_encoder(name, resolution=128, weights=mobilenet)
    grid = encoder.spec.grid(128)
    assert grid == (128 // stride, 128 // stride)
    tokens = encoder.tokens(images)
    dense = tokens.transpose(1, 2).unflatten(2, grid)
    step = 32 // stride
    coarse = load_mobilenet_v2(mobilenet, output_stride=32).features(images / 127.5 - 1)
    torch.testing.assert_close(
        dense[..., step - 1 :: step, step - 1 :: step], coarse, atol=2e-4, rtol=1e-4
    )


def test_taesd(expected: dict[str, Any], banana: Image.Image, taesd: str) -> None:
    images = _resized(banana, 256)
    autoencoder = load_autoencoder("taesd", weights=taesd)
    latent = autoencoder.encode(images)
    decoded = autoencoder.decode(latent).clamp(-1, 1)
    wanted = expected["taesd"]
    assert list(latent.shape[1:]) == wanted["latent_shape"]
    assert latent.mean((0, 2, 3)).tolist() == pytest.approx(
        wanted["latent_mean_per_channel"], abs=2e-5
    )
    assert latent.std().item() == pytest.approx(wanted["latent_std"], abs=1e-4)
    mse = ((decoded + 1) / 2 - images / 255).square().mean()
    assert -10 * mse.log10().item() == pytest.approx(wanted["psnr"], abs=2e-3)


def test_taesd_in_diffusers_naming(tmp_path: pathlib.Path, banana: Image.Image, taesd: str) -> None:
    renamed = {}
    for key, value in load_file(taesd).items():
        half, index, rest = key.split(".", 2)
        layer = int(index) if half == "encoder" else int(index) - 1
        renamed[f"{half}.layers.{layer}.{rest}"] = value
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(renamed, path)
    images = _resized(banana, 64)
    own, other = (load_autoencoder("taesd", weights=str(name)) for name in (taesd, path))
    assert torch.equal(own.encode(images), other.encode(images))
    assert torch.equal(own.decode(own.encode(images)), other.decode(own.encode(images)))


def test_weights_hash_is_the_files(shared: pathlib.Path, taesd: str) -> None:
    about = json.loads((shared / "data" / "weights" / "taesd_bf16.json").read_text())
    assert load_autoencoder("taesd", weights=taesd).weights_sha256 == about["sha256"]
    assert file_sha256(taesd) == about["sha256"]
