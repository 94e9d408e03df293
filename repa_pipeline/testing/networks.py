"""The networks of parts.py: one convolution each."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from repa_pipeline.autoencoders import GAUSSIAN, AutoencoderSpec
from repa_pipeline.autoencoders.base import AutoencoderNetwork
from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.weights import fit_state, load_state


class TinyAutoencoder(AutoencoderNetwork):
    """A strided convolution to the moments, a transposed one back."""

    def __init__(self, spec: AutoencoderSpec):
        super().__init__()
        side = spec.downsample
        self.gaussian = spec.posterior == GAUSSIAN
        self.down = nn.Conv2d(3, spec.stored_channels, side, stride=side, bias=False)
        self.up = nn.ConvTranspose2d(spec.channels, 3, side, stride=side, bias=False)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, R, R] -> mean and std (0.14 to 1) [B, 2C, h, w], or latent [B, C, h, w]."""
        stored: Tensor = self.down(pixels)
        if not self.gaussian:
            return stored
        mean, raw = stored.chunk(2, dim=1)
        return torch.cat([mean, (torch.tanh(raw) - 1).exp()], dim=1)

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latent [B, C, h, w] -> pixels [B, 3, R, R] in [-1, 1]."""
        return torch.tanh(self.up(raw))


class TinyEncoder(nn.Module):
    """A patch embedding."""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        side = spec.patch_size
        self.embed = nn.Conv2d(3, spec.width, side, stride=side, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels float32 [B, 3, S, S] -> tokens [B, T, D], row by row."""
        embedded: Tensor = self.embed(pixels)
        return embedded.flatten(2).transpose(1, 2)


def load_autoencoder(spec: AutoencoderSpec, path: Path) -> TinyAutoencoder:
    """Raises DamagedError and MismatchError for a file that does not fit."""
    network = TinyAutoencoder(spec)
    fit_state(network, load_state(path), path, f"autoencoder '{spec.name}'")
    return network


def load_encoder(spec: EncoderSpec, resolution: int, path: Path) -> TinyEncoder:
    """Raises DamagedError and MismatchError for a file that does not fit."""
    network = TinyEncoder(spec)
    fit_state(network, load_state(path), path, f"encoder '{spec.name}'")
    return network
