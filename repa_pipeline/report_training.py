"""The report's parts about training: curves, losses by t, speed and memory, scores on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from repa_pipeline.report_charts import Line, Panel, colour_of, draw, glyph_of
from repa_pipeline.report_html import Html, join, key, missing_text, number, table, tag
from repa_pipeline.report_results import DISTANCE, RunFacts, is_bucket, is_number

_NOT_LOGGED = "not logged yet"
_PER_TEACHER = "alignment/"
_PANELS = 3  # side by side
_GB = 1e9


def run_line(
    runs: Sequence[RunFacts], run: RunFacts, x: Sequence[float], y: Sequence[float]
) -> Line:
    """A line in the run's own colour and mark, the same in every chart."""
    return Line(run.name, _position(runs, run), not run.aligned, x, y)


def run_name(runs: Sequence[RunFacts], run: RunFacts) -> Html:
    """A run's name behind the mark that it has in the charts."""
    position = _position(runs, run)
    mark = key(colour_of(position), glyph_of(position))
    return join([mark, tag("strong", run.name)], " ")


def training_curves(runs: Sequence[RunFacts]) -> Html:
    """Losses and gradient norm against steps, and the losses of the last interval against t."""
    panels = [
        Panel("Denoising loss", "loss", _lines(runs, "denoising"), "no events yet"),
        Panel(
            "Alignment with the teacher",
            "mean cosine similarity",
            _lines(runs, "alignment", scale=-1),
            "no aligned run has logged yet",
        ),
        Panel("Gradient norm", "norm before clipping", _lines(runs, "grad_norm"), "no events yet"),
    ]
    silent = [run.name for run in runs if not run.scalars]
    quiet = f" Nothing logged yet: {', '.join(silent)}." if silent else ""
    note = f"Means over the steps between two points. Dashed: vanilla.{quiet}"
    parts = [tag("h2", "Training curves"), *_figures(panels, "training")]
    parts.append(tag("p", note, "quiet"))
    return join([*parts, *_by_teacher(runs), *_by_time(runs)])


def _by_teacher(runs: Sequence[RunFacts]) -> list[Html]:
    """One panel a teacher; nothing where no run has logged its teachers one by one."""
    logged = dict.fromkeys(name for run in runs for name in run.names())
    names = [name for name in logged if name.startswith(_PER_TEACHER) and not is_bucket(name)]
    panels = [
        Panel(
            f"Alignment with {name.removeprefix(_PER_TEACHER)}",
            "mean cosine similarity",
            _lines(runs, name, scale=-1),
            _NOT_LOGGED,
        )
        for name in sorted(names)
    ]
    if not panels:
        return []
    return [tag("h3", "Alignment by teacher"), *_figures(panels, "teachers")]


def _by_time(runs: Sequence[RunFacts]) -> list[Html]:
    """Losses of the last interval by bucket of t; nothing where none was logged."""
    panels = []
    wanted = (
        ("denoising", "Denoising loss by t", "loss", 1),
        ("alignment", "Alignment by t", "mean cosine similarity", -1),
    )
    for name, title, label, sign in wanted:
        found = [(run, *run.by_time(name)) for run in runs]
        lines = [
            run_line(runs, run, t, [sign * v for v in values]) for run, t, values in found if t
        ]
        if lines:
            panels.append(Panel(title, label, lines, "", x_label="t (1 is noise)"))
    if not panels:
        return []
    note = "Means of the samples whose t fell into a bucket, in the last logged interval of a run."
    figures = _figures(panels, "time")
    return [tag("h3", "Losses by diffusion time"), *figures, tag("p", note, "quiet")]


def speed(runs: Sequence[RunFacts]) -> Html:
    """How fast the runs went and what they used: a table, and curves of what was logged."""
    parts = [tag("h2", "Speed and memory"), _speed_table(runs)]
    note = (
        "Medians over the log's intervals; memory is the largest value logged. MFU: model FLOPs "
        "utilisation, 6 x forward multiply-adds x images/s over the devices' dense bf16 peak, "
        "without encoder or recomputation; data wait: share of the time spent waiting for data; "
        "read and memory are those of one rank."
    )
    parts.append(tag("p", note, "quiet"))
    panels = [
        Panel("Images per second", "images/s", _lines(runs, "images_per_s"), _NOT_LOGGED),
        Panel("Model FLOPs utilisation", "%", _lines(runs, "mfu", scale=100), _NOT_LOGGED),
        Panel("Data wait", "% of the time", _lines(runs, "data_wait", scale=100), _NOT_LOGGED),
        Panel("Read", "MB/s", _lines(runs, "bytes_per_s", scale=1e-6), _NOT_LOGGED),
        Panel("Resident memory", "GB", _lines(runs, "rss_bytes", scale=1 / _GB), _NOT_LOGGED),
        Panel("Device memory", "GB", _lines(runs, "peak_device_bytes", scale=1 / _GB), _NOT_LOGGED),
    ]
    shown = [panel for panel in panels if panel.lines]
    return join([*parts, *_figures(shown, "speed")])


