"""Settings of `repa plan`."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config import EncodeAllConfig
from repa_pipeline.settings import check_not_negative, check_positive, setting


@dataclasses.dataclass(frozen=True)
class PlanConfig(EncodeAllConfig):
    """`repa plan`: what a cache costs and saves. The settings of `repa encode` say which cache;
    the only encoder "none" plans latents alone."""

    num_images: int = setting(
        0,
        "Images (0: those of the workspace's index, else ImageNet's train set).",
        check=check_not_negative,
    )
    image_bytes: int = setting(
        0,
        "Bytes of a source image (0: the index's mean, else ImageNet's).",
        check=check_not_negative,
    )
    devices: int = setting(8, "Devices of the cluster.", check=check_positive)
    devices_per_node: int = setting(8, "Devices of a node.", check=check_positive)
    cores_per_node: int = setting(
        0, "CPU cores of a node (0: as this machine).", check=check_not_negative
    )
    model: str = setting("SiT-XL/2", "Model that will be trained, by table name.")
    train_steps: int = setting(400_000, "Steps of a training run.", check=check_positive)
    train_batch: int = setting(256, "Global batch of a training run.", check=check_positive)
    runs: int = setting(1, "Training runs that will use the cache.", check=check_positive)
    rates: str | None = setting(None, "TOML file of rates and prices (docs/plan.md).")
    probe: bool = setting(True, "Measure rates that the file does not give on this machine.")
    json: bool = setting(False, "Print one JSON object instead of text.")
