"""Settings: one frozen dataclass per command, and the presets they start from.

How a value is settled (flag, environment, repa.toml, preset, default) is in resolve.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from repa_pipeline.settings import (
    as_json,
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
    settings_file: str | None = setting(
        None, "The repa.toml that was read, for commands that this one starts.", hidden=True
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
class RunsConfig(CommonConfig):
    """`repa runs`: the training runs of a workspace."""


@dataclasses.dataclass(frozen=True)
class ReportConfig(CommonConfig):
    """`repa report`: one page from the results of a workspace."""

    output: str | None = setting(None, "The page (default: report.html in the workspace).")


_DIGITS_SAMPLER: Mapping[str, Any] = {
    "sampler": "ode",
    "num_steps": 12,
    "batch_size": 100,
    "resolution": 0,  # of a file of others, which is not of digits
}
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
        "sample": {**_DIGITS_SAMPLER, "num_images": 1000, "shard_rows": 100},
        "grid": _DIGITS_SAMPLER,
        "sweep": {
            **_DIGITS_SAMPLER,
            "num_images": 1000,
            "shard_rows": 100,
            "network": "digits-cnn",
            "is_split": 1000,
        },
        "evaluate": {"network": "digits-cnn", "is_split": 1000},
        "reference": {"network": "digits-cnn"},
    },
    "imagenet": {},
}
