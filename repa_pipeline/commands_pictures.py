"""What `repa grid` and `repa sweep` do: many sets of samples, one page.

Every set is an ordinary resumable set of samples below the page's folder, so a command that was
killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repa_pipeline.cluster.select import choose_executor
from repa_pipeline.commands import say
from repa_pipeline.commands_sample import make_samples
from repa_pipeline.config import CommonConfig, decisions
from repa_pipeline.config_evaluate import EvaluateConfig, ScoreConfig
from repa_pipeline.config_pictures import GridConfig, SweepConfig
from repa_pipeline.config_sample import DrawConfig, SampleConfig
from repa_pipeline.data.array import fingerprint
from repa_pipeline.data.objects import LocalStore, get_json, json_bytes
from repa_pipeline.errors import ConfigError, MismatchError
from repa_pipeline.observe import progress_for_stream
from repa_pipeline.pictures import png_bytes, tiled
from repa_pipeline.ranges import intervals, numbers
from repa_pipeline.report_pictures import (
    DISTANCE,
    GridRow,
    SweepPoint,
    best_point,
    grid_page,
    guidance_name,
    sweep_page,
)
from repa_pipeline.training.runs import find_run, runs_folder

if TYPE_CHECKING:
    from repa_pipeline.stages.sample import SampleStage

_NUM_CLASSES = 10
Guidance = tuple[float, tuple[float, float]]


def guidances(cfg: str, interval: str) -> list[Guidance]:
    """Every scale with every interval; without guidance (1) the interval says nothing: once."""
    pairs = [
        (scale, (0.0, 1.0) if scale == 1 else pair)
        for scale in numbers(cfg)
        for pair in intervals(interval)
    ]
    return list(dict.fromkeys(pairs))


def grid(config: GridConfig) -> None:
    """`repa grid`."""
    checkpoints = _checkpoints(config)
    pairs = guidances(config.cfg, config.interval)
    about = _about_all(config, checkpoints)
    num_classes = about["inputs"]["num_classes"]
    classes = config.classes or _evenly(num_classes)
    _check_classes(classes, num_classes)
    folder = _folder(config, "grids", [checkpoints, pairs, classes, config.per_class])
    say(
        f"grid: {len(checkpoints) * len(pairs)} rows (checkpoints x guidances) of "
        f"{config.per_class} samples of each of {len(classes)} classes at seed {config.seed}, in "
        f"{folder}"
    )
    if config.dry_run:
        return
    num_images = len(classes) * config.per_class
    labels = folder / "labels.txt"
    # Classes in turn: sample k is of class k modulo their number, in every row.
    _put(labels, "".join(f"{label}\n" for label in [*classes] * config.per_class))
    rows: list[GridRow] = []
    recipe: list[Any] = [classes, config.per_class]
    for checkpoint, (cfg, interval) in itertools.product(checkpoints, pairs):
        settings = _sample_config(
            config,
            checkpoint=checkpoint,
            cfg=cfg,
            interval=interval,
            labels=str(labels),
            num_images=num_images,
            batch_size=min(config.batch_size, num_images),
            outputs=("images",),
            grid=0,
            output=str(folder / "samples" / f"{len(rows)}"),
        )
        stage = make_samples(settings)
        rows.append(_row(stage, len(classes)))
        recipe.append(stage.spec.fingerprint)
    names = [_class_name(about["class_names"], number) for number in classes]
    page = grid_page("Samples at the same seeds", rows, names, config.per_class, config.seed)
    picture = png_bytes(tiled([row.images for row in rows]))
    _publish(folder, "grid", recipe, {"index.html": page.encode(), "grid.png": picture})
    say(f"picture: {folder / 'grid.png'}, a row a checkpoint and guidance")
    say(f"page: {folder / 'index.html'}")


def sweep(config: SweepConfig) -> None:
    """`repa sweep`."""
    from repa_pipeline.stages.reference import settle_network
    from repa_pipeline.stages.sample_plan import sample_stage

    pairs = guidances(config.cfg, config.interval)
    checkpoint = config.checkpoint or str(find_run(config, config.run).newest_checkpoint())
    network = settle_network(config, config.reference)
    folder = _folder(config, "sweeps", [checkpoint, config.num_images, config.labels])
    say(
        f"sweep: {len(pairs)} guidances, {config.num_images:,} samples each, scored by {network}, "
        f"in {folder}"
    )
    settings = [_point_config(config, checkpoint, network, folder, pair) for pair in pairs]
    first = sample_stage(settings[0])
    _check_scoring(config, first)
    evaluations = sum(_evaluations(first.config.sampler, point) for point in settings)
    say(f"{evaluations * config.num_images:,} model evaluations in all")
    if config.dry_run:
        return
    scored = [_scored(config, make_samples(point)) for point in settings]
    _finish_sweep(folder, scored, network)


def _point_config(
    config: SweepConfig, checkpoint: str, network: str, folder: Path, pair: Guidance
) -> SampleConfig:
    """The samples of one guidance, as features alone."""
    cfg, interval = pair
    return _sample_config(
        config,
        checkpoint=checkpoint,
        cfg=cfg,
        interval=interval,
        labels=config.labels,
        num_images=config.num_images,
        score=(network,),
        network_weights=config.network_weights,
        any_weights=config.any_weights,
        output=str(folder / "samples" / f"cfg{cfg:g}-{interval[0]:g}-{interval[1]:g}"),
    )


def _evaluations(sampler: str, point: SampleConfig) -> int:
    """Forward passes of an image, of the weaker model too."""
    from repa_pipeline.diffusion.guidance import count_evaluations

    return sum(
        count_evaluations(
            sampler,
            point.num_steps,
            autoguided=point.guide_checkpoint is not None,
            scale=point.cfg,
            interval=point.interval,
        )
    )


def _check_scoring(config: SweepConfig, stage: SampleStage) -> None:
    """Raises for a score that would be refused, before hours of sampling for it."""
    from repa_pipeline.metrics.networks import Widths
    from repa_pipeline.stages.reference import check_reference
    from repa_pipeline.stages.scores import check_counts

    manifest = stage.judges[0].manifest
    check_counts(config, stage.recipe["num_images"], Widths(**manifest["widths"]))
    check_reference(_scoring(config, stage.output), manifest)


def _scoring(config: SweepConfig, samples: str) -> EvaluateConfig:
    given = {**_shared(config, ScoreConfig), "batch_size": 0}  # sampling has one of that name
    return EvaluateConfig(**given, samples=samples, reference=config.reference)


def _scored(config: SweepConfig, stage: SampleStage) -> tuple[SweepPoint, Any]:
    """The score of samples whose features stand, and what decides it."""
    from repa_pipeline.stages.evaluate import evaluate, summary

    scoring = _scoring(config, stage.output)
    result = evaluate(scoring, progress_for_stream(), choose_executor(scoring))
    errors = {name: error["value"] for name, error in result["standard_errors"].items()}
    cfg, interval = stage.config.cfg, stage.config.interval
    point = SweepPoint(cfg, interval, result["metrics"], errors, result["kind"], stage.output)
    say(f"{point.name}: {summary(result)}")
    return point, result["recipe"]


def _finish_sweep(folder: Path, scored: Sequence[tuple[SweepPoint, Any]], network: str) -> None:
    from repa_pipeline.stages.sample import read_settings

    points = [point for point, _ in scored]
    alike = read_settings(points[0].samples)
    about = {k: v for k, v in alike.items() if k not in ("cfg", "interval")}
    page = sweep_page("Guidance sweep", points, {**about, "network": network})
    files = {"index.html": page.encode()}
    recipe = [recipe for _, recipe in scored]
    _publish(folder, "sweep", recipe, files, points=[dataclasses.asdict(p) for p in points])
    best = best_point(points)
    say(f"least {best.kind}: {best.metric(DISTANCE):.4g} with {best.name}")
    say(f"page: {folder / 'index.html'}")


def _publish(
    folder: Path, name: str, recipe: Sequence[Any], files: Mapping[str, bytes], **told: Any
) -> None:
    """Writes a page's files, and NAME.json that says what they are of.

    A page of other settings that stands there is kept beside, under a digest of its own; NAME.json
    moves last and is written first, so that after a kill every file is still told from others.
    """
    store, key = LocalStore(str(folder)), f"{name}.json"
    said = json_bytes({"recipe": recipe, **told})
    standing = {} if store.size(key) is None else get_json(store, key)
    if standing and standing["recipe"] != json.loads(said)["recipe"]:
        digest = fingerprint({"recipe": standing["recipe"]})[:8]
        for file in (*files, key):
            if store.size(file) is not None:
                stem, _, kind = file.partition(".")
                os.replace(folder / file, folder / f"{stem}.{digest}.{kind}")
                say(f"kept: {folder / f'{stem}.{digest}.{kind}'}, of other settings")
    store.put(key, said)
    for file, data in files.items():
        store.put(file, data)


def _checkpoints(config: GridConfig) -> list[str]:
    runs = [str(find_run(config, name).newest_checkpoint()) for name in config.run]
    given = [*config.checkpoint, *runs]
    return list(dict.fromkeys(given)) or [str(find_run(config, None).newest_checkpoint())]


def _about_all(config: GridConfig, checkpoints: Sequence[str]) -> Mapping[str, Any]:
    """What the first checkpoint says of itself; raises MismatchError where the others are of other
    images or classes."""
    from repa_pipeline.stages.sample_checkpoint import read_checkpoint

    abouts = [read_checkpoint(_sample_config(config), where).about for where in checkpoints]
    for where, about in zip(checkpoints, abouts, strict=True):
        for name in ("resolution", "num_classes"):
            got, expected = about["inputs"][name], abouts[0]["inputs"][name]
            if got != expected:
                raise MismatchError(
                    f"{where} has {name} {got}, {checkpoints[0]} has {expected}: a grid shows one "
                    "kind of images; make a grid of each"
                )
    return abouts[0]


def _sample_config(config: DrawConfig, **changes: Any) -> SampleConfig:
    settings = {**_shared(config, DrawConfig), **changes}
    if settings.get("cfg") == 1:  # the rest is guided, this one has nothing that could be
        settings["guide_checkpoint"] = None
    return SampleConfig(**settings)


def _shared(config: CommonConfig, cls: type[Any]) -> dict[str, Any]:
    """The settings of `config` that class `cls` has."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)}


