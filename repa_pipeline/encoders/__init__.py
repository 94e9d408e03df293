"""The table of frozen teachers. Data only: imports neither torch nor timm.

A new teacher is one entry here, or one in a plugin's ENCODERS, and one loader function:
`load(spec, resolution, path) -> nn.Module` whose forward maps preprocessed images float32
[B, 3, S, S] to patch tokens [B, T, D], row by row, without class or register tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repa_pipeline.encoders.rules import PREPROCESS, Preprocess
from repa_pipeline.errors import ConfigError
from repa_pipeline.tables import Table


@dataclass(frozen=True)
class EncoderSpec:
    """All the pipeline needs to know of a teacher.

    `loader` is "module:function"; `preprocess` a key of PREPROCESS or a rule of one's own; `width`
    the tokens' channels; `hub` and `hub_file` the published weights; `weights` a local path or
    "asset:FILE"; `config` what the loader builds the network from; `tokens` says which tokens.
    """

    name: str
    loader: str
    preprocess: str | Preprocess
    width: int
    patch_size: int
    hub: str | None = None
    hub_file: str = "model.safetensors"
    weights: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tokens: str = "patch tokens after the final norm, no class token"

    @property
    def rule(self) -> Preprocess:
        """The preprocessing rule; raises ConfigError on an unknown key."""
        if isinstance(self.preprocess, Preprocess):
            return self.preprocess
        if self.preprocess not in PREPROCESS:
            raise ConfigError(
                f"encoder '{self.name}' names preprocessing '{self.preprocess}': "
                f"known are {', '.join(sorted(PREPROCESS))}"
            )
        return PREPROCESS[self.preprocess]

    def input_size(self, resolution: int) -> int:
        """Side in pixels of what the network sees for images of `resolution` pixels.

        Raises ConfigError when that is not a whole number of patches.
        """
        size = self.rule.scaled(resolution)
        if resolution <= 0 or size % self.patch_size != 0:
            step = self.rule.resolution_step(self.patch_size)
            raise ConfigError(
                f"encoder '{self.name}' cannot take images of {resolution} pixels: its input of "
                f"{float(size):g} is not a multiple of patch {self.patch_size}; use a resolution "
                f"that is a multiple of {step}"
            )
        return int(size)

    def grid(self, resolution: int) -> tuple[int, int]:
        """Rows and columns of patch tokens for images of `resolution` pixels."""
        side = self.input_size(resolution) // self.patch_size
        return side, side

    def num_tokens(self, resolution: int) -> int:
        """Patch tokens of one image of `resolution` pixels."""
        rows, columns = self.grid(resolution)
        return rows * columns


def _dinov2(size: str, architecture: str, width: int) -> EncoderSpec:
    return EncoderSpec(
        name=f"dinov2-{size}",
        loader="repa_pipeline.encoders.timm_vit:load",
        preprocess="dinov2",
        width=width,
        patch_size=14,
        hub=f"timm/{architecture}.lvd142m",
        config={"architecture": architecture},
    )


def _mobilenet_v2(name: str, output_stride: int) -> EncoderSpec:
    return EncoderSpec(
        name=name,
        loader="repa_pipeline.encoders.mobilenet_v2:load",
        preprocess="mobilenet",
        width=1280,
        patch_size=output_stride,
        config={"output_stride": output_stride},
        tokens="spatial features before pooling",
    )


ENCODERS: Table[EncoderSpec] = Table(
    "encoder",
    [
        _dinov2("s", "vit_small_patch14_dinov2", 384),
        _dinov2("b", "vit_base_patch14_dinov2", 768),
        _dinov2("l", "vit_large_patch14_dinov2", 1024),
        _dinov2("g", "vit_giant_patch14_dinov2", 1536),
        _mobilenet_v2("mobilenet-v2", 16),
        _mobilenet_v2("mobilenet-v2-os8", 8),
        EncoderSpec(
            name="digits-vit",
            loader="repa_pipeline.encoders.timm_vit:load",
            preprocess="digits",
            width=128,
            patch_size=16,
            weights="asset:digits_vit.safetensors",
        ),
    ],
    # The names that the reference's command line gives these teachers.
    aliases={f"dinov2-vit-{size}": f"dinov2-{size}" for size in "sblg"},
)
