"""The pages of `repa grid` and `repa sweep`: self-contained, equal bytes for equal results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    """A section a class, a strip of `per_class` samples a row; a column is one seed.

    Sample k of a set is of class k modulo their number; rows hold them class after class.
    """
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
        indices = ", ".join(str(place + len(classes) * i) for i in range(per_class))
        sections.append(join([tag("h2", name), tag("p", f"samples {indices}", "quiet")]))
        for row in rows:
            strip = picture_of(png_bytes(tiled([row.images[part]])), f"{row.label}: {name}")
            sections.append(tag("figure", join([tag("figcaption", row.label), strip or ""])))
    settings = join(join([tag("h3", row.label), facts(row.settings)]) for row in rows)
    return page(title, [*sections, folded("All settings", settings)])


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """What one guidance came to: metrics, their standard errors and what the distance is called,
    as in a result.json."""

    cfg: float
    interval: tuple[float, float]
    metrics: Mapping[str, float | None]
    errors: Mapping[str, float]
    kind: str
    samples: str

    @property
    def name(self) -> str:
        return guidance_name(self.cfg, self.interval)

    def metric(self, name: str) -> float:
        """A number of the result, infinite where it has none."""
        value = self.metrics.get(name)
        return float("inf") if value is None else value


def guidance_name(cfg: float, interval: Sequence[float]) -> str:
    """A guidance in words."""
    return "no guidance" if cfg == 1 else f"cfg {cfg:g} on [{interval[0]:g}, {interval[1]:g}]"


def best_point(points: Sequence[SweepPoint]) -> SweepPoint:
    """The point of the least distance."""
    return min(points, key=lambda point: point.metric(DISTANCE))


def sweep_page(title: str, points: Sequence[SweepPoint], about: Mapping[str, Any]) -> str:
    """Distance against inception score and against scale, a line an interval; all numbers."""
    best = best_point(points)
    lead = tag(
        "p",
        f"Least {best.kind}: {best.metric(DISTANCE):.4g} with {best.name}. It was chosen on these "
        "samples, so it flatters: make new ones with another seed before you publish it.",
        "lead",
    )
    panels = [
        _panel(points, SCORE, "inception score"),
        _panel(points, None, "guidance scale"),
    ]
    return page(
        title,
        [
            lead,
            tag("figure", Html(draw(panels, "sweep"))),
            tag("h2", "All points"),
            _sweep_table(points),
            folded("Settings of all points", facts(about)),
        ],
    )


def _panel(points: Sequence[SweepPoint], metric: str | None, x_label: str) -> Panel:
    """`metric` is the x axis, None the scale."""
    lines = []
    for position, interval in enumerate(sorted({p.interval for p in points if p.cfg != 1})):
        # Without guidance there is no interval: that point belongs to every line.
        members = [p for p in points if p.interval == interval or p.cfg == 1]
        members = [p for p in members if metric is None or p.metrics.get(metric) is not None]
        members = sorted(members, key=lambda p: p.cfg)
        if members:
            x = [p.cfg if metric is None else p.metric(metric) for p in members]
            y = [p.metric(DISTANCE) for p in members]
            label = f"guided on [{interval[0]:g}, {interval[1]:g}]"
            lines.append(Line(label, position, False, x, y))
    kind = points[0].kind
    return Panel(f"{kind} against {x_label}", kind, lines, f"no {x_label}", x_label=x_label)


def _sweep_table(points: Sequence[SweepPoint]) -> Html:
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    shown = [points[0].kind if name == DISTANCE else _in_words(name) for name in names]
    rows = [
        [p.name, *(_with_error(p, name) for name in names), tag("code", Path(p.samples).name)]
        for p in sorted(points, key=lambda point: point.metric(DISTANCE))
    ]
    return table(["guidance", *shown, "samples"], rows, shown)


def _in_words(metric: str) -> str:
    return "KID" if metric == "kid" else metric.replace("frechet", "Fréchet").replace("_", " ")


def _with_error(point: SweepPoint, name: str) -> Html:
    error = point.errors.get(name)
    shown = number(point.metrics.get(name))
    return shown if error is None else join([shown, f"± {error:.2g}"], " ")
