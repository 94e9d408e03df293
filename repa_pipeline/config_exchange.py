"""Settings of the commands that look into a cache and exchange it with other formats."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import CommonConfig, IndexConfig
from repa_pipeline.settings import check_not_negative, check_positive, setting


@dataclasses.dataclass(frozen=True)
class InspectConfig(CommonConfig):
    """`repa inspect`: what is in a cache, with pictures; --fidelity compares it with its source."""

    array: tuple[str, ...] = setting((), "Arrays to look at, by name (default: all).")
    rows: int = setting(
        0, "Rows to show or to compare (0: 16, with --fidelity 64).", check=check_not_negative
    )
    seed: int = setting(0, "Which rows: they are spread evenly over the cache.")
    pictures: bool = setting(True, "Draw rows decoded from latents, and teacher tokens.")
    fidelity: bool = setting(
        False, "Encode rows of the source again and compare with what is stored; draws nothing."
    )
    json: bool = setting(False, "Print JSON.")
    weights: str | None = setting(None, "Local weights file of the network of the one --array.")
    decode_threads: int = setting(4, "Threads that read and decode images.", check=check_positive)
    scratch: str | None = setting(None, "Local folder for unpacked .tar.gz and parquet files.")
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=check_positive)
    output: str | None = setting(
        None, "Folder of the pictures (default: inspect in the workspace)."
    )


@dataclasses.dataclass(frozen=True)
class ExportConfig(CommonConfig):
    """`repa export`: a cache -> the reference's format, or webdataset tars; a run -> a model."""

    destination: str | None = setting(
        None,
        "Where it goes: a folder (webdataset: or a URL), for the reference also a .zip; of a run a "
        ".pt file for the reference, a folder for safetensors.",
    )
    to: str = setting(
        "reference",
        "Of a cache, reference: images/, vae-sd/ and dataset.json, or webdataset: tars with all "
        "that is cached. Of a run, reference: a checkpoint of the reference's code, or "
        "safetensors: the EMA with a model card.",
        choices=("reference", "webdataset", "safetensors"),
        decides=True,
    )
    run: str | None = setting(None, "Export this run's model, not the cache.")
    checkpoint: str | None = setting(
        None, "Export the model of this checkpoint file (default: the run's newest)."
    )
    license: str | None = setting(None, "Licence of the weights, for the model card.")
    autoencoder: str = setting("auto", "Latents; auto: the only ones in the cache.", decides=True)
    encoder: tuple[str, ...] = setting(
        ("auto",), "Teachers for webdataset; auto: all of the latents' resolution; none.",
        decides=True,
    )  # fmt: skip
    images: bool | None = setting(
        None,
        "Add the cropped images as PNG (default: for the reference, not for webdataset).",
        decides=True,
    )
    coded: bool = setting(
        False, "Teacher tokens as they are stored, not decoded to float16.", decides=True
    )
    decode_threads: int = setting(4, "Threads that read and decode images.", check=check_positive)
    scratch: str | None = setting(None, "Local folder for unpacked .tar.gz and parquet files.")
    scratch_gb: float = setting(50.0, "Size limit of the scratch folder.", check=check_positive)


@dataclasses.dataclass(frozen=True)
class ImportConfig(IndexConfig):
    """`repa import`: a reference set, or an export to webdataset -> a cache; a checkpoint -> a run.

    Nothing is encoded.
    """

    from_: str = setting(
        "reference",
        "reference: a folder or zip with images/ and vae-sd/; webdataset: tars of `repa export`; "
        "checkpoint: a .pt or .safetensors file, or a folder of `repa export --to safetensors` "
        "(known by its name).",
        choices=("reference", "webdataset", "checkpoint"),
        decides=True,
    )
    name: str | None = setting(None, "Name of the run that a checkpoint becomes.")
    num_heads: int = setting(
        0,
        "Attention heads of a checkpoint's model (0: as the table says for its size).",
        check=check_not_negative,
    )
    resolution: int = setting(
        0, "Pixels of a checkpoint that does not tell (diffusers' DiT).", check=check_not_negative
    )
    autoencoder: str = setting(
        "sd-vae-ft-ema", "Autoencoder that made the latents, by table name.", decides=True
    )
    moments_dtype: str = setting(
        "float16",
        "How moments are stored.",
        choices=("float16", "float32"),
        decides=True,
    )
    format: str = setting(
        "zarr",
        "Container of the shards: zarr, or webdataset (a tar of .npy members).",
        choices=("zarr", "webdataset"),
        decides=True,
    )
    weights: str | None = setting(
        None, "Weights file that made the latents: its hash is recorded, nothing is encoded."
    )
