"""DINO (arXiv 2104.14294): the teacher's backbone.

Tokens: all but the first of what the authors' `get_intermediate_layers(x, 1)` gives, that is, the
last block's patch tokens after the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.names import State, from_hf_vit, under
from repa_pipeline.encoders.timm_vit import VitTokens, build, fit_vit
from repa_pipeline.weights import STATE_KEYS, load_state

__all__ = ["build", "from_published", "load"]


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """DINO with the weights in `path`: Meta's backbone file (timm's names), its full checkpoint
    (the teacher is taken), or transformers' names. Raises as `fit_vit`.
    """
    state = load_state(path, ("teacher", *STATE_KEYS))
    return fit_vit(spec, resolution, path, from_published(state))


def from_published(state: Mapping[str, Tensor]) -> State:
    """Published parameter names as timm's; a projection head beside the backbone is left out."""
    return from_hf_vit(under(under(state, "module."), "backbone."))
