"""The table of encoders, preprocessing rules, and loading a teacher."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from repa_pipeline.encoders import ENCODERS, precision
from repa_pipeline.encoders.base import load_encoder
from repa_pipeline.encoders.preprocess import PREPROCESS, preprocess, resample_pos_embed
from repa_pipeline.errors import ConfigError, MismatchError, UnknownNameError
from repa_pipeline.weights import file_sha256

VIT = {
    "img_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 4,
    "num_classes": 0, "class_token": True, "global_pool": "",
}  # fmt: skip


def _save(path: pathlib.Path, state: dict[str, Tensor], config: dict[str, Any]) -> str:
    save_file(state, path, metadata={"config": json.dumps(config)})
    return str(path)


def _images(resolution: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (3, 3, resolution, resolution), dtype=torch.uint8, generator=generator
    )


@pytest.fixture
def vit(tmp_path: pathlib.Path) -> tuple[VisionTransformer, str]:
    torch.manual_seed(0)
    network = VisionTransformer(**VIT).eval()
    return network, _save(tmp_path / "vit.safetensors", network.state_dict(), VIT)


# Tables


def test_tables_import_without_torch() -> None:
    code = (
        "import sys, repa_pipeline.encoders, repa_pipeline.autoencoders, repa_pipeline.weights;"
        "print([m for m in ('torch', 'timm', 'diffusers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown encoder 'dino2-b': did you mean 'dinov2-b"):
        load_encoder("dino2-b", resolution=256)
    for reference, name in (
        ("dinov2-vit-b", "dinov2-b"), ("dinov2reg-vit-l", "dinov2-l-reg"),
        ("dinov1-vit-b", "dinov1-b"), ("mocov3-vit-l", "mocov3-l"), ("clip-vit-L", "clip-l"),
        ("mae-vit-l", "mae-l"), ("jepa-vit-h", "ijepa-h"), ("siglip2", "siglip2-b"),
    ):  # fmt: skip
        assert ENCODERS[reference].name == name


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_encoder_has_a_rule_and_a_grid(name: str) -> None:
    spec = ENCODERS[name]
    rows, columns = spec.grid(256)
    size = spec.input_size(256)
    assert preprocess(_images(256)[:1], spec.rule).shape == (1, 3, size, size)
    assert rows == columns == size // spec.patch_size
    assert spec.num_tokens(512) == 4 * spec.num_tokens(256)


def test_grids_of_the_published_setups() -> None:
    assert ENCODERS["dinov2-b"].input_size(512) == 448
    assert ENCODERS["dinov2-b"].grid(512) == (32, 32)
    assert ENCODERS["mobilenet-v2"].grid(128) == (8, 8)
    assert ENCODERS["mobilenet-v2-os8"].grid(128) == (16, 16)
    assert ENCODERS["digits-vit"].grid(64) == (4, 4)


def test_unusable_resolution_says_which_are_usable() -> None:
    with pytest.raises(ConfigError, match="250 pixels.*multiple of 16"):
        ENCODERS["dinov2-b"].grid(250)


def test_stored_tokens_count_the_class_token() -> None:
    clip, jepa = ENCODERS["clip-l"], ENCODERS["ijepa-h"]
    assert clip.num_tokens(256) == clip.stored_tokens(256) == 256
    assert clip.stored_tokens(256, "patch+cls") == 257
    assert clip.stored_tokens(512, "patch+cls") == 1025
    assert jepa.stored_tokens(256, "patch") == 256
    with pytest.raises(ConfigError, match="'ijepa-h' has no class token: use tokens patch"):
        jepa.stored_tokens(256, "patch+cls")
    with pytest.raises(ConfigError, match="tokens is 'cls': expected patch or patch.cls"):
        clip.stored_tokens(256, "cls")


# Preprocessing


def test_mobilenet_and_digits_rules() -> None:
    images = _images(32)
    torch.testing.assert_close(
        preprocess(images, PREPROCESS["mobilenet"]), images / 127.5 - 1, atol=1e-6, rtol=0
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(preprocess(images, PREPROCESS["digits"]), expected)


def test_preprocess_refuses_other_dtypes_and_shapes() -> None:
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(MismatchError, match=r"expected uint8 \[B, 3, R, R\]"):
            preprocess(images, PREPROCESS["digits"])


def test_position_embedding_refuses_what_is_no_square() -> None:
    with pytest.raises(MismatchError, match="1369 rows: expected 1 prefix"):
        resample_pos_embed(torch.zeros(1, 37 * 37, 4), (16, 16), 1)


# Encoders


def test_vit_with_settings_in_the_file(vit: tuple[VisionTransformer, str]) -> None:
    network, path = vit
    images = _images(64)
    encoder = load_encoder("digits-vit", resolution=64, weights=path)
    with torch.no_grad():
        expected = network.forward_features(preprocess(images, PREPROCESS["digits"]))[:, 1:]
    torch.testing.assert_close(encoder.tokens(images), expected, atol=1e-5, rtol=1e-5)
    assert encoder.weights_sha256 == file_sha256(path)
    assert encoder.resolution == 64


def test_loading_draws_no_random_numbers(vit: tuple[VisionTransformer, str]) -> None:
    before = torch.random.get_rng_state()
    load_encoder("digits-vit", resolution=64, weights=vit[1])
    assert torch.equal(before, torch.random.get_rng_state())


def test_images_of_another_resolution_are_refused(vit: tuple[VisionTransformer, str]) -> None:
    encoder = load_encoder("digits-vit", resolution=64, weights=vit[1])
    with pytest.raises(MismatchError, match=r"\[B, 3, 64, 64\]"):
        encoder.tokens(_images(32))


def test_entry_that_misstates_its_width_is_refused(vit: tuple[VisionTransformer, str]) -> None:
    spec = dataclasses.replace(ENCODERS["digits-vit"], width=64)
    encoder = load_encoder(spec, resolution=64, weights=vit[1])
    with pytest.raises(MismatchError, match=r"made tokens \[17, 128\].*says \[17, 64\]"):
        encoder.tokens(_images(64))


def test_keys_that_do_not_fit_are_named(vit: tuple[VisionTransformer, str]) -> None:
    network, path = vit
    state = network.state_dict()
    state["blocks.7.norm1.weight"] = state.pop("norm.weight")
    state["cls_token"] = torch.zeros(1, 1, 5)
    _save(pathlib.Path(path), state, VIT)
    with pytest.raises(MismatchError) as caught:
        load_encoder("digits-vit", resolution=64, weights=path)
    message = str(caught.value)
    assert "missing: norm.weight;" in message
    assert "unexpected: blocks.7.norm1.weight;" in message
    assert "cls_token (1, 1, 5) (expected (1, 1, 128))" in message


def test_many_wrong_keys_are_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"something.else": torch.zeros(2)}, path)
    with pytest.raises(MismatchError, match="and 17[0-9] more; unexpected: something.else"):
        load_encoder("dinov2-s", resolution=256, weights=str(path))


def test_file_without_settings_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(MismatchError, match="no metadata `config`"):
        load_encoder("digits-vit", resolution=64, weights=str(path))


# The class token, precision, compilation


def test_class_token_comes_first(vit: tuple[VisionTransformer, str]) -> None:
    network, path = vit
    images = _images(64)
    both = load_encoder("digits-vit", resolution=64, weights=path, tokens="patch+cls")
    patches = load_encoder("digits-vit", resolution=64, weights=path)
    with torch.no_grad():
        expected = network.forward_features(preprocess(images, PREPROCESS["digits"]))
    torch.testing.assert_close(both.tokens(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(both.tokens(images)[:, 1:], patches.tokens(images))


def test_no_class_token_to_keep(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="'mobilenet-v2' has no class token"):
        load_encoder("mobilenet-v2", resolution=128, weights="absent", tokens="patch+cls")
    config = {**VIT, "class_token": False}
    network = VisionTransformer(**config)
    path = _save(tmp_path / "without.safetensors", network.state_dict(), config)
    with pytest.raises(MismatchError, match="'digits-vit' has no class token, its table entry"):
        load_encoder("digits-vit", resolution=64, weights=path)
    spec = dataclasses.replace(ENCODERS["digits-vit"], class_token=False)
    assert load_encoder(spec, resolution=64, weights=path).tokens(_images(64)).shape[1] == 16


def test_bf16_is_close_and_float32_is_exact(vit: tuple[VisionTransformer, str]) -> None:
    images = _images(64)
    plain, same, half = (
        load_encoder("digits-vit", resolution=64, weights=vit[1], dtype=dtype).tokens(images)
        for dtype in ("float32", "float32", "bf16")
    )
    assert torch.equal(plain, same) and half.dtype == torch.float32
    assert not torch.equal(plain, half)
    cosine = torch.nn.functional.cosine_similarity(plain, half, dim=-1)
    assert cosine.min() > 0.999
    with pytest.raises(ConfigError, match="dtype is 'fp16': expected float32 or bf16"):
        load_encoder("digits-vit", resolution=64, weights=vit[1], dtype="fp16")


def test_networks_compile_in_one_graph(
    vit: tuple[VisionTransformer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(precision.torch, "compile", compile)
    images = _images(64)
    fast = load_encoder("digits-vit", resolution=64, weights=vit[1], compile=True)
    plain = load_encoder("digits-vit", resolution=64, weights=vit[1])
    assert torch.equal(fast.tokens(images), plain.tokens(images))


def test_every_entry_is_documented() -> None:
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "encoders.md").read_text()
    assert [name for name in ENCODERS if f"`{name}`" not in text] == []
