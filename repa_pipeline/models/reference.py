"""Checkpoints of the reference REPA code (sihyun-yu/REPA): read, split, size, join and write them.

A reference file holds `model`, `ema`, `opt`, `args` (argparse.Namespace) and `steps`; the trunk and
the projectors share one state dict. Early ones count the blocks behind the alignment depth afresh
as `decoder_blocks.N`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repa_pipeline.errors import ConfigError, DataError, MismatchError, MissingError
from repa_pipeline.models import MODELS
from repa_pipeline.models.sit import SiTConfig
from repa_pipeline.weights import load_state

State = dict[str, Tensor]

_BLOCK = re.compile(r"^(blocks|decoder_blocks)\.(\d+)\.")
_PROJECTORS = "projectors."
_LABELS = "y_embedder.embedding_table.weight"


@dataclasses.dataclass(frozen=True)
class ReferenceCheckpoint:
    """A reference checkpoint in our terms; `projectors` has keys `N.{0,2,4}.{weight,bias}`.

    `model` and `projectors` are the trained weights, `ema` and `ema_projectors` the averaged ones.
    A file that is only a state dict (the released last.pt) is read as both, with `args` empty and
    `steps` None.
    """

    config: SiTConfig
    model: State
    ema: State
    projectors: State
    args: dict[str, Any]
    steps: int | None
    ema_projectors: State = dataclasses.field(default_factory=dict)


def rename_blocks(state: Mapping[str, Tensor]) -> State:
    """The same tensors with `decoder_blocks.N` numbered on behind `blocks.N`."""
    numbers: dict[str, set[int]] = {"blocks": set(), "decoder_blocks": set()}
    for key in state:
        if match := _BLOCK.match(key):
            numbers[match[1]].add(int(match[2]))
    offset = len(numbers["blocks"]) - min(numbers["decoder_blocks"], default=0)

    def renamed(match: re.Match[str]) -> str:
        shift = offset if match[1] == "decoder_blocks" else 0
        return f"blocks.{int(match[2]) + shift}."

    return {_BLOCK.sub(renamed, key): value for key, value in state.items()}


def split_reference_state(
    state: Mapping[str, Tensor], *, num_classes: int | None = None
) -> tuple[State, State]:
    """The reference's state dict, either naming, as (SiT state, projectors' state).

    The projectors' keys lose their prefix: they fit `nn.ModuleList` of build_projector. A model
    trained without label dropout has no null row: where `num_classes` says so, a zero row is added.
    """
    model, projectors = State(), State()
    for key, value in rename_blocks(state).items():
        if key.startswith(_PROJECTORS):
            projectors[key.removeprefix(_PROJECTORS)] = value
        else:
            model[key] = value
    labels = model.get(_LABELS)
    if labels is not None and num_classes is not None and len(labels) == num_classes:
        model[_LABELS] = torch.cat([labels, torch.zeros_like(labels[:1])])
    return model, projectors


def join_reference_state(model: Mapping[str, Tensor], projectors: Mapping[str, Tensor]) -> State:
    """The inverse of `split_reference_state`, in the reference's newer naming."""
    return {**model, **{f"{_PROJECTORS}{key}": value for key, value in projectors.items()}}


def family_of(state: Mapping[str, Tensor]) -> str | None:
    """The family of MODELS ("sit", "dit") that a state dict's names and shapes speak of, or None.

    A DiT answers with twice its input's channels, and diffusers names its blocks otherwise.
    """
    if any(key.startswith("transformer_blocks.") for key in state):
        return "dit"
    patches, answer = state.get("x_embedder.proj.weight"), state.get("final_layer.linear.weight")
    if patches is None or answer is None or patches.dim() != 4:
        return None
    one_answer = patches[0].numel()  # channels x patch x patch
    return {one_answer: "sit", 2 * one_answer: "dit"}.get(len(answer))


