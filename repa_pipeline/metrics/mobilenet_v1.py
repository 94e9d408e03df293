"""MobileNetV1 1.0 (Howard et al. 2017) from a file of quantised layers, as a feature network.

For Frechet distances where no Inception weights are at hand. Its numbers are not FID.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from repa_pipeline.errors import ConfigError
from repa_pipeline.metrics.networks import Features, NetworkSpec
from repa_pipeline.quantised import load_quantised, tf_same_conv2d
from repa_pipeline.weights import fit_state

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STEM_WIDTH, NUM_CLASSES = 32, 1000


def load(spec: NetworkSpec, path: Path) -> MobileNetV1:
    """MobileNetV1 with the quantised weights in `path`; raises DamagedError and MismatchError.

    config: `spatial_channels`, how many leading channels of block `spatial_block` (0 to 12) make
    the spatial features; 0 for none.
    """
    with torch.device("meta"):
        network = MobileNetV1(**spec.config)
    fit_state(network, load_quantised(path), path, "MobileNetV1")
    return network


class MobileNetV1(nn.Module):
    """BatchNorm folded, ReLU6 after all but the classifier, SAME padding as in TensorFlow."""

    def __init__(self, *, spatial_block: int = 10, spatial_channels: int = 0) -> None:
        super().__init__()
        if not 0 <= spatial_block < len(STRIDES):
            raise ConfigError(f"MobileNetV1's spatial_block is {spatial_block}: give 0 to 12")
        self.spatial_block = spatial_block
        self.spatial_channels = spatial_channels
        self.stem = nn.Conv2d(3, STEM_WIDTH, 3, stride=2)
        widths_in = (STEM_WIDTH, *WIDTHS)
        self.blocks = nn.ModuleList(
            _separable(width_in, width, stride)
            for width_in, width, stride in zip(widths_in, WIDTHS, STRIDES, strict=False)
        )
        self.classifier = nn.Conv2d(WIDTHS[-1], NUM_CLASSES, 1)

    def forward(self, images: Tensor) -> Features:
        """images uint8 [B, 3, R, R] -> pool of 1024, spatial (y, x, channel), 1000 logits."""
        maps = self.maps(images)
        pool = maps[-1].mean(dim=(2, 3), keepdim=True)
        spatial = maps[self.spatial_block][:, : self.spatial_channels]
        return Features(
            pool=pool.flatten(1),
            spatial=spatial.permute(0, 2, 3, 1).flatten(1) if self.spatial_channels else None,
            logits=self.classifier(pool).flatten(1),
        )

    def maps(self, images: Tensor) -> list[Tensor]:
        """Outputs of the 13 blocks, float32 in [0, 6]; the last is [B, 1024, R/32, R/32]."""
        x = _convolve(self.stem, images.float() / 127.5 - 1)
        maps = []
        for block in self.blocks:
            for convolution in block.children():
                x = _convolve(convolution, x)
            maps.append(x)
        return maps


def _separable(width_in: int, width: int, stride: int) -> nn.ModuleDict:
    depthwise = nn.Conv2d(width_in, width_in, 3, stride=stride, groups=width_in)
    return nn.ModuleDict({"dw": depthwise, "pw": nn.Conv2d(width_in, width, 1)})


def _convolve(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    out = tf_same_conv2d(x, layer.weight, layer.bias, layer.stride[0], groups=layer.groups)
    return out.clamp(0, 6)
