"""The shipped networks of the embedded default: the files are the described ones, and they work.

Scores are measured again from the shipped weights on digits that no network was trained on; the
floors leave about 1% (4 images) for other versions of the libraries.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from repa_pipeline.autoencoders import AUTOENCODERS
from repa_pipeline.autoencoders.base import load_autoencoder, scale_latents
from repa_pipeline.data import digits
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.encoders.base import load_encoder
from repa_pipeline.errors import DataError, MismatchError
from repa_pipeline.metrics.digits_judge import DigitsJudge, fit_judge
from repa_pipeline.metrics.networks import load_network
from repa_pipeline.weights import ASSETS, load_config

CNN_FLOOR = 0.98
KNN_FLOOR = 0.96
PSNR_FLOOR_DB = 36.0
JUDGE_FLOOR = 0.98
MAX_BYTES = 2**20


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ASSETS / "assets.json").read_text())
    return found


@pytest.fixture(scope="module")
def images() -> Tensor:
    """All digits, uint8 [1797, 3, 64, 64]."""
    return torch.from_numpy(digits.embedded_digits()[0]).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def judge() -> DigitsJudge:
    return fit_judge()


def _accuracy(predicted: Any, index: Any) -> float:
    return float(np.mean(np.asarray(predicted) == digits.labels()[index]))


def test_files_are_the_described_ones(described: dict[str, Any]) -> None:
    assert sorted(described["files"]) == sorted(
        path.name for path in ASSETS.glob("digits_*.safetensors")
    )
    for name, facts in described["files"].items():
        data = (ASSETS / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == facts["sha256"], name
        assert len(data) == facts["num_bytes"] < MAX_BYTES, name


def test_configs_travel_with_the_files() -> None:
    vae = load_config(ASSETS / "digits_vae.safetensors")
    vit = load_config(ASSETS / "digits_vit.safetensors")
    assert (vae["latent_channels"], len(vae["block_out_channels"])) == (4, 4)
    assert (vit["embed_dim"], vit["patch_size"], vit["depth"]) == (128, 16, 4)


# Digits


def test_split_and_labels() -> None:
    train, held_out = digits.train_indices(), digits.heldout_indices()
    assert (len(train), len(held_out)) == (1438, 359)
    assert held_out[:3].tolist() == [4, 9, 14]
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(1797))
    assert digits.labels()[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_grays_are_the_stored_values() -> None:
    from sklearn.datasets import load_digits

    expected = np.floor(load_digits().images * 255 / 16 + 0.5)
    assert np.array_equal(digits.digit_grays(), expected)
    assert digits.digit_grays().max() == 255


def test_png_holds_the_digit_and_prepares_like_the_arrays(images: Tensor) -> None:
    for index in (0, 4, 1796):
        stored = Image.open(io.BytesIO(digits.digit_png(index)))
        assert (stored.mode, stored.size, stored.format) == ("L", (8, 8), "PNG")
        assert np.array_equal(np.asarray(stored), digits.digit_grays()[index])
        prepared = adm_center_crop(decode_image(digits.digit_png(index)).image, 64)
        assert np.array_equal(prepared, images[index].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("index", [-1, 1797])
def test_no_such_digit(index: int) -> None:
    with pytest.raises(DataError, match=r"expected 0\.\.1796"):
        digits.digit_png(index)


# Scores of the shipped weights on held-out digits


def test_cnn_classifies_held_out_digits(images: Tensor, described: dict[str, Any]) -> None:
    index = digits.heldout_indices()
    features = load_network("digits-cnn").features(images[index])
    assert features.logits is not None and features.spatial is not None
    accuracy = _accuracy(features.logits.argmax(1), index)
    assert accuracy >= CNN_FLOOR
    stated = described["files"]["digits_cnn.safetensors"]["held_out"]["accuracy"]
    assert accuracy == pytest.approx(stated, abs=0.006)
    assert features.pool.shape == (359, 64) and features.spatial.shape == (359, 448)


def test_cnn_spatial_order_batch_and_other_sizes(images: Tensor) -> None:
    network: Any = load_network("digits-cnn")
    batch = images[:8]
    features = network.features(batch)
    module = network._module
    maps = batch.float() / 127.5 - 1
    for stage in module.stages:
        maps = stage(maps)
    row, column, channel = 5, 2, 6
    assert features.spatial is not None
    torch.testing.assert_close(
        features.spatial[:, (row * 8 + column) * 7 + channel], maps[:, channel, row, column]
    )
    torch.testing.assert_close(network.features(batch[3:4]).pool, features.pool[3:4])
    doubled = batch.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(network.features(doubled).pool, features.pool)
    small = batch[:, :, ::2, ::2]
    assert torch.equal(network.features(small).logits.argmax(1), features.logits.argmax(1))


def test_vit_neighbours_share_the_class(images: Tensor, described: dict[str, Any]) -> None:
    encoder = load_encoder("digits-vit", resolution=64)
    train, held_out = digits.train_indices(), digits.heldout_indices()
    pooled = torch.nn.functional.normalize(encoder.tokens(images).mean(dim=1), dim=1)
    nearest = (pooled[held_out] @ pooled[train].T).topk(10, dim=1).indices
    votes = torch.from_numpy(digits.labels()[train])[nearest]
    accuracy = _accuracy(votes.mode(dim=1).values, held_out)
    assert accuracy >= KNN_FLOOR
    stated = described["files"]["digits_vit.safetensors"]["held_out"]["knn"]
    assert accuracy == pytest.approx(stated, abs=0.006)


def test_vit_tokens_differ_by_place(images: Tensor) -> None:
    """Tokens of one image must not all be copies of a class summary."""
    tokens_BTD = load_encoder("digits-vit", resolution=64).tokens(images[:100])
    between_places = tokens_BTD.var(dim=1).mean()
    assert between_places > 0.1 * tokens_BTD.var(dim=(0, 1)).mean()


def test_vae_reconstructs_held_out_digits(
    images: Tensor, judge: DigitsJudge, described: dict[str, Any]
) -> None:
    index = digits.heldout_indices()
    originals = images[index]
    vae = load_autoencoder("digits-vae")
    mean, std = vae.encode(originals).chunk(2, dim=1)
    pixels = ((vae.decode(mean) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    mse = (pixels.double() - originals.double()).square().mean(dim=(1, 2, 3))
    psnr_db = float((10 * torch.log10(255**2 / mse)).mean())
    assert psnr_db >= PSNR_FLOOR_DB
    stated = described["files"]["digits_vae.safetensors"]["held_out"]["psnr"]
    assert psnr_db == pytest.approx(stated, abs=0.1)
    on_decoded = _accuracy(judge.predict(pixels.numpy()), index)
    assert on_decoded >= judge.held_out_accuracy - 0.01
    sampled = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    scaled = scale_latents(sampled, AUTOENCODERS["digits-vae"]).transpose(0, 1).flatten(1)
    assert scaled.mean(dim=1).abs().max() < 0.05
    assert (scaled.std(dim=1) - 1).abs().max() < 0.05
    assert 0.02 < float(std.mean()) < 0.2


def test_table_scales_by_the_described_latents(described: dict[str, Any]) -> None:
    latents = described["files"]["digits_vae.safetensors"]["latents"]
    spec = AUTOENCODERS["digits-vae"]
    assert spec.shift == pytest.approx(latents["mean"], abs=1e-5)
    assert spec.scale == pytest.approx([1 / std for std in latents["std"]], abs=1e-4)


# Judge


def test_judge_is_good_and_reads_both_layouts(images: Tensor, judge: DigitsJudge) -> None:
    held_out = images[digits.heldout_indices()].numpy()
    channels_last = held_out.transpose(0, 2, 3, 1)
    predicted = judge.predict(held_out)
    assert judge.held_out_accuracy >= JUDGE_FLOOR
    assert _accuracy(predicted, digits.heldout_indices()) == judge.held_out_accuracy
    assert predicted.dtype == np.int64
    assert np.array_equal(judge.predict(channels_last), predicted)
    doubled = channels_last.repeat(2, axis=1).repeat(2, axis=2)
    assert np.array_equal(judge.predict(doubled), predicted)
    assert judge.predict(held_out[:0]).shape == (0,)


def test_judge_refuses_other_images(judge: DigitsJudge) -> None:
    with pytest.raises(MismatchError, match="multiple of 8"):
        judge.predict(np.zeros((2, 3, 60, 60), np.uint8))
    with pytest.raises(MismatchError, match="float32"):
        judge.predict(np.zeros((2, 64, 64, 3), np.float32))
