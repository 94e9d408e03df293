"""The pages of `repa grid` and `repa sweep`: self-contained, equal bytes for equal results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.pictures import png_bytes, tiled
from repa_pipeline.report_charts import Line, Panel, draw
from repa_pipeline.report_html import (
    Html,
    facts,
    folded,
    join,
    number,
    page,
    picture_of,
    table,
    tag,
)

Images = npt.NDArray[np.uint8]
DISTANCE, SCORE = "frechet_distance", "inception_score"


@dataclasses.dataclass(frozen=True)
class GridRow:
    """Samples of one checkpoint and one guidance: uint8 [classes * per_class, R, R, 3]."""

    label: str
    images: Images
    settings: Mapping[str, Any]


def grid_page(
    title: str, rows: Sequence[GridRow], classes: Sequence[str], per_class: int, seed: int
) -> str:
    """A section a class, a strip of `per_class` samples a row; a column is one seed."""
    sections = [
        tag(
            "p",
            f"Every column shows one sample at seed {seed}: the same noise and the same class for "
            "all rows, so what differs is the checkpoint and the guidance alone.",
            "quiet",
        )
    ]
    for place, name in enumerate(classes):
        part = slice(place * per_class, (place + 1) * per_class)
        first, last = part.start, part.stop - 1
        sections.append(tag("h2", f"{name} (samples {first} to {last})"))
        for row in rows:
            strip = picture_of(png_bytes(tiled([row.images[part]])), f"{row.label}: {name}")
            sections.append(tag("figure", join([tag("figcaption", row.label), strip or ""])))
    settings = join(join([tag("h3", row.label), facts(row.settings)]) for row in rows)
    return page(title, [*sections, folded("All settings", settings)])


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """What one guidance came to; metrics as in a result.json."""

    cfg: float
    interval: tuple[float, float]
    metrics: Mapping[str, float | None]
    samples: str

    @property
    def name(self) -> str:
        """The guidance in words."""
        if self.cfg == 1:
            return "no guidance"
        return f"cfg {self.cfg:g} on {interval_name(self.interval)}"

    def metric(self, name: str) -> float:
        """A number of the result, infinite where it has none."""
        value = self.metrics.get(name)
        return float("inf") if value is None else value


def interval_name(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:g}, {interval[1]:g}]"


def best_point(points: Sequence[SweepPoint]) -> SweepPoint:
    """The point of the least distance."""
    return min(points, key=lambda point: point.metric(DISTANCE))


def sweep_page(
    title: str, points: Sequence[SweepPoint], distance_name: str, about: Mapping[str, Any]
) -> str:
    """Distance against inception score and against scale, a line an interval; all numbers."""
    best = best_point(points)
    lead = tag(
        "p",
        f"Least {distance_name}: {best.metric(DISTANCE):.4g} with {best.name}. It was chosen on "
        "the samples it is told of: make new ones with another seed before you publish it.",
        "lead",
    )
    panels = [
        _panel(points, SCORE, "inception score", distance_name),
        _panel(points, None, "guidance scale", distance_name),
    ]
    return page(
        title,
        [
            lead,
            tag("figure", Html(draw(panels, "sweep"))),
            tag("h2", "All points"),
            _sweep_table(points, distance_name),
            folded("Settings of all points", facts(about)),
        ],
    )


def _panel(
    points: Sequence[SweepPoint], metric: str | None, x_label: str, distance_name: str
) -> Panel:
    lines = []
    for position, interval in enumerate(sorted({p.interval for p in points if p.cfg != 1})):
        # Without guidance there is no interval: that point belongs to every line.
        members = [p for p in points if p.interval == interval or p.cfg == 1]
        members = [p for p in members if metric is None or p.metrics.get(metric) is not None]
        members = sorted(members, key=lambda p: p.cfg)
        if members:
            x = [p.cfg if metric is None else p.metric(metric) for p in members]
            y = [p.metric(DISTANCE) for p in members]
            lines.append(Line(f"guided on {interval_name(interval)}", position, False, x, y))
    title = f"{distance_name} against {x_label}"
    return Panel(title, distance_name, lines, f"no {x_label}", x_label=x_label)


def _sweep_table(points: Sequence[SweepPoint], distance_name: str) -> Html:
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    shown = [distance_name if name == DISTANCE else name.replace("_", " ") for name in names]
    rows = [
        [p.name, *(number(p.metrics.get(name)) for name in names), tag("code", p.samples)]
        for p in sorted(points, key=lambda point: point.metric(DISTANCE))
    ]
    return table(["guidance", *shown, "samples"], rows, shown)
