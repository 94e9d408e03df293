"""MAE (arXiv 2111.06377): the encoder, on the whole image.

Tokens: the last block's patch tokens before the final norm. That is what the reference takes: the
authors' own forward_features (models_vit.py) up to its mean over patches, where the norm is after
the mean. Change the entry's `config` to `final_norm = true` for the tokens after the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.names import State, from_hf_vit, without
from repa_pipeline.encoders.timm_vit import VitTokens, build, fit_vit
from repa_pipeline.weights import load_state

__all__ = ["build", "from_published", "load"]


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """MAE with the weights in `path`: the authors' file (timm's names), with its decoder or
    without, or transformers' names. Raises as `fit_vit`.
    """
    return fit_vit(spec, resolution, path, from_published(load_state(path)))


def from_published(state: Mapping[str, Tensor]) -> State:
    """Published parameter names as timm's; decoder and mask token are left out."""
    return without(from_hf_vit(state), ("decoder_", "mask_token"))
