"""Parameter names of published weights to timm's: the tools that families share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
Renames = tuple[tuple[str, str], ...]

# Hugging Face transformers: its ViT family (I-JEPA, DINO, MAE, DINOv2), its CLIP and SigLIP towers,
# and its DINOv3.
HF_VIT: Renames = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
HF_TOWER: Renames = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.q_proj\.", ".attn.query."),
    (r"\.self_attn\.k_proj\.", ".attn.key."),
    (r"\.self_attn\.v_proj\.", ".attn.value."),
)
HF_DINOV3: Renames = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^(model\.)?layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
)
HF_TOWER_PREFIX = "vision_model."


def rename(state: Mapping[str, Tensor], renames: Renames) -> State:
    """Every name after each (pattern, replacement) in turn; the tensors are not touched."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def without(state: Mapping[str, Tensor], prefixes: Iterable[str]) -> State:
    """What a file has beside the network: names that start with one of `prefixes` are left out."""
    left_out = tuple(prefixes)
    return {key: value for key, value in state.items() if not key.startswith(left_out)}


def under(state: Mapping[str, Tensor], *prefixes: str) -> State:
    """The names under the first of `prefixes` that any name has, without it; else all names."""
    for prefix in prefixes:
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if found:
            return found
    return dict(state)


def join_qkv(state: Mapping[str, Tensor]) -> State:
    """`attn.{query,key,value}` as timm's one `attn.qkv`, in this order; other names unchanged."""
    joined = dict(state)
    for key in state:
        if ".attn.query." not in key:
            continue
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in state for part in parts):
            joined[key.replace(".query.", ".qkv.")] = torch.cat([joined.pop(p) for p in parts])
    return joined


def from_hf_vit(state: Mapping[str, Tensor]) -> State:
    """transformers' names of its ViT family as timm's; other names unchanged."""
    state = under(state, "vit.", "ijepa.", "dinov2.", "dinov2_with_registers.")
    if "embeddings.position_embeddings" not in state:
        return state
    kept = without(state, ("pooler.", "decoder.", "classifier.", "embeddings.mask_token"))
    return join_qkv(rename(kept, HF_VIT))


def from_hf_tower(state: Mapping[str, Tensor]) -> State:
    """transformers' names of a CLIP or SigLIP vision tower as timm's; other names unchanged."""
    if not any(key.startswith(HF_TOWER_PREFIX) for key in state):
        return dict(state)
    tower = without(under(state, HF_TOWER_PREFIX), ("head.", "embeddings.position_ids"))
    return with_batch_axis(join_qkv(rename(tower, HF_TOWER)))


def from_hf_dinov3(state: Mapping[str, Tensor]) -> State:
    """transformers' names of DINOv3 as timm's; other names unchanged."""
    if "embeddings.register_tokens" not in state:
        return dict(state)
    return join_qkv(rename(without(state, ("embeddings.mask_token",)), HF_DINOV3))


def with_batch_axis(state: State) -> State:
    """Class token [D] and position embedding [N, D] as timm keeps them: [1, 1, D], [1, N, D]."""
    for key in ("cls_token", "pos_embed"):
        if key in state:
            state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    return state
