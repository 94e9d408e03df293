"""Preprocessing and position embeddings against the reference program's outputs."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch

from repa_pipeline.encoders import ALIASES, ENCODERS
from repa_pipeline.encoders.preprocess import PREPROCESS, preprocess, resample_pos_embed

Golden = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def golden(shared: pathlib.Path) -> Golden:
    with np.load(shared / "golden" / "preprocessing.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("name", ["dinov2", "clip", "mae", "mocov3", "jepa"])
def test_equals_reference(golden: Golden, name: str) -> None:
    pixels = preprocess(torch.from_numpy(golden["pre_in"]), PREPROCESS[name])
    assert list(pixels.shape) == golden[f"pre_{name}_shape"].tolist()
    np.testing.assert_allclose(
        pixels[:, :, ::5, ::5].numpy(), golden[f"pre_{name}"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["dinov1", "dinov3"])
def test_prepared_as_mae(golden: Golden, name: str) -> None:
    images = torch.from_numpy(golden["pre_in"])
    assert torch.equal(preprocess(images, PREPROCESS[name]), preprocess(images, PREPROCESS["mae"]))


def test_every_entry_of_the_reference_has_its_own_rule() -> None:
    rules = {
        "dinov2": "dinov2", "dinov2reg": "dinov2", "clip": "clip", "mae": "mae",
        "mocov3": "mocov3", "jepa": "jepa", "dinov1": "dinov1",
    }  # fmt: skip
    named = [name for name in ALIASES if "-vit-" in name]
    assert {name.split("-")[0] for name in named} == set(rules)
    for name in named:
        assert ENCODERS[name].rule == PREPROCESS[rules[name.split("-")[0]]]


def test_siglip_takes_pixels_in_minus_one_to_one(golden: Golden) -> None:
    images = torch.from_numpy(golden["pre_in"])
    expected = images / 127.5 - 1
    torch.testing.assert_close(
        preprocess(images, PREPROCESS["siglip"]), expected, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("side", [16, 32])
def test_position_embedding_equals_reference(golden: Golden, side: int) -> None:
    resampled = resample_pos_embed(torch.from_numpy(golden["pos_in"]), (side, side), 1)
    np.testing.assert_allclose(resampled.numpy(), golden[f"pos_out_{side}"], atol=1e-5, rtol=0)
