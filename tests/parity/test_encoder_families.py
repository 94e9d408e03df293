"""Every family of teachers: published names, and tokens against a forward written out here.

Each file is made by timm's own network class, small and with random weights, in timm's names and
in the authors'. The plain forward below knows the families' rules and shares no code with ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from repa_pipeline.encoders import ENCODERS, EncoderSpec
from repa_pipeline.encoders.base import Encoder, load_encoder
from repa_pipeline.encoders.mocov3 import from_published
from repa_pipeline.encoders.timm_vit import build_vit
from repa_pipeline.errors import MismatchError

State = dict[str, Tensor]
Published = Mapping[str, Any]

RESOLUTION = 96
WIDTH, HEADS, DEPTH = 48, 3, 2
SMALL = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# The plain forward, in float64


@dataclasses.dataclass(frozen=True)
class Rule:
    """What an entry does to an image of RESOLUTION pixels, as its authors or the reference say."""

    mean_std: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    size: int = 96
    act: str = "gelu"
    eps: float = 1e-6
    num_registers: int = 0
    class_token: bool = True
    class_has_position: bool = True
    final_norm: bool = True
    rope: bool = False


DINOV2 = Rule(size=84)
RULES = {
    "dinov2-b": DINOV2,
    "dinov2-b-reg": dataclasses.replace(DINOV2, num_registers=4, class_has_position=False),
    "dinov1-b": Rule(),
    "mocov3-b": Rule(),
    "mae-l": Rule(final_norm=False),
    "clip-l": Rule(mean_std=CLIP, size=84, act="quick_gelu", eps=1e-5, final_norm=False),
    "ijepa-h": Rule(size=84, class_token=False),
    "dinov3-s": Rule(eps=1e-5, num_registers=4, class_has_position=False, rope=True),
    "siglip2-b": Rule(mean_std=HALF, act="gelu_tanh", class_token=False),
    "siglip2-so400m": Rule(mean_std=HALF, act="gelu_tanh", class_token=False),
}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


def plain_tokens(images: Tensor, state: State, rule: Rule, patch: int) -> Tensor:
    """Tokens float64 [B, 1 + T, D] or [B, T, D] of a state in timm's names; registers dropped."""
    weights = {key: value.double() for key, value in state.items()}
    x = _embedded(_pixels(images, rule), weights, rule, patch)
    if "norm_pre.weight" in weights:
        x = _norm(x, weights, "norm_pre", rule.eps)
    grid = rule.size // patch
    periods = 100 ** (torch.arange(4, dtype=torch.float64) / 4)
    rotary = _rotary(grid, weights.get("periods", periods)) if rule.rope else None
    num_prefix = int(rule.class_token) + rule.num_registers
    for block in range(DEPTH):
        x = _block(x, weights, f"blocks.{block}", rule, rotary, num_prefix)
    if rule.final_norm:
        x = _norm(x, weights, "norm", rule.eps)
    patches = x[:, num_prefix:]
    return torch.cat([x[:, :1], patches], 1) if rule.class_token else patches


def _pixels(images: Tensor, rule: Rule) -> Tensor:
    mean, std = (torch.tensor(t, dtype=torch.float64).view(3, 1, 1) for t in rule.mean_std)
    normalised = (images.double() / 255 - mean) / std
    if rule.size == images.shape[-1]:
        return normalised
    # In float32, as the reference does it: where a pixel is read from depends on the type.
    resized = F.interpolate(normalised.float(), size=rule.size, mode="bicubic", antialias=False)
    return resized.double()


