"""Teachers that are timm's Vision Transformers, in timm's own parameter names.

The families with names of their own (dinov2.py, clip.py, ...) map a file's state to timm's names
and share `fit_vit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.encoders.names import State, without
from repa_pipeline.encoders.preprocess import resample_pos_embed
from repa_pipeline.encoders.randomised import local_config
from repa_pipeline.errors import MismatchError
from repa_pipeline.weights import fit_state, load_config, load_state


class VitTokens(nn.Module):
    """The patch tokens of a Vision Transformer, after its class token if that is wanted."""

    def __init__(self, vit: Any, class_token: bool):
        super().__init__()
        self.vit = vit
        self.class_token = class_token

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels float32 [B, 3, S, S] -> [B, T, D] or [B, 1 + T, D]; registers are dropped."""
        tokens: Tensor = self.vit.forward_features(pixels)
        first_patch = self.vit.num_prefix_tokens
        if first_patch == int(self.class_token):
            return tokens
        patches = tokens[:, first_patch:]
        # timm's order is class token, registers, patches.
        return torch.cat([tokens[:, :1], patches], dim=1) if self.class_token else patches


def load(spec: EncoderSpec, resolution: int, path: Path) -> VitTokens:
    """A Vision Transformer with the weights in `path`, in timm's names.

    Raises DamagedError and MismatchError.
    """
    return fit_vit(spec, resolution, path, load_state(path))


def fit_vit(
    spec: EncoderSpec, resolution: int, path: Path, state: Mapping[str, Tensor]
) -> VitTokens:
    """The network of `spec` for images of `resolution` pixels, with `state` in timm's names.

    It is built from `spec.config` or, where that is empty, from the JSON object `config` in the
    metadata of `path`: timm's `architecture` and changes of its settings, or the settings of
    timm's VisionTransformer. The position embedding is resampled to the grid of `resolution`.
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
    _check_class_token(spec, vit)
    unused = ("norm.",) if isinstance(vit.norm, nn.Identity) else ()
    fitting = resampled(vit, without(state, unused), spec.grid(resolution), path, what)
    fit_state(vit, fitting, path, what)
    return VitTokens(vit, spec.class_token)


def build(spec: EncoderSpec, resolution: int, device: str) -> VitTokens:
    """The network of `spec` without its weights, on `device`.

    An entry without `config` is built from the metadata of its weights file. Raises MissingError
    and MismatchError.
    """
    config = spec.config or local_config("encoder", spec.name, spec.weights)
    vit = build_vit(config, spec.input_size(resolution), device)
    _check_class_token(spec, vit)
    return VitTokens(vit, spec.class_token)


def build_vit(config: Mapping[str, Any], img_size: int, device: str = "meta") -> Any:
    """timm's network without weights: on the meta device it draws no random numbers."""
    settings = {**config, "img_size": img_size, "num_classes": 0, "global_pool": ""}
    with torch.device(device):
        if "architecture" in settings:
            return timm.create_model(settings.pop("architecture"), pretrained=False, **settings)
        return VisionTransformer(**settings)


def _check_class_token(spec: EncoderSpec, vit: Any) -> None:
    if spec.class_token and vit.cls_token is None:
        raise MismatchError(
            f"encoder '{spec.name}' has no class token, its table entry says it has: correct it"
        )


def resampled(
    vit: Any, state: State, grid: tuple[int, int], path: Path, what: str
) -> Mapping[str, Tensor]:
    """`state` with its position embedding, if it has one, on `grid`.

    Raises MismatchError when the embedding is no square grid and the names fit: where they do
    not, fit_state says which.
    """
    if "pos_embed" not in state or vit.pos_embed is None:
        return state
    num_prefix_tokens = 0 if vit.no_embed_class else vit.num_prefix_tokens
    try:
        pos = resample_pos_embed(state["pos_embed"].float(), grid, num_prefix_tokens)
    except MismatchError as error:
        if state.keys() != vit.state_dict().keys():
            return state
        raise MismatchError(f"{path} does not fit {what}: {error}") from None
    return {**state, "pos_embed": pos}
