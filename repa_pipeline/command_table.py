"""The commands of `repa`: settings, help line, the function that runs it. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from repa_pipeline.config import (
    CommonConfig,
    EncodeAllConfig,
    FeaturesConfig,
    IndexConfig,
    LatentsConfig,
    ReportConfig,
    RunsConfig,
)
from repa_pipeline.config_care import CopyConfig, RepairConfig, VerifyConfig
from repa_pipeline.config_evaluate import CertifyConfig, EvaluateConfig, ReferenceConfig
from repa_pipeline.config_exchange import ExportConfig, ImportConfig, InspectConfig
from repa_pipeline.config_pictures import GridConfig, SweepConfig
from repa_pipeline.config_plan import PlanConfig
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.config_train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Command:
    """`action` is "module:function" and takes the settings; `positional` maps settings that are
    arguments without a flag to the name that help shows."""

    config: type[CommonConfig]
    action: str
    summary: str
    positional: Mapping[str, str] = dataclasses.field(default_factory=dict)


COMMAND_TABLE: Mapping[str, Command] = {
    "index": Command(
        IndexConfig,
        "repa_pipeline.commands:run_index",
        "List the source's images and fix their order; encode-latents does it when needed.",
    ),
    "encode-latents": Command(
        LatentsConfig,
        "repa_pipeline.commands:encode_latents",
        "Encode every image with the autoencoder and store its moments.",
    ),
    "cache-features": Command(
        FeaturesConfig,
        "repa_pipeline.commands:cache_features",
        "Run frozen teachers over every image and store their patch tokens.",
    ),
    "encode": Command(
        EncodeAllConfig,
        "repa_pipeline.commands:encode_all",
        "Do both from one decode of each image: latents and teacher tokens.",
    ),
    "plan": Command(
        PlanConfig,
        "repa_pipeline.commands_plan:plan",
        "Estimate a cache: bytes, requests, device hours, and whether it pays.",
    ),
    "inspect": Command(
        InspectConfig,
        "repa_pipeline.commands_exchange:inspect",
        "Show what is in a cache, with pictures; --fidelity compares it with its source.",
    ),
    "verify": Command(
        VerifyConfig,
        "repa_pipeline.commands_care:verify",
        "Check every stored byte of a cache against its checksums; name what is damaged.",
    ),
    "repair": Command(
        RepairConfig,
        "repa_pipeline.commands_care:repair",
        "Make damaged or missing shards again, by the array's own recipe.",
    ),
    "copy": Command(
        CopyConfig,
        "repa_pipeline.commands_care:copy",
        "Copy a cache from one workspace to another, verified.",
        {"origin": "FROM", "target": "TO"},
    ),
    "export": Command(
        ExportConfig,
        "repa_pipeline.commands_exchange:export",
        "Write a cache, or a trained model, in the formats of others.",
        {"destination": "DESTINATION"},
    ),
    "import": Command(
        ImportConfig,
        "repa_pipeline.commands_exchange:import_",
        "Make a cache of a reference set or exported tars, or a run of a checkpoint.",
        {"source": "SOURCE"},
    ),
    "train": Command(
        TrainConfig,
        "repa_pipeline.commands:train",
        "Train a diffusion transformer from the cache, with alignment or without.",
        {"name": "NAME"},
    ),
    "sample": Command(
        SampleConfig,
        "repa_pipeline.commands_sample:sample",
        "Make images from a run's EMA weights.",
    ),
    "evaluate": Command(
        EvaluateConfig,
        "repa_pipeline.commands_evaluate:evaluate",
        "Score samples: Fréchet distance, inception score, precision, recall.",
    ),
    "reference": Command(
        ReferenceConfig,
        "repa_pipeline.commands_evaluate:reference",
        "Make statistics to score against, from a source, a cache's source or ADM's npz.",
    ),
    "certify": Command(
        CertifyConfig,
        "repa_pipeline.commands_evaluate:certify",
        "Check evaluator, sampler and trainer against published numbers; exit 1 if one is off.",
    ),
    "grid": Command(
        GridConfig,
        "repa_pipeline.commands_pictures:grid",
        "Show samples of several checkpoints and guidances at the same seeds, side by side.",
    ),
    "sweep": Command(
        SweepConfig,
        "repa_pipeline.commands_pictures:sweep",
        "Score a checkpoint over guidance scales and intervals, and plot FID against IS.",
    ),
    "runs": Command(
        RunsConfig, "repa_pipeline.commands:runs", "List the training runs of the workspace."
    ),
    "report": Command(
        ReportConfig,
        "repa_pipeline.commands:report",
        "Make one self-contained page from the results in the workspace.",
    ),
}

COMMANDS: Mapping[str, type[CommonConfig]] = {
    name: command.config for name, command in COMMAND_TABLE.items()
}
