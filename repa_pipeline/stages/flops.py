"""Floating-point operations of networks, counted on the meta device: nothing is computed.

Matrix products, convolutions and attention count (2 operations a multiply-add), nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.errors import MissingError, RepaError
from repa_pipeline.models import ModelSpec

# A training step: forward, and twice that to go back (FACTS: 6 x forward multiply-adds an image).
TRAINING_PASSES = 3
_NUM_CLASSES = 1000


def training_flops(spec: ModelSpec, latents: AutoencoderSpec, resolution: int) -> float:
    """Operations of one image's training step, without projectors.

    Raises ConfigError for sizes that do not fit, MissingError for a plugin's model that cannot be
    counted.
    """
    import torch

    from repa_pipeline.models import build_model

    channels, side, _ = latents.latent_shape(resolution)

    def forward() -> None:
        model = build_model(spec, input_size=side, in_channels=channels, num_classes=_NUM_CLASSES)
        label = torch.zeros(1, dtype=torch.int64)
        model(torch.empty(1, channels, side, side), torch.empty(1), label)

    return TRAINING_PASSES * _count(f"model '{spec.name}'", forward)


def encoder_flops(spec: EncoderSpec, resolution: int) -> float:
    """Operations of one image's pass through a teacher.

    Raises ConfigError for the resolution, MissingError for a plugin's teacher that cannot be
    counted.
    """
    import torch

    from repa_pipeline.encoders.base import build_network

    side = spec.input_size(resolution)

    def forward() -> None:
        build_network(spec, resolution)(torch.empty(1, 3, side, side))

    return _count(f"encoder '{spec.name}'", forward)


def _count(what: str, forward: Callable[[], None]) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward()
    except RepaError:
        raise
    # A plugin's network may do what the meta device cannot, and fail in any way.
    except Exception as error:
        raise MissingError(
            f"cannot count the operations of {what} ({type(error).__name__}): give the rate of "
            "training as `train` in --rates"
        ) from error
    return float(counter.get_total_flops())
