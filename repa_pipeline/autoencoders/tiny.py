"""TAESD, the small deterministic autoencoder of Stable Diffusion's latent space.

Its latents already carry the factor 0.18215 of that space, so the table's scale is 1. diffusers'
AutoencoderTiny takes and gives pixels in [-1, 1] and converts to TAESD's own [0, 1] itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.autoencoders.base import AutoencoderNetwork
from repa_pipeline.weights import fit_state, load_state

OWN_NAME = re.compile(r"(encoder|decoder)\.(\d+)\.(.+)")


class TinyNetwork(AutoencoderNetwork):
    """AutoencoderTiny: no posterior, the encoding is the latent."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, R, R] in [-1, 1] -> latent [B, C, h, w]."""
        latent: Tensor = self.vae.encode(pixels, return_dict=False)[0]
        return latent

    def decode(self, raw: Tensor) -> Tensor:
        """Latent [B, C, h, w] -> pixels [B, 3, R, R], about [-1, 1]."""
        pixels: Tensor = self.vae.decode(raw, return_dict=False)[0]
        return pixels


def load(spec: AutoencoderSpec, path: Path) -> TinyNetwork:
    """AutoencoderTiny with the weights in `path`, in TAESD's own naming or in diffusers'.

    Raises DamagedError and MismatchError.
    """
    network = build(spec, "meta")
    what = f"autoencoder '{spec.name}'"
    fit_state(network.vae, from_own_naming(load_state(path)), path, what)
    return network


def build(spec: AutoencoderSpec, device: str) -> TinyNetwork:
    """AutoencoderTiny without its weights, on `device`."""
    untyped: Any = AutoencoderTiny
    with torch.device(device):
        return TinyNetwork(untyped(**spec.config))


def from_own_naming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TAESD's own parameter names as diffusers'; diffusers' own pass unchanged."""
    return {_rename(key): value for key, value in state.items()}


def _rename(key: str) -> str:
    match = OWN_NAME.fullmatch(key)
    if match is None:
        return key
    half, index, rest = match.groups()
    # TAESD's decoder begins with its tanh clamp, which diffusers does not count as a layer.
    return f"{half}.layers.{int(index) - (half == 'decoder')}.{rest}"
