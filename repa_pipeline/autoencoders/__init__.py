"""The table of frozen autoencoders. Data only: imports neither torch nor diffusers.

A new autoencoder is one entry here, or one in a plugin's AUTOENCODERS, and one loader function:
`load(spec, path) -> AutoencoderNetwork` (base.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repa_pipeline.errors import ConfigError
from repa_pipeline.tables import Table

GAUSSIAN, NONE = "gaussian", "none"


@dataclass(frozen=True)
class AutoencoderSpec:
    """All the pipeline needs to know of an autoencoder.

    `channels` C of the latent; `downsample` pixels a latent cell; `posterior` "gaussian" (mean and
    std are stored) or "none" (the latent itself); scaled latent = (raw - shift) * scale, one
    number or one per channel; `hub` and `hub_file` the published weights; `weights` a local path
    or "asset:FILE"; `config` what the loader builds the network from; `float32_only` when it must
    not run in a smaller type. Raises ConfigError.
    """

    name: str
    loader: str
    channels: int
    downsample: int
    posterior: str
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    hub: str | None = None
    hub_file: str = "diffusion_pytorch_model.safetensors"
    weights: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    float32_only: bool = False

    def __post_init__(self) -> None:
        if self.posterior not in (GAUSSIAN, NONE):
            raise ConfigError(
                f"autoencoder '{self.name}' has posterior '{self.posterior}': "
                f"give '{GAUSSIAN}' or '{NONE}'"
            )
        for setting, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) not in (1, self.channels):
                raise ConfigError(
                    f"autoencoder '{self.name}' has {len(values)} values of {setting}: "
                    f"give 1 or {self.channels}, one per channel"
                )

    @property
    def stored_channels(self) -> int:
        """Channels of what encoding gives and the cache stores: 2C (mean, std) or C."""
        return 2 * self.channels if self.posterior == GAUSSIAN else self.channels

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a latent of an image of `resolution` pixels; raises ConfigError."""
        if resolution <= 0 or resolution % self.downsample:
            raise ConfigError(
                f"autoencoder '{self.name}' cannot take images of {resolution} pixels: "
                f"use a resolution that is a multiple of {self.downsample}"
            )
        side = resolution // self.downsample
        return self.channels, side, side


SD_VAE_CONFIG: Mapping[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
}


def _sd_vae(decoder: str) -> AutoencoderSpec:
    return AutoencoderSpec(
        name=f"sd-vae-ft-{decoder}",
        loader="repa_pipeline.autoencoders.kl:load",
        channels=4,
        downsample=8,
        posterior=GAUSSIAN,
        scale=(0.18215,),
        hub=f"stabilityai/sd-vae-ft-{decoder}",
        config=SD_VAE_CONFIG,
    )


SDXL_VAE = AutoencoderSpec(
    name="sdxl-vae",
    loader="repa_pipeline.autoencoders.kl:load",
    channels=4,
    downsample=8,
    posterior=GAUSSIAN,
    scale=(0.13025,),
    hub="stabilityai/sdxl-vae",
    config={**SD_VAE_CONFIG, "sample_size": 1024},
    # Its activations overflow float16, and its publishers run it in float32 (`force_upcast`).
    float32_only=True,
)

AUTOENCODERS: Table[AutoencoderSpec] = Table(
    "autoencoder",
    [
        _sd_vae("ema"),
        _sd_vae("mse"),
        SDXL_VAE,
        AutoencoderSpec(
            name="taesd",
            loader="repa_pipeline.autoencoders.tiny:load",
            channels=4,
            downsample=8,
            posterior=NONE,
            hub="madebyollin/taesd",
        ),
        AutoencoderSpec(
            name="digits-vae",
            loader="repa_pipeline.autoencoders.kl:load",
            channels=4,
            downsample=8,
            posterior=GAUSSIAN,
            # 1 / std and mean of posterior samples over the training digits (assets.json).
            scale=(0.97130, 0.97990, 0.99768, 0.99256),
            shift=(0.00057, -0.00641, -0.00207, 0.00080),
            weights="asset:digits_vae.safetensors",
        ),
    ],
    aliases={"sd-vae": "sd-vae-ft-ema"},
)
