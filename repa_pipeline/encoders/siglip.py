"""SigLIP 2's image tower (arXiv 2502.14786).

Tokens: `encoded` of the authors' ViT (big_vision), that is, after the final norm and before the
attention pool. There is no class token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.names import State, from_hf_tower, under, without
from repa_pipeline.encoders.timm_vit import VitTokens, build, fit_vit
from repa_pipeline.weights import load_state

__all__ = ["build", "from_published", "load"]


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """SigLIP 2 with the weights in `path`, in timm's names, alone or inside open_clip's file, or
    in transformers'. Raises as `fit_vit`.
    """
    return fit_vit(spec, resolution, path, from_published(load_state(path)))


def from_published(state: Mapping[str, Tensor]) -> State:
    """Published parameter names as timm's; text tower and attention pool are left out."""
    return without(under(from_hf_tower(state), "visual.trunk."), ("attn_pool.", "head."))
