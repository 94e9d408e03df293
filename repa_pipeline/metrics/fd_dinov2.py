"""FD-DINOv2's network (Stein et al., arXiv 2306.04675): DINOv2 ViT-L/14, class token, 1024 wide.

As dgm-eval has it: 8-bit Pillow bicubic to 224 pixels whatever the image's size, ImageNet mean and
std, the authors' own resampling of the position embedding (37x37 to 16x16), the class token after
the last norm. This is another network than the teacher "dinov2-l": another input and embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from repa_pipeline.encoders import ENCODERS
from repa_pipeline.encoders.dinov2 import from_published
from repa_pipeline.encoders.rules import IMAGENET_MEAN, IMAGENET_STD
from repa_pipeline.encoders.timm_vit import build_vit
from repa_pipeline.errors import MissingError
from repa_pipeline.metrics.networks import Features, NetworkSpec
from repa_pipeline.weights import fit_state, load_state, resolve_weights

SIDE = 224
# DINOv2 adds this to the number of patches a side before it takes the ratio of the two grids.
OFFSET = 0.1


def load(spec: NetworkSpec, path: Path) -> DinoV2Judge:
    """The network with the weights in `path`, in timm's names, Meta's or transformers'; raises
    DamagedError and MismatchError. config: timm's architecture and changes of its settings."""
    vit = build_vit(spec.config, SIDE)
    state = from_published(load_state(path))
    if "pos_embed" in state:
        state["pos_embed"] = resample(state["pos_embed"].float(), vit.patch_embed.grid_size[0])
    fit_state(vit, state, path, f"network '{spec.name}'")
    return DinoV2Judge(vit)


class DinoV2Judge(nn.Module):
    """Images uint8 [B, 3, R, R] -> pool [B, D], the class token after the norm."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Features:
        pixels = resize(images).to(self.mean.device)
        return Features(self.vit.forward_features((pixels - self.mean) / self.std)[:, 0])


def resize(images: Tensor) -> Tensor:
    """uint8 [B, 3, R, R] -> float32 [B, 3, 224, 224] in 0..1, by Pillow, so on the CPU; rounded to
    8 bits, and so left alone where it has that size."""
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    resized = [
        np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for picture in pictures
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


def resample(pos: Tensor, side: int) -> Tensor:
    """The position embedding [1, 1 + N, D] on side x side patches, by DINOv2's own rule: bicubic
    without antialias at the ratio (side + 0.1) / sqrt(N)."""
    stored = round((pos.shape[1] - 1) ** 0.5)
    if stored == side or stored**2 != pos.shape[1] - 1:
        return pos
    grid = pos[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
    ratio = (side + OFFSET) / stored
    made = F.interpolate(grid, scale_factor=(ratio, ratio), mode="bicubic")
    return torch.cat([pos[:, :1], made.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def download(ways_out: str) -> Path:
    """The weights of timm's DINOv2 ViT-L/14 from the hub.

    `ways_out` tells what else the user can do. Raises MissingError.
    """
    entry = ENCODERS["dinov2-l"]
    try:
        return resolve_weights("network", "fd-dinov2", None, entry.hub, entry.hub_file, None)
    except MissingError:
        raise MissingError(
            f"no weights for network 'fd-dinov2': cannot get {entry.hub_file} from the hub "
            f"repository {entry.hub}: give {ways_out}, or a network that reaches the hub"
        ) from None