def _embedded(pixels: Tensor, weights: State, rule: Rule, patch: int) -> Tensor:
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    columns = F.unfold(pixels, patch, stride=patch)
    x = (kernel @ columns).transpose(1, 2) + weights.get("patch_embed.proj.bias", 0.0)
    class_position = torch.zeros(1, 1, WIDTH, dtype=torch.float64)
    if "pos_embed" in weights:
        pos = weights["pos_embed"]
        if rule.class_token and rule.class_has_position:
            class_position, pos = pos[:, :1], pos[:, 1:]
        old, new = math.isqrt(pos.shape[1]), rule.size // patch
        square = pos.reshape(1, old, old, WIDTH).permute(0, 3, 1, 2)
        square = F.interpolate(square.float(), size=new, mode="bicubic", antialias=True).double()
        x = x + square.permute(0, 2, 3, 1).reshape(1, new * new, WIDTH)
    prefix = [weights["cls_token"] + class_position] if rule.class_token else []
    prefix += [weights["reg_token"]] if rule.num_registers else []
    return torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)


def _norm(x: Tensor, weights: State, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _block(
    x: Tensor, weights: State, name: str, rule: Rule, rotary: Any, num_prefix: int
) -> Tensor:
    one = torch.ones((), dtype=torch.float64)
    scale = [
        weights.get(f"{name}.ls{i}.gamma", weights.get(f"{name}.gamma_{i}", one)) for i in (1, 2)
    ]
    normed = _norm(x, weights, f"{name}.norm1", rule.eps)
    x = x + scale[0] * _attention(normed, weights, f"{name}.attn", rotary, num_prefix)
    hidden = _linear(_norm(x, weights, f"{name}.norm2", rule.eps), weights, f"{name}.mlp.fc1")
    return x + scale[1] * _linear(ACTS[rule.act](hidden), weights, f"{name}.mlp.fc2")


def _attention(x: Tensor, weights: State, name: str, rotary: Any, num_prefix: int) -> Tensor:
    heads = []
    size = WIDTH // HEADS
    joined = x @ weights[f"{name}.qkv.weight"].T + weights.get(f"{name}.qkv.bias", 0.0)
    query, key, value = joined.split(WIDTH, dim=-1)
    query = query + weights.get(f"{name}.q_bias", 0.0)
    value = value + weights.get(f"{name}.v_bias", 0.0)
    for head in range(HEADS):
        q, k, v = (part[..., head * size : (head + 1) * size] for part in (query, key, value))
        if rotary is not None:
            q, k = (_rotated(part, rotary, num_prefix) for part in (q, k))
        scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(size))
        heads.append(scores / scores.sum(-1, keepdim=True) @ v)
    return _linear(torch.cat(heads, dim=-1), weights, f"{name}.proj")


