"""DINOv2 (arXiv 2304.07193), with registers or without (arXiv 2309.16588).

Tokens: `x_norm_patchtokens` of the authors' forward_features, on a position embedding resampled
the reference's way, not by DINOv2's own interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.names import State, from_hf_vit, rename
from repa_pipeline.encoders.timm_vit import VitTokens, build, fit_vit
from repa_pipeline.weights import load_state

__all__ = ["build", "from_published", "load"]

# SwiGLU layers of DINOv2-g: Meta's names on the left, timm's on the right.
META_RENAMES = ((r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """DINOv2 with the weights in `path`, in timm's names, Meta's or transformers'. Raises as
    `fit_vit`.
    """
    return fit_vit(spec, resolution, path, from_published(load_state(path)))


def from_published(state: Mapping[str, Tensor]) -> State:
    """Published parameter names as timm's; timm's own pass unchanged."""
    renamed = rename(from_hf_vit(state), META_RENAMES)
    renamed.pop("mask_token", None)
    if "register_tokens" in renamed and {"cls_token", "pos_embed"} <= renamed.keys():
        # timm gives the class token no row of the position embedding: Meta's goes into the token.
        pos = renamed["pos_embed"]
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + pos[:, :1]
        renamed["pos_embed"] = pos[:, 1:]
    return renamed
