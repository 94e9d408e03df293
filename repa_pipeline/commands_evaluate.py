"""What `repa evaluate`, `repa reference` and `repa certify` do with their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa_pipeline.cluster.select import choose_executor
from repa_pipeline.commands import describe, say
from repa_pipeline.config_evaluate import AUTO, CertifyConfig, EvaluateConfig, ReferenceConfig
from repa_pipeline.engine.run import ledger_of
from repa_pipeline.observe import progress_for_stream


def evaluate(config: EvaluateConfig) -> None:
    """`repa evaluate`."""
    from repa_pipeline.metrics.networks import Widths
    from repa_pipeline.metrics.published import comparison_lines
    from repa_pipeline.stages.evaluate import evaluate as score
    from repa_pipeline.stages.evaluate import summary
    from repa_pipeline.stages.reference import check_reference, settle_network
    from repa_pipeline.stages.scored_samples import find_samples, open_scored_samples
    from repa_pipeline.stages.scores import check_counts

    if config.dry_run:
        network = settle_network(config, config.reference)
        reference = config.reference or "statistics of the training source"
        say(f"would score {find_samples(config)} with {network} against {reference}")
        samples = open_scored_samples(config, network)
        manifest = samples.spec.manifest
        check_counts(config, samples.spec.num_rows, Widths(**manifest["widths"]))
        check_reference(config, manifest)
        if samples.stage:
            (output,) = samples.stage.outputs
            describe(output, ledger_of(output.store, output))
        return
    result = score(config, progress_for_stream(), choose_executor(config, _written(config)))
    if not result["new"]:
        say(f"nothing to do: {result['path']} is the result of these samples and settings")
    say(summary(result))
    for line in comparison_lines(result) if config.compare else ():
        say(line)
    say(f"result: {result['path']}; next: repa report")


def _written(config: EvaluateConfig) -> str | None:
    """The folder that features go to or below, None for the workspace's."""
    from repa_pipeline.stages.scored_samples import find_samples

    if config.features:
        return config.features
    where = Path(find_samples(config))
    if where.is_dir():
        return str(where)
    return str(where.parent) if where.is_file() else None


def reference(config: ReferenceConfig) -> None:
    """`repa reference`."""
    from repa_pipeline.stages.reference import (
        check_reference_inputs,
        make_reference,
        settle_network,
        write_adm_layout,
    )

    network = settle_network(config, config.adm)
    if config.dry_run:
        check_reference_inputs(config)
        what = config.adm or f"{config.source} at {config.resolution} pixels"
        say(f"would make a reference of {what} with {network}")
        return
    made = make_reference(config, choose_executor(config), progress_for_stream())
    about = made.reference.about
    say(
        f"{'made' if made.new else 'nothing to do'}: {made.path} ({about['name']}, "
        f"{about['num_images']:,} images of {about['resolution']} pixels, network "
        f"{about['network']['name']}, {len(made.reference.rows):,} rows for precision and recall, "
        f"sha256 {about['sha256'][:12]})"
    )
    if config.adm_npz:
        say(f"made: {write_adm_layout(config, made)} (ADM's layout)")
    say(f"next: repa evaluate --reference {made.path}")


def certify(config: CertifyConfig) -> None:
    """`repa certify`."""
    from repa_pipeline.stages.certify import PARTS, lines, why_not
    from repa_pipeline.stages.certify import certify as run
    from repa_pipeline.stages.evaluate import evaluate as score

    if config.dry_run:
        for part in PARTS:
            because = why_not(config, part)
            say(f"would run {part.name}" if because is None else f"NOT RUN  {part.name}: {because}")
        return
    result = run(
        config,
        lambda settings: score(settings, progress_for_stream(), choose_executor(settings)),
        lambda checkpoint, changes: _sample(config, checkpoint, changes),
    )
    for line in lines(result):
        say(line)
    if result["exit_code"]:
        raise SystemExit(result["exit_code"])


def _sample(config: CertifyConfig, checkpoint: str, changes: Mapping[str, Any]) -> str:
    """Features of 50,000 SDE samples of a checkpoint, as the published numbers are of; returns
    their folder."""
    from repa_pipeline.commands_sample import make_samples
    from repa_pipeline.config import ClusterConfig
    from repa_pipeline.config_sample import SampleConfig

    guidance = f"cfg{changes['cfg']:g}"
    folder = f"{config.workspace.rstrip('/')}/certify/{Path(checkpoint).stem}.{guidance}"
    network = "inception-v3" if config.network == AUTO else config.network
    settings: dict[str, Any] = {
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(ClusterConfig)},
        **{"checkpoint": checkpoint, "output": folder, "num_images": 50_000},
        **{"score": (network,), "network_weights": config.network_weights},
        **{"sampler": "sde", "num_steps": 250},
        **{name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()},
    }
    make_samples(SampleConfig(**settings))
    return folder