def _rotary(grid: int, periods: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos [grid * grid, D]: half of the angles from the row, half from the column."""
    place = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid * 2 - 1
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    angles = [2 * math.pi * axis.reshape(-1, 1) / periods for axis in (rows, columns)]
    both = torch.cat([*angles, *angles], dim=1)
    return both.sin(), both.cos()


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor], num_prefix: int) -> Tensor:
    sin, cos = rotary
    patches = x[:, num_prefix:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([x[:, :num_prefix], turned], dim=1)


def _linear(x: Tensor, weights: State, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


# The authors' files, from a state in timm's names


def _others(state: State) -> State:
    """Another branch of a checkpoint: same names, other values."""
    return {key: value + 1 for key, value in state.items()}


def _prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def _renamed(state: State, renames: Mapping[str, str]) -> State:
    renamed = {}
    for key, value in state.items():
        for theirs, authors in renames.items():
            key = key.replace(theirs, authors)
        renamed[key] = value
    return renamed


def _split_qkv(state: State, names: tuple[str, str, str]) -> State:
    """`attn.qkv` as three layers, each named by `names` in place of `attn.qkv`."""
    split = {}
    for key, value in state.items():
        parts = zip(names, value.chunk(3), strict=True) if ".attn.qkv." in key else [("", value)]
        for name, part in parts:
            split[key.replace("attn.qkv", name)] = part.clone()
    return split


def meta_dinov2(state: State) -> Published:
    named = {"mask_token": torch.zeros(1, WIDTH), **state}
    if "reg_token" in named:
        half = state["cls_token"] / 2
        named["register_tokens"] = named.pop("reg_token")
        named["cls_token"] = half
        named["pos_embed"] = torch.cat([half, state["pos_embed"]], dim=1)
    return named


def dino_checkpoint(state: State) -> Published:
    head = {"module.head.mlp.0.weight": torch.zeros(2, 2)}
    return {
        "student": _prefixed(_others(state), "module.backbone."),
        "teacher": {**_prefixed(state, "module.backbone."), **head},
        "args": argparse.Namespace(arch="vit_base", lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 2)},
        "epoch": 400,
    }


def moco_checkpoint(state: State) -> Published:
    heads = {
        "module.base_encoder.head.0.weight": torch.zeros(2, 2),
        "module.predictor.0.weight": torch.zeros(2, 2),
    }
    other = _prefixed(_others(state), "module.momentum_encoder.")
    named = {**other, **heads, **_prefixed(state, "module.base_encoder.")}
    return {"epoch": 300, "arch": "vit_base", "state_dict": named, "optimizer": {"state": {}}}


def moco_momentum(state: State) -> Published:
    return {"state_dict": _prefixed(state, "module.momentum_encoder.")}


def mae_checkpoint(state: State) -> Published:
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 50, 8),
        "decoder_embed.weight": torch.zeros(8, WIDTH),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
    }
    scaler = {"scale": np.float64(65536), "growth": np.float32(2), "rates": np.ones(3)}
    return {"model": {**state, **decoder}, "scaler": scaler, "args": argparse.Namespace(mask=0.75)}


OPENAI = {
    "patch_embed.proj": "conv1",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "norm_pre": "ln_pre",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    ".norm1": ".ln_1",
    ".norm2": ".ln_2",
    "blocks.": "transformer.resblocks.",
    "norm.": "ln_post.",
}


def openai_clip(state: State) -> Published:
    tower = {key: value for key, value in state.items() if not key.startswith("head.")}
    named = _renamed(tower, OPENAI)
    named["class_embedding"] = named["class_embedding"][0, 0].clone()
    named["positional_embedding"] = named["positional_embedding"][0].clone()
    named["proj"] = torch.zeros(WIDTH, 4)
    text = {"transformer.resblocks.0.ln_1.weight": torch.zeros(8), "logit_scale": torch.zeros(())}
    return {**text, **_prefixed(named, "visual."), "positional_embedding": torch.zeros(77, 8)}


def openai_clip_half(state: State) -> Published:
    return {key: value.half() for key, value in openai_clip(state).items()}


HF_TOWER = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "attn.proj": "self_attn.out_proj",
    ".norm1": ".layer_norm1",
    ".norm2": ".layer_norm2",
    "blocks.": "encoder.layers.",
}


def hf_tower(state: State) -> Published:
    left_out = ("head.", "attn_pool.")
    tower = {key: value for key, value in state.items() if not key.startswith(left_out)}
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    named = _renamed(_split_qkv(tower, names), HF_TOWER)
    named = {re.sub(r"^norm\.", "post_layernorm.", key): value for key, value in named.items()}
    named = {key.replace("norm_pre", "pre_layrnorm"): value for key, value in named.items()}
    for key, index in (("embeddings.class_embedding", (0, 0)), ("position_embedding.weight", (0,))):
        for full in [full for full in named if full.endswith(key)]:
            named[full] = named[full][index].clone()
    beside = {
        "vision_model.embeddings.position_ids": torch.arange(50),
        "vision_model.head.probe": torch.zeros(1, 1, WIDTH),
        "text_model.encoder.layers.0.layer_norm1.weight": torch.zeros(8),
        "logit_scale": torch.zeros(()),
    }
    return {**_prefixed(named, "vision_model."), **beside}


def ijepa_checkpoint(state: State) -> Published:
    return {
        "encoder": _prefixed(state, "module."),
        "target_encoder": _prefixed(_others(state), "module."),
        "predictor": {"module.mask_token": torch.zeros(1, 1, 8)},
        "opt": {"state": {}, "param_groups": []},
        "epoch": 300,
        "loss": np.float64(0.1),
    }


def ijepa_target(state: State) -> Published:
    return {"target_encoder": _prefixed(state, "module."), "epoch": 300}


HF_VIT = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    ".norm1": ".layernorm_before",
    ".norm2": ".layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "blocks.": "encoder.layer.",
}


def hf_vit(state: State) -> Published:
    names = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
    named = _renamed(_split_qkv(state, names), HF_VIT)
    named = {re.sub(r"^norm\.", "layernorm.", key): value for key, value in named.items()}
    return {**named, "pooler.dense.weight": torch.zeros(WIDTH, WIDTH)}


def hf_mae(state: State) -> Published:
    decoder = {"decoder.mask_token": torch.zeros(1, 1, 8)}
    return {**_prefixed(hf_vit(state), "vit."), **decoder}


def hf_dinov2(state: State) -> Published:
    names = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
    renames = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "attn.proj": "attention.output.dense",
        "blocks.": "encoder.layer.",
    }
    named = _renamed(_split_qkv(dict(meta_dinov2(state)), names), renames)
    named = {re.sub(r"^norm\.", "layernorm.", key): value for key, value in named.items()}
    named = {
        re.sub(r"\.ls([12])\.gamma", r".layer_scale\1.lambda1", k): v for k, v in named.items()
    }
    tokens = {"pos_embed": "position_embeddings"}
    tokens |= {name: name for name in ("cls_token", "mask_token", "register_tokens")}
    return {f"embeddings.{tokens[k]}" if k in tokens else k: v for k, v in named.items()}


def hf_dinov3(state: State) -> Published:
    named = _split_qkv(state, ("attention.q_proj", "attention.k_proj", "attention.v_proj"))
    renames = {
        "patch_embed.proj": "embeddings.patch_embeddings",
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
        "blocks.": "layer.",
    }
    return {**_renamed(named, renames), "embeddings.mask_token": torch.zeros(1, 1, WIDTH)}


def hf_dinov3_zero_biases(state: State) -> Published:
    return hf_dinov3(dict(timm_dinov3_qkvb(state)))


def hf_dinov3_of_version_5(state: State) -> Published:
    return {re.sub(r"^layer\.", "model.layer.", k): v for k, v in hf_dinov3(state).items()}


def meta_dinov3(state: State) -> Published:
    named = _renamed(state, {"reg_token": "storage_tokens", "gamma_": "ls"})
    named = {re.sub(r"(\.ls[12])$", r"\1.gamma", key): value for key, value in named.items()}
    named["mask_token"] = torch.zeros(1, WIDTH)
    named["rope_embed.periods"] = 100 ** (torch.arange(4) / 4)
    for block in range(DEPTH):
        named[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(3 * WIDTH)
        named[f"blocks.{block}.attn.qkv.bias_mask"] = torch.zeros(3 * WIDTH)
    return named


def timm_dinov3_qkvb(state: State) -> Published:
    biases = [f"blocks.{i}.attn.{name}_bias" for i in range(DEPTH) for name in "qv"]
    return {**state, **{name: torch.zeros(WIDTH) for name in biases}}


def open_clip_siglip(state: State) -> Published:
    return {**_prefixed(state, "visual.trunk."), "text.ln_final.weight": torch.zeros(8)}


NAMINGS: list[tuple[str, Callable[[State], Published]]] = [
    ("dinov2-b", meta_dinov2),
    ("dinov2-b-reg", meta_dinov2),
    ("dinov2-b", hf_dinov2),
    ("dinov2-b-reg", hf_dinov2),
    ("dinov1-b", dino_checkpoint),
    ("dinov1-b", hf_vit),
    ("mocov3-b", moco_checkpoint),
    ("mocov3-b", moco_momentum),
    ("mae-l", mae_checkpoint),
    ("mae-l", hf_mae),
    ("clip-l", openai_clip),
    ("clip-l", hf_tower),
    ("ijepa-h", ijepa_checkpoint),
    ("ijepa-h", ijepa_target),
    ("ijepa-h", hf_vit),
    ("dinov3-s", meta_dinov3),
    ("dinov3-s", timm_dinov3_qkvb),
    ("dinov3-s", hf_dinov3),
    ("dinov3-s", hf_dinov3_zero_biases),
    ("dinov3-s", hf_dinov3_of_version_5),
    ("siglip2-b", hf_tower),
    ("siglip2-b", open_clip_siglip),
    ("siglip2-so400m", hf_tower),
]


# Small networks of timm's own classes


def small_spec(name: str) -> EncoderSpec:
    spec = ENCODERS[name]
    return dataclasses.replace(spec, width=WIDTH, config={**spec.config, **SMALL})


def timm_state(name: str, **settings: Any) -> State:
    """What timm's own class keeps: a 7x7 grid, heads and pools, every parameter random."""
    spec = ENCODERS[name]
    torch.manual_seed(0)
    network = timm.create_model(
        spec.config["architecture"],
        img_size=7 * spec.patch_size,
        **{"num_classes": 5 if name == "clip-l" else 0, **SMALL, **settings},
    )
    state: State = network.state_dict()
    return {key: value + 0.1 * torch.randn_like(value) for key, value in state.items()}


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, RESOLUTION, RESOLUTION)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def load(name: str, path: pathlib.Path, content: Published, **settings: Any) -> Encoder:
    if all(isinstance(value, Tensor) for value in content.values()):
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(dict(content), path)
    return load_encoder(small_spec(name), resolution=RESOLUTION, weights=str(path), **settings)


