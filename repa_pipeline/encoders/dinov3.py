"""DINOv3 (arXiv 2508.10104): registers, and rotary positions instead of a position embedding.

Tokens: `x_norm_patchtokens` of the authors' forward_features. The query and value biases of the
published files are all zero, so the network has none unless a file's are not. The rotary periods
are the file's own where it has them (Meta's: rounded to bf16), else float32 as in timm and in
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.names import State, from_hf_dinov3, rename, without
from repa_pipeline.encoders.timm_vit import VitTokens, build_vit
from repa_pipeline.errors import MismatchError
from repa_pipeline.weights import fit_state, load_state

META_RENAMES = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
)
PERIODS = "rope_embed.periods"
QKV_BIAS, BIAS_MASK = ".attn.qkv.bias", ".attn.qkv.bias_mask"


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """DINOv3 with the weights in `path`, in timm's names, Meta's or transformers'.

    Raises DamagedError and MismatchError.
    """
    what = f"encoder '{spec.name}'"
    published = load_state(path)
    state = without_zero_biases(from_published(published))
    has_bias = any(key.endswith(".q_bias") for key in state)
    vit = build_vit({**spec.config, "qkv_bias": has_bias}, spec.input_size(resolution))
    fit_state(vit, state, path, what)
    if has_bias:
        _mask_key_biases(vit)
    vit.rope = _rope(vit.rope, published.get(PERIODS), path, what)
    return VitTokens(vit, spec.class_token)


def build(spec: EncoderSpec, resolution: int, device: str) -> VitTokens:
    """DINOv3 without its weights, on `device`; without the query and value biases."""
    config = {**spec.config, "qkv_bias": False}
    return VitTokens(build_vit(config, spec.input_size(resolution), device), spec.class_token)


def from_published(state: Mapping[str, Tensor]) -> State:
    """Published parameter names as timm's; timm's own pass unchanged."""
    kept = without(from_hf_dinov3(state), (PERIODS, "mask_token", "local_cls_norm."))
    renamed = rename(kept, META_RENAMES)
    for key in [key for key in renamed if key.endswith(QKV_BIAS)]:
        bias = renamed.pop(key)
        mask = renamed.pop(key.replace(QKV_BIAS, BIAS_MASK), None)
        if mask is not None:
            bias = torch.where(mask == 0, 0, bias * mask)
        query, _, value = bias.chunk(3)
        block = key.removesuffix(QKV_BIAS)
        renamed[f"{block}.attn.q_bias"], renamed[f"{block}.attn.v_bias"] = query, value
    return renamed


def without_zero_biases(state: State) -> State:
    """`state` without its query and value biases when every one of them is zero."""
    biases = [key for key in state if key.endswith((".q_bias", ".v_bias"))]
    if any(state[key].any() for key in biases):
        return state
    return without(state, biases)


def _mask_key_biases(vit: Any) -> None:
    # Not part of the state, so it is still on the meta device: the key bias is always zero.
    for block in vit.blocks:
        block.attn.k_bias = torch.zeros_like(block.attn.q_bias)


def _rope(built: Any, periods: Tensor | None, path: Path, what: str) -> Any:
    # Its buffers are not part of the state and would stay on the meta device: made anew.
    rope = type(built)(dim=built.dim, temperature=built.temperature, rotate_half=built.rotate_half)
    if periods is not None:
        if periods.shape != rope.periods.shape:
            raise MismatchError(
                f"{path} does not fit {what}: {PERIODS} is {tuple(periods.shape)}, expected "
                f"{tuple(rope.periods.shape)}: give a file made for {what}"
            )
        rope.periods.copy_(periods)
    return rope
