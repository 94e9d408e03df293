"""Settings of `repa train`."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import CommonConfig
from repa_pipeline.settings import (
    check_fraction,
    check_not_negative,
    check_positive,
    setting,
)


def _check_workers(values: tuple[int, ...]) -> str | None:
    is_range = len(values) <= 2 and all(value > 0 for value in values)
    return None if is_range and list(values) == sorted(values) else "N, or MIN,MAX"


def _check_fractions(values: tuple[float, ...]) -> str | None:
    return None if all(0 <= value <= 1 for value in values) else "numbers in [0, 1]"


@dataclasses.dataclass(frozen=True)
class ModelSettings(CommonConfig):
    """What is trained: data, model, diffusion, alignment."""

    name: str | None = setting(None, "Name of the run (default: from model and teacher).")
    autoencoder: str = setting("auto", "Latents to train on; auto: the only ones in the cache.")
    encoder: tuple[str, ...] = setting(
        ("auto",), "Teachers; auto: the only one in the cache; none: the vanilla twin."
    )
    features: str = setting(
        "cache",
        "Where teacher tokens come from: the cache, or the teacher itself, run inside every step "
        "on the source's images (online).",
        choices=("cache", "online"),
        decides=True,
    )
    method: str = setting(
        "auto", "What is trained; auto: by the model's family, aligned where there is a teacher."
    )
    model: str = setting("SiT-XL/2", "Model, by table name.", decides=True)
    qk_norm: bool = setting(False, "Normalise queries and keys.", decides=True)
    path: str = setting("linear", "Interpolant of SiT.", decides=True, choices=("linear", "cosine"))
    weighting: str = setting(
        "uniform", "Distribution of t of SiT.", decides=True, choices=("uniform", "lognormal")
    )
    align_depth: int = setting(
        0,
        "Block after which tokens are aligned (0: the model's, 8 of XL, 4 of B).",
        decides=True,
        check=check_not_negative,
    )
    align_coeff: float = setting(0.5, "Weight of the alignment loss (lambda).", decides=True)
    align_schedule: str = setting(
        "constant",
        "lambda over the steps until --align-steps: constant, or falling to 0 linearly or as a "
        "half cosine.",
        decides=True,
        choices=("constant", "linear", "cosine"),
    )
    align_steps: int = setting(
        0,
        "Align for this many steps only (0: to the end); afterwards no features are read.",
        decides=True,
        check=check_not_negative,
    )
    align_objective: str = setting("cosine", "Alignment objective, by table name.", decides=True)
    align_temperature: float = setting(
        0.1, "Temperature of the nt-xent objective.", decides=True, check=check_positive
    )
    align_target: str = setting(
        "tokens",
        "What is aligned with, by table name: the teacher's tokens, or spatially normalised ones.",
        decides=True,
    )
    align_resize: str = setting(
        "refuse",
        "pool: average-pool a teacher grid that is a multiple of the student's.",
        choices=("refuse", "pool"),
        decides=True,
    )
    projector: str = setting("mlp", "Alignment head, by table name: mlp or conv.", decides=True)
    projector_width: int = setting(
        2048, "Hidden width of the mlp projector.", decides=True, check=check_positive
    )
    flip: bool = setting(
        False,
        "Draw the mirrored view of every image half of the time (a cache made with --flip).",
        decides=True,
    )


@dataclasses.dataclass(frozen=True)
class StepSettings(ModelSettings):
    """How it is trained: batches, optimiser, precision."""

    batch_size: int = setting(256, "Global batch.", decides=True, check=check_positive)
    accumulate: int = setting(1, "Micro-steps a step is split into.", check=check_positive)
    micro_batch: int = setting(
        0,
        "Most images of one micro-step on a device (0: no limit): the global batch stays when "
        "there are fewer devices.",
        check=check_not_negative,
    )
    steps: int = setting(400_000, "Optimiser steps of the whole run.", check=check_positive)
    learning_rate: float = setting(1e-4, "AdamW learning rate.", decides=True, check=check_positive)
    beta2: float = setting(
        0.999, "AdamW second beta (the first is 0.9).", decides=True, check=check_fraction
    )
    weight_decay: float = setting(
        0.0, "AdamW weight decay.", decides=True, check=check_not_negative
    )
    clip: float = setting(
        1.0, "Gradient norm is clipped to this.", decides=True, check=check_positive
    )
    ema_decay: float = setting(
        0.9999, "Decay of the EMA weights.", decides=True, check=check_fraction
    )
    ema_extra: tuple[float, ...] = setting(
        (), "Decays of further EMAs kept beside it.", decides=True, check=_check_fractions
    )
    label_dropout: float = setting(
        0.1, "Share of labels replaced by the null label.", decides=True, check=check_fraction
    )
    dtype: str = setting(
        "auto",
        "Compute type; auto: bf16 autocast on CUDA, float32 on CPU.",
        choices=("auto", "float32", "bf16"),
    )
    tf32: bool = setting(False, "Let float32 matrix products round to TF32 on CUDA.", decides=True)
    compile: bool | None = setting(None, "Compile the blocks (default: on CUDA).")
    gradient_checkpointing: bool = setting(
        False, "Compute the blocks again on the way back: less memory, a third more work."
    )
    max_grad_norm: float = setting(
        1e4,
        "A step whose gradient norm is above this, or not finite, is skipped and counted.",
        decides=True,
        check=check_positive,
    )
    max_bad_steps: int = setting(
        10, "Skipped steps in a row before the run stops with a diagnosis.", check=check_positive
    )
    seed: int = setting(0, "Seed of weights, order, noise.", decides=True)


@dataclasses.dataclass(frozen=True)
class TrainConfig(StepSettings):
    """`repa train`: a diffusion transformer over the cache."""

    lanes: int = setting(
        1, "Canonical lanes of the data order.", decides=True, check=check_positive
    )
    window: int = setting(
        16, "Shards a lane shuffles together.", decides=True, check=check_positive
    )
    read_threads: int = setting(8, "Threads that read the cache.", check=check_positive)
    read_ahead_gb: float = setting(
        0.0, "Memory for shards read ahead, each rank (0: as the window needs).",
        check=check_not_negative,
    )  # fmt: skip
    local_copy: str | None = setting(
        None, "Local folder for a copy of what is read of a remote cache."
    )
    local_copy_gb: float = setting(
        500.0, "Size limit of the local copy; the longest unused goes first.", check=check_positive
    )
    decode_threads: int = setting(
        4, "Threads that decode images for --features online.", check=check_positive
    )
    scratch: str | None = setting(
        None, "Local folder for unpacked .tar.gz and parquet files (--features online)."
    )
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=check_positive)
    log_every: int = setting(100, "Steps between logged means.", decides=True, check=check_positive)
    tensorboard: bool = setting(True, "Write TensorBoard files beside events.jsonl.")
    wandb: str | None = setting(None, "Also log to this Weights & Biases project.")
    peak_tflops: float = setting(
        0.0,
        "Dense peak of a device for the model FLOPs utilisation (0: known for common GPUs).",
        check=check_not_negative,
    )
    checkpoint_every: int = setting(10_000, "Steps between checkpoints.", check=check_positive)
    keep: int = setting(
        2, "Newest checkpoints to keep (the last is always kept).", check=check_positive
    )
    keep_every: int = setting(
        0, "Also keep the checkpoints at multiples of this step (0: none).",
        check=check_not_negative,
    )  # fmt: skip
    checkpoints: str | None = setting(
        None,
        "URL or shared folder where checkpoints and logs are kept too, for other machines to go "
        "on from (default: below a remote workspace).",
    )
    preview_every: int = setting(
        0, "Steps between EMA previews (0: none).", check=check_not_negative
    )
    preview_count: int = setting(16, "Images of a preview.", check=check_positive)
    evaluate_every: int = setting(
        0, "Steps between scores of the EMA (0: none).", check=check_not_negative
    )
    evaluate_count: int = setting(1000, "Images of such a score.", check=check_positive)
    resume: bool = setting(True, "Go on when the run exists.")
    ranks: int = setting(
        0,
        "Processes on this machine (0: one a visible CUDA device, else one).",
        check=check_not_negative,
    )
    executor: str = setting(
        "auto",
        "Where ranks run; auto: on Ray where an --address is configured, else on this machine, a "
        "rank a CUDA device.",
        choices=("auto", "local", "ray"),
    )
    workers: tuple[int, ...] = setting(
        (),
        "Ray workers, a rank each: N, or MIN,MAX of a group that may shrink and grow (default: one "
        "a CUDA device, or one a CPU node).",
        check=_check_workers,
    )
    worker_cpus: float = setting(
        0.0, "CPU cores that Ray reserves for a worker (0: its threads).", check=check_not_negative
    )
    max_failures: int = setting(
        3, "Restarts after a dead worker or node (-1: without limit)."
    )  # fmt: skip
