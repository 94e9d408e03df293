"""The table of frozen teachers. Data only: imports neither torch nor timm.

A new teacher is one entry here, or one in a plugin's ENCODERS, and one loader function:
`load(spec, resolution, path) -> nn.Module` whose forward maps preprocessed images float32
[B, 3, S, S] to patch tokens [B, T, D], row by row, without register tokens, or to [B, 1 + T, D]
with the class token first where the entry's `class_token` is true. docs/encoders.md says what each
entry does to an image and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repa_pipeline.encoders.rules import PREPROCESS, Preprocess
from repa_pipeline.errors import ConfigError
from repa_pipeline.tables import Table

PATCH, PATCH_CLS = "patch", "patch+cls"
AFTER_NORM = "patch tokens after the final norm"
BEFORE_NORM = "patch tokens of the last block, before the final norm"


@dataclass(frozen=True)
class EncoderSpec:
    """All the pipeline needs to know of a teacher.

    `loader` is "module:function"; `preprocess` a key of PREPROCESS or a rule of one's own; `width`
    the tokens' channels; `hub` and `hub_file` the published weights; `weights` a local path or
    "asset:FILE"; `config` what the loader builds the network from; `tokens` says which tokens;
    `class_token` whether the network gives a class token before the patches.
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
    tokens: str = f"{AFTER_NORM}, no class token"
    class_token: bool = False

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

    def check_tokens(self, tokens: str) -> None:
        """Raises ConfigError when `tokens` is not "patch" or, with a class token, "patch+cls"."""
        if tokens not in (PATCH, PATCH_CLS):
            raise ConfigError(f"tokens is '{tokens}': expected {PATCH} or {PATCH_CLS}")
        if tokens == PATCH_CLS and not self.class_token:
            raise ConfigError(
                f"encoder '{self.name}' has no class token: use tokens {PATCH}, or another encoder"
            )

    def stored_tokens(self, resolution: int, tokens: str = PATCH) -> int:
        """Tokens of one image that a cache holds: the patches, and the class token if kept.

        Raises ConfigError as `grid` and `check_tokens` do.
        """
        self.check_tokens(tokens)
        return self.num_tokens(resolution) + (tokens == PATCH_CLS)


def _vit(
    name: str,
    family: str,
    width: int,
    patch_size: int,
    hub: str,
    architecture: str,
    *,
    preprocess: str | None = None,
    tokens: str = f"{AFTER_NORM}, no class token",
    class_token: bool = True,
    **settings: Any,
) -> EncoderSpec:
    """A Vision Transformer of timm: `settings` change those of `architecture`."""
    return EncoderSpec(
        name=name,
        loader=f"repa_pipeline.encoders.{family}:load",
        preprocess=preprocess or family,
        width=width,
        patch_size=patch_size,
        hub=hub,
        config={"architecture": architecture, **settings},
        tokens=tokens,
        class_token=class_token,
    )


def _dinov2(size: str, long: str, width: int) -> list[EncoderSpec]:
    plain, registers = f"vit_{long}_patch14_dinov2", f"vit_{long}_patch14_reg4_dinov2"
    dropped = f"{AFTER_NORM}, no class token, no registers"
    return [
        _vit(f"dinov2-{size}", "dinov2", width, 14, f"timm/{plain}.lvd142m", plain),
        _vit(
            f"dinov2-{size}-reg", "dinov2", width, 14, f"timm/{registers}.lvd142m", registers,
            tokens=dropped,
        ),
    ]  # fmt: skip


def _dinov3(size: str, long: str, width: int) -> EncoderSpec:
    architecture = f"vit_{long}_patch16_dinov3"
    return _vit(
        f"dinov3-{size}", "dinov3", width, 16, f"timm/{architecture}.lvd1689m", architecture,
        tokens=f"{AFTER_NORM}, no class token, no registers",
    )  # fmt: skip


def _siglip2(size: str, long: str, width: int) -> EncoderSpec:
    architecture = f"vit_{long}_patch16_siglip_256"
    # The authors' JAX code has the tanh form of GELU in every size; timm's table in one alone.
    return _vit(
        f"siglip2-{size}", "siglip", width, 16, f"timm/{architecture}.v2_webli", architecture,
        tokens=f"{AFTER_NORM}, before the attention pool", class_token=False, act_layer="gelu_tanh",
    )  # fmt: skip


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


_BASE, _LARGE = "vit_base_patch16_224", "vit_large_patch16_224"

# The names that the reference's command line gives its teachers.
ALIASES = {
    **{f"dinov2-vit-{size}": f"dinov2-{size}" for size in "sblg"},
    **{f"dinov2reg-vit-{size}": f"dinov2-{size}-reg" for size in "sblg"},
    **{f"dinov2reg-{size}": f"dinov2-{size}-reg" for size in "sblg"},
    "dinov1-vit-b": "dinov1-b",
    "mocov3-vit-b": "mocov3-b",
    "mocov3-vit-l": "mocov3-l",
    "clip-vit-L": "clip-l",
    "mae-vit-l": "mae-l",
    "jepa-vit-h": "ijepa-h",
    "siglip2": "siglip2-b",
}

ENCODERS: Table[EncoderSpec] = Table(
    "encoder",
    [
        *_dinov2("s", "small", 384),
        *_dinov2("b", "base", 768),
        *_dinov2("l", "large", 1024),
        *_dinov2("g", "giant", 1536),
        _vit("dinov1-b", "dinov1", 768, 16, "timm/vit_base_patch16_224.dino", _BASE),
        _vit("mocov3-b", "mocov3", 768, 16, "nyu-visionx/moco-v3-vit-b", _BASE),
        _vit("mocov3-l", "mocov3", 1024, 16, "nyu-visionx/moco-v3-vit-l", _LARGE),
        _vit(
            "mae-l", "mae", 1024, 16, "timm/vit_large_patch16_224.mae", _LARGE,
            tokens=f"{BEFORE_NORM}, no class token", final_norm=False,
        ),
        _vit(
            "clip-l", "clip", 1024, 14, "openai/clip-vit-large-patch14",
            "vit_large_patch14_clip_quickgelu_224",
            tokens=f"{BEFORE_NORM}, no class token", final_norm=False,
        ),
        _vit(
            "ijepa-h", "ijepa", 1280, 14, "facebook/ijepa_vith14_1k", "vit_huge_patch14_gap_224",
            preprocess="jepa", tokens=AFTER_NORM, class_token=False,
        ),
        _dinov3("s", "small", 384),
        _dinov3("b", "base", 768),
        _dinov3("l", "large", 1024),
        _siglip2("b", "base", 768),
        _siglip2("l", "large", 1024),
        _siglip2("so400m", "so400m", 1152),
        _mobilenet_v2("mobilenet-v2", 16),
        _mobilenet_v2("mobilenet-v2-os8", 8),
        EncoderSpec(
            name="digits-vit",
            loader="repa_pipeline.encoders.timm_vit:load",
            preprocess="digits",
            width=128,
            patch_size=16,
            weights="asset:digits_vit.safetensors",
            class_token=True,
        ),
    ],
    aliases=ALIASES,
)  # fmt: skip
