"""Preprocessing rules as data: what each family of teachers does to an image (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocess:
    """x/255, then minus `mean`, over `std`, then bicubic (no antialias) to the input size.

    `size_at_256` is the encoder's input size for images of 256 pixels; it grows in proportion.
    """

    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    size_at_256: int = 256

    def scaled(self, resolution: int) -> Fraction:
        """The input size in pixels for images of `resolution` pixels; whole for usable ones."""
        return Fraction(resolution * self.size_at_256, 256)

    def resolution_step(self, patch_size: int) -> int:
        """Usable resolutions are the multiples of this: they give whole patches."""
        return 256 * patch_size // math.gcd(256 * patch_size, self.size_at_256)


PREPROCESS: Mapping[str, Preprocess] = {
    "dinov2": Preprocess(size_at_256=224),
    "clip": Preprocess(mean=CLIP_MEAN, std=CLIP_STD, size_at_256=224),
    "mae": Preprocess(),
    "mocov3": Preprocess(),
    "jepa": Preprocess(size_at_256=224),
    "dinov1": Preprocess(),
    "dinov3": Preprocess(),
    "siglip": Preprocess(mean=HALF, std=HALF),
    "digits": Preprocess(),
    "mobilenet": Preprocess(mean=HALF, std=HALF),
}
