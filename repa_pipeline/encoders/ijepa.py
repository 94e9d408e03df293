"""I-JEPA (arXiv 2301.08243): the context encoder, on the whole image.

Tokens: the authors' forward without masks, after the final norm. There is no class token.
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

# The reference takes `encoder`; a file with the target encoder alone is taken at its word.
BRANCHES = ("encoder", "target_encoder")


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """I-JEPA with the weights in `path`: the authors' checkpoint, or transformers' or timm's
    names. Raises as `fit_vit`.
    """
    return fit_vit(spec, resolution, path, from_published(load_state(path, BRANCHES + STATE_KEYS)))


def from_published(state: Mapping[str, Tensor]) -> State:
    """Published parameter names as timm's."""
    return from_hf_vit(under(state, "module."))
