"""DiT: the trunk of SiT with the answer of DDPM (DiT, arXiv 2212.09748).

It takes whole timesteps 0 to 999 in place of times in [0, 1], and answers with twice the latent
channels: the noise, then the value of its learned variance (diffusion/ddpm.py). Parameter names
are those of the published weights (models/published_dit.py).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from repa_pipeline.models.sit import SiT, SiTConfig

if TYPE_CHECKING:
    from repa_pipeline.models import ModelSpec


@dataclasses.dataclass(frozen=True)
class DiTConfig(SiTConfig):
    """Everything that decides the shape of a DiT."""

    @property
    def out_channels(self) -> int:
        """Noise, and a variance for every channel of it."""
        return 2 * self.in_channels


class DiT(SiT):
    """The trunk: noise and variance [B, 2C, H, W] given latents, timestep and label.

    Called as SiT is, with whole timesteps [B] in 0 to 999, of an integer or a float dtype.
    """

    def __init__(self, config: DiTConfig):
        super().__init__(config)


def build_dit(
    spec: ModelSpec, *, input_size: int, in_channels: int, num_classes: int, qk_norm: bool = False
) -> DiT:
    """The loader of the DiT entries of MODELS."""
    return DiT(
        DiTConfig.of(
            spec,
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            qk_norm=qk_norm,
        )
    )
