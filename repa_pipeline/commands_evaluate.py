"""What `repa evaluate` does with its settings."""

from __future__ import annotations

from repa_pipeline.commands import say
from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.observe import progress_for_stream


def evaluate(config: EvaluateConfig) -> None:
    """`repa evaluate`."""
    from repa_pipeline.stages.evaluate import evaluate as score
    from repa_pipeline.stages.evaluate import find_samples, summary

    if config.dry_run:
        reference = config.reference or "statistics of the training source"
        say(f"would score {find_samples(config)} with {config.network} against {reference}")
        return
    result = score(config, progress_for_stream())
    if not result["new"]:
        say(f"nothing to do: {result['path']} is the result of these samples and settings")
    say(summary(result))
    say(f"result: {result['path']}; next: repa report")
