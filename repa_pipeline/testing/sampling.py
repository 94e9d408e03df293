"""A workspace to sample from: toy runs with a tiny decoder, made in a few seconds.

with isolated_tables(folder):
    write_toy_runs(folder)
    make_samples(toy_sample_config(folder, num_steps=3))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.engine.contracts import Executor
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import run_stage
from repa_pipeline.observe import Silent
from repa_pipeline.stages.sample import SampleStage, finish_samples, sample_ledgers
from repa_pipeline.stages.sample_plan import sample_stage
from repa_pipeline.testing.caches import toy_train_config, write_toy_cache
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights

TOY_PLUGIN = """
from repa_pipeline.testing.parts import tiny_autoencoder

AUTOENCODERS = [
    tiny_autoencoder(weights={weights!r}),
    tiny_autoencoder("tiny-other", weights={other!r}),
]
"""
PLUGIN_NAME = "toy_decoders"


def write_toy_runs(folder: Path, **runs: dict[str, Any]) -> None:
    """A toy cache, a plugin with its decoder, and a run for each name, of the settings given
    (without any: one run `toy`). Inside `isolated_tables(folder)`."""
    from repa_pipeline.stages.train import plan_training, train

    write_toy_cache(folder)
    weights, other = str(folder / "tiny.safetensors"), str(folder / "other.safetensors")
    write_weights(tiny_autoencoder(weights=weights))
    write_weights(tiny_autoencoder(weights=other), seed=1)
    (folder / f"{PLUGIN_NAME}.py").write_text(TOY_PLUGIN.format(weights=weights, other=other))
    common: dict[str, Any] = {"plugins": (PLUGIN_NAME,), "steps": 12, "learning_rate": 1e-2}
    for name, changes in (runs or {"toy": {}}).items():
        train(plan_training(toy_train_config(folder, name=name, **{**common, **changes})), Silent())


def toy_sample_config(workspace: Path, **changes: Any) -> SampleConfig:
    """Settings of ten samples of four steps, in shards of five."""
    settings: dict[str, Any] = {
        "workspace": str(workspace),
        "device": "cpu",
        "threads": 1,
        "num_images": 10,
        "num_steps": 4,
        "cfg": 2.0,
        "interval": (0.0, 0.7),
        "batch_size": 4,
        "shard_rows": 5,
        "grid": 0,
    }
    return SampleConfig(**{**settings, **changes})


def make_samples(config: SampleConfig, executor: Executor | None = None) -> SampleStage:
    """Runs the stage of `config` to its end, as `repa sample` does."""
    stage = sample_stage(config)
    run_stage(stage, executor or LocalExecutor(), sample_ledgers(stage), Silent())
    finish_samples(stage)
    return stage