@pytest.mark.parametrize("name", RULES)
def test_tokens_equal_the_plain_forward(name: str, tmp_path: pathlib.Path) -> None:
    state, rule = timm_state(name), RULES[name]
    encoder = load(name, tmp_path / "file", state)
    tokens = encoder.tokens(images())
    expected = plain_tokens(images(), state, rule, encoder.spec.patch_size)
    assert tokens.dtype == torch.float32 and tokens.shape == (2, 36, WIDTH)
    assert expected.std() > 0.3
    first_patch = int(rule.class_token)
    close = {"atol": 1e-5 * max(1, expected.std().item()), "rtol": 1e-5}
    torch.testing.assert_close(tokens.double(), expected[:, first_patch:], **close)
    if not rule.class_token:
        return
    both = load(name, tmp_path / "file", state, tokens="patch+cls").tokens(images())
    torch.testing.assert_close(both.double(), expected, **close)
    assert torch.equal(both[:, 1:], tokens)
    assert both.shape[1] == encoder.spec.stored_tokens(RESOLUTION, "patch+cls") == 37


@pytest.mark.parametrize(("name", "published"), NAMINGS)
def test_published_names_give_the_same_tokens(
    name: str, published: Callable[[State], Published], tmp_path: pathlib.Path
) -> None:
    state = timm_state(name)
    kept = {"tokens": "patch+cls" if RULES[name].class_token else "patch"}
    plain = load(name, tmp_path / "timm", state, **kept).tokens(images())
    named = load(name, tmp_path / "authors", published(state), **kept).tokens(images())
    assert torch.equal(named, plain)


