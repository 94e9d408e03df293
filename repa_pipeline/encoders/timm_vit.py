"""Teachers that are timm Vision Transformers: DINOv2 and any other of timm's parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.preprocess import resample_pos_embed
from repa_pipeline.errors import MismatchError
from repa_pipeline.weights import fit_state, load_config, load_state

# SwiGLU layers of DINOv2-g: Meta's names on the left, timm's on the right.
META_RENAMES = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}


class PatchTokens(nn.Module):
    """The patch tokens of a Vision Transformer after its final norm."""

    def __init__(self, vit: Any):
        super().__init__()
        self.vit = vit

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels float32 [B, 3, S, S] -> [B, T, D], class and register tokens dropped."""
        tokens: Tensor = self.vit.forward_features(pixels)[:, self.vit.num_prefix_tokens :]
        return tokens


def load(spec: EncoderSpec, resolution: int, path: Path) -> PatchTokens:
    """A Vision Transformer with the weights in `path`, in timm's naming or in Meta's.

    The network is built from `spec.config` or, where that is empty, from the JSON object `config`
    in the file's metadata: timm's `architecture` and overrides of its settings, or the settings
    of timm's VisionTransformer. The position embedding is resampled to the grid of `resolution`.
    Raises DamagedError and MismatchError.
    """
    config = spec.config or load_config(path)
    what = f"encoder '{spec.name}'"
    if not config:
        raise MismatchError(
            f"{path} has no metadata `config` and {what} names no architecture: give a safetensors "
            "file with timm's VisionTransformer settings as JSON under `config`"
        )
    vit = build_vit(config, spec.input_size(resolution))
    state = from_meta_naming(load_state(path))
    if "pos_embed" in state and vit.pos_embed is not None:
        num_prefix_tokens = 0 if vit.no_embed_class else vit.num_prefix_tokens
        grid = spec.grid(resolution)
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], grid, num_prefix_tokens)
    fit_state(vit, state, path, what)
    return PatchTokens(vit)


def build_vit(config: Mapping[str, Any], img_size: int) -> Any:
    """timm's network without weights: on the meta device, drawing no random numbers."""
    settings = {**config, "img_size": img_size, "num_classes": 0, "global_pool": ""}
    with torch.device("meta"):
        if "architecture" in settings:
            return timm.create_model(settings.pop("architecture"), pretrained=False, **settings)
        return VisionTransformer(**settings)


def from_meta_naming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Meta's published DINOv2 parameter names as timm's; timm's own pass unchanged."""
    renamed = {}
    for key, value in state.items():
        for theirs, ours in META_RENAMES.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    renamed.pop("mask_token", None)
    return renamed
