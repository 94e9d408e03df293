"""A frozen autoencoder: stored images to raw latents and back. `load_autoencoder("sd-vae")`.

Raw latents are stored; scale and shift of the table entry are applied late, by `scale_latents`
when training reads them, and undone by `unscale_latents` before decoding.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from repa_pipeline.autoencoders import AUTOENCODERS, AutoencoderSpec
from repa_pipeline.autoencoders.scaling import scale_by, unscale_by
from repa_pipeline.encoders.precision import FLOAT32, autocast, check_dtype, compiled
from repa_pipeline.encoders.randomised import RANDOM, build_random, find_build, unbuildable
from repa_pipeline.errors import ConfigError, MismatchError, MissingError
from repa_pipeline.tables import resolve
from repa_pipeline.weights import file_sha256, resolve_weights


class AutoencoderNetwork(nn.Module):
    """What a loader returns."""

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, R, R] in [-1, 1] -> mean and std [B, 2C, h, w], or latent [B, C, h, w]."""
        raise NotImplementedError

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latent [B, C, h, w] -> pixels [B, 3, R, R], about [-1, 1]."""
        raise NotImplementedError


class Autoencoder:
    """An autoencoder in eval mode, deterministic, without gradients.

    What it gives is float32 whatever it computes in; byte equality is promised for float32 alone.
    """

    def __init__(
        self,
        spec: AutoencoderSpec,
        network: AutoencoderNetwork,
        *,
        weights_sha256: str,
        device: str | torch.device = "cpu",
        dtype: str = FLOAT32,
        compile: bool = False,
    ):
        check_precision(spec, dtype)
        self.spec = spec
        self.weights_sha256 = weights_sha256
        self.device = torch.device(device)
        self.dtype = dtype
        network = network.to(self.device).eval().requires_grad_(False)
        self._encode = compiled(network.encode, compile)
        self._decode = compiled(network.decode, compile)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Raw, unscaled moments of a batch of images.

        images uint8 [B, 3, R, R], any device -> float32 on this autoencoder's device: mean and std
        [B, 2C, h, w] of a gaussian posterior, or the latent [B, C, h, w]. Raises ConfigError on a
        resolution it cannot take and MismatchError on another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise MismatchError(
                f"images are {images.dtype} {list(images.shape)}: expected uint8 [B, 3, R, R]"
            )
        _, height, width = self.spec.latent_shape(images.shape[2])
        pixels = images.to(self.device).float() / 127.5 - 1
        with autocast(self.device, self.dtype):
            stored = self._encode(pixels).float()
        self._check(stored, self.spec.stored_channels, height, width)
        return stored

    @torch.no_grad()
    def decode(self, raw: Tensor) -> Tensor:
        """Images of raw, unscaled latents.

        raw float32 [B, C, h, w], any device -> float32 [B, 3, R, R] on this autoencoder's device,
        about [-1, 1]. Raises MismatchError on another number of channels.
        """
        self._check(raw, self.spec.channels, *raw.shape[2:])
        with autocast(self.device, self.dtype):
            return self._decode(raw.to(self.device, torch.float32)).float()

    def _check(self, latents: Tensor, channels: int, height: int, width: int) -> None:
        if latents.shape[1:] != (channels, height, width):
            raise MismatchError(
                f"latents of autoencoder '{self.spec.name}' are {list(latents.shape)}: expected "
                f"[B, {channels}, {height}, {width}] by its table entry"
            )


def check_precision(spec: AutoencoderSpec, dtype: str) -> None:
    """Raises ConfigError for a dtype that is unknown or that this autoencoder must not run in."""
    if check_dtype(dtype) != FLOAT32 and spec.float32_only:
        raise ConfigError(
            f"autoencoder '{spec.name}' runs in {FLOAT32} only (its activations overflow smaller "
            f"types), got dtype {dtype}: leave dtype at {FLOAT32}"
        )


def scale_latents(raw: Tensor, spec: AutoencoderSpec) -> Tensor:
    """(raw - shift) * scale, per channel; [B, C, h, w] -> the same; raises MismatchError."""
    _check_channels(raw, spec)
    return scale_by(raw, spec.scale, spec.shift)


def unscale_latents(scaled: Tensor, spec: AutoencoderSpec) -> Tensor:
    """scaled / scale + shift, the inverse of `scale_latents`; [B, C, h, w] -> the same."""
    _check_channels(scaled, spec)
    return unscale_by(scaled, spec.scale, spec.shift)


def find_autoencoder_weights(
    name_or_spec: str | AutoencoderSpec, weights: str | None = None
) -> Path:
    """The local file an autoencoder's weights come from; raises MissingError (weights.py)."""
    spec = AUTOENCODERS[name_or_spec] if isinstance(name_or_spec, str) else name_or_spec
    return resolve_weights("autoencoder", spec.name, spec.weights, spec.hub, spec.hub_file, weights)


def load_autoencoder(
    name_or_spec: str | AutoencoderSpec,
    *,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str = FLOAT32,
    compile: bool = False,
) -> Autoencoder:
    """Loads an autoencoder; `weights` is a local file and comes before the entry's own.

    `dtype` "bf16" runs the network under bf16 autocast; `compile` compiles it at the first batch.
    Raises UnknownNameError, ConfigError (dtype), MissingError (no weights to be had),
    DamagedError or MismatchError (the file).
    """
    spec = AUTOENCODERS[name_or_spec] if isinstance(name_or_spec, str) else name_or_spec
    check_precision(spec, dtype)
    path = find_autoencoder_weights(spec, weights)
    network: AutoencoderNetwork = resolve(spec.loader)(spec, path)
    return Autoencoder(
        spec,
        network,
        weights_sha256=file_sha256(path),
        device=device,
        dtype=dtype,
        compile=compile,
    )


def load_random_autoencoder(
    spec: AutoencoderSpec,
    *,
    device: str | torch.device = "cpu",
    dtype: str = FLOAT32,
    compile: bool = False,
) -> Autoencoder:
    """An autoencoder with seeded random weights, for probes and benchmarks; its `weights_sha256`
    is "random".

    One that cannot be built without its file (a plugin without `build`) is loaded from the local
    file that its entry names. Raises ConfigError (dtype), MissingError without either.
    """
    check_precision(spec, dtype)
    build = find_build(spec.loader)
    if build is None:
        if spec.weights is None:
            why = "there is no `build` by its loader"
            raise MissingError(unbuildable("autoencoder", spec.name, why))
        return load_autoencoder(spec, device=device, dtype=dtype, compile=compile)
    made = build_random(functools.partial(build, spec), torch.device(device))
    return Autoencoder(
        spec,
        cast(AutoencoderNetwork, made),
        weights_sha256=RANDOM,
        device=device,
        dtype=dtype,
        compile=compile,
    )


def _check_channels(latents: Tensor, spec: AutoencoderSpec) -> None:
    if latents.shape[-3] != spec.channels:
        raise MismatchError(
            f"latents are {list(latents.shape)}: autoencoder '{spec.name}' has {spec.channels} "
            "channels; draw a sample of mean and std before scaling"
        )
