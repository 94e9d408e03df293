"""Published weights of DiT: the authors' file, and diffusers' names for the same tensors.

facebookresearch/DiT publishes `DiT-XL-2-256x256.pt`, a bare state dict whose names are ours; its
training checkpoints hold such dicts under `model` and `ema`. diffusers' class repeats the two
embedders in every block, splits the qkv layer in three, has no position embedding among its
weights, and has the output layer's halves of scale and shift in the same order.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from repa_pipeline.errors import ConfigError, DataError, MissingError
from repa_pipeline.models import MODELS
from repa_pipeline.models.dit import DiTConfig
from repa_pipeline.models.sit import sincos_pos_embed
from repa_pipeline.weights import load_state

State = dict[str, Tensor]

# ours -> diffusers'; N is the block's number
_WHOLE: Mapping[str, str] = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EVERY_BLOCK: Mapping[str, str] = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK: Mapping[str, str] = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_TABLES = ("y_embedder.embedding_table",)
_QKV = ("to_q", "to_k", "to_v")
_NUMBERED = re.compile(r"^(?:blocks|transformer_blocks)\.(\d+)\.")


def to_diffusers(state: Mapping[str, Tensor]) -> State:
    """The state dict of a DiT under the names of diffusers' DiTTransformer2DModel."""
    renamed = State()
    for key, value in state.items():
        layer, _, part = key.rpartition(".")
        if layer in _WHOLE:
            renamed[f"{_WHOLE[layer]}.{part}"] = value
        elif layer in _EVERY_BLOCK:
            for block in range(_depth(state)):
                renamed[f"transformer_blocks.{block}.{_EVERY_BLOCK[layer]}.{part}"] = value
        elif layer.endswith(".attn.qkv"):
            number = layer.split(".")[1]
            for name, third in zip(_QKV, value.chunk(3), strict=True):
                renamed[f"transformer_blocks.{number}.attn1.{name}.{part}"] = third
        elif key != "pos_embed":
            _, number, inner = layer.split(".", 2)
            renamed[f"transformer_blocks.{number}.{_BLOCK[inner]}.{part}"] = value
    return renamed


def from_diffusers(state: Mapping[str, Tensor], *, input_size: int) -> State:
    """The inverse of `to_diffusers`; latents of `input_size` a side decide the position embedding.

    Raises DataError when a tensor of diffusers' DiT class is missing.
    """
    first = {ours: f"transformer_blocks.0.{theirs}" for ours, theirs in _EVERY_BLOCK.items()}
    renamed = State()
    try:
        for ours, theirs in {**_WHOLE, **first}.items():
            for part in ("weight",) if ours in _TABLES else ("weight", "bias"):
                renamed[f"{ours}.{part}"] = state[f"{theirs}.{part}"]
        for number in range(_depth(state)):
            renamed |= _block_from_diffusers(state, number)
    except KeyError as error:
        raise DataError(
            f"not the state dict of diffusers' DiT class: it has no {error}; expected the weights "
            "of a DiTTransformer2DModel"
        ) from error
    width, _, patch_size, _ = renamed["x_embedder.proj.weight"].shape
    position = sincos_pos_embed(width, input_size // patch_size)
    renamed["pos_embed"] = position.to(renamed["x_embedder.proj.weight"].dtype)
    return renamed


def _block_from_diffusers(state: Mapping[str, Tensor], number: int) -> State:
    theirs, ours = f"transformer_blocks.{number}", f"blocks.{number}"
    block = State()
    for part in ("weight", "bias"):
        thirds = [state[f"{theirs}.attn1.{name}.{part}"] for name in _QKV]
        block[f"{ours}.attn.qkv.{part}"] = torch.cat(thirds)
        for own, other in _BLOCK.items():
            block[f"{ours}.{own}.{part}"] = state[f"{theirs}.{other}.{part}"]
    return block


def dit_config(state: Mapping[str, Tensor], *, num_heads: int | None = None) -> DiTConfig:
    """The DiT that a state dict (our names) belongs to, read off its shapes.

    The number of heads leaves no trace: it is `num_heads`, or that of the entry of MODELS with
    this width and depth. Raises DataError for other tensors, ConfigError when the heads cannot be
    told.
    """
    try:
        _, num_tokens, width = state["pos_embed"].shape
        _, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        mlp_width = state["blocks.0.mlp.fc1.weight"].shape[0]
        out_width = state["final_layer.linear.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"not the state dict of a DiT: {error}; expected the names of facebookresearch/DiT "
            "(pos_embed, x_embedder.proj, blocks.N, y_embedder, final_layer)"
        ) from error
    if out_width != 2 * in_channels * patch_size**2:
        raise DataError(
            f"a model of {in_channels} channels answers with {out_width // patch_size**2}, "
            f"expected {2 * in_channels}: it is no DiT with a learned variance"
        )
    depth = _depth(state)
    return DiTConfig(
        input_size=math.isqrt(num_tokens) * patch_size,
        in_channels=in_channels,
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=num_heads or _known_heads(width, depth),
        num_classes=rows - 1,
        mlp_ratio=mlp_width / width,
    )


def load_published_dit(
    path: str | os.PathLike[str], *, input_size: int = 32, num_heads: int | None = None
) -> tuple[DiTConfig, State]:
    """Reads a DiT of the authors or of diffusers (.pt, .bin or .safetensors): its shape and state.

    Of a training checkpoint the averaged weights are taken. `input_size` (latents per side) counts
    for diffusers' files alone, which do not tell it. No code is unpickled. Raises MissingError
    without a file, DamagedError for one that holds no tensors, the others as `dit_config`.
    """
    if not os.path.isfile(path):
        raise MissingError(f"no weights file at {os.fspath(path)}: give the path of a DiT's file")
    state = load_state(os.fspath(path), keys=("ema", "model"))
    if any(key.startswith("transformer_blocks.") for key in state):
        state = from_diffusers(state, input_size=input_size)
    return dit_config(state, num_heads=num_heads), state


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({match[1] for key in state if (match := _NUMBERED.match(key))})


def _known_heads(width: int, depth: int) -> int:
    known = {
        spec.num_heads
        for spec in MODELS.values()
        if (spec.family, spec.width, spec.depth) == ("dit", width, depth)
    }
    if len(known) != 1:
        raise ConfigError(
            f"cannot tell the number of heads of a DiT of width {width}, depth {depth}: say it "
            "with num_heads"
        )
    return known.pop()
