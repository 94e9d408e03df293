"""All randomness of training step s, for the whole global batch.

Each purpose (posterior, t, noise, label dropout) has a generator seeded by (seed, s, purpose), so
a rank or a micro-step takes its slice of the same numbers whatever the world size.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from repa_pipeline.diffusion.interpolant import WEIGHTINGS, States, draw_t


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    text = "/".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StepDraws:
    """The random numbers of one step; `device` is the generators' device and decides the values."""

    def __init__(self, seed: int, step: int, batch_size: int, device: str):
        self._key = (seed, step)
        self._batch_size = batch_size
        self._device = device

    def posterior(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal [B, *shape] for the sample of the autoencoder's posterior."""
        return self._normal("posterior", shape)

    def noise(self, shapes: tuple[tuple[int, ...], ...]) -> States:
        """Standard normal noise of every state, each [B, *shape]."""
        return tuple(self._normal(f"noise.{i}", shape) for i, shape in enumerate(shapes))

    def t(self, weighting: str, path: str) -> Tensor:
        """Times float32 [B] in [0, 1]."""
        normal = WEIGHTINGS[weighting] == "normal"
        draw = self._normal("t", ()) if normal else self._uniform("t")
        return draw_t(weighting, path, draw)

    def dropped(self, share: float) -> Tensor:
        """bool [B]: whose label is replaced by the null label."""
        return self._uniform("label_dropout") < share

    def mirrored(self) -> npt.NDArray[np.bool_]:
        """bool [B]: whose mirrored view is drawn. On the CPU: the reader asks for it."""
        generator = torch.Generator("cpu").manual_seed(seed_of(*self._key, "mirrored"))
        drawn: npt.NDArray[np.bool_] = (
            torch.rand(self._batch_size, generator=generator) < 0.5
        ).numpy()
        return drawn

    def _normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        size = (self._batch_size, *shape)
        return torch.randn(size, generator=self._generator(purpose), device=self._device)

    def _uniform(self, purpose: str) -> Tensor:
        generator = self._generator(purpose)
        return torch.rand(self._batch_size, generator=generator, device=self._device)

    def _generator(self, purpose: str) -> torch.Generator:
        generator = torch.Generator(self._device)
        return generator.manual_seed(seed_of(*self._key, purpose))