def _folder(config: GridConfig | SweepConfig, kind: str, also: Sequence[Any]) -> Path:
    """Where the page goes: of its own for every set of settings."""
    if config.output:
        return Path(config.output)
    also = [*also, config.guide_checkpoint, config.eta]
    digest = fingerprint({"settings": decisions(config), "also": also})[:12]
    return runs_folder(config).parent / kind / digest


def _put(path: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    LocalStore(str(path.parent)).put(path.name, data)


def _evenly(num_classes: int) -> tuple[int, ...]:
    """At most ten classes, evenly apart."""
    count = min(num_classes, _NUM_CLASSES)
    return tuple(i * num_classes // count for i in range(count))


def _check_classes(classes: Sequence[int], num_classes: int) -> None:
    wrong = [number for number in classes if not 0 <= number < num_classes]
    if wrong or len(set(classes)) < len(classes):
        raise ConfigError(
            f"classes: got {','.join(map(str, classes))}, expected different numbers from 0 to "
            f"{num_classes - 1}"
        )


def _class_name(names: Sequence[str] | None, number: int) -> str:
    name = names[number] if names else str(number)
    return f"class {number}" if name == str(number) else f"{number}: {name}"


def _row(stage: SampleStage, num_classes: int) -> GridRow:
    from repa_pipeline.stages.sample import open_samples, sample_blocks

    images = np.concatenate([block.copy() for block in sample_blocks(open_samples(stage.output))])
    by_class = np.concatenate([images[place::num_classes] for place in range(num_classes)])
    manifest = stage.spec.manifest
    guidance = guidance_name(manifest["cfg"], manifest["interval"])
    return GridRow(f"{_name_of(str(stage.checkpoint))}, {guidance}", by_class, manifest)


def _name_of(checkpoint: str) -> str:
    """A checkpoint of a run as run/step-N, any other by its file name."""
    *_, run, folder, name = ("", "", *checkpoint.rstrip("/").split("/"))
    name = name.removesuffix(".pt")
    return f"{run}/{name}" if folder == "checkpoints" else name
