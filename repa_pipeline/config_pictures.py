"""Settings of `repa grid` and `repa sweep`."""

from __future__ import annotations

import dataclasses

from repa_pipeline.config_evaluate import ScoreConfig
from repa_pipeline.config_sample import DrawConfig
from repa_pipeline.ranges import check_intervals, check_numbers
from repa_pipeline.settings import check_local, check_positive, setting


@dataclasses.dataclass(frozen=True)
class GridConfig(DrawConfig):
    """`repa grid`: samples of several checkpoints and guidances at the same seeds, side by side."""

    run: tuple[str, ...] = setting((), "Runs to sample the newest checkpoint of.")
    checkpoint: tuple[str, ...] = setting((), "Checkpoint files; may be given several times.")
    cfg: str = setting(
        "1,1.8", "Guidance scales: numbers and FROM:TO:STEP, with commas.", check=check_numbers
    )
    interval: str = setting(
        "0,1", "Guidance intervals: LOW,HIGH, each a number or FROM:TO:STEP.", check=check_intervals
    )
    classes: tuple[int, ...] = setting((), "Classes by number (default: ten of them, evenly).")
    per_class: int = setting(8, "Samples of a class.", check=check_positive)
    output: str | None = setting(
        None, "Local folder of the page (default: grids in the workspace).", check=check_local
    )


@dataclasses.dataclass(frozen=True)
class SweepConfig(DrawConfig, ScoreConfig):
    """`repa sweep`: scores over guidance scales and intervals, and a plot of them."""

    run: str | None = setting(None, "Run to sample from (default: the only one).")
    checkpoint: str | None = setting(None, "Checkpoint file (default: the run's newest).")
    cfg: str = setting(
        "1.0:2.5:0.1",
        "Guidance scales: numbers and FROM:TO:STEP, with commas.",
        check=check_numbers,
    )
    interval: str = setting(
        "0,0.6:0.8:0.05",
        "Guidance intervals: LOW,HIGH, each a number or FROM:TO:STEP.",
        check=check_intervals,
    )
    reference: str | None = setting(
        None,
        "ADM's reference npz, or one of `repa reference` (default: statistics of the training "
        "source).",
    )
    num_images: int = setting(10_000, "Images of a point.", check=check_positive)
    labels: str = setting("random", "random, balanced, one class number, or a file.")
    output: str | None = setting(
        None, "Local folder of the page (default: sweeps in the workspace).", check=check_local
    )
