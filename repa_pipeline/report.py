"""`repa report`: one self-contained HTML page from the runs of a workspace.

No script, no outside resource, no date: equal results are equal bytes. What is read is in
report_results.py, what is compared in report_twins.py, how it is drawn in report_charts.py; the
sections on training and settings are in report_training.py and report_settings.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repa_pipeline.config import ReportConfig
from repa_pipeline.data.fsstore import refuse_credentials
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.errors import ConfigError, MissingError
from repa_pipeline.report_charts import Panel, draw
from repa_pipeline.report_html import (
    Html,
    facts,
    folded,
    join,
    missing_text,
    number,
    page,
    picture,
    prose,
    table,
    tag,
)
from repa_pipeline.report_results import DISTANCE, RunFacts, SampleSet, dig, is_number, read_runs
from repa_pipeline.report_settings import settings_section
from repa_pipeline.report_training import evaluations, run_line, run_name, speed, training_curves
from repa_pipeline.report_twins import TwinGroup, find_twins, without_twin
from repa_pipeline.training.runs import runs_folder

_NOT_SCORED = "not scored yet"
_MANY = 4  # lines of one kind, above which they are folded away
_COMPARING = (
    "Lower distances are better. A distance falls with the number of samples and depends on "
    "network, reference and sampler, so only equal ones are compared. For one pair of runs a "
    "difference counts from 2 % (what two equal runs usually differ by) plus twice 1/√N (about "
    "what N samples leave open): a rule of thumb. Only several training seeds measure the spread."
)


def write_report(config: ReportConfig) -> Path:
    """Writes the page and returns where it is (`config.output`, else report.html in the workspace).

    Raises MissingError for a workspace without runs, ConfigError for a remote one without output.
    """
    output = _output(config)
    runs = read_runs(config)
    if not runs:
        raise MissingError(
            f"no runs in {runs_folder(config)}, so there is nothing to report: run `repa train` "
            "first, or choose another --workspace"
        )
    title = f"Training report: {_workspace_name(config)}"
    sections = [
        _summary(runs),
        _runs_table(runs, output.parent),
        training_curves(runs),
        speed(runs),
        evaluations(runs),
        _distances(runs),
        _samples(runs),
        settings_section(runs),
    ]
    LocalStore(str(output.parent)).put(output.name, page(title, sections).encode())
    return output


def _output(config: ReportConfig) -> Path:
    if config.output:
        return Path(config.output)
    if "://" in config.workspace:
        refuse_credentials(config.workspace)
        raise ConfigError(
            f"the report is a local file, the workspace is {config.workspace}: give --output FILE"
        )
    return Path(config.workspace) / "report.html"


def _workspace_name(config: ReportConfig) -> str:
    if "://" in config.workspace:
        return config.workspace.rstrip("/").rsplit("/", 1)[-1]
    return Path(config.workspace).resolve().name


def _summary(runs: Sequence[RunFacts]) -> Html:
    groups = find_twins(runs)  # last step first
    last = {group.series: group.step for group in reversed(groups)}
    newest = [group for group in groups if group.step == last[group.series]]
    parts = [tag("h2", "Summary"), *map(_group, newest)]
    earlier = [group for group in groups if group not in newest]
    if earlier:
        parts.append(folded(f"Pairs at earlier steps ({len(earlier)})", join(map(_group, earlier))))
    compared = {twin.aligned.name for group in groups for twin in group.twins}
    alone = [run for run in runs if run.aligned and run.name not in compared]
    reasons = [tag("p", prose(without_twin(run, runs)), "missing") for run in alone]
    if len(reasons) > _MANY:
        reasons = [folded(f"Aligned runs that are not compared ({len(alone)})", join(reasons))]
    parts += reasons
    if not any(run.aligned for run in runs):
        parts.append(
            tag("p", "There is no aligned run yet, so nothing to compare with.", "missing")
        )
    return join([*parts, tag("p", _COMPARING, "quiet")])


def _group(group: TwinGroup) -> Html:
    over_seeds = group.sentence()
    first = group.twins[0]
    samples = first.aligned_samples
    lines = [tag("p", tag("strong", over_seeds))] if over_seeds else []
    lines += [tag("p", twin.sentence()) for twin in group.twins]
    if not over_seeds:
        lines.append(tag("p", "One seed: the spread between seeds is not measured.", "quiet"))
    how = (
        f"{first.aligned.setting('model')}; {samples.num_samples:,} samples each, "
        f"{_sampling(samples)}; network {samples.network}; reference {_reference(samples)}."
    )
    lines.append(tag("p", how, "quiet"))
    return Html(f'<div class="lead">\n{join(lines)}\n</div>')


def _sampling(samples: SampleSet) -> str:
    """The sampling settings in words."""
    settings = samples.settings or {}
    if not settings:
        return "sampling settings not recorded"
    low, high = settings.get("interval") or (0, 1)
    cfg = settings.get("cfg", 1)
    guidance = "no guidance" if cfg == 1 else f"cfg {cfg:g} on t in [{low:g}, {high:g}]"
    weights = "EMA weights" if settings.get("use_ema") else "raw weights"
    return (
        f"{settings.get('sampler')} {settings.get('num_steps')} steps, {guidance}, "
        f"{settings.get('labels')} labels, {weights}"
    )


def _reference(samples: SampleSet) -> str:
    about = dig(samples.result, "reference") or {}
    count = about.get("num_images")
    images = f" ({count:,} images)" if is_number(count) else ""
    return f"{about.get('name', 'not recorded')}{images}"


def _runs_table(runs: Sequence[RunFacts], beside: Path) -> Html:
    losses = list(dict.fromkeys(name for run in runs for name in run.last()))
    numeric = ("seed", "steps done / planned")
    columns = ("run", "model", "teacher", "method", *numeric, *(_last(name) for name in losses))
    rows = [
        (
            join([run_name(runs, run), _folder(run, beside)], "<br>"),
            tag("span", _known(run.setting("model")), "whole"),
            ", ".join(run.teachers) or "vanilla",
            _known(dig(run.record, "decided", "method")),
            _known(run.setting("seed")),
            _steps(run),
            *(number(run.last().get(name), missing=_no_loss(run)) for name in losses),
        )
        for run in runs
    ]
    remarks = [tag("p", prose(f"{run.name}: {r}"), "missing") for run in runs for r in run.remarks]
    shown = table(columns, rows, columns[4:])
    return join([tag("h2", "Runs"), shown, *remarks])


def _known(value: Any) -> Any:
    return missing_text("not recorded") if value is None else value


def _steps(run: RunFacts) -> str:
    planned = run.setting("steps")
    return f"{run.run.last_step():,} / " + ("unknown" if planned is None else f"{planned:,}")


def _folder(run: RunFacts, beside: Path) -> Html:
    return tag("code", os.path.relpath(run.run.folder, beside))


def _last(name: str) -> str:
    return f"last {name.replace('_', ' ')}"


def _no_loss(run: RunFacts) -> str:
    return "none" if run.scalars else "not logged yet"


def _distances(runs: Sequence[RunFacts]) -> Html:
    parts: list[Any] = [tag("h2", "Distances")]
    scored = [(run, samples) for run in runs for samples in run.scored]
    if not scored:
        words = f"Samples are {_NOT_SCORED}: run `repa sample`, then `repa evaluate`."
        return join([*parts, tag("p", prose(words), "missing")])
    comparable: dict[str, list[tuple[RunFacts, SampleSet]]] = {}
    for run, samples in scored:
        key = json.dumps(samples.conditions(), sort_keys=True)
        comparable.setdefault(key, []).append((run, samples))
    for position, members in enumerate(comparable.values()):
        parts += _distance_chart(runs, members, f"distance{position}")
    if len(parts) == 1:
        parts.append(tag("p", "No run has two checkpoints scored alike, so no curve.", "quiet"))
    return join([*parts, _distance_table(scored)])


def _distance_chart(
    runs: Sequence[RunFacts], members: list[tuple[RunFacts, SampleSet]], name: str
) -> list[Html]:
    """The chart of one set of comparable scores; nothing without a run that has two of them."""
    lines = []
    for run in runs:
        own = [s for r, s in members if r.name == run.name and s.step is not None]
        points = sorted((s.step or 0, s.distance or 0.0) for s in own)
        if points:
            lines.append(run_line(runs, run, [x for x, _ in points], [y for _, y in points]))
    if not any(len(set(line.x)) > 1 for line in lines):
        return []
    samples = members[0][1]
    label = f"{samples.distance_name} ({samples.network})"
    panel = Panel(f"{label} against training steps", label, lines, "", log_y=True)
    seed = dig(samples.settings, "seed")
    note = (
        f"All points: {samples.num_samples:,} samples, {_sampling(samples)}, sampling seed {seed}; "
        f"reference {_reference(samples)}. Dashed: vanilla."
    )
    return [tag("figure", Html(draw([panel], name))), tag("p", note, "quiet")]


def _distance_table(scored: list[tuple[RunFacts, SampleSet]]) -> Html:
    numeric = ("seed", "step", "samples", "sampling seed", "value", "label agreement")
    columns = ("run", *numeric[:4], "sampling", "distance", *numeric[4:])
    rows = [
        (
            tag("strong", run.name),
            _known(run.setting("seed")),
            "not recorded" if samples.step is None else f"{samples.step:,}",
            f"{samples.num_samples:,}",
            _known(dig(samples.settings, "seed")),
            _sampling(samples),
            f"{samples.distance_name}, {samples.network}",
            number(samples.distance),
            number(dig(samples.judge, "agreement"), ".1%", missing="not judged"),
        )
        for run, samples in scored
    ]
    return table(columns, rows, numeric)


def _samples(runs: Sequence[RunFacts]) -> Html:
    parts: list[Any] = [tag("h2", "Samples")]
    for run in runs:
        parts += [_sample_set(run, samples) for samples in run.samples]
    absent = [
        f"{run.name}: no samples yet, run `repa sample --run {run.name}`."
        for run in runs
        if not run.samples
    ]
    lines = [tag("p", prose(words), "missing") for words in absent]
    if len(lines) > _MANY:
        lines = [folded(f"Runs without samples ({len(lines)})", join(lines))]
    return join([*parts, *lines])


def _sample_set(run: RunFacts, samples: SampleSet) -> Html:
    step = "step not recorded" if samples.step is None else f"step {samples.step:,}"
    path = samples.folder / "grid.png"
    shown = picture(path, f"Samples of {run.name}, {step}") if path.is_file() else None
    absent = "grid.png cannot be read" if path.is_file() else "no picture (grid.png) yet"
    told = [
        tag("h3", f"{run.name}, {step}"),
        tag("p", _how_many(samples) + _sampling(samples) + "."),
        _metrics(samples),
        _judgement(samples),
        *(tag("p", prose(remark), "missing") for remark in samples.remarks),
        tag("p", tag("code", samples.folder.name), "quiet"),
    ]
    if samples.settings:
        told.append(folded("All sampling settings", facts(samples.settings)))
    if samples.result:
        told.append(folded("How it was measured, versions", facts(_measurement(samples))))
    left = shown or missing_text(absent)
    return Html(f'<div class="set"><div>{left}</div>\n<div>{join(told)}</div></div>')


def _how_many(samples: SampleSet) -> str:
    settings = samples.settings or {}
    if not settings:
        return ""
    return f"{settings.get('num_images', 0):,} samples, seed {settings.get('seed')}, "


def _metrics(samples: SampleSet) -> Html:
    metrics = dig(samples.result, "metrics")
    if not metrics:
        words = f"{_NOT_SCORED}: run `repa evaluate --samples FOLDER`"
        return tag("p", prose(words), "missing")
    # The distance first, then as the ADM suite lists them.
    order = (DISTANCE, "spatial_frechet_distance", "inception_score", "precision", "recall")
    names = [n for n in order if n in metrics] + sorted(n for n in metrics if n not in order)
    rows = [
        (_metric_name(samples, name), number(metrics[name], missing="not given by this network"))
        for name in names
    ]
    measured = (
        f"{samples.num_samples:,} samples, network {samples.network}, against "
        f"{_reference(samples)}."
    )
    return join([table(("metric", "value"), rows, ("value",)), tag("p", measured, "quiet")])


def _metric_name(samples: SampleSet, name: str) -> str:
    if name == DISTANCE:
        return samples.distance_name
    return name.replace("_", " ").replace("frechet", "Fréchet")


def _judgement(samples: SampleSet) -> Html:
    judge = samples.judge
    if not judge:
        return tag("p", "Labels not judged.", "quiet")
    held_out = number(judge.get("held_out_accuracy"), ".1%", missing="an unknown share")
    count = judge.get("num_samples")
    of = f" of {count:,} samples" if is_number(count) else ""
    return tag(
        "p",
        join(
            [
                number(judge.get("agreement"), ".1%", missing="An unknown share"),
                f"{of} show the class that they were asked for, as judged by "
                f"{judge.get('judge', 'an unnamed judge')} (right on",
                held_out,
                "of held-out images).",
            ],
            " ",
        ),
    )


def _measurement(samples: SampleSet) -> dict[str, Any]:
    """All of the result but what is shown elsewhere, and where files lay on some machine."""
    elsewhere = ("metrics", "samples", "sample_settings")
    told = {k: v for k, v in (samples.result or {}).items() if k not in elsewhere}
    reference = dig(told, "reference") or {}
    return {**told, "reference": {k: v for k, v in reference.items() if k != "source"}}
