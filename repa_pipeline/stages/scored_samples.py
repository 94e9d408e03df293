"""The samples that `repa evaluate` scores: in a folder of ours, an npz, or pictures in a source."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.data.array import ArraySpec
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.errors import ConfigError, MissingError
from repa_pipeline.stages.judge import Judged, judge_name, judge_spec, open_judged, standing_batch
from repa_pipeline.stages.judge_images import (
    IMAGES,
    ImageSet,
    adm_images,
    sample_images,
    source_images,
)
from repa_pipeline.stages.judge_stage import JudgeStage
from repa_pipeline.training.runs import find_run, list_runs

# Where features of pictures in a source go, in the workspace.
JUDGED = "judged"


@dataclasses.dataclass(frozen=True)
class ScoredSamples:
    """Samples to score.

    spec: the array of their features, below `features`. stage: the pass that makes it, None where
    features alone were kept. result: where result.json goes. settings: how they were made, where
    it is known.
    """

    path: Path
    features: str
    spec: ArraySpec
    stage: JudgeStage | None
    result: Path
    settings: Mapping[str, Any] | None

    def judged(self) -> Judged:
        """The features, which must be finished."""
        return open_judged(open_store(self.features), self.spec.manifest["network"])


def open_scored_samples(config: EvaluateConfig, network: str) -> ScoredSamples:
    """The samples of `config`, in whichever form they are, to be scored by `network`.

    Reads manifests and headers, no pixels. Raises MissingError, ConfigError, DataError for
    samples, and as `judge_spec` for the network.
    """
    path = find_samples(config)
    if path.suffix == ".npz":
        npz = adm_images(path)
        features = path.with_suffix(".features") / npz.sha256[:12]
        result = path.with_suffix(".result.json")
        return _with_images(config, network, path, npz, str(features), result, None)
    store, result = open_store(str(path)), path / "result.json"
    if _has(store, IMAGES):
        images = sample_images(str(path.resolve()))
        settings = _plain(images.spec.manifest)
        return _with_images(config, network, path, images, str(path.resolve()), result, settings)
    if _has(store, judge_name(network)):
        spec = open_judged(store, network).array.spec
        settings = _plain(spec.manifest["of"]["settings"])
        return ScoredSamples(path, str(path), spec, None, result, settings)
    pictures = source_images(
        str(config.samples or path), config.scratch, config.scratch_gb, config.decode_threads
    )
    features = Path(open_store(config.workspace).child(JUDGED).child(pictures.listing[:12]).url)
    result = features / "result.json"
    return _with_images(config, network, path, pictures, str(features), result, None)


def _with_images(
    config: EvaluateConfig,
    network: str,
    path: Path,
    images: ImageSet,
    features: str,
    result: Path,
    settings: Mapping[str, Any] | None,
) -> ScoredSamples:
    url = config.features or features
    spec = judge_spec(
        config,
        network,
        config.network_weights,
        resolution=images.resolution,
        num_rows=images.num_rows,
        shard_rows=images.shard_rows,
        of=images.of,
        forward_images=config.batch_size or standing_batch(open_store(url), network),
        any_weights=config.any_weights,
    )
    stage = JudgeStage(config, config.network_weights, images, url, spec, "sample features")
    return ScoredSamples(path, url, spec, stage, result, settings)


def find_samples(config: EvaluateConfig) -> Path:
    """The samples to score; refuses to guess between several."""
    if config.samples:
        path = Path(config.samples)
        if not path.exists() and not _is_pattern(config.samples):
            raise MissingError(f"no samples at {path}: check --samples")
        return path
    runs = [find_run(config, config.run)] if config.run else list_runs(config)
    seals = [seal for run in runs for seal in sorted(run.folder.glob("samples/*/*/seal.json"))]
    arrays = [seal.parent for seal in seals]
    scorable = [a for a in arrays if a.name == IMAGES or a.name.startswith("judge.")]
    folders = list(dict.fromkeys(array.parent for array in scorable))
    if not folders:
        raise MissingError("no finished samples in the workspace: run `repa sample` first")
    if len(folders) > 1:
        listed = ", ".join(str(folder) for folder in folders)
        raise ConfigError(f"{len(folders)} sets of samples ({listed}): choose with --samples")
    return folders[0]


def _is_pattern(samples: str) -> bool:
    return any(sign in samples for sign in ("{", "*", "?", "[", "::", "://"))


def _has(store: ObjectStore, array: str) -> bool:
    return store.size(f"{array}/seal.json") is not None


def _plain(manifest: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dict(manifest)))
    return values
