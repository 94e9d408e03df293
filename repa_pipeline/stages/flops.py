"""Floating-point operations of networks, counted on the meta device: nothing is computed.

Matrix products, convolutions and attention count (2 operations a multiply-add), nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from repa_pipeline.errors import MissingError, RepaError
from repa_pipeline.models import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repa_pipeline.autoencoders import AutoencoderSpec
    from repa_pipeline.encoders import EncoderSpec

# A training step: forward, and twice that to go back (FACTS: 6 x forward multiply-adds an image).
TRAINING_PASSES = 3
_NUM_CLASSES = 1000


def training_flops(spec: ModelSpec, latents: AutoencoderSpec, resolution: int) -> float:
    """Operations of one image's training step, without projectors.

    Raises ConfigError for sizes that do not fit, MissingError for a plugin's model that cannot be
    counted.
    """
    channels, side, _ = latents.latent_shape(resolution)
    return latent_training_flops(spec, channels, side)


def latent_training_flops(spec: ModelSpec, channels: int, side: int) -> float:
    """`training_flops` of latents [channels, side, side]."""
    import torch

    from repa_pipeline.models import build_model

    def build() -> nn.Module:
        return build_model(spec, input_size=side, in_channels=channels, num_classes=_NUM_CLASSES)

    with torch.device("meta"):
        label = torch.zeros(1, dtype=torch.int64)
        inputs = (torch.empty(1, channels, side, side), torch.empty(1), label)
    return TRAINING_PASSES * _count(f"model '{spec.name}'", build, inputs)


def countable_training_flops(spec: ModelSpec, channels: int, side: int) -> float | None:
    """`latent_training_flops`; None for a plugin's model that cannot be counted."""
    try:
        return latent_training_flops(spec, channels, side)
    except MissingError:
        return None


def encoder_flops(spec: EncoderSpec, resolution: int) -> float:
    """Operations of one image's pass through a teacher.

    Raises ConfigError for the resolution, MissingError for a plugin's teacher that cannot be
    counted.
    """
    import torch

    from repa_pipeline.encoders.base import build_network

    side = spec.input_size(resolution)

    inputs = (torch.empty(1, 3, side, side, device="meta"),)
    return _count(f"encoder '{spec.name}'", lambda: build_network(spec, resolution), inputs)


def _count(what: str, build: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"), torch.no_grad():
            network = build()
            with FlopCounterMode(display=False) as counter:
                network(*inputs)
    except RepaError:
        raise
    # A plugin's network may do what the meta device cannot, and fail in any way.
    except Exception as error:
        raise MissingError(
            f"cannot count the operations of {what} ({type(error).__name__}): give the rate of "
            "training as `train` in --rates"
        ) from error
    return float(counter.get_total_flops())
