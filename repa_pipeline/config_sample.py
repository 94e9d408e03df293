"""Settings of `repa sample`."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import ClusterConfig
from repa_pipeline.settings import (
    check_fraction,
    check_interval,
    check_not_negative,
    check_positive,
    setting,
)


@dataclasses.dataclass(frozen=True)
class SampleConfig(ClusterConfig):
    """`repa sample`: a checkpoint -> images."""

    run: str | None = setting(None, "Run to sample from (default: the only one).")
    checkpoint: str | None = setting(None, "Checkpoint file (default: the run's newest).")
    num_images: int = setting(50_000, "Images to make.", check=check_positive)
    cfg: float = setting(
        1.0, "Guidance scale; 1 is no guidance.", decides=True, check=check_not_negative
    )
    interval: tuple[float, float] = setting(
        (0.0, 1.0),
        "Guide only while LOW <= t <= HIGH (t = 1 is noise; of DiT t is timestep / 1000).",
        decides=True,
        check=check_interval,
    )
    sampler: str = setting(
        "auto",
        "Of SiT: sde (Euler-Maruyama), euler, heun; of DiT: ddpm, ddim. auto: sde or ddpm; ode: "
        "euler or ddim.",
        decides=True,
        choices=("auto", "ode", "sde", "euler", "heun", "ddpm", "ddim"),
    )
    eta: float = setting(0.0, "Noise of a ddim step: 0 is none, 1 DDPM's.", check=check_fraction)
    num_steps: int = setting(250, "Sampler steps.", decides=True, check=check_positive)
    seed: int = setting(
        0, "Image k depends on (checkpoint, settings, seed, k) alone.", decides=True
    )
    labels: str = setting("random", "random, balanced, or one class number.", decides=True)
    batch_size: int = setting(64, "Images made together.", decides=True, check=check_positive)
    shard_rows: int = setting(256, "Images of a stored shard.", decides=True, check=check_positive)
    uint8: str = setting(
        "truncate",
        "255*x to integers: truncate (REPA's reference) or round (SiT, DiT).",
        decides=True,
        choices=("truncate", "round"),
    )
    use_ema: bool = setting(True, "Sample the EMA weights, not the raw ones.", decides=True)
    dtype: str = setting(
        "float32", "The model's compute type.", decides=True, choices=("float32", "bf16")
    )
    decoder: str | None = setting(
        None, "Autoencoder to decode with (default: the cache's).", decides=True
    )
    decoder_weights: str | None = setting(None, "Local weights file of the decoder.")
    grid: int = setting(100, "Images of the picture (0: none).", check=check_not_negative)
    npz: bool = setting(True, "Also pack all images into one ADM-style npz.")
    output: str | None = setting(None, "Folder for the result (default: below the workspace).")
