"""DiT against diffusers' class, the published names, and what blocks recompute and compile to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from repa_pipeline.errors import ConfigError, DamagedError, DataError, MissingError
from repa_pipeline.models import build_model
from repa_pipeline.models.dit import DiT, DiTConfig
from repa_pipeline.models.published_dit import (
    dit_config,
    from_diffusers,
    load_published_dit,
    to_diffusers,
)
from repa_pipeline.models.sit import SiT, SiTConfig

SIZES: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 4,
    "patch_size": 2,
    "width": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}
CONFIG = DiTConfig(**SIZES)
# diffusers' own defaults are eps 1e-5 for one of the norms: DiT has 1e-6 everywhere.
THEIRS: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
    "norm_eps": 1e-6,
}


def randomised(config: SiTConfig = CONFIG) -> SiT:
    """A model whose output depends on everything: no zero layers."""
    model = DiT(config) if isinstance(config, DiTConfig) else SiT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def inputs(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.tensor([0, 1, 250, 731, 999])[:batch], torch.tensor([0, 3, 9, 10, 5])[:batch]


def with_time_frequencies(model: Any, shift: int) -> Any:
    """A diffusers DiT whose frequencies of t are spaced by 1 / (128 - shift)."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift
    return model


# --- parity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_forward_is_that_of_the_diffusers_class(shift: int) -> None:
    """Its frequencies of t are not the published ones (shift 1, not 0): equal under both rules."""
    diffusers = pytest.importorskip("diffusers")
    ours = randomised(DiTConfig(**SIZES, frequency_shift=shift))
    theirs = diffusers.DiTTransformer2DModel(**THEIRS).eval()
    if shift == 0:
        with_time_frequencies(theirs, 0)
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    x, t, y = inputs()
    found, expected = ours(x, t, y), theirs(x, t, y).sample
    assert found.shape == (5, 8, 8, 8) and float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (randomised()(x, t, y) - found).abs().max() > 1e-3 or shift == 0


@torch.no_grad()
def test_random_weights_of_the_diffusers_class_load_here() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    defaults = {key: value for key, value in THEIRS.items() if key != "norm_eps"}
    theirs = diffusers.DiTTransformer2DModel(**defaults).eval()
    state = theirs.state_dict()
    # The class keeps an embedder in every block; only the same one in all is a DiT.
    shared = {key: state[f"transformer_blocks.0.{key.split('.', 2)[2]}"]
              for key in state if ".norm1.emb." in key}  # fmt: skip
    theirs.load_state_dict({**state, **shared})
    ours = DiT(DiTConfig(**SIZES, frequency_shift=1))
    ours.load_state_dict(from_diffusers(theirs.state_dict(), input_size=8))
    x, t, y = inputs()
    torch.testing.assert_close(ours(x, t, y), theirs(x, t, y).sample, rtol=0, atol=1e-5)


def test_names_of_diffusers_and_back() -> None:
    state = randomised().state_dict()
    back = from_diffusers(to_diffusers(state), input_size=8)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    lacking = to_diffusers(state)
    del lacking["transformer_blocks.2.ff.net.2.bias"]
    with pytest.raises(DataError, match="has no 'transformer_blocks.2.ff.net.2.bias'"):
        from_diffusers(lacking, input_size=8)


# --- published files ---------------------------------------------------------------------------


