"""Settings of `repa evaluate`, `repa reference` and `repa certify`."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import ClusterConfig, IndexConfig
from repa_pipeline.settings import check_local, check_not_negative, check_positive, setting

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class ScoreConfig(ClusterConfig):
    """How images are scored, whichever they are."""

    network: str = setting(
        AUTO,
        "Feature network: inception-v3, fd-dinov2, another table name or encoder:NAME; auto: the "
        "reference's (inception-v3 for ADM's), encoder:dinov2-b without one.",
    )
    network_weights: str | None = setting(None, "Local weights file of the feature network.")
    any_weights: bool = setting(
        False, "Take other weights than the published ones; the score is then not called FID."
    )
    batch_size: int = setting(
        0,
        "Images of one forward pass; fixed, so it decides bytes (0: as the features that stand "
        "there, else 64).",
        check=check_not_negative,
    )
    decode_threads: int = setting(4, "Threads that read and decode images.", check=check_positive)
    scratch: str | None = setting(None, "Local folder for unpacked .tar.gz and parquet files.")
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=check_positive)
    reference_images: int = setting(
        10_000, "Reference images for precision, recall and KID.", check=check_positive
    )
    pr_mode: str = setting(
        "float32",
        "Distances of precision and recall: float32, or adm_fp16 as the ADM suite has them.",
        choices=("float32", "float64", "adm_fp16"),
    )
    is_split: int = setting(
        5000, "Images of one block of the inception score.", check=check_positive
    )
    kid_subsets: int = setting(100, "Random subsets of KID (0: no KID).", check=check_not_negative)
    kid_size: int = setting(1000, "Images of such a subset.", check=check_positive)
    kid_seed: int = setting(2020, "Seed of the subsets.")
    blocks: int = setting(
        10,
        "Blocks of samples left out in turn for standard errors (0: none).",
        check=check_not_negative,
    )
    allow_few: bool = setting(
        False,
        "Also score fewer samples than features have dimensions, or than the inception score's "
        "block.",
    )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(ScoreConfig):
    """`repa evaluate`: images -> Fréchet distance and the other four numbers."""

    run: str | None = setting(None, "Run whose samples are scored (default: the only one).")
    samples: str | None = setting(
        None,
        "Sample folder, ADM npz, or webdataset or folder of pictures (default: the only samples).",
    )
    reference: str | None = setting(
        None,
        "ADM's reference npz, or one of `repa reference` (default: statistics of the training "
        "source).",
    )
    compare: str | None = setting(
        None, "paper: the published numbers beside the result.", choices=("paper",)
    )
    features: str | None = setting(
        None, "Folder for the images' features (default: beside the samples)."
    )
    output: str | None = setting(None, "Where result.json goes (default: beside the samples).")


@dataclasses.dataclass(frozen=True)
class ReferenceConfig(ScoreConfig, IndexConfig):
    """`repa reference`: a source, or ADM's npz -> statistics that samples are scored against."""

    name: str | None = setting(None, "What results call it (default: the source's last part).")
    adm: str | None = setting(
        None, "Make it of this ADM-style reference npz, not of the source's images."
    )
    resolution: int = setting(256, "Image side in pixels.", check=check_positive)
    adm_npz: str | None = setting(
        None,
        "Also write an npz of ADM's layout here: statistics and `reference_images` images.",
        check=check_local,
    )
    output: str | None = setting(
        None,
        "The npz to write (default: in the workspace's references folder).",
        check=check_local,
    )


@dataclasses.dataclass(frozen=True)
class CertifyConfig(ScoreConfig):
    """`repa certify`: the published numbers, by the files that you have."""

    adm_reference: str | None = setting(
        None, "VIRTUAL_imagenet256_labeled.npz; every part needs it."
    )
    adm_samples: str | None = setting(
        None, "admnet_guided_upsampled_imagenet256.npz: certifies the evaluator."
    )
    checkpoint: str | None = setting(
        None, "The published SiT-XL/2 + REPA checkpoint (4M steps): 2 x 50,000 images are sampled."
    )
    plain: str | None = setting(
        None, "Or 50,000 finished SDE samples of it, without guidance: certifies the sampler."
    )
    guided: str | None = setting(None, "And 50,000 at guidance 1.8 on [0, 0.7].")
    trained: str | None = setting(
        None, "50,000 SDE samples of a SiT-B/2 + REPA run at 400,000 steps: certifies the trainer."
    )
    output: str | None = setting(
        None, "Where certify.json goes (default: in the workspace).", check=check_local
    )
