"""What each command does with its settings: plan, run, say where the output is and what is next."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from repa_pipeline.cluster.select import choose_executor, ray_address
from repa_pipeline.command_table import COMMANDS
from repa_pipeline.config import (
    EMBEDDED,
    EncodeAllConfig,
    EncodeConfig,
    FeaturesConfig,
    IndexConfig,
    LatentsConfig,
    ReportConfig,
    RunsConfig,
)
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.index import Index
from repa_pipeline.engine.contracts import Output
from repa_pipeline.engine.ledger import Ledger, standing
from repa_pipeline.engine.run import Progress, StageResult
from repa_pipeline.errors import ConfigError, UnknownNameError
from repa_pipeline.exits import EXIT_TERMINATED
from repa_pipeline.observe import progress_for_stream
from repa_pipeline.resolve import Project, resolve
from repa_pipeline.text import count, size


def run_index(config: IndexConfig) -> None:
    """`repa index`."""
    finished = _has_index(config)
    _index(config, relist=True)
    if finished:
        say(f"nothing to do: the index at {_store_url(config)} is finished")
    elif not config.dry_run:
        say(f"index: {_store_url(config)}/index.parquet; next: repa encode-latents")


def encode_latents(config: LatentsConfig) -> None:
    """`repa encode-latents`."""
    from repa_pipeline.stages.latents import check_latents, latents_product

    check_latents(config)
    index = _index(config)
    _run_pass(config, [latents_product(config, index)], index)
    if not config.dry_run:
        say("next: repa cache-features")


def cache_features(config: FeaturesConfig) -> None:
    """`repa cache-features`."""
    from repa_pipeline.stages.features import check_features, features_products

    check_features(config)
    index = _index(config)
    _run_pass(config, features_products(config, index), index)
    if not config.dry_run:
        say("next: repa train")


def encode_all(config: EncodeAllConfig) -> None:
    """`repa encode`."""
    from repa_pipeline.stages.features import check_features, features_products
    from repa_pipeline.stages.latents import check_latents, latents_product

    if config.weights:
        raise ConfigError(
            "--weights names one file, `repa encode` runs several networks: set "
            '[encoders.NAME] and [autoencoders.NAME] weights = "..." in repa.toml'
        )
    check_latents(config)
    check_features(config)
    index = _index(config)
    _run_pass(config, [latents_product(config, index), *features_products(config, index)], index)
    if not config.dry_run:
        say("next: repa train")


def train(config: TrainConfig) -> None:
    """`repa train`: here, in a process a device, or on Ray."""
    from repa_pipeline.training.launch import launch, num_ranks
    from repa_pipeline.training.world import world_of_environment

    started = world_of_environment().size > 1
    address = None if started or config.dry_run else ray_address(config)
    if address is not None:
        from repa_pipeline.cluster.train import train_on_ray

        code = train_on_ray(config, address, run_training, progress_for_stream())
    else:
        ranks = 1 if started or config.dry_run else num_ranks(config)
        code = launch(config, ranks) if ranks > 1 else run_training(config)
    if code:
        raise SystemExit(code)


def run_training(
    config: TrainConfig,
    progress: Progress | None = None,
    notice: Callable[[], bool] | None = None,
) -> int:
    """One rank of `repa train`, or all of it; rank 0 alone says anything. Returns the exit code.

    A starter that gives `notice`, which stops the run, says itself what then follows.
    """
    from repa_pipeline.stages.train import plan_training
    from repa_pipeline.stages.train import train as run_rank
    from repa_pipeline.training.world import never, world_of_environment

    world = world_of_environment()
    tell = say if world.is_main else _say_nothing
    plan = plan_training(config)
    teachers = [teacher.describe().name for teacher in plan.inputs.teachers]
    what = f"aligned with {', '.join(teachers)}" if teachers else "without a teacher"
    tell(
        f"train {plan.name}: {config.model} {what}, {config.steps:,} steps of "
        f"{config.batch_size} images ({plan.order.steps_per_epoch:,} steps an epoch), "
        f"{plan.dtype} on {plan.device}" + (f", {world.size} ranks" if world.size > 1 else "")
    )
    if config.dry_run:
        from repa_pipeline.stages.train_check import check_training

        for line in (_train_dry_run(plan), *check_training(plan)):
            tell(line)
        return 0
    result = run_rank(plan, progress or progress_for_stream(), notice or never)
    if not result.num_new:
        tell(f"nothing to do: run {result.run.name} is at step {result.step:,}")
    names = ("loss", "denoising", "alignment", "images_per_s", "data_wait", "mfu")
    shown = ", ".join(f"{n} {result.last[n]:.4g}" for n in names if n in result.last)
    tell(f"run: {result.run.folder} at step {result.step:,}" + (f" ({shown})" if shown else ""))
    if result.stopped:
        if notice is None:
            tell("stopped by SIGTERM, saved; the same command goes on from here")
        return EXIT_TERMINATED
    tell(f"next: repa sample --run {plan.name} --cfg 1.8 --interval 0,0.7")
    return 0


def runs(config: RunsConfig) -> None:
    """`repa runs`."""
    from repa_pipeline.training.inputs import part_name
    from repa_pipeline.training.runs import list_runs, runs_folder

    found = list_runs(config)
    if not found:
        say(f"no runs in {runs_folder(config)}: run `repa train` first")
    for run in found:
        record = run.record()
        settings = record["config"]
        arrays = record["decided"]["data"]["arrays"]
        named = (part_name(name) for name in arrays if name.startswith("features."))
        teachers = list(dict.fromkeys(named))
        say(
            f"{run.name}  step {run.last_step():,} of {settings['steps']:,}  {settings['model']}  "
            f"{', '.join(teachers) or 'vanilla'}  seed {settings['seed']}  {run.folder}"
        )


def report(config: ReportConfig) -> None:
    """`repa report`."""
    from repa_pipeline.report import write_report

    if config.dry_run:
        say(f"would write {config.output or 'report.html'} from the runs of {config.workspace}")
        return
    say(f"report: {write_report(config)}")


def print_config(command: str | None, project: Project) -> None:
    """`repa config`: every setting, its value and where it came from."""
    if command is not None and command not in COMMANDS:
        raise UnknownNameError(f"unknown command '{command}': known are {', '.join(COMMANDS)}")
    for name in [command] if command else COMMANDS:
        resolved = resolve(name, {}, project)
        say(f"[{name}]")
        for key, origin in sorted(resolved.origins.items()):
            value = getattr(resolved.config, key)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            say(f"  {key} = {shown}  ({origin})")
        for entry, changes in resolved.config.overrides.items():
            say(f"  {entry}: {changes}  ({project.path})")


def run_selftest_command(vectors: str, device: str, dtype: str, dry_run: bool = False) -> int:
    """`repa selftest`; returns the exit code: 0 within tolerance, 1 above."""
    from repa_pipeline.device import choose_device
    from repa_pipeline.stages.selftest import plan_selftest, run_selftest

    wanted: Any = dtype  # run_selftest refuses an unknown one
    if dry_run:
        planned, left_out = plan_selftest(vectors, choose_device(device), wanted)
        for file, name in planned:
            say(f"would check  {file}  {name}")
        for skipped in left_out:
            say(f"would skip  {skipped.file}: {skipped.reason}")
        return 0
    found = run_selftest(vectors, choose_device(device), wanted)
    for group in found.groups:
        worst = "-" if group.worst is None else f"{group.worst:.3g}"
        limit = "reported only" if group.tolerance is None else f"tolerance {group.tolerance:g}"
        verdict = "ok" if group.passed else "FAILED"
        about = f" in {group.worst_array}" if group.worst_array and not group.passed else ""
        problem = f": {group.problem}" if group.problem else ""
        say(
            f"{verdict:6}  {group.file}  {group.group}  worst error {worst} ({limit}, "
            f"{group.num_arrays} arrays){about}{problem}"
        )
    for skipped in found.skipped:
        say(f"skipped  {skipped.file}: {skipped.reason}")
    failed = sum(not group.passed for group in found.groups)
    say(
        f"selftest on {found.device}, {found.dtype}: {len(found.groups) - failed} groups passed, "
        f"{failed} failed, {len(found.skipped)} skipped"
    )
    return 0 if found.passed else 1


def _index(config: IndexConfig, relist: bool = False) -> Index:
    """The finished index (for --dry-run a planned one), with a word on what is in the source."""
    from repa_pipeline.stages.index import cache_store, ensure_index, planned_index

    if config.source == EMBEDDED:
        say(
            "source: the embedded data set (scikit-learn's handwritten digits); use --source, "
            "REPA_SOURCE or repa.toml for your own images"
        )
    if config.dry_run and not _has_index(config):
        index, num_bytes = planned_index(config)
        say(
            f"plan: {cache_store(config).url}/index.parquet: {index.num_rows:,} images "
            f"({size(num_bytes)}) to read, decode and index; done: 0"
        )
        return index
    index = ensure_index(config, choose_executor(config), progress_for_stream(), relist)
    manifest = index.manifest
    say(
        f"{index.num_rows:,} images in {manifest['num_classes']} classes, "
        f"{manifest['num_excluded']} excluded, {manifest['num_duplicates']} exact duplicates"
    )
    for remark in manifest["remarks"]:
        say(f"note: {remark}")
    for what, counts in (("excluded", "excluded_reasons"), ("converted", "notes")):
        if manifest[counts]:
            listed = "; ".join(f"{number} x {name}" for name, number in manifest[counts].items())
            say(f"{what}: {listed}")
    return index


def _has_index(config: IndexConfig) -> bool:
    from repa_pipeline.stages.index import cache_store

    return cache_store(config).size("manifest.json") is not None


def _store_url(config: IndexConfig) -> str:
    from repa_pipeline.stages.index import cache_store

    return cache_store(config).url


def _run_pass(config: EncodeConfig, products: list[Any], index: Index) -> None:
    """Runs (or, for --dry-run, describes) one pass over the images."""
    from repa_pipeline.stages.images import ImagePass, pass_ledgers, run_pass

    stage = ImagePass(config, tuple(products))
    if config.dry_run:
        for output, ledger in zip(stage.outputs, pass_ledgers(stage).values(), strict=True):
            describe(output, ledger)
        return
    report_pass(run_pass(stage, index, choose_executor(config), progress_for_stream()))


def describe(output: Output, ledger: Ledger, also: str = "") -> None:
    """What --dry-run says of an output; `also`: what its bytes are counted without."""
    plan, done = output.plan(), standing(output, ledger)
    rows = sum(commit.rows for commit in done.values())
    say(
        f"plan: {plan.where}: {plan.num_rows:,} {plan.unit} in {count(len(plan.shards), 'shard')}, "
        f"{size(plan.num_bytes)}{also}; done: {rows:,} {plan.unit} in {count(len(done), 'shard')}"
        + (", sealed" if output.is_sealed() else "")
    )


def report_pass(result: StageResult, unit: str = "") -> None:
    """What a pass did, by output; `unit`: what a row is called, without one as the plan says."""
    if result.seconds:
        shown = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.seconds.items())
        say(f"time: {shown} (summed over threads and workers)")
    for name, output in result.outputs.items():
        plan = output.plan
        rows = f"{plan.num_rows:,} {unit or plan.unit}"
        if not output.num_new:
            say(f"nothing to do: {plan.where} is complete ({rows})")
            continue
        counts: Counter[str] = Counter()
        for commit in output.commits:
            counts.update(commit.counts)
        seen = "".join(f", {number:,} {what}" for what, number in counts.items())
        num_bytes = sum(commit.num_bytes for commit in output.commits)
        say(f"{name}: {rows}, {size(num_bytes)}, sealed{seen}")
        say(f"output: {plan.where}")


def _train_dry_run(plan: Any) -> str:
    from repa_pipeline.training.runs import Run, runs_folder

    run = Run(runs_folder(plan.config) / plan.name)
    record = sum(array.spec.layout.record_bytes for array in plan.inputs.arrays)
    arrays = (*plan.inputs.arrays, *plan.inputs.mirrored)
    total = sum(array.spec.num_bytes for array in arrays)
    return (
        f"plan: reads {record:,} bytes an image, {size(record * plan.config.batch_size)} a step "
        f"from {size(total)} of cache; done: step {run.last_step():,} of {plan.config.steps:,}"
    )


def say(line: str) -> None:
    """Prints a line for people, at once."""
    print(line, file=sys.stdout, flush=True)


def _say_nothing(line: str) -> None:
    """What ranks other than the first say."""