def test_half_precision_files_are_read_as_float32(tmp_path: pathlib.Path) -> None:
    state = timm_state("clip-l")
    rounded = {key: value.half().float() for key, value in state.items()}
    half = load("clip-l", tmp_path / "half", openai_clip_half(state)).tokens(images())
    assert torch.equal(half, load("clip-l", tmp_path / "full", rounded).tokens(images()))


def test_dinov3_biases_that_are_not_zero(tmp_path: pathlib.Path) -> None:
    state = timm_state("dinov3-s", qkv_bias=True)
    assert state["blocks.0.attn.q_bias"].abs().max() > 0.1
    encoder = load("dinov3-s", tmp_path / "timm", state)
    tokens = encoder.tokens(images())
    expected = plain_tokens(images(), state, RULES["dinov3-s"], 16)[:, 1:]
    torch.testing.assert_close(tokens.double(), expected, atol=1e-5, rtol=1e-5)
    unbiased = {k: v for k, v in state.items() if not k.endswith(("q_bias", "v_bias"))}
    meta = dict(meta_dinov3(unbiased))
    for block in range(DEPTH):
        attention = f"blocks.{block}.attn"
        query, value = state[f"{attention}.q_bias"], state[f"{attention}.v_bias"]
        # The authors' layer multiplies by the mask: what is under its zeros does not count.
        meta[f"{attention}.qkv.bias"] = torch.cat([query, torch.full_like(query, math.nan), value])
        meta[f"{attention}.qkv.bias_mask"] = torch.ones(3, WIDTH).index_fill(
            0, torch.tensor(1), 0
        ).flatten()  # fmt: skip
    assert torch.equal(load("dinov3-s", tmp_path / "meta", meta).tokens(images()), tokens)
    assert torch.equal(load("dinov3-s", tmp_path / "hf", hf_dinov3(state)).tokens(images()), tokens)


