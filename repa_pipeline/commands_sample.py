"""What `repa sample` does with its settings."""

from __future__ import annotations

from repa_pipeline.cluster.select import choose_executor
from repa_pipeline.commands import describe, report_pass, say
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.engine.run import run_stage
from repa_pipeline.observe import progress_for_stream


def sample(config: SampleConfig) -> None:
    """`repa sample`."""
    from repa_pipeline.diffusion.guidance import count_model_evaluations
    from repa_pipeline.stages.sample import finish_samples, sample_stage

    stage = sample_stage(config)
    config = stage.config
    evaluations = count_model_evaluations(
        config.sampler, config.num_steps, scale=config.cfg, interval=config.interval
    )
    say(
        f"sample from {stage.checkpoint}: {config.num_images:,} images, {config.sampler} "
        f"{config.num_steps} steps, cfg {config.cfg:g} on t in [{config.interval[0]:g}, "
        f"{config.interval[1]:g}], {evaluations} model evaluations an image"
    )
    (images,) = stage.outputs
    ledger = Ledger(images.store, "ledger", images.plan().fingerprint)
    if config.dry_run:
        describe(images, ledger)
        return
    ledgers = {images.name: ledger}
    result = run_stage(stage, choose_executor(config), ledgers, progress_for_stream())
    report_pass(result)
    for path in finish_samples(stage):
        say(f"made: {path}")
    say("next: repa evaluate")
