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

OUTPUTS = ("npz", "images", "png", "jpeg", "latents")
# Settings that came later: at their default they are not in a recipe, so that it stays what it was.
LATER = ("compile", "ema_decay", "num_heads")


def check_outputs(value: tuple[str, ...]) -> str | None:
    """Names of OUTPUTS."""
    return None if set(value) <= set(OUTPUTS) else f"some of {', '.join(OUTPUTS)}"


def check_quality(value: int) -> str | None:
    """A JPEG quality."""
    return None if 1 <= value <= 100 else "a quality from 1 to 100"


@dataclasses.dataclass(frozen=True)
class DrawConfig(ClusterConfig):
    """How samples are drawn, of whatever checkpoint and with whatever guidance."""

    downloads: str | None = setting(
        None,
        "Local folder of checkpoints from URLs (default: ~/.cache/repa-pipeline/checkpoints).",
    )
    guide_checkpoint: str | None = setting(
        None,
        "A weaker checkpoint of the same latents: its answer takes the place of the unconditional "
        "one (autoguidance).",
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
    batch_size: int = setting(64, "Images made together.", decides=True, check=check_positive)
    shard_rows: int = setting(256, "Images of a stored shard.", decides=True, check=check_positive)
    uint8: str = setting(
        "truncate",
        "255*x to integers: truncate (REPA's reference) or round (SiT, DiT).",
        decides=True,
        choices=("truncate", "round"),
    )
    use_ema: bool = setting(True, "Sample the EMA weights, not the raw ones.", decides=True)
    ema_decay: float = setting(
        0.0,
        "Which of a run's averages, by its decay (0: the main one; others by --ema-extra).",
        decides=True,
        check=check_fraction,
    )
    dtype: str = setting(
        "float32",
        "The model's compute type; tf32 and bf16 count on CUDA devices.",
        decides=True,
        choices=("float32", "tf32", "bf16"),
    )
    compile: bool = setting(False, "Compile the model with torch.compile.", decides=True)
    decoder: str | None = setting(
        None,
        "Autoencoder to decode with (default: the cache's; sd-vae-ft-ema where a file of others "
        "does not say).",
        decides=True,
    )
    decoder_weights: str | None = setting(None, "Local weights file of the decoder.")
    num_heads: int = setting(
        0,
        "Attention heads of a file of others (0: as the table says for its size).",
        decides=True,
        check=check_not_negative,
    )
    resolution: int = setting(
        0,
        "Pixels of a file of others that does not tell (diffusers' DiT).",
        check=check_not_negative,
    )


@dataclasses.dataclass(frozen=True)
class SampleConfig(DrawConfig):
    """`repa sample`: a checkpoint -> images."""

    run: str | None = setting(None, "Run to sample from (default: the only one).")
    checkpoint: str | None = setting(
        None,
        "Checkpoint: a file or URL of a run, of the reference's code or a published DiT, or a "
        "folder of `repa export --to safetensors` (default: the run's newest).",
    )
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
    labels: str = setting(
        "random",
        "random, balanced (k modulo the classes), one class number, or a .npy or .txt file with a "
        "class an image.",
        decides=True,
    )
    sorted_labels: bool = setting(
        False, "Take a labels file that stands class by class, of which IS would be wrong."
    )
    from_latents: str | None = setting(
        None, "Decode the latents of this sample folder; no checkpoint is needed."
    )
    outputs: tuple[str, ...] = setting(
        (),
        "What is written, of npz (with images), images (zarr), png and jpeg (webdataset), latents "
        "(zarr) (default: npz, nothing with --score).",
        check=check_outputs,
    )
    score: tuple[str, ...] = setting(
        (), "Networks whose features of every image are written, for `repa evaluate`."
    )
    network_weights: str | None = setting(None, "Local weights file of the one --score network.")
    any_weights: bool = setting(False, "Let --score take other weights than the published ones.")
    jpeg_quality: int = setting(95, "Quality of jpeg, without subsampling.", check=check_quality)
    grid: int = setting(100, "Images of the picture (0: none).", check=check_not_negative)
    npz: bool = setting(
        True, "Pack all images into one ADM-style npz, where --outputs is not given."
    )
    output: str | None = setting(
        None, "Folder or URL for the result (default: below the run or the workspace)."
    )
