"""CLIP's image tower (arXiv 2103.00020), with its QuickGELU.

Tokens: the last block's output, before the final norm and the projection, class token dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.names import (
    Renames,
    State,
    from_hf_tower,
    rename,
    under,
    with_batch_axis,
    without,
)
from repa_pipeline.encoders.timm_vit import VitTokens, build, fit_vit
from repa_pipeline.weights import load_state

__all__ = ["build", "from_published", "load"]

OPENAI: Renames = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """CLIP with the weights in `path`, in OpenAI's names (open_clip's too), transformers' or
    timm's. Raises as `fit_vit`, and DamagedError for OpenAI's TorchScript archive.
    """
    return fit_vit(spec, resolution, path, from_published(load_state(path)))


def from_published(state: Mapping[str, Tensor]) -> State:
    """Published parameter names as timm's; text tower and projection are left out."""
    tower = under(from_hf_tower(state), "module.visual.", "visual.")
    if "class_embedding" in tower:
        tower = with_batch_axis(rename(without(tower, ("proj",)), OPENAI))
    return without(tower, ("head.",))
