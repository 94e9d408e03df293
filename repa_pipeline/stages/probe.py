"""Measures what `repa plan` needs to know of this machine, in seconds and without any file.

Networks run with random weights: the speed is the same. A rate is images a second, the best of a
few runs. A slow device gets a smaller batch, so that the probe stays short; said so.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Sequence

import numpy as np

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.encoders import EncoderSpec
from repa_pipeline.text import count

_BUDGET_S = 4.0  # of one network, beside building it
_RUNS = 3
_PROBE_IMAGES = 16
# The usual size of an ImageNet file; with this noise and quality its usual bytes (114 KB), too.
_PROBE_SIDES = (500, 375)
_PROBE_NOISE, _PROBE_QUALITY = 16, 95


@dataclasses.dataclass(frozen=True)
class Measured:
    """Images a second, and how they were measured."""

    rate: float
    how: str


@dataclasses.dataclass(frozen=True)
class Probe:
    """Where and in what type to measure; `batch` as `repa encode` will run it."""

    device: str
    dtype: str
    compile: bool
    threads: int
    resolution: int
    batch: int

    def where(self) -> str:
        """The device in words: 'cpu with 2 threads, float32'."""
        import torch

        device = self._device()
        name = f"cpu with {count(torch.get_num_threads(), 'thread')}"
        if device != "cpu":
            name = f"{device} ({torch.cuda.get_device_name(device)})"
        return f"{name}, {self.dtype}" + (", compiled" if self.compile else "")

    def encoder(self, spec: EncoderSpec) -> Measured:
        """A teacher's forward pass, preprocessing and copy to the device included.

        Raises MissingError for one that cannot be had without its weights.
        """
        from repa_pipeline.encoders.base import load_random_encoder

        encoder = load_random_encoder(
            spec,
            resolution=self.resolution,
            device=self._device(),
            dtype=self.dtype,
            compile=self.compile,
        )
        return self._measure(encoder.tokens)

    def autoencoder(self, spec: AutoencoderSpec) -> Measured:
        """An autoencoder's encoding pass, copy to the device included; raises MissingError."""
        from repa_pipeline.autoencoders.base import load_random_autoencoder

        autoencoder = load_random_autoencoder(
            spec, device=self._device(), dtype=self.dtype, compile=self.compile
        )
        return self._measure(autoencoder.encode)

    def decode(self, files: Sequence[bytes] = ()) -> Measured:
        """Decoding and the exact crop on one core: of `files`, else of a generated JPEG."""
        chosen = list(files) or [example_jpeg()] * _PROBE_IMAGES

        def run() -> None:
            for data in chosen:
                adm_center_crop(decode_image(data).image, self.resolution)

        seconds = min(_seconds(run) for _ in range(_RUNS))
        what = f"{len(chosen)} files of the source" if files else "a JPEG like ImageNet's"
        return Measured(len(chosen) / seconds, f"{what}, best of {_RUNS} runs")

    def _device(self) -> str:
        prepare_compute(self.threads)
        return choose_device(self.device)

    def _measure(self, forward: Callable[..., object]) -> Measured:
        import torch

        device = torch.device(self._device())
        shape = (3, self.resolution, self.resolution)

        def seconds(batch: int) -> float:
            images = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8)

            def run() -> None:
                forward(images)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            return _seconds(run)

        is_slow = device.type == "cpu" and not self.compile
        return measure(seconds, self.batch, _BUDGET_S if is_slow else None)


def measure(seconds: Callable[[int], float], batch: int, budget: float | None) -> Measured:
    """The best rate of a few runs; `seconds(b)` runs a batch of b images.

    With a `budget` in seconds a run of one image comes first, and says how many fit; without one
    (fast devices, compiled networks) a full batch warms up.
    """
    first = seconds(batch if budget is None else 1)
    if budget is None:
        times = [seconds(batch) for _ in range(_RUNS)]
    else:
        batch = max(1, min(batch, int(budget / 2 / first)))
        times = [first] if batch == 1 else []
        spent = first
        while not times or (len(times) < _RUNS and spent < budget):
            times.append(seconds(batch))
            spent += times[-1]
    runs = "one run" if len(times) == 1 else f"best of {len(times)} runs"
    return Measured(batch / min(times), f"batch {batch}, {runs}")


def example_jpeg() -> bytes:
    """A seeded JPEG that costs about what an ImageNet file does: 500 x 375 pixels, 114 KB."""
    from PIL import Image

    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (24, 32, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize(_PROBE_SIDES, Image.Resampling.BICUBIC)
    noise = generator.integers(-_PROBE_NOISE, _PROBE_NOISE + 1, (*_PROBE_SIDES[::-1], 3), np.int16)
    pixels = np.clip(np.asarray(smooth).astype(np.int16) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_PROBE_QUALITY)
    return buffer.getvalue()


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
