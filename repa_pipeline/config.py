"""Settings: one frozen dataclass per command, and the presets they start from.

How a value is settled (flag, environment, repa.toml, preset, default) is in resolve.py.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

EMBEDDED = "embedded:digits"
WORKSPACE = "./repa-workspace"


def setting(
    default: Any,
    help: str,
    *,
    decides: bool = False,
    choices: tuple[str, ...] = (),
    check: Callable[[Any], str | None] | None = None,
    hidden: bool = False,
) -> Any:
    """A field: default, help line, whether it decides bytes, and what values it takes.

    `check` returns what is expected when the value is wrong, None when it is right.
    """
    metadata = {
        "help": help,
        "decides": decides,
        "choices": choices,
        "check": check,
        "hidden": hidden,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _positive(value: float) -> str | None:
    return None if value > 0 else "a number above 0"


def _not_negative(value: float) -> str | None:
    return None if value >= 0 else "0 or more"


def _fraction(value: float) -> str | None:
    return None if 0 <= value <= 1 else "a number in [0, 1]"


def _interval(value: tuple[float, float]) -> str | None:
    low, high = value
    return None if 0 <= low <= high <= 1 else "LOW,HIGH with 0 <= LOW <= HIGH <= 1"


@dataclasses.dataclass(frozen=True)
class CommonConfig:
    """What every command knows."""

    source: str = setting(
        EMBEDDED,
        "Images: a folder of class folders, webdataset tars (a folder, glob or {000..009} "
        "pattern), or embedded:digits.",
    )
    workspace: str = setting(WORKSPACE, "Folder or URL for everything that is made.")
    runs_dir: str | None = setting(
        None, "Local folder of runs and their samples (default: runs in the workspace)."
    )
    preset: str = setting(
        "auto",
        "Defaults to start from; auto: digits for the embedded source (or a cache of it), "
        "else imagenet.",
    )
    device: str = setting("auto", "cpu, cuda, cuda:1; auto takes CUDA where there is one.")
    executor: str = setting("local", "Where shards run.", choices=("local",))
    threads: int = setting(
        0, "CPU compute threads (0: OMP_NUM_THREADS, else all cores).", check=_not_negative
    )
    plugins: tuple[str, ...] = setting((), "Modules that add table entries.")
    overrides: dict[str, dict[str, Any]] = setting(
        {}, "Changed table entries, from [encoders.NAME] and the like.", hidden=True
    )
    dry_run: bool = setting(False, "Show the plan, the bytes and what is already done; do nothing.")


@dataclasses.dataclass(frozen=True)
class IndexConfig(CommonConfig):
    """`repa index`: which images there are, in which order they are stored."""

    permutation_seed: int = setting(0, "Seed of the global order of the rows.", decides=True)
    exif: str = setting(
        "upright",
        "upright turns photos by their EXIF orientation; raw ignores it, as ADM and REPA do.",
        choices=("upright", "raw"),
        decides=True,
    )
    max_pixels: int = setting(
        178_956_970, "Images with more pixels are excluded.", decides=True, check=_positive
    )
    shard_rows: int = setting(
        0, "Rows of a stored shard (0: 512, fewer for small sets).", check=_not_negative
    )
    max_bad: int = setting(0, "Unusable images to accept before failing.", check=_not_negative)
    decode_threads: int = setting(4, "Threads that read and decode images.", check=_positive)
    retries: int = setting(
        2, "Further tries of a shard after a passing fault.", check=_not_negative
    )
    scratch: str | None = setting(None, "Local folder for unpacked .tar.gz files.")
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=_positive)


@dataclasses.dataclass(frozen=True)
class EncodeConfig(IndexConfig):
    """What the two image passes share."""

    resolution: int = setting(256, "Image side in pixels.", decides=True, check=_positive)
    batch_size: int = setting(
        32, "Images of one forward pass; fixed, so it decides bytes.", decides=True, check=_positive
    )
    weights: str | None = setting(
        None, "Local weights file (else the table entry's, else the hub)."
    )


@dataclasses.dataclass(frozen=True)
class LatentsConfig(EncodeConfig):
    """`repa encode-latents`: images -> autoencoder moments."""

    autoencoder: str = setting("sd-vae-ft-ema", "Autoencoder, by table name.", decides=True)


@dataclasses.dataclass(frozen=True)
class FeaturesConfig(EncodeConfig):
    """`repa cache-features`: images -> teacher patch tokens."""

    encoder: tuple[str, ...] = setting(
        ("dinov2-b",), "Teacher, by table name; may be given several times.", decides=True
    )
    codec: str = setting("fp16", "How tokens are stored.", choices=("fp16",), decides=True)


@dataclasses.dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """`repa train`: a diffusion transformer over the cache."""

    name: str | None = setting(None, "Name of the run (default: from model and teacher).")
    autoencoder: str = setting("auto", "Latents to train on; auto: the only ones in the cache.")
    encoder: tuple[str, ...] = setting(
        ("auto",), "Teachers; auto: the only one in the cache; none: the vanilla twin."
    )
    method: str = setting("auto", "What is trained; auto: repa with a teacher, sit without.")
    model: str = setting("SiT-XL/2", "Model, by table name.", decides=True)
    qk_norm: bool = setting(False, "Normalise queries and keys.", decides=True)
    path: str = setting("linear", "Interpolant.", decides=True, choices=("linear", "cosine"))
    weighting: str = setting(
        "uniform", "Distribution of t.", decides=True, choices=("uniform", "lognormal")
    )
    align_depth: int = setting(
        0,
        "Block after which tokens are aligned (0: the model's, 8 of XL, 4 of B).",
        decides=True,
        check=_not_negative,
    )
    align_coeff: float = setting(0.5, "Weight of the alignment loss (lambda).", decides=True)
    align_resize: str = setting(
        "refuse",
        "pool: average-pool a teacher grid that is a multiple of the student's.",
        choices=("refuse", "pool"),
        decides=True,
    )
    projector_width: int = setting(
        2048, "Hidden width of the projector.", decides=True, check=_positive
    )
    batch_size: int = setting(256, "Global batch.", decides=True, check=_positive)
    accumulate: int = setting(1, "Micro-steps a step is split into.", check=_positive)
    steps: int = setting(400_000, "Optimiser steps of the whole run.", check=_positive)
    learning_rate: float = setting(1e-4, "AdamW learning rate.", decides=True, check=_positive)
    beta2: float = setting(
        0.999, "AdamW second beta (the first is 0.9).", decides=True, check=_fraction
    )
    weight_decay: float = setting(0.0, "AdamW weight decay.", decides=True, check=_not_negative)
    clip: float = setting(1.0, "Gradient norm is clipped to this.", decides=True, check=_positive)
    ema_decay: float = setting(0.9999, "Decay of the EMA weights.", decides=True, check=_fraction)
    label_dropout: float = setting(
        0.1, "Share of labels replaced by the null label.", decides=True, check=_fraction
    )
    dtype: str = setting(
        "auto",
        "Compute type; auto: bf16 autocast on CUDA, float32 on CPU.",
        choices=("auto", "float32", "bf16"),
    )
    seed: int = setting(0, "Seed of weights, order, noise.", decides=True)
    lanes: int = setting(1, "Canonical lanes of the data order.", decides=True, check=_positive)
    window: int = setting(16, "Shards a lane shuffles together.", decides=True, check=_positive)
    log_every: int = setting(100, "Steps between logged means.", decides=True, check=_positive)
    checkpoint_every: int = setting(10_000, "Steps between checkpoints.", check=_positive)
    keep: int = setting(2, "Newest checkpoints to keep (the last is always kept).", check=_positive)
    preview_every: int = setting(0, "Steps between EMA previews (0: none).", check=_not_negative)
    preview_count: int = setting(16, "Images of a preview.", check=_positive)
    resume: bool = setting(True, "Go on when the run exists.")


@dataclasses.dataclass(frozen=True)
class SampleConfig(CommonConfig):
    """`repa sample`: a checkpoint -> images."""

    run: str | None = setting(None, "Run to sample from (default: the only one).")
    checkpoint: str | None = setting(None, "Checkpoint file (default: the run's newest).")
    num_images: int = setting(50_000, "Images to make.", check=_positive)
    cfg: float = setting(
        1.0, "Guidance scale; 1 is no guidance.", decides=True, check=_not_negative
    )
    interval: tuple[float, float] = setting(
        (0.0, 1.0),
        "Guide only while LOW <= t <= HIGH (t = 1 is noise).",
        decides=True,
        check=_interval,
    )
    sampler: str = setting(
        "sde",
        "SDE Euler-Maruyama, or ODE Euler or Heun.",
        decides=True,
        choices=("sde", "euler", "heun"),
    )
    num_steps: int = setting(250, "Sampler steps.", decides=True, check=_positive)
    seed: int = setting(
        0, "Image k depends on (checkpoint, settings, seed, k) alone.", decides=True
    )
    labels: str = setting("random", "random, balanced, or one class number.", decides=True)
    batch_size: int = setting(64, "Images made together.", decides=True, check=_positive)
    shard_rows: int = setting(256, "Images of a stored shard.", decides=True, check=_positive)
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
    grid: int = setting(100, "Images of the picture (0: none).", check=_not_negative)
    npz: bool = setting(True, "Also pack all images into one ADM-style npz.")
    output: str | None = setting(None, "Folder for the result (default: below the workspace).")
    retries: int = setting(
        2, "Further tries of a shard after a passing fault.", check=_not_negative
    )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(CommonConfig):
    """`repa evaluate`: images -> Fréchet distance and the other four numbers."""

    run: str | None = setting(None, "Run whose samples are scored (default: the only one).")
    samples: str | None = setting(None, "Sample folder or ADM npz (default: the only samples).")
    network: str = setting("encoder:dinov2-b", "Feature network: a table name or encoder:NAME.")
    network_weights: str | None = setting(None, "Local weights file of the feature network.")
    reference: str | None = setting(
        None, "ADM-style reference npz (default: statistics of the training source)."
    )
    batch_size: int = setting(64, "Images of one forward pass.", check=_positive)
    decode_threads: int = setting(4, "Threads that read and decode images.", check=_positive)
    scratch: str | None = setting(None, "Local folder for unpacked .tar.gz files.")
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=_positive)
    reference_images: int = setting(
        10_000, "Reference images for precision and recall.", check=_positive
    )
    pr_mode: str = setting(
        "float32",
        "Distances of precision and recall: float32, or adm_fp16 as the ADM suite has them.",
        choices=("float32", "float64", "adm_fp16"),
    )
    is_split: int = setting(5000, "Images of one block of the inception score.", check=_positive)
    output: str | None = setting(None, "Where result.json goes (default: beside the samples).")


@dataclasses.dataclass(frozen=True)
class RunsConfig(CommonConfig):
    """`repa runs`: the training runs of a workspace."""


@dataclasses.dataclass(frozen=True)
class ReportConfig(CommonConfig):
    """`repa report`: one page from the results of a workspace."""

    output: str | None = setting(None, "The page (default: report.html in the workspace).")


COMMANDS: Mapping[str, type[CommonConfig]] = {
    "index": IndexConfig,
    "encode-latents": LatentsConfig,
    "cache-features": FeaturesConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "runs": RunsConfig,
    "report": ReportConfig,
}

# Per preset: settings of all commands under "", of one command under its name.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "digits": {
        "": {"resolution": 64},
        "encode-latents": {"autoencoder": "digits-vae"},
        "cache-features": {"encoder": ("digits-vit",)},
        "train": {
            "model": "SiT-XS/2",
            "steps": 600,
            "batch_size": 64,
            "learning_rate": 3e-3,
            "ema_decay": 0.99,
            "projector_width": 256,
            "log_every": 10,
            "checkpoint_every": 300,
        },
        "sample": {
            "num_images": 1000,
            "sampler": "euler",
            "num_steps": 12,
            "batch_size": 100,
            "shard_rows": 100,
        },
        "evaluate": {"network": "digits-cnn", "is_split": 1000},
    },
    "imagenet": {},
}


def decisions(config: Any) -> dict[str, Any]:
    """The settings that decide bytes, as JSON values."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.metadata.get("decides")
    }


def as_json(config: Any) -> dict[str, Any]:
    """All settings, as JSON values."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_json(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """The inverse of `as_json`; settings this version does not know are left out."""
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(
        **{
            name: tuple(value) if typing.get_origin(hints[name]) is tuple else value
            for name, value in values.items()
            if name in known
        }
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
