"""Published numbers on ImageNet 256x256: 50,000 samples, ADM suite, ADM's reference.

From REPA (arXiv 2410.06940), which also gives the numbers of the vanilla models. SiT: SDE
Euler-Maruyama, DiT: DDPM, 250 steps; the EMA, classes drawn at random (equal counts of every class
give about 0.1 less).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NUM_SAMPLES = 50_000
RESOLUTION = 256
SAMPLER_STEPS = 250
# Known by its name: no hash of it is published.
ADM_FILE = "VIRTUAL_imagenet256_labeled.npz"
# Names of the numbers in a result, and what the field calls them.
NUMBERS = {
    "frechet_distance": "FID",
    "spatial_frechet_distance": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
}


@dataclass(frozen=True)
class PublishedRow:
    """One line of a table; None where it gives no number."""

    model: str
    aligned: bool
    step: int
    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    cfg: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def numbers(self) -> dict[str, float | None]:
        """By the names of a result's metrics."""
        values = (self.fid, self.sfid, self.inception_score, self.precision, self.recall)
        return dict(zip(NUMBERS, values, strict=True))

    @property
    def title(self) -> str:
        steps = f"{self.step / 1e6:g}M" if self.step >= 1_000_000 else f"{self.step // 1000}K"
        guided = "" if self.cfg == 1 else f", cfg {self.cfg:g}"
        if self.cfg != 1 and self.interval != (0.0, 1.0):
            guided += " on t in [{:g}, {:g}]".format(*self.interval)
        return f"{self.model}{' + REPA' * self.aligned}, {steps} steps{guided}"


PUBLISHED: tuple[PublishedRow, ...] = (
    PublishedRow("SiT-B/2", False, 400_000, 33.0),
    PublishedRow("SiT-B/2", True, 400_000, 24.4),
    PublishedRow("SiT-L/2", False, 400_000, 18.8),
    PublishedRow("SiT-L/2", True, 400_000, 9.7),
    PublishedRow("SiT-XL/2", False, 400_000, 17.2),
    PublishedRow("SiT-XL/2", False, 7_000_000, 8.3, 6.32, 131.7, 0.68, 0.67),
    PublishedRow("SiT-XL/2", False, 7_000_000, 2.06, 4.50, 270.3, 0.82, 0.59, cfg=1.5),
    PublishedRow("SiT-XL/2", True, 50_000, 52.3),
    PublishedRow("SiT-XL/2", True, 100_000, 19.4),
    PublishedRow("SiT-XL/2", True, 200_000, 11.1, 5.05, 100.4),
    PublishedRow("SiT-XL/2", True, 400_000, 7.9, 5.06, 122.6, 0.70, 0.65),
    PublishedRow("SiT-XL/2", True, 1_000_000, 6.4),
    PublishedRow("SiT-XL/2", True, 4_000_000, 5.9, 5.73, 157.8, 0.70, 0.69),
    PublishedRow("SiT-XL/2", True, 4_000_000, 1.80, 4.50, 284.0, 0.81, 0.61, cfg=1.35),
    PublishedRow(
        "SiT-XL/2",
        True,
        4_000_000,
        1.42,
        4.70,
        305.7,
        0.80,
        0.65,
        cfg=1.8,
        interval=(0.0, 0.7),
    ),
    PublishedRow("DiT-L/2", False, 400_000, 23.3),
    PublishedRow("DiT-L/2", True, 400_000, 15.6),
    PublishedRow("DiT-XL/2", False, 400_000, 19.5),
    PublishedRow("DiT-XL/2", True, 400_000, 12.3),
    PublishedRow("DiT-XL/2", True, 850_000, 9.6),
)


def rows_like(settings: Mapping[str, Any] | None) -> list[PublishedRow]:
    """The rows that samples of these settings can be set beside: all of them without settings,
    else those of the model, and of its step and guidance where there are such."""
    if not settings or settings.get("model") is None:
        return list(PUBLISHED)
    rows = [row for row in PUBLISHED if row.model == settings["model"]]
    for key in ("step", "cfg"):
        alike = [row for row in rows if getattr(row, key) == settings.get(key)]
        rows = alike or rows
    return rows


def is_alike(row: PublishedRow, settings: Mapping[str, Any] | None) -> bool:
    """Whether nothing that is known of the samples differs from what a row is of."""
    known = {k: v for k, v in (settings or {}).items() if v is not None}
    wanted = {"model": row.model, "step": row.step, "cfg": row.cfg}
    if row.cfg != 1:
        wanted["interval"] = list(row.interval)
    return all(known.get(key, value) == value for key, value in wanted.items())


def why_not_comparable(result: Mapping[str, Any]) -> list[str]:
    """What keeps a result from being compared with published numbers; empty where nothing does."""
    reasons = []
    if result["num_samples"] != NUM_SAMPLES:
        reasons.append(f"{result['num_samples']:,} samples, not {NUM_SAMPLES:,}")
    if result["network"]["name"] != "inception-v3" or not result["network"]["published"]:
        reasons.append("another network than the published Inception-v3")
    if result["reference"]["kind"] != "adm":
        reasons.append("another reference than ADM's")
    elif result["reference"]["adm_file"] != ADM_FILE:
        reasons.append(f"reference file {result['reference']['adm_file']}, not {ADM_FILE}")
    elif result["reference"]["resolution"] != RESOLUTION:
        reasons.append(f"{result['reference']['resolution']} pixels, not {RESOLUTION}")
    settings = result["sample_settings"] or {}
    steps, sampler = settings.get("num_steps"), settings.get("sampler")
    if sampler is not None and (sampler, steps) not in (("sde", 250), ("ddpm", 250)):
        reasons.append(f"sampler {sampler} with {steps} steps, not sde with {SAMPLER_STEPS}")
    if settings.get("labels", "random") != "random":
        reasons.append(f"labels {settings['labels']}, not random")
    if settings.get("guide"):
        reasons.append("guided by a weaker checkpoint, not by the model's own null class")
    if settings.get("use_ema") is False:
        reasons.append("the raw weights, not their average")
    return reasons


def comparison(result: Mapping[str, Any]) -> dict[str, Any]:
    """The published rows beside a result: {"comparable", "because", "rows"}.

    A row holds its title, numbers and, where the result is comparable and nothing known of the
    samples is other than the row's, `difference` (ours minus published) by metric.
    """
    because = why_not_comparable(result)
    rows = []
    for row in rows_like(result["sample_settings"]):
        told: dict[str, Any] = {"title": row.title, "numbers": row.numbers}
        if not because and is_alike(row, result["sample_settings"]):
            told["difference"] = {
                name: result["metrics"][name] - value
                for name, value in row.numbers.items()
                if value is not None and result["metrics"].get(name) is not None
            }
        rows.append(told)
    return {"comparable": not because, "because": because, "rows": rows}


def comparison_lines(result: Mapping[str, Any]) -> list[str]:
    """The comparison as lines for people."""
    compared = result["compare"]
    lines = []
    if not compared["comparable"]:
        lines.append("not comparable with published numbers: " + "; ".join(compared["because"]))
    if not compared["rows"]:
        lines.append("no published row is of this model")
    for row in compared["rows"]:
        shown = []
        for name, value in row["numbers"].items():
            if value is None:
                continue
            off = row.get("difference", {}).get(name)
            shown.append(f"{NUMBERS[name]} {value:g}" + ("" if off is None else f" ({off:+.3g})"))
        lines.append(f"published {row['title']}: {', '.join(shown)}")
    return lines
