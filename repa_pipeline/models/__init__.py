"""The table MODELS: every trainable trunk by name, as data; importing it needs no torch.

A new trunk of a known family is one line in MODELS; a new family is one file with a loader. Sizes
are those of DiT and SiT (REPA, section 4 and Appendix D); XS and Ti are small ones of our own for
tests and small data.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from repa_pipeline.tables import Table, resolve

if TYPE_CHECKING:
    from torch import nn


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One trunk: `loader` names the function that builds it, "module:function".

    `align_depth` is the block after which REPA aligns it by default; `family` decides which
    methods train it (methods/__init__.py).

    The loader is called as `loader(spec, input_size=, in_channels=, num_classes=, qk_norm=)`.
    """

    name: str
    depth: int
    width: int
    num_heads: int
    patch_size: int
    align_depth: int
    family: str = "sit"
    loader: str = "repa_pipeline.models.sit:build_sit"

    def grid(self, input_size: int) -> tuple[int, int]:
        """Tokens per side for latents of `input_size` per side."""
        return input_size // self.patch_size, input_size // self.patch_size


# name, depth, width, heads, block that is aligned (REPA, Table 2 and Appendix D), patch sizes
_Sizes = tuple[tuple[str, int, int, int, int, tuple[int, ...]], ...]
_SMALL: _Sizes = (
    ("XS", 4, 128, 4, 2, (1, 2)),
    ("Ti", 6, 192, 3, 2, (1, 2)),
)
_PUBLISHED: _Sizes = (
    ("S", 12, 384, 6, 4, (2, 4, 8)),
    ("B", 12, 768, 12, 4, (2, 4, 8)),
    ("L", 24, 1024, 16, 8, (2, 4, 8)),
    ("XL", 28, 1152, 16, 8, (2, 4, 8)),
)


def _entries(prefix: str, sizes: _Sizes, **family: str) -> list[ModelSpec]:
    return [
        ModelSpec(f"{prefix}-{size}/{patch}", depth, width, num_heads, patch, align_depth, **family)
        for size, depth, width, num_heads, align_depth, patches in sizes
        for patch in patches
    ]


MODELS: Table[ModelSpec] = Table(
    "model",
    [
        *_entries("SiT", _SMALL + _PUBLISHED),
        *_entries("DiT", _PUBLISHED, family="dit", loader="repa_pipeline.models.dit:build_dit"),
    ],
)


def build_model(
    model: str | ModelSpec,
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    qk_norm: bool = False,
) -> nn.Module:
    """Builds an initialised trunk from its name or entry.

    `input_size`: latents per side; `in_channels`: latent channels; `num_classes`: without the null
    class. Raises UnknownNameError for a name that is in no table, ConfigError for sizes that do
    not fit together.
    """
    spec = MODELS[model] if isinstance(model, str) else model
    built: nn.Module = resolve(spec.loader)(
        spec,
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        qk_norm=qk_norm,
    )
    return built
