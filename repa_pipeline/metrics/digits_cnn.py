"""A small convolutional classifier of the embedded digits, as a feature network.

It scores samples of the embedded default, and took no part in making them: it is neither the
teacher nor the autoencoder. Its numbers are not FID. Trained by scripts/train_embedded.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repa_pipeline.metrics.networks import Features, NetworkSpec
from repa_pipeline.weights import fit_state, load_state

SIDE = 64
WIDTHS = (16, 32, 64)
POOL_WIDTH, NUM_CLASSES, NUM_GROUPS = 64, 10, 8
SPATIAL_CHANNELS = 7


def load(spec: NetworkSpec, path: Path) -> DigitsCNN:
    """DigitsCNN with the weights in `path`, float32; raises DamagedError and MismatchError."""
    with torch.device("meta"):
        network = DigitsCNN()
    fit_state(network, load_state(path), path, f"network '{spec.name}'")
    return network


class DigitsCNN(nn.Module):
    """Three halving convolutions to 8x8, one more, average pooling, a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        widths_in = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            _stage(width_in, width, stride=2)
            for width_in, width in zip(widths_in, WIDTHS, strict=True)
        )
        self.last = _stage(WIDTHS[-1], POOL_WIDTH, stride=1)
        self.classifier = nn.Linear(POOL_WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Features:
        """images uint8 [B, 3, R, R] -> pool [B, 64], spatial [B, 448], logits [B, 10], float32.

        Images of another size are first brought to 64x64: by area where larger, bilinear where
        smaller. Spatial: 7 channels of the last halving's 8x8 map in order y, x, channel, as sFID
        takes them.
        """
        x = _to_side(images.float()) / 127.5 - 1
        for stage in self.stages:
            x = stage(x)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pool = self.last(x).mean(dim=(2, 3))
        return Features(pool=pool, spatial=spatial, logits=self.classifier(pool))


def _to_side(x: Tensor) -> Tensor:
    if x.shape[-1] > SIDE:
        return F.adaptive_avg_pool2d(x, SIDE)
    if x.shape[-1] < SIDE:
        return F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return x


def _stage(width_in: int, width: int, *, stride: int) -> nn.Sequential:
    # GroupNorm: features of an image must not depend on its batch, nor on running averages.
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride=stride, padding=1),
        nn.GroupNorm(NUM_GROUPS, width),
        nn.SiLU(),
    )
