"""MobileNetV2 as a teacher: the spatial features before pooling, at a chosen output stride.

A small convolutional teacher from a local file of quantised layers (quantised.py). Where the
output stride is below 32, the last strides become 1 and what follows is dilated: same weights,
denser map.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.errors import ConfigError
from repa_pipeline.quantised import load_quantised, tf_same_conv2d
from repa_pipeline.weights import fit_state

# Expansion, output channels, blocks, stride of the first block (MobileNetV2, table 2).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_WIDTH, HEAD_WIDTH, NUM_CLASSES = 32, 1280, 1000


class SameConv(nn.Module):
    """A convolution with TensorFlow's SAME padding, ReLU6 behind it unless `linear`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        linear: bool = False,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.stride, self.dilation, self.groups, self.linear = stride, dilation, groups, linear

    def forward(self, x: Tensor) -> Tensor:
        x = tf_same_conv2d(x, self.weight, self.bias, self.stride, self.dilation, self.groups)
        return x if self.linear else x.clamp(0, 6)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; the input is added where the shapes allow it."""

    def __init__(self, width_in: int, width_out: int, expansion: int, stride: int, dilation: int):
        super().__init__()
        hidden = width_in * expansion
        self.expand = SameConv(width_in, hidden) if expansion > 1 else None
        self.dw = SameConv(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden)
        self.project = SameConv(hidden, width_out, linear=True)
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else self.expand(x)
        out: Tensor = self.project(self.dw(hidden))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 of 32, 16 or 8 pixels a feature."""

    def __init__(self, output_stride: int):
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ConfigError(f"MobileNetV2's output_stride is {output_stride}: give 8, 16 or 32")
        self.stem = SameConv(3, STEM_WIDTH, 3, stride=2)
        self.blocks = nn.Sequential(*_blocks(output_stride))
        self.head = SameConv(STAGES[-1][1], HEAD_WIDTH)
        self.classifier = SameConv(HEAD_WIDTH, NUM_CLASSES, linear=True)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels float32 [B, 3, R, R] in [-1, 1] -> [B, 1280, R/stride, R/stride], in [0, 6]."""
        features: Tensor = self.head(self.blocks(self.stem(pixels)))
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Spatial features [B, 1280, h, w] -> ImageNet logits [B, 1000]."""
        logits: Tensor = self.classifier(features.mean((2, 3), keepdim=True))
        return logits.flatten(1)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels float32 [B, 3, R, R] in [-1, 1] -> tokens [B, h * w, 1280], row by row."""
        return self.features(pixels).flatten(2).transpose(1, 2)


def load(spec: EncoderSpec, resolution: int, path: Path) -> MobileNetV2:
    """MobileNetV2 at `spec.config["output_stride"]`; raises DamagedError and MismatchError."""
    return load_mobilenet_v2(path, int(spec.config["output_stride"]))


def build(spec: EncoderSpec, resolution: int, device: str) -> MobileNetV2:
    """MobileNetV2 without its weights, on `device`."""
    with torch.device(device):
        return MobileNetV2(int(spec.config["output_stride"]))


def load_mobilenet_v2(path: str | Path, output_stride: int) -> MobileNetV2:
    """MobileNetV2 with the quantised weights in `path`, whose classifier is kept too."""
    with torch.device("meta"):
        network = MobileNetV2(output_stride)
    fit_state(network, load_quantised(path), path, "MobileNetV2")
    return network


def _blocks(output_stride: int) -> list[InvertedResidual]:
    blocks = []
    width_in, reached, dilation = STEM_WIDTH, 2, 1
    for expansion, width, num_blocks, first_stride in STAGES:
        for i in range(num_blocks):
            stride = first_stride if i == 0 else 1
            # A stride left out leaves its own layer as it is and dilates all that follow.
            kept = stride if reached * stride <= output_stride else 1
            blocks.append(InvertedResidual(width_in, width, expansion, kept, dilation))
            dilation *= stride // kept
            reached *= kept
            width_in = width
    return blocks
