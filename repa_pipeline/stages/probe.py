"""Measures what `repa plan` needs to know of this machine: seconds of work, not of files.

Networks run with whatever weights are at hand; where there are none, with random ones: the speed
is the same. A rate is images a second, the best of several runs.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.device import choose_device
from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.models import ModelSpec

_RUNS = 3
# The mean size of an ImageNet training image; its files are JPEGs of about this quality.
_PROBE_SIDE = (500, 375)
_PROBE_IMAGES = 16


@dataclasses.dataclass(frozen=True)
class Probe:
    """Where and in what type to measure."""

    device: str
    dtype: str
    compile: bool
    resolution: int
    batch: int

    def encoder(self, spec: EncoderSpec) -> float:
        """Images/s of a teacher's forward pass."""
        from repa_pipeline.encoders.base import load_random_encoder

        encoder = load_random_encoder(
            spec,
            resolution=self.resolution,
            device=choose_device(self.device),
            dtype=self.dtype,
            compile=self.compile,
        )
        return self._rate(lambda: encoder.tokens(self._images()))

    def autoencoder(self, spec: AutoencoderSpec) -> float:
        """Images/s of an autoencoder's encoding pass."""
        from repa_pipeline.autoencoders.base import load_random_autoencoder

        autoencoder = load_random_autoencoder(
            spec, device=choose_device(self.device), dtype=self.dtype, compile=self.compile
        )
        return self._rate(lambda: autoencoder.encode(self._images()))

    def decode(self) -> float:
        """Images/s of one core: an ImageNet-sized JPEG through the exact crop."""
        from PIL import Image

        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (24, 32, 3), np.uint8)
        picture = Image.fromarray(coarse).resize(_PROBE_SIDE, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=95)
        data = buffer.getvalue()

        def run() -> None:
            for _ in range(_PROBE_IMAGES):
                adm_center_crop(decode_image(data).image, self.resolution)

        return _PROBE_IMAGES / _best(run)

    def _images(self) -> Tensor:
        import torch

        side = self.resolution
        return torch.randint(0, 256, (self.batch, 3, side, side), dtype=torch.uint8)

    def _rate(self, forward: Callable[[], object]) -> float:
        import torch

        def run() -> None:
            forward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        run()
        return self.batch / _best(run)


def train_rate(
    spec: ModelSpec, latents: AutoencoderSpec, encoder: EncoderSpec, resolution: int, rate: float
) -> float:
    """Images/s of training, from a teacher's measured forward rate at equal use of the device.

    A training step costs three forward passes (FACTS: 6 x forward MACs an image).
    """
    model = model_flops(spec, latents, resolution)
    return rate * encoder_flops(encoder, resolution) / (3 * model)


def model_flops(spec: ModelSpec, latents: AutoencoderSpec, resolution: int) -> float:
    """Floating-point operations of one image's forward pass, counted without computing it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from repa_pipeline.models.sit import SiT, SiTConfig

    channels, side, _ = latents.latent_shape(resolution)
    with torch.device("meta"):
        model = SiT(
            SiTConfig(
                input_size=side,
                in_channels=channels,
                patch_size=spec.patch_size,
                width=spec.width,
                depth=spec.depth,
                num_heads=spec.num_heads,
                num_classes=1000,
            )
        )
        x, t = torch.empty(1, channels, side, side), torch.empty(1)
        label = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(x, t, label)
    return float(counter.get_total_flops())


def encoder_flops(spec: EncoderSpec, resolution: int) -> float:
    """Floating-point operations of one image's forward pass, counted without computing it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from repa_pipeline.encoders.base import build_network

    side = spec.input_size(resolution)
    network = build_network(spec, resolution)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network(torch.empty(1, 3, side, side))
    return float(counter.get_total_flops())


def _best(run: Callable[[], object]) -> float:
    """Fastest of several runs: the machine's noise only ever adds."""
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