def test_dinov3_takes_the_periods_of_its_file(tmp_path: pathlib.Path) -> None:
    state = timm_state("dinov3-s")
    meta = dict(meta_dinov3(state))
    meta["rope_embed.periods"] = meta["rope_embed.periods"].bfloat16()
    tokens = load("dinov3-s", tmp_path / "meta", meta).tokens(images())
    rounded = {**state, "periods": meta["rope_embed.periods"]}
    expected = plain_tokens(images(), rounded, RULES["dinov3-s"], 16)[:, 1:]
    torch.testing.assert_close(tokens.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tokens, load("dinov3-s", tmp_path / "t", state).tokens(images()))
    meta["rope_embed.periods"] = torch.ones(5)
    with pytest.raises(MismatchError, match=r"rope_embed.periods is \(5,\), expected \(4,\)"):
        load("dinov3-s", tmp_path / "meta", meta)


def test_rotary_network_in_bf16_and_in_one_graph(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile)
    state = timm_state("dinov3-s")
    plain = load("dinov3-s", tmp_path / "file", state).tokens(images())
    fast = load("dinov3-s", tmp_path / "file", state, compile=True).tokens(images())
    assert torch.equal(fast, plain)
    half = load("dinov3-s", tmp_path / "file", state, dtype="bf16").tokens(images())
    assert F.cosine_similarity(half, plain, dim=-1).min() > 0.999 and not torch.equal(half, plain)


def test_mocov3_large_with_its_misnamed_layers() -> None:
    right = [f"blocks.{i}.{layer}.weight" for i in (1, 13, 14) for layer in
             ("norm1", "norm2", "mlp.fc1", "mlp.fc2")]  # fmt: skip
    state = {key: torch.tensor(float(i)) for i, key in enumerate(right)}
    slips = {
        "blocks.13.norm1": "blocks.13.norm13", "blocks.13.mlp.fc1": "blocks.13.mlp.fc13",
        "blocks.14.norm2": "blocks.14.norm14", "blocks.14.mlp.fc2": "blocks.14.mlp.fc14",
    }  # fmt: skip
    published = _prefixed(_renamed(state, slips), "module.base_encoder.")
    assert "module.base_encoder.blocks.13.norm13.weight" in published
    assert from_published(published) == state