def published_keys(depth: int) -> set[str]:
    """The keys of facebookresearch/DiT's DiT-XL-2-256x256.pt."""
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    for n in range(depth):
        inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        layers += [f"blocks.{n}.{name}" for name in inner]
    keys = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    return keys | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_the_published_xl_has_our_names_and_shapes() -> None:
    with torch.device("meta"):
        model = build_model("DiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes.keys() == published_keys(28)
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["blocks.27.mlp.fc1.weight"] == (4608, 1152)
    assert shapes["blocks.27.attn.qkv.weight"] == (3456, 1152)
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert dit_config(model.state_dict()) == model.config


def test_xl_has_the_names_and_shapes_of_the_diffusers_class() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = build_model("DiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
        theirs = diffusers.DiTTransformer2DModel(out_channels=8)
    renamed = {key: tuple(v.shape) for key, v in to_diffusers(model.state_dict()).items()}
    assert renamed == {key: tuple(v.shape) for key, v in theirs.state_dict().items()}


@pytest.mark.parametrize("kind", ["authors", "training checkpoint", "diffusers bin", "diffusers"])
def test_published_files_load(kind: str, tmp_path: Path) -> None:
    model = randomised()
    state = dict(model.state_dict())
    path = tmp_path / ("model.safetensors" if kind == "diffusers" else "DiT.pt")
    if kind == "authors":
        torch.save(state, path)
    elif kind == "training checkpoint":
        raw = {key: value + 1 for key, value in state.items()}
        args = argparse.Namespace(model="DiT-S/2")
        torch.save({"model": raw, "ema": state, "opt": {}, "args": args}, path)
    elif kind == "diffusers bin":
        torch.save(to_diffusers(state), path)
    else:
        save_file({key: v.clone() for key, v in to_diffusers(state).items()}, path)
    config, loaded = load_published_dit(path, input_size=8, num_heads=4)
    assert config == CONFIG and loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    again = DiT(config).eval()
    again.load_state_dict(loaded)
    assert torch.equal(again(*inputs()), model(*inputs()))


def test_files_that_are_no_dit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no weights file at .*absent.pt"):
        load_published_dit(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(DamagedError, match="text.pt"):
        load_published_dit(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="not the state dict of a DiT: 'pos_embed'"):
        load_published_dit(tmp_path / "other.pt")
    torch.save(randomised(SiTConfig(**SIZES)).state_dict(), tmp_path / "sit.pt")
    with pytest.raises(DataError, match="answers with 4, expected 8: it is no DiT"):
        load_published_dit(tmp_path / "sit.pt", num_heads=4)
    torch.save(dict(randomised().state_dict()), tmp_path / "small.pt")
    with pytest.raises(ConfigError, match="width 32, depth 3: say it with num_heads"):
        load_published_dit(tmp_path / "small.pt")


# --- the trunk ---------------------------------------------------------------------------------


def test_a_dit_is_the_sit_with_another_output() -> None:
    """Same weights, same tokens; only the last layer is wider."""
    dit, sit = randomised(), SiT(SiTConfig(**SIZES))
    state = dict(dit.state_dict())
    for part in ("weight", "bias"):
        key = f"final_layer.linear.{part}"
        # Of each pixel of a patch the first half is the noise.
        state[key] = state[key].unflatten(0, (4, 2, 4))[:, 0].flatten(0, 1)
    sit.load_state_dict(state)
    x, t, y = inputs()
    answer, tokens = dit(x, t, y, capture=2)
    velocity, same = sit(x, t.float(), y, capture=2)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(answer[:, :4], velocity)


def test_timesteps_may_be_whole_or_float() -> None:
    model = randomised()
    x, t, y = inputs()
    assert torch.equal(model(x, t, y), model(x, t.float(), y))
    assert not torch.equal(model(x, t, y)[3], model(x, t + 1, y)[3])
    exact = model.double()(x.double(), t, y)
    assert exact.dtype == torch.float64


def gradients(model: SiT) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    answer, tokens = model(*inputs(), capture=2)
    (answer.square().mean() + tokens.square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [CONFIG, SiTConfig(**SIZES, qk_norm=True)])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_blocks_give_the_same_gradients(config: SiTConfig, autocast: bool) -> None:
    model = randomised(config).train()
    runs: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = gradients(model)
        assert len(runs) == 1
        model.gradient_checkpointing = True
        again = gradients(model)
        assert len(runs) == 3
        with torch.no_grad():
            model(*inputs())
        assert len(runs) == 4
    assert kept.keys() == again.keys() and len(kept) > 30
    assert all(torch.equal(again[name], value) for name, value in kept.items())


@pytest.mark.slow
def test_compiled_blocks_are_the_eager_ones() -> None:
    """Also where they are recomputed on the way back."""
    model = randomised().train()
    eager = gradients(model)
    for block in model.blocks:
        block.compile()
    for model.gradient_checkpointing in (False, True):
        compiled = gradients(model)
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["DiT-S/8", "SiT-S/4"])
@pytest.mark.parametrize("input_size", [32, 64])
def test_latents_of_256_and_of_512_pixels(name: str, input_size: int) -> None:
    with torch.device("meta"):
        model = build_model(name, input_size=input_size, in_channels=4, num_classes=1000)
        x = torch.empty(2, 4, input_size, input_size)
        answer = model(x, torch.empty(2), torch.zeros(2, dtype=torch.int64))
    channels = 8 if name.startswith("DiT") else 4
    assert answer.shape == (2, channels, input_size, input_size)
