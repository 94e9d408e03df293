"""The table of autoencoders: moments, decoding, names in weights files, scaling."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from repa_pipeline.autoencoders import AUTOENCODERS, AutoencoderSpec
from repa_pipeline.autoencoders.base import load_autoencoder, scale_latents, unscale_latents
from repa_pipeline.autoencoders.kl import build_kl
from repa_pipeline.encoders import precision
from repa_pipeline.errors import ConfigError, MismatchError, UnknownNameError

KL = {
    "block_out_channels": [16, 16, 16, 16], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 4, "latent_channels": 4,
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
def kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**KL).eval()


def test_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown autoencoder 'taes': did you mean 'taesd'"):
        load_autoencoder("taes")
    assert AUTOENCODERS["sd-vae"].name == "sd-vae-ft-ema"


def test_autoencoder_shapes_and_checks() -> None:
    assert AUTOENCODERS["sd-vae"].latent_shape(256) == (4, 32, 32)
    assert AUTOENCODERS["sd-vae"].stored_channels == 8
    assert AUTOENCODERS["taesd"].stored_channels == 4
    with pytest.raises(ConfigError, match="100 pixels.*multiple of 8"):
        AUTOENCODERS["sd-vae"].latent_shape(100)
    assert AUTOENCODERS["sd-vae-ft-mse"].scale == (0.18215,)
    sdxl = AUTOENCODERS["sdxl-vae"]
    assert sdxl.scale == (0.13025,) and sdxl.hub == "stabilityai/sdxl-vae"
    assert sdxl.latent_shape(256) == (4, 32, 32) and sdxl.stored_channels == 8
    with pytest.raises(ConfigError, match="2 values of scale: give 1 or 4"):
        dataclasses.replace(AUTOENCODERS["taesd"], scale=(1.0, 2.0))
    with pytest.raises(ConfigError, match="posterior 'normal'"):
        dataclasses.replace(AUTOENCODERS["taesd"], posterior="normal")


def test_sd_vae_is_the_published_architecture() -> None:
    for name in ("sd-vae-ft-ema", "sd-vae-ft-mse", "sdxl-vae"):
        network = build_kl(AUTOENCODERS[name].config)
        assert sum(p.numel() for p in network.parameters()) == 83_653_863


def test_file_without_settings_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(MismatchError, match="no metadata `config`"):
        load_autoencoder("digits-vae", weights=str(path))


def test_kl_moments_are_mean_and_std(tmp_path: pathlib.Path, kl: AutoencoderKL) -> None:
    with torch.no_grad():
        kl.quant_conv.weight[4:] *= 300  # log-variances on both sides of the clamp
    autoencoder = load_autoencoder(
        "digits-vae", weights=_save(tmp_path / "kl.safetensors", kl.state_dict(), KL)
    )
    images = _images(32)
    pixels = images / 127.5 - 1
    with torch.no_grad():
        posterior = kl.encode(pixels).latent_dist
        mean, logvar = kl.quant_conv(kl.encoder(pixels)).chunk(2, dim=1)
    assert logvar.min() < -30 and logvar.max() > 20
    moments = autoencoder.encode(images)
    assert moments.shape == (3, 8, 4, 4) and moments.dtype == torch.float32
    expected = torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30, 20))], dim=1)
    torch.testing.assert_close(moments, expected)
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.std], dim=1))


def test_kl_decodes_raw_latents(tmp_path: pathlib.Path, kl: AutoencoderKL) -> None:
    autoencoder = load_autoencoder(
        "digits-vae", weights=_save(tmp_path / "kl.safetensors", kl.state_dict(), KL)
    )
    raw = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = kl.decode(raw).sample
    decoded = autoencoder.decode(raw)
    assert decoded.shape == (2, 3, 32, 32) and not decoded.requires_grad
    assert torch.equal(decoded, expected)
    with pytest.raises(MismatchError, match=r"expected \[B, 4, 4, 4\]"):
        autoencoder.decode(torch.zeros(2, 8, 4, 4))


@pytest.mark.parametrize("name", ["sd-vae-ft-ema", "sdxl-vae"])
def test_kl_old_attention_names(tmp_path: pathlib.Path, kl: AutoencoderKL, name: str) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in kl.state_dict().items():
        for current, former in old.items():
            key = key.replace(f".{current}.", f".{former}.")
        state[key] = value
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    kl.save_pretrained(tmp_path / "diffusers")
    new = tmp_path / "diffusers" / AUTOENCODERS[name].hub_file
    spec = dataclasses.replace(AUTOENCODERS[name], config=KL)
    plain = load_autoencoder(spec, weights=str(new))
    renamed = load_autoencoder(spec, weights=_save(tmp_path / "old", state, {}))
    assert torch.equal(renamed.encode(_images(32)), plain.encode(_images(32)))
    with torch.no_grad():
        posterior = kl.encode(_images(32) / 127.5 - 1).latent_dist
    expected = torch.cat([posterior.mean, posterior.std], dim=1)
    assert torch.equal(plain.encode(_images(32)), expected)
    torch.save(state, tmp_path / "old.bin")
    from_torch = load_autoencoder(spec, weights=str(tmp_path / "old.bin"))
    assert torch.equal(from_torch.encode(_images(32)), expected)


def test_encode_refuses_floats(tmp_path: pathlib.Path, kl: AutoencoderKL) -> None:
    path = _save(tmp_path / "kl.safetensors", kl.state_dict(), KL)
    with pytest.raises(MismatchError, match="expected uint8"):
        load_autoencoder("digits-vae", weights=path).encode(torch.zeros(1, 3, 32, 32))


def test_bf16_is_close(tmp_path: pathlib.Path, kl: AutoencoderKL) -> None:
    path = _save(tmp_path / "kl.safetensors", kl.state_dict(), KL)
    plain = load_autoencoder("digits-vae", weights=path)
    half = load_autoencoder("digits-vae", weights=path, dtype="bf16")
    images = _images(32)
    moments, rounded = plain.encode(images), half.encode(images)
    assert rounded.dtype == torch.float32 and not torch.equal(moments, rounded)
    torch.testing.assert_close(moments, rounded, atol=0.03, rtol=0.03)
    decoded = half.decode(moments[:, :4])
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(plain.decode(moments[:, :4]), decoded, atol=0.05, rtol=0.05)


def test_sdxl_runs_in_float32_alone() -> None:
    expected = "'sdxl-vae' runs in float32 only .*, got dtype bf16"
    with pytest.raises(ConfigError, match=expected):
        load_autoencoder("sdxl-vae", weights="absent", dtype="bf16")
    with pytest.raises(ConfigError, match="dtype is 'half': expected float32 or bf16"):
        load_autoencoder("taesd", weights="absent", dtype="half")


def test_networks_compile_in_one_graph(
    tmp_path: pathlib.Path, kl: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(precision.torch, "compile", compile)
    path = _save(tmp_path / "kl.safetensors", kl.state_dict(), KL)
    plain = load_autoencoder("digits-vae", weights=path)
    fast = load_autoencoder("digits-vae", weights=path, compile=True)
    moments = plain.encode(_images(32))
    assert torch.equal(fast.encode(_images(32)), moments)
    assert torch.equal(fast.decode(moments[:, :4]), plain.decode(moments[:, :4]))


PER_CHANNEL = AutoencoderSpec(
    name="per-channel", loader="none:none", channels=4, downsample=8, posterior="none",
    scale=(0.5, 1.0, 2.0, 4.0), shift=(1.0, 0.0, -1.0, 3.0),
)  # fmt: skip


@pytest.mark.parametrize("spec", [AUTOENCODERS["sd-vae"], PER_CHANNEL], ids=lambda s: s.name)
def test_scaling_is_inverted(spec: AutoencoderSpec) -> None:
    raw = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(unscale_latents(scale_latents(raw, spec), spec), raw)
    torch.testing.assert_close(scale_latents(unscale_latents(raw, spec), spec), raw)


def test_scaling_is_per_channel() -> None:
    scaled = scale_latents(torch.full((1, 4, 1, 2), 3.0), PER_CHANNEL)
    assert scaled[0, :, 0, 1].tolist() == [1.0, 3.0, 8.0, 0.0]
    assert scale_latents(torch.ones(1, 4, 1, 1), AUTOENCODERS["sd-vae"])[0, 0].item() == (
        pytest.approx(0.18215)
    )


def test_scaling_refuses_moments() -> None:
    with pytest.raises(MismatchError, match="draw a sample"):
        scale_latents(torch.zeros(1, 8, 2, 2), AUTOENCODERS["sd-vae"])