@pytest.mark.parametrize(
    ("name", "other", "fault"),
    [
        ("dinov2-b-reg", "dinov2-b", "missing: reg_token"),
        ("dinov2-b", "dinov2-b-reg", "unexpected: reg_token"),
        ("dinov1-b", "clip-l", "unexpected: head.bias, head.weight, norm_pre.bias"),
        ("clip-l", "dinov1-b", "missing: norm_pre.weight, norm_pre.bias"),
        ("ijepa-h", "mae-l", "unexpected: cls_token"),
        ("dinov3-s", "dinov2-b", "missing: reg_token"),
        ("mae-l", "siglip2-b", "missing: cls_token"),
        ("siglip2-b", "siglip2-so400m", r"fc1.weight \(179, 48\) \(expected \(192, 48\)\)"),
    ],
)
def test_another_familys_file_is_one_clear_line(
    name: str, other: str, fault: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "file"
    with pytest.raises(MismatchError) as caught:
        load(name, path, timm_state(other))
    message = str(caught.value)
    assert re.search(f"does not fit encoder '{name}': .*{fault}", message)
    assert message.startswith(str(path)) and "\n" not in message


def test_positions_that_are_no_grid_are_refused(tmp_path: pathlib.Path) -> None:
    state = timm_state("dinov1-b")
    state["pos_embed"] = state["pos_embed"][:, :-1]
    with pytest.raises(MismatchError, match="file does not fit encoder 'dinov1-b': position.*49"):
        load("dinov1-b", tmp_path / "file", state)


# The full-size entries, on the meta device

# Parameters of the published network with the positions of its own grid; those positions; and its
# parameters that no token needs (the final norm, CLIP's projection, SigLIP's attention pool).
PUBLISHED = {
    "dinov2-s": (22_056_192, 1369, 0),
    "dinov2-b": (86_579_712, 1369, 0),
    "dinov2-l": (304_367_616, 1369, 0),
    "dinov2-g": (1_136_479_232, 1369, 0),
    "dinov2-s-reg": (22_057_344, 1369, 0),
    "dinov2-b-reg": (86_582_016, 1369, 0),
    "dinov2-l-reg": (304_370_688, 1369, 0),
    "dinov2-g-reg": (1_136_483_840, 1369, 0),
    "dinov1-b": (85_798_656, 196, 0),
    "mocov3-b": (85_798_656, 196, 0),
    "mocov3-l": (303_301_632, 196, 0),
    "mae-l": (303_301_632, 196, 2 * 1024),
    "clip-l": (303_966_208, 256, 2 * 1024 + 1024 * 768),
    "ijepa-h": (630_762_240, 256, 0),
    "dinov3-s": (21_586_944, 256, 0),
    "dinov3-b": (85_641_216, 256, 0),
    "dinov3-l": (303_079_424, 256, 0),
    "siglip2-b": (92_930_304, 256, 7_087_104),
    "siglip2-l": (315_956_224, 256, 12_595_200),
    "siglip2-so400m": (427_888_064, 256, 15_238_352),
}
EPS_1E5 = ("clip-l", "dinov3-s", "dinov3-b", "dinov3-l")
ACT = {"clip": "QuickGELU", "siglip2": "GELUTanh"}


def test_every_vision_transformer_of_the_table_is_checked() -> None:
    architectures = {name for name, spec in ENCODERS.items() if "architecture" in spec.config}
    assert architectures == set(PUBLISHED)
    loaders = [{ENCODERS[name].loader for name in names} for names in (RULES, PUBLISHED)]
    assert loaders[0] == loaders[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_entries_are_the_published_networks(name: str) -> None:
    spec = ENCODERS[name]
    settings = {"qkv_bias": False} if name.startswith("dinov3") else {}
    vit = build_vit({**spec.config, **settings}, spec.input_size(256))
    published, num_positions, not_needed = PUBLISHED[name]
    grown = 0 if name.startswith("dinov3") else (256 - num_positions) * spec.width
    assert sum(p.numel() for p in vit.parameters()) == published + grown - not_needed
    assert all(parameter.is_meta for parameter in vit.parameters())
    assert vit.embed_dim == spec.width
    assert vit.patch_embed.patch_size == (spec.patch_size, spec.patch_size)
    assert spec.class_token == (vit.cls_token is not None)
    assert spec.grid(256) == vit.patch_embed.grid_size == (16, 16)
    assert spec.grid(512) == (32, 32) and spec.num_tokens(512) == 1024
    assert {m.eps for m in vit.modules() if isinstance(m, torch.nn.LayerNorm)} == {
        1e-5 if name in EPS_1E5 else 1e-6
    }
    if not name.startswith("dinov2-g"):
        act = ACT.get(name.split("-")[0], "GELU")
        assert {type(block.mlp.act).__name__ for block in vit.blocks} == {act}
