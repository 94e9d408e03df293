"""Line charts as SVG text that can stand inside an HTML page, equal bytes for equal numbers."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
# With the colours: after the first seven lines the next seven have another mark, and so on.
MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
_MARKED_POINTS = 40
_MARKS_OF_MANY = 8
_FEW_LINES = 8
# More points than a chart has room for are averaged.
_MAX_POINTS = 300
_STYLE: dict[str, Any] = {
    "svg.fonttype": "path",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One run in a chart; `position` among all runs gives its colour and its mark."""

    label: str
    position: int
    dashed: bool
    x: Sequence[float]
    y: Sequence[float]

    @property
    def colour(self) -> str:
        return colour_of(self.position)

    @property
    def mark(self) -> str:
        return _mark_of(self.position)[0]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes; `missing` is shown instead when there is no line."""

    title: str
    y_label: str
    lines: Sequence[Line]
    missing: str
    log_y: bool = False
    x_label: str = "step"


def colour_of(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def glyph_of(position: int) -> str:
    """The mark of a line, as text."""
    return _mark_of(position)[1]


def _mark_of(position: int) -> tuple[str, str]:
    return MARKS[position // len(COLOURS) % len(MARKS)]


def draw(panels: Sequence[Panel], name: str, *, width: float = 11.6, height: float = 3.4) -> str:
    """The panels side by side over one legend, as an <svg> element without outside references.

    `name` makes the ids of the element its own on the page. width, height in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams
        parameters.update({**_STYLE, "svg.hashsalt": name})
        labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
        columns = _legend_columns(labels, width)
        rows = math.ceil(len(labels) / columns)
        figure = Figure(figsize=(width, height + 0.2 * rows), layout="constrained")
        handles: dict[str, Any] = {}
        for position, panel in enumerate(panels, start=1):
            _draw_panel(figure.add_subplot(1, len(panels), position), panel, handles)
        if handles:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=columns,
                frameon=False,
            )
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return _for_html(buffer.getvalue(), name, "; ".join(panel.title for panel in panels))


def _draw_panel(axes: Axes, panel: Panel, handles: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.x_label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if not panel.lines:
        axes.text(0.5, 0.5, panel.missing, ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    for line in panel.lines:
        (handles[line.label],) = _plot(axes, line, few=len(panel.lines) <= _FEW_LINES)
    if panel.log_y and all(y > 0 for line in panel.lines for y in line.y):
        _use_log(axes, [y for line in panel.lines for y in line.y])


def _plot(axes: Axes, line: Line, *, few: bool) -> Any:
    x, y = thinned(line.x, line.y)
    # Of many points, or of many lines, only some are marked, and none where colours suffice.
    crowded = len(x) > _MARKED_POINTS or not few
    every = math.ceil(len(x) / _MARKS_OF_MANY) if crowded else 1
    marked = not crowded or line.position >= len(COLOURS) or len(x) == 1
    return axes.plot(
        x,
        y,
        color=line.colour,
        linestyle="--" if line.dashed else "-",
        linewidth=1.6 if few else 1.1,
        marker=line.mark if marked else "",
        markevery=every,
        markersize=3 if few else 4,
        label=line.label,
    )


def thinned(
    x: Sequence[float], y: Sequence[float], limit: int = _MAX_POINTS
) -> tuple[list[float], list[float]]:
    """At most `limit` points: means of as many values each, at the last of their places."""
    size = math.ceil(len(x) / limit)
    if size <= 1:
        return list(x), list(y)
    parts = [slice(start, start + size) for start in range(0, len(x), size)]
    return [x[part][-1] for part in parts], [statistics.fmean(y[part]) for part in parts]


def _use_log(axes: Axes, values: Sequence[float]) -> None:
    """A log scale that shows plain numbers, also where the values span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    plain = FuncFormatter(lambda y, _: f"{y:,.4g}")
    axes.yaxis.set_major_formatter(plain)
    narrow = max(values) < 20 * min(values)
    if narrow:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Columns that fit: about 0.085 inches a letter and half an inch for the line."""
    longest = max((len(label) for label in labels), default=1)
    return max(1, min(len(labels), int(width / (0.085 * longest + 0.5))))


def _for_html(svg: str, name: str, title: str) -> str:
    """The bare element: no prologue, no namespaces, ids that no other chart has."""
    import html

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", svg)
    label = html.escape(title)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
