"""Autoencoders with a gaussian posterior: diffusers' AutoencoderKL (Stable Diffusion's VAE)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.autoencoders.base import AutoencoderNetwork
from repa_pipeline.encoders.randomised import local_config
from repa_pipeline.errors import MismatchError
from repa_pipeline.weights import fit_state, load_config, load_state

# The attention's old parameter names, which published files still have.
ATTENTION_RENAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


class KLNetwork(AutoencoderNetwork):
    """AutoencoderKL whose encoding is mean and std, the log-variance clamped to [-30, 20]."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, R, R] in [-1, 1] -> mean and std (not log-variance) [B, 2C, h, w]."""
        posterior = self.vae.encode(pixels, return_dict=False)[0]
        # In float32 also where the network ran in bf16: exp magnifies rounding.
        std = torch.exp(0.5 * posterior.logvar.float())
        return torch.cat([posterior.mean.float(), std], dim=1)

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latent [B, C, h, w] -> pixels [B, 3, R, R], about [-1, 1]."""
        pixels: Tensor = self.vae.decode(raw, return_dict=False)[0]
        return pixels


def load(spec: AutoencoderSpec, path: Path) -> KLNetwork:
    """AutoencoderKL with the weights in `path`, in diffusers' naming, old or new.

    The network is built from `spec.config` or, where that is empty, from the JSON object `config`
    in the file's metadata (settings of AutoencoderKL). Raises DamagedError and MismatchError.
    """
    config = spec.config or load_config(path)
    what = f"autoencoder '{spec.name}'"
    if not config:
        raise MismatchError(
            f"{path} has no metadata `config` and {what} names none: give a safetensors file with "
            "the settings of diffusers' AutoencoderKL as JSON under `config`"
        )
    vae = build_kl(config)
    fit_state(vae, from_old_naming(load_state(path)), path, what)
    return KLNetwork(vae)


def build(spec: AutoencoderSpec, device: str) -> KLNetwork:
    """The network of `spec` without its weights, on `device`.

    An entry without `config` is built from the metadata of its weights file. Raises MissingError.
    """
    config = spec.config or local_config("autoencoder", spec.name, spec.weights)
    return KLNetwork(build_kl(config, device))


def build_kl(config: Mapping[str, Any], device: str = "meta") -> Any:
    """diffusers' network without weights: on the meta device it draws no random numbers."""
    untyped: Any = AutoencoderKL
    with torch.device(device):
        return untyped(**config)


def from_old_naming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' old names of the attention's parameters as the new ones; new ones unchanged."""
    renamed = {}
    for key, value in state.items():
        for old, new in ATTENTION_RENAMES.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed
