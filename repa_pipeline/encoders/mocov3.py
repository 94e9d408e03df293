"""MoCo v3 (arXiv 2104.02057): the base encoder, with its fixed sin-cos position embedding.

Tokens: forward_features (after the final norm) without the class token. The position embedding is
the file's own, resampled like a learned one: so does the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.names import State, rename, under, without
from repa_pipeline.encoders.timm_vit import VitTokens, build, fit_vit
from repa_pipeline.weights import load_state

__all__ = ["build", "from_published", "load"]

PREFIXES = ("module.base_encoder.", "module.momentum_encoder.", "module.")
# The published ViT-L misnames layers of two of its blocks.
SLIPS = (
    (r"^(blocks\.13)\.norm13\.", r"\1.norm1."),
    (r"^(blocks\.13)\.mlp\.fc13\.", r"\1.mlp.fc1."),
    (r"^(blocks\.14)\.norm14\.", r"\1.norm2."),
    (r"^(blocks\.14)\.mlp\.fc14\.", r"\1.mlp.fc2."),
)


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """MoCo v3 with the weights in `path`, in timm's names or under the prefixes of the authors'
    checkpoint (the base encoder is taken before the momentum encoder). Raises as `fit_vit`.
    """
    return fit_vit(spec, resolution, path, from_published(load_state(path)))


def from_published(state: Mapping[str, Tensor]) -> State:
    """Published parameter names as timm's; the projector or linear head is left out."""
    return without(rename(under(state, *PREFIXES), SLIPS), ("head.",))
