"""Settings: one frozen dataclass per command, and the presets they start from.

How a value is settled (flag, environment, repa.toml, preset, default) is in resolve.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from repa_pipeline.settings import (
    as_json,
    check_fraction,
    check_interval,
    check_not_negative,
    check_positive,
    decisions,
    from_json,
    setting,
)

__all__ = ["EMBEDDED", "PRESETS", "WORKSPACE", "as_json", "decisions", "from_json"]

EMBEDDED = "embedded:digits"
WORKSPACE = "./repa-workspace"


@dataclasses.dataclass(frozen=True)
class CommonConfig:
    """What every command knows."""

    source: str = setting(
        EMBEDDED,
        "Images: a folder of class folders; webdataset tars, parquet files or zips (one, a folder, "
        "a glob or {000..009} pattern); the reference's images/ + vae-sd/ + dataset.json (folder "
        "or zip); local or s3://, https://, hf://datasets/...; or embedded:digits.",
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
    executor: str = setting(
        "auto",
        "Where shards run; auto: Ray where an --address is configured or the machine has several "
        "CUDA devices, else this process.",
        choices=("auto", "local", "ray"),
    )
    address: str | None = setting(
        None, "Ray cluster to join (also RAY_ADDRESS); default: one started on this machine."
    )
    threads: int = setting(
        0, "CPU compute threads (0: OMP_NUM_THREADS, else all cores).", check=check_not_negative
    )
    plugins: tuple[str, ...] = setting((), "Modules that add table entries.")
    overrides: dict[str, dict[str, Any]] = setting(
        {}, "Changed table entries, from [encoders.NAME] and the like.", hidden=True
    )
    dry_run: bool = setting(False, "Show the plan, the bytes and what is already done; do nothing.")


@dataclasses.dataclass(frozen=True)
class ClusterConfig(CommonConfig):
    """Commands whose shards run on workers. None of these settings decides bytes."""

    workers: int = setting(
        0, "Ray workers (0: one a CUDA device, or one a CPU node).", check=check_not_negative
    )
    worker_gpus: float = setting(
        1.0, "CUDA devices of a Ray worker; 0.5 puts two on one.", check=check_not_negative
    )
    worker_cpus: float = setting(
        0.0, "CPU cores that Ray reserves for a worker (0: its threads).", check=check_not_negative
    )
    retries: int = setting(
        2, "Further tries of a shard after a passing fault.", check=check_not_negative
    )
    straggler_factor: float = setting(
        3.0,
        "A shard that takes this many times the median gets a second worker (0: never).",
        check=check_not_negative,
    )
    shard_timeout_s: float = setting(
        0.0,
        "A worker that holds a shard longer is replaced (0: no limit).",
        check=check_not_negative,
    )


@dataclasses.dataclass(frozen=True)
class IndexConfig(ClusterConfig):
    """`repa index`: which images there are, in which order they are stored."""

    permutation_seed: int = setting(0, "Seed of the global order of the rows.", decides=True)
    exif: str = setting(
        "upright",
        "upright turns photos by their EXIF orientation; raw ignores it, as ADM and REPA do.",
        choices=("upright", "raw"),
        decides=True,
    )
    max_pixels: int = setting(
        178_956_970, "Images with more pixels are excluded.", decides=True, check=check_positive
    )
    shard_rows: int = setting(
        0, "Rows of a stored shard (0: 512, fewer for small sets).", check=check_not_negative
    )
    max_bad: int = setting(0, "Unusable images to accept before failing.", check=check_not_negative)
    decode_threads: int = setting(4, "Threads that read and decode images.", check=check_positive)
    scratch: str | None = setting(None, "Local folder for unpacked .tar.gz and parquet files.")
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=check_positive)


@dataclasses.dataclass(frozen=True)
class EncodeConfig(IndexConfig):
    """What the two image passes share."""

    resolution: int = setting(256, "Image side in pixels.", decides=True, check=check_positive)
    batch_size: int = setting(
        32,
        "Images of one forward pass; fixed, so it decides bytes.",
        decides=True,
        check=check_positive,
    )
    flip: bool = setting(
        False, "Also store the mirrored view of every image, beside the other.", decides=True
    )
    format: str = setting(
        "zarr",
        "Container of the shards: zarr, or webdataset (a tar of .npy members).",
        choices=("zarr", "webdataset"),
        decides=True,
    )
    dtype: str = setting(
        "float32",
        "Compute type of the frozen network; bf16 is for CUDA devices.",
        choices=("float32", "bf16"),
        decides=True,
    )
    compile: bool = setting(False, "Compile the network with torch.compile.", decides=True)
    weights: str | None = setting(
        None, "Local weights file (else the table entry's, else the hub)."
    )


@dataclasses.dataclass(frozen=True)
class LatentsConfig(EncodeConfig):
    """`repa encode-latents`: images -> autoencoder moments."""

    autoencoder: str = setting("sd-vae-ft-ema", "Autoencoder, by table name.", decides=True)
    moments_dtype: str = setting(
        "float16",
        "How moments are stored.",
        choices=("float16", "float32"),
        decides=True,
    )


@dataclasses.dataclass(frozen=True)
class FeaturesConfig(EncodeConfig):
    """`repa cache-features`: images -> teacher patch tokens."""

    encoder: tuple[str, ...] = setting(
        ("dinov2-b",), "Teacher, by table name; may be given several times.", decides=True
    )
    codec: str = setting(
        "auto",
        "How tokens are stored; auto: as the array that stands there, else int8.",
        choices=("auto", "fp16", "bf16", "int8", "int4"),
        decides=True,
    )
    tokens: str = setting(
        "patch",
        "Which tokens are stored: patch tokens, or the class token in front of them too.",
        choices=("patch", "patch+cls"),
        decides=True,
    )


@dataclasses.dataclass(frozen=True)
class EncodeAllConfig(FeaturesConfig, LatentsConfig):
    """`repa encode`: latents and teacher tokens from one decode of each image."""


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
    batch_size: int = setting(64, "Images of one forward pass.", check=check_positive)
    decode_threads: int = setting(4, "Threads that read and decode images.", check=check_positive)
    scratch: str | None = setting(None, "Local folder for unpacked .tar.gz and parquet files.")
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=check_positive)
    reference_images: int = setting(
        10_000, "Reference images for precision and recall.", check=check_positive
    )
    pr_mode: str = setting(
        "float32",
        "Distances of precision and recall: float32, or adm_fp16 as the ADM suite has them.",
        choices=("float32", "float64", "adm_fp16"),
    )
    is_split: int = setting(
        5000, "Images of one block of the inception score.", check=check_positive
    )
    output: str | None = setting(None, "Where result.json goes (default: beside the samples).")


@dataclasses.dataclass(frozen=True)
class RunsConfig(CommonConfig):
    """`repa runs`: the training runs of a workspace."""


@dataclasses.dataclass(frozen=True)
class ReportConfig(CommonConfig):
    """`repa report`: one page from the results of a workspace."""

    output: str | None = setting(None, "The page (default: report.html in the workspace).")


# Per preset: settings of all commands under "", of one command under its name.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "digits": {
        "": {"resolution": 64},
        "encode-latents": {"autoencoder": "digits-vae"},
        "cache-features": {"encoder": ("digits-vit",)},
        "encode": {"autoencoder": "digits-vae", "encoder": ("digits-vit",)},
        "plan": {
            "autoencoder": "digits-vae",
            "encoder": ("digits-vit",),
            "model": "SiT-XS/2",
            "train_steps": 600,
            "train_batch": 64,
            "devices": 1,
            "devices_per_node": 1,
        },
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
            "sampler": "ode",
            "num_steps": 12,
            "batch_size": 100,
            "shard_rows": 100,
        },
        "evaluate": {"network": "digits-cnn", "is_split": 1000},
    },
    "imagenet": {},
}