def config_from_reference(
    state: Mapping[str, Tensor],
    args: Mapping[str, Any] | None = None,
    *,
    num_heads: int | None = None,
) -> SiTConfig:
    """The SiT that a reference state dict (either naming, projectors or not) belongs to.

    Everything is read off the tensors' shapes but the number of heads, which leaves no trace
    unless queries are normalised: it comes from `num_heads`, from `args["model"]`, or from the
    entry of MODELS with this width and depth. Raises DataError when tensors are missing,
    MismatchError when `args` names another model, ConfigError when the heads cannot be told.
    """
    state = rename_blocks(state)
    try:
        _, num_tokens, width = state["pos_embed"].shape
        _, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        mlp_width = state["blocks.0.mlp.fc1.weight"].shape[0]
        rows = state[_LABELS].shape[0]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"not the state dict of a reference SiT: {error}; expected its parameter names and "
            "shapes (pos_embed, x_embedder.proj, blocks.N or decoder_blocks.N, y_embedder)"
        ) from error
    depth = len({match[2] for key in state if (match := _BLOCK.match(key))})
    q_norm = state.get("blocks.0.attn.q_norm.weight")
    if q_norm is not None:
        num_heads = width // q_norm.shape[0]
    return SiTConfig(
        input_size=math.isqrt(num_tokens) * patch_size,
        in_channels=in_channels,
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=num_heads or _num_heads(width, depth, args or {}),
        num_classes=_num_classes(rows, args or {}),
        mlp_ratio=mlp_width / width,
        qk_norm=q_norm is not None,
    )


def _num_classes(rows: int, args: Mapping[str, Any]) -> int:
    # With cfg_prob 0 the reference has no null row, and then every row is a class.
    return rows if args.get("num_classes") == rows and args.get("cfg_prob") == 0 else rows - 1


def _num_heads(width: int, depth: int, args: Mapping[str, Any]) -> int:
    name = args.get("model")
    if name is not None:
        spec = MODELS[str(name)]
        if (spec.width, spec.depth) != (width, depth):
            raise MismatchError(
                f"the checkpoint's args say {name} (width {spec.width}, depth {spec.depth}) but "
                f"its tensors have width {width}, depth {depth}: the file is mixed up"
            )
        return spec.num_heads
    known = {
        spec.num_heads for spec in MODELS.values() if (spec.width, spec.depth) == (width, depth)
    }
    if len(known) != 1:
        raise ConfigError(
            f"cannot tell the number of heads of a model of width {width}, depth {depth}: "
            "say it with num_heads"
        )
    return known.pop()


def load_reference_checkpoint(
    path: str | os.PathLike[str], *, num_heads: int | None = None
) -> ReferenceCheckpoint:
    """Reads a reference checkpoint without unpickling code; tensors stay on the CPU.

    Raises MissingError when there is no file, DataError when it is not such a checkpoint.
    """
    content = read_plain(path)
    bare = "pos_embed" in content
    given = content.get("args")
    args = dict(vars(given)) if isinstance(given, argparse.Namespace) and not bare else {}
    states = {}
    for part in ("model", "ema"):
        state = content if bare else content.get(part)
        if not isinstance(state, Mapping):
            raise DataError(
                f"{os.fspath(path)} has no '{part}': got keys {sorted(map(str, content))[:8]}, "
                "expected a checkpoint of the reference code (model, ema, opt, args, steps)"
            )
        states[part] = state
    config = config_from_reference(states["ema"], args, num_heads=num_heads)
    model, projectors = split_reference_state(states["model"], num_classes=config.num_classes)
    ema, averaged = split_reference_state(states["ema"], num_classes=config.num_classes)
    steps = None if bare else content.get("steps")
    return ReferenceCheckpoint(config, model, ema, projectors, args, steps, averaged)


def read_plain(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict in a torch file of tensors, plain values and argparse.Namespace, or a safetensors.

    Raises MissingError when there is no file, DataError when it holds something else; nothing in
    it is executed.
    """
    if os.path.isfile(path) and os.fspath(path).endswith(".safetensors"):
        return dict(load_state(os.fspath(path)))
    if not os.path.isfile(path):
        raise MissingError(f"no checkpoint at {os.fspath(path)}: give the path of a .pt file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read: the optimizer's state is half of the file and is not wanted.
            is_mappable = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    except (OSError, MemoryError):
        raise
    # A foreign file can fail anywhere in torch's restricted unpickler, with any kind of error.
    except Exception as error:
        raise DataError(
            f"{os.fspath(path)} cannot be read as a checkpoint: {error}; expected a file of the "
            "reference code, of tensors and plain values only"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{os.fspath(path)} holds a {type(content).__name__}, expected the reference's dict "
            "(model, ema, opt, args, steps) or a state dict"
        )
    return content
