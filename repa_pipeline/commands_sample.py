"""What `repa sample` does with its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repa_pipeline.cluster.select import choose_executor
from repa_pipeline.commands import describe, report_pass, say
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.engine.run import run_stage
from repa_pipeline.observe import progress_for_stream

if TYPE_CHECKING:
    from repa_pipeline.stages.sample import SampleStage


def sample(config: SampleConfig) -> None:
    """`repa sample`."""
    from repa_pipeline.stages.sample import finish_samples
    from repa_pipeline.stages.sample_outputs import LATENTS

    stage = make_samples(config)
    if config.dry_run:
        return
    for path in finish_samples(stage):
        say(f"made: {path}")
    if {output.name for output in stage.outputs} == {LATENTS}:
        say(f"next: repa sample --from-latents {stage.output}")
    else:
        network = f" --network {config.score[0]}" if config.score else ""
        say(f"next: repa evaluate --samples {stage.output}{network}")


def make_samples(config: SampleConfig) -> SampleStage:
    """Runs (or, for --dry-run, describes) what is missing of a set of samples."""
    from repa_pipeline.stages.sample import sample_ledgers
    from repa_pipeline.stages.sample_plan import sample_stage

    stage = sample_stage(config)
    for note in stage.notes:
        say(f"note: {note}")
    say(_what(stage))
    ledgers = sample_ledgers(stage)
    if config.dry_run:
        for output in stage.outputs:
            describe(output, ledgers[output.name])
        return stage
    executor = choose_executor(stage.config, stage.output)
    report_pass(run_stage(stage, executor, ledgers, progress_for_stream()))
    return stage


def _what(stage: SampleStage) -> str:
    """What is about to be sampled, and what an image costs."""
    from repa_pipeline.diffusion.guidance import count_evaluations
    from repa_pipeline.stages.sample_outputs import LATENTS

    config, num_images = stage.config, stage.recipe["num_images"]
    latents = None if LATENTS in stage.writes else stage.finished_latents()
    if latents is not None:
        return f"decode {latents}: {num_images:,} latents, {stage.recipe['decoder']}"
    autoguided = config.guide_checkpoint is not None
    own, weaker = count_evaluations(
        config.sampler,
        config.num_steps,
        autoguided=autoguided,
        scale=config.cfg,
        interval=config.interval,
    )
    guide = f" and {weaker} of the weaker {config.guide_checkpoint}" if autoguided else ""
    return (
        f"sample from {stage.checkpoint}: {num_images:,} images, {config.sampler} "
        f"{config.num_steps} steps, cfg {config.cfg:g} on t in [{config.interval[0]:g}, "
        f"{config.interval[1]:g}], {own} model evaluations{guide} an image"
    )
