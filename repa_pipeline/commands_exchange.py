"""What `repa inspect`, `repa export` and `repa import` print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repa_pipeline.commands import describe, report_pass, say
from repa_pipeline.config_exchange import ExportConfig, ImportConfig, InspectConfig
from repa_pipeline.engine.run import run_stage
from repa_pipeline.observe import progress_for_stream
from repa_pipeline.text import count, size

_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_COLUMNS = ("array", "state", "stored as", "shape", "shards", "bytes", "container", "weights")


def inspect(config: InspectConfig) -> None:
    """`repa inspect`; with --fidelity raises DamagedError for an array that is too far off."""
    from repa_pipeline.registry import load_plugins
    from repa_pipeline.stages.inspect import look

    load_plugins(config.plugins)
    state = look(config)
    if config.fidelity:
        return _inspect_fidelity(config)
    drawn: dict[str, Any] = {}
    if config.pictures and not config.dry_run:
        from repa_pipeline.stages.inspect_pictures import draw_pictures

        drawn = dataclasses.asdict(draw_pictures(config, state))
    if config.json:
        return say(json.dumps({**state.as_json(), **drawn}, indent=1))
    for line in _index_lines(state.url, state.index):
        say(line)
    for line in _array_lines(state.arrays):
        say(line)
    for picture in drawn.get("pictures", ()):
        say(f"picture: {picture}")
    for note in drawn.get("notes", ()):
        say(f"note: {note}")


def export(config: ExportConfig) -> None:
    """`repa export`."""
    if config.run or config.checkpoint or config.to == "safetensors":
        return _export_run(config)
    from repa_pipeline.engine.local import LocalExecutor
    from repa_pipeline.stages.exporting_reference import ReferenceZip, reference_export
    from repa_pipeline.stages.exporting_webdataset import webdataset_export

    stage: Any = (reference_export if config.to == "reference" else webdataset_export)(config)
    (output,) = stage.outputs
    names = [array.spec.name for array in output.exported.arrays]
    images = "with images" if output.with_images else "without images"
    say(f"export of {', '.join(names)}, {images}: {config.to} at {output.where}")
    if config.dry_run:
        return describe(output, output.ledger, " and images" * output.with_images)
    if isinstance(output, ReferenceZip) and output.is_sealed():
        output.tidy()
        return say(f"nothing to do: {output.where} is complete")
    ledgers = {output.name: output.ledger}
    result = run_stage(stage, LocalExecutor(), ledgers, progress_for_stream())
    made = result.outputs[output.name]
    if not made.num_new:
        return say(f"nothing to do: {output.where} is complete ({made.plan.num_rows:,} rows)")
    num_bytes = sum(commit.num_bytes for commit in made.commits)
    say(f"exported: {count(made.plan.num_rows, 'row')}, {size(num_bytes)}")
    say(f"output: {output.where}")


def import_(config: ImportConfig) -> None:
    """`repa import`."""
    if _is_checkpoint(config):
        return _import_run(config)
    from repa_pipeline.cluster.select import choose_executor
    from repa_pipeline.stages.importing_reference import check_reference, import_reference
    from repa_pipeline.stages.importing_webdataset import import_webdataset

    if config.dry_run:
        if config.from_ == "reference":
            pairs = check_reference(config)
            return say(f"plan: {len(pairs):,} images and latents of {config.source}; done: 0")
        from repa_pipeline.stages.importing_tars import scan_tars

        tars = scan_tars(config.source)
        arrays = ", ".join(sorted(tars.samples[0].arrays))
        return say(f"plan: {len(tars.samples):,} samples of {config.source} with {arrays}")
    run = import_reference if config.from_ == "reference" else import_webdataset
    index, result = run(config, choose_executor(config), progress_for_stream())
    manifest = index.manifest
    say(
        f"{index.num_rows:,} rows in {manifest['num_classes']} classes, "
        f"{manifest['num_excluded']} excluded"
    )
    for remark in manifest["remarks"]:
        say(f"note: {remark}")
    report_pass(result, "rows")
    say("next: repa cache-features" if _has_images(manifest) else "next: repa train")


def _export_run(config: ExportConfig) -> None:
    from repa_pipeline.stages.export_run import export_run, plan_export

    plan = plan_export(config)
    say(f"export of {plan.checkpoint}: {config.to} at {plan.destination}")
    if config.dry_run:
        return
    notes = export_run(plan)
    if notes is None:
        return say(f"nothing to do: {plan.destination} is complete")
    for note in notes:
        say(f"note: {note}")
    say(f"output: {plan.destination}")


def _is_checkpoint(config: ImportConfig) -> bool:
    """Whether what is imported is a model, not a cache."""
    if config.from_ != "reference":
        return config.from_ == "checkpoint"
    is_exported = (Path(config.source) / "config.json").is_file()
    return config.source.endswith(_CHECKPOINTS) or is_exported


def _import_run(config: ImportConfig) -> None:
    from repa_pipeline.stages.import_run import import_run, read_model

    imported = read_model(config)
    inputs = imported.about["inputs"]
    teachers = ", ".join(f"{f['name']} ({f['width']})" for f in inputs["features"])
    steps = f"{imported.step:,} steps" if imported.step else "an unknown number of steps"
    say(
        f"{config.source}: {imported.about['model_spec']['name']} after {steps}, "
        f"{inputs['num_classes']:,} classes of {inputs['resolution']} pixels, projectors: "
        f"{teachers or 'none'}; latents taken to be of {imported.about['latents']['autoencoder']}"
    )
    if config.dry_run:
        return
    run, is_new = import_run(config, imported)
    if not is_new:
        say(f"nothing to do: run {run.name} is this checkpoint")
    say(f"run: {run.folder}; it can be sampled, not trained on")
    say(f"next: repa sample --run {run.name}")


def _inspect_fidelity(config: InspectConfig) -> None:
    from repa_pipeline.stages.fidelity import check_fidelity, require_fidelity

    if config.dry_run:
        return say("would encode rows of the source again and compare")
    found = check_fidelity(config)
    if config.json:
        say(json.dumps([dataclasses.asdict(array) for array in found], indent=1))
    else:
        for array in found:
            say(array.as_line())
    require_fidelity(found)


def _index_lines(url: str, manifest: Any) -> list[str]:
    lines = [
        f"cache: {url}",
        f"index: {manifest['num_rows']:,} rows in {manifest['num_classes']} classes, "
        f"{manifest['num_excluded']} excluded, {manifest['num_duplicates']} exact duplicates, "
        f"{manifest['shard_rows']} rows a shard",
        f"source: {manifest['source']} (row digest {manifest['rows_digest'][:12]}, permutation "
        f"seed {manifest['permutation_seed']})",
    ]
    for reason, number in manifest["excluded_reasons"].items():
        lines.append(f"excluded: {number} x {reason}")
    return lines + [f"note: {remark}" for remark in manifest["remarks"]]


def _array_lines(arrays: Sequence[Any]) -> list[str]:
    """The table, then settings and problems of each array."""
    if not arrays:
        return ["no arrays: run `repa encode`"]
    rows: list[Sequence[str]] = [_COLUMNS]
    rows += [_cells(array) for array in arrays]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    total = sum(array.num_bytes for array in arrays if array.state == "sealed")
    lines.append(f"sealed arrays: {size(total)}")
    for array in arrays:
        if array.problem:
            lines.append(f"{array.name}: {array.problem}")
        if array.zero_tokens:
            lines.append(f"{array.name}: {count(array.zero_tokens, 'zero token')}")
    alike: dict[str, list[str]] = {}
    for array in arrays:
        alike.setdefault(_settings(array.settings), []).append(array.name)
    return lines + [f"{', '.join(names)}: {said}" for said, names in alike.items() if said]


def _cells(array: Any) -> Sequence[str]:
    if array.state == "unreadable":
        return (array.name, array.progress, *[""] * (len(_COLUMNS) - 2))
    weights = array.weights_sha256
    return (
        array.name,
        array.progress,
        f"{array.codec} {array.dtype}",
        "x".join(map(str, array.shape)),
        f"{array.shards:,}",
        size(array.num_bytes),
        array.container,
        weights if weights.startswith("imported") else weights[:12],
    )


def _settings(values: Any) -> str:
    """Settings on one line; nested ones under dotted names."""
    parts = []
    for name, value in sorted(values.items()):
        if isinstance(value, dict):
            parts += [f"{name}.{inner} {value[inner]}" for inner in sorted(value)]
        elif value is not None:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _has_images(manifest: Any) -> bool:
    return not str(manifest["source"]).startswith("none ")