def _speed_table(runs: Sequence[RunFacts]) -> Html:
    columns = (
        *("run", "images/s", "MFU", "data wait", "read, MB/s"),
        *("resident, GB", "device, GB", "skipped steps"),
    )
    rows = []
    for run in runs:
        read, skipped = run.median("bytes_per_s"), run.values("skipped_steps")
        resident, device = run.peak("rss_bytes"), run.peak("peak_device_bytes")
        rows.append(
            (
                run_name(runs, run),
                number(run.median("images_per_s"), missing=_NOT_LOGGED),
                number(run.median("mfu"), ".1%", missing="peak unknown"),
                number(run.median("data_wait"), ".2%", missing=_NOT_LOGGED),
                number(read and read / 1e6, missing=_NOT_LOGGED),
                number(resident and resident / _GB, missing=_NOT_LOGGED),
                number(device and device / _GB, missing="no device"),
                f"{skipped[-1]:,.0f}" if skipped else missing_text(_NOT_LOGGED),
            )
        )
    return table(columns, rows, columns[1:])


def evaluations(runs: Sequence[RunFacts]) -> Html:
    """Scores that were made on the way, against steps; nothing where there is none."""
    comparable: dict[str, list[tuple[RunFacts, dict[str, float]]]] = {}
    for run in runs:
        for event in run.evaluations:
            how = [event.get(name) for name in ("num_samples", "network", "reference")]
            numbers = {k: v for k, v in event.items() if k.startswith("eval/") and is_number(v)}
            point = {"step": event["step"], **numbers}
            comparable.setdefault(json.dumps(how), []).append((run, point))
    if not comparable:
        return Html("")
    parts = [tag("h2", "Scores on the way")]
    for position, (conditions, points) in enumerate(comparable.items()):
        parts += _figures(_score_panels(runs, points), f"scores{position}")
        count, network, reference = (
            "an unrecorded" if value is None else value for value in json.loads(conditions)
        )
        note = (
            f"EMA samples of equal noise at every step: {count} samples, network {network}, "
            f"against {reference}. For following a run, not for reporting it. Dashed: vanilla."
        )
        parts.append(tag("p", note, "quiet"))
    return join(parts)


def _score_panels(
    runs: Sequence[RunFacts], points: Sequence[tuple[RunFacts, dict[str, float]]]
) -> list[Panel]:
    names = dict.fromkeys(name for _, point in points for name in point if name != "step")
    order = sorted(names, key=lambda name: (name != f"eval/{DISTANCE}", name))
    panels = []
    for name in order:
        lines = []
        for run in runs:
            own = [point for other, point in points if other is run and name in point]
            if own:
                steps = [point["step"] for point in own]
                lines.append(run_line(runs, run, steps, [point[name] for point in own]))
        words = name.removeprefix("eval/").replace("_", " ").replace("frechet", "Fréchet")
        words = words.replace("kid", "KID")
        log_y = "distance" in name
        title = words[0].upper() + words[1:]
        panels.append(Panel(title, words, lines, "", log_y=log_y))
    return panels


def _figures(panels: Sequence[Panel], name: str) -> list[Html]:
    """The panels in rows of about the same number."""
    num_rows = math.ceil(len(panels) / _PANELS)
    width = math.ceil(len(panels) / max(num_rows, 1))
    rows = [panels[row * width : (row + 1) * width] for row in range(num_rows)]
    return [
        tag("figure", Html(draw(row, name if len(rows) == 1 else f"{name}-{i}-")))
        for i, row in enumerate(rows)
    ]


def _lines(runs: Sequence[RunFacts], name: str, scale: float = 1) -> list[Line]:
    lines = []
    for run in runs:
        steps, values = run.curve(name)
        if steps:
            lines.append(run_line(runs, run, steps, [scale * value for value in values]))
    return lines


def _position(runs: Sequence[RunFacts], run: RunFacts) -> int:
    return [other.name for other in runs].index(run.name)
