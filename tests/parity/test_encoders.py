"""DINOv2 through the table against a plain timm forward written here, on random weights."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from repa_pipeline.encoders import ENCODERS
from repa_pipeline.encoders.base import load_encoder

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
TINY_GIANT = {
    "architecture": "vit_giant_patch14_dinov2", "depth": 2, "embed_dim": 96, "num_heads": 4,
}  # fmt: skip


def _random_state(architecture: str, **settings: int) -> dict[str, Tensor]:
    """A pretrained-like state: 37x37 positions, all parameters far from zero."""
    torch.manual_seed(0)
    vit = timm.create_model(architecture, img_size=518, num_classes=0, **settings)
    return {key: value + 0.05 * torch.randn_like(value) for key, value in vit.state_dict().items()}


def _to_hf_naming(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of what differs from timm's; its position names the naming."""
    named = {}
    for key, value in state.items():
        key = key.replace("mlp.fc1", "mlp.weights_in").replace("mlp.fc2", "mlp.weights_out")
        key = key.replace("pos_embed", "embeddings.position_embeddings")
        named[key.replace("cls_token", "embeddings.cls_token")] = value
    return named


def _to_meta_naming(state: dict[str, Tensor]) -> dict[str, Tensor]:
    swiglu = any(key.endswith("mlp.fc1.weight") for key in state)
    named = {"mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    for key, value in state.items():
        if swiglu:
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        named[key] = value
    return named


def _plain_tokens(
    images: Tensor, state: dict[str, Tensor], architecture: str, **settings: int
) -> Tensor:
    """timm's own network at the target size; timm resamples the position embedding itself."""
    size = images.shape[-1] * 224 // 256
    vit = timm.create_model(architecture, img_size=518, num_classes=0, **settings)
    vit.load_state_dict(state)
    vit.set_input_size((size, size))
    pixels = F.interpolate((images / 255 - MEAN) / STD, size, mode="bicubic", antialias=False)
    with torch.no_grad():
        return vit.eval().forward_features(pixels)[:, 1:]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, pathlib.Path]]:
    """DINOv2-S in timm's naming (safetensors) and in Meta's (torch file)."""
    folder = tmp_path_factory.mktemp("dinov2-s")
    paths = {"timm": folder / "timm.safetensors", "meta": folder / "meta.pth"}
    state = _random_state("vit_small_patch14_dinov2")
    save_file(state, paths["timm"])
    torch.save({"mask_token": torch.zeros(1, 384), **state}, paths["meta"])
    yield paths
    for path in paths.values():
        path.unlink()


def _images(resolution: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        0, 256, (2, 3, resolution, resolution), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize("naming", ["timm", "meta"])
def test_dinov2_small_equals_plain_timm(small: dict[str, pathlib.Path], naming: str) -> None:
    images = _images(256)
    encoder = load_encoder("dinov2-s", resolution=256, weights=str(small[naming]))
    tokens = encoder.tokens(images)
    assert encoder.spec.grid(256) == (16, 16)
    assert tokens.shape == (2, 256, 384) and tokens.dtype == torch.float32
    expected = _plain_tokens(
        images, _random_state("vit_small_patch14_dinov2"), "vit_small_patch14_dinov2"
    )
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("naming", ["timm", "meta", "transformers"])
@pytest.mark.parametrize("resolution", [128, 256, 512])
def test_swiglu_naming_equals_plain_timm(
    tmp_path: pathlib.Path, naming: str, resolution: int
) -> None:
    state = _random_state(**TINY_GIANT)
    path = tmp_path / "giant.safetensors"
    names = {"timm": dict, "meta": _to_meta_naming, "transformers": _to_hf_naming}
    save_file(names[naming](state), path)
    spec = dataclasses.replace(ENCODERS["dinov2-g"], width=96, config=TINY_GIANT)
    images = _images(resolution)
    tokens = load_encoder(spec, resolution=resolution, weights=str(path)).tokens(images)
    assert tokens.shape[1] == spec.num_tokens(resolution) == (resolution // 16) ** 2
    torch.testing.assert_close(
        tokens, _plain_tokens(images, state, **TINY_GIANT), atol=1e-5, rtol=1e-5
    )


def test_tokens_need_no_gradient_and_ignore_the_batch(small: dict[str, pathlib.Path]) -> None:
    encoder = load_encoder("dinov2-s", resolution=64, weights=str(small["timm"]))
    images = _images(64)
    tokens = encoder.tokens(images)
    assert not tokens.requires_grad
    assert torch.equal(tokens, encoder.tokens(images))
    torch.testing.assert_close(tokens[1:], encoder.tokens(images[1:]), atol=1e-5, rtol=1e-5)
