"""Settings of `repa evaluate`."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import CommonConfig
from repa_pipeline.settings import check_positive, setting


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
