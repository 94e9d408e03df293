"""`repa evaluate`: images -> features -> Fréchet distance, IS, precision and recall.

Definitions are the ADM suite's (guided-diffusion, evaluations/evaluator.py). The distance is called
FID only with the Inception network and a reference file; otherwise it is named for what it is.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.data.index import read_manifest
from repa_pipeline.data.objects import LocalStore, get_json, json_bytes, open_store
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import ConfigError, MismatchError, MissingError
from repa_pipeline.registry import encoder_spec, load_plugins, network_spec
from repa_pipeline.stages.reference import FeatureSet, Reference, extract_features, find_reference
from repa_pipeline.training.runs import find_run, list_runs
from repa_pipeline.weights import file_sha256

if TYPE_CHECKING:
    from repa_pipeline.metrics.networks import FeatureNetwork

Images = npt.NDArray[np.uint8]
_ENCODER = "encoder:"
_BLOCK_ROWS = 512


def evaluate(config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
    """Scores a set of samples; writes and returns the result.

    A result that stands there for the same samples, network, reference and settings is returned
    as it is, with "new" False. Raises MissingError for absent samples, weights or reference,
    MismatchError when sizes or networks do not fit, ConfigError when it would have to guess.
    """
    prepare_compute(config.threads)
    samples = find_samples(config)
    settings, resolution, count = _describe_samples(samples)
    output = Path(config.output) if config.output else _beside(samples)
    network = _load_network(config)
    recipe = _recipe(config, samples, network)
    standing = _standing(output)
    if standing.get("recipe") == recipe:
        return {**standing, "path": str(output), "new": False}
    blocks = _image_blocks(samples)
    reference, about = find_reference(config, network, resolution, progress)
    ours = extract_features(network, blocks, config, progress, "sample features", count, keep=count)
    result = {
        "kind": "Fréchet distance",
        "recipe": recipe,
        "metrics": _metrics(config, reference, ours),
        "num_samples": count,
        "samples": str(samples),
        "sample_settings": settings,
        "network": {"name": network.name, "weights_sha256": network.weights_sha256},
        "reference": about,
        "precision_recall": {"mode": config.pr_mode, "k": 3, "reference": len(reference.rows)},
        "inception_score_block": config.is_split,
        "device": choose_device(config.device),
        "tf32": False,
        "versions": {name: version(name) for name in ("repa-pipeline", "torch", "numpy")}
        | {"python": platform.python_version()},
    }
    LocalStore(str(output.parent)).put(output.name, json_bytes(result))
    return {**result, "path": str(output), "new": True}


def _recipe(config: EvaluateConfig, samples: Path, network: FeatureNetwork) -> dict[str, Any]:
    """What decides a result, as digests and settings."""
    if samples.is_dir():
        from repa_pipeline.stages.sample import open_samples

        images = open_samples(str(samples)).spec.fingerprint
    else:
        images = file_sha256(samples)
    if config.reference:
        reference: Any = _reference_digest(Path(config.reference))
    else:
        manifest = read_manifest(open_store(config.workspace).child("cache"))
        reference = [manifest["rows_digest"], manifest["decode"]]
    return {
        "samples": images,
        "network": [network.name, network.weights_sha256],
        "reference": reference,
        "reference_images": config.reference_images,
        "pr_mode": config.pr_mode,
        "is_split": config.is_split,
    }


def _reference_digest(path: Path) -> str:
    if not path.is_file():
        raise MissingError(f"no reference file {path}: check --reference")
    return file_sha256(path)


def _standing(output: Path) -> dict[str, Any]:
    store = LocalStore(str(output.parent))
    return {} if store.size(output.name) is None else get_json(store, output.name)


def summary(result: Mapping[str, Any]) -> str:
    """The result in one line."""
    metrics = result["metrics"]
    shown = [f"{name} {value:.4g}" for name, value in metrics.items() if value is not None]
    return (
        f"{', '.join(shown)} ({result['num_samples']:,} samples, network "
        f"{result['network']['name']}, against {result['reference']['name']})"
    )


def find_samples(config: EvaluateConfig) -> Path:
    """The samples to score; refuses to guess between several."""
    if config.samples:
        path = Path(config.samples)
        if not path.exists():
            raise MissingError(f"no samples at {path}: check --samples")
        return path
    runs = [find_run(config, config.run)] if config.run else list_runs(config)
    seals = [seal for run in runs for seal in sorted(run.folder.glob("samples/*/images/seal.json"))]
    folders = [seal.parent.parent for seal in seals]
    if not folders:
        raise MissingError("no finished samples in the workspace: run `repa sample` first")
    if len(folders) > 1:
        listed = ", ".join(str(folder) for folder in folders)
        raise ConfigError(f"{len(folders)} sets of samples ({listed}): choose with --samples")
    return folders[0]


def _describe_samples(path: Path) -> tuple[Mapping[str, Any] | None, int, int]:
    """(settings, resolution, number of images) of a sample folder or an npz."""
    if path.is_dir():
        from repa_pipeline.stages.sample import open_samples

        spec = open_samples(str(path)).spec
        return spec.manifest, spec.layout.shape[0], spec.num_rows
    from repa_pipeline.metrics.adm_file import adm_shape

    num_images, height, width, _ = adm_shape(path)
    if height != width:
        raise MismatchError(f"images of {path} are {height}x{width}: expected square ones")
    return None, height, num_images


def _image_blocks(path: Path) -> Iterator[Images]:
    if path.is_dir():
        from repa_pipeline.stages.sample import open_samples, sample_blocks

        yield from sample_blocks(open_samples(str(path)))
        return
    from repa_pipeline.metrics.adm_file import read_adm

    yield from read_adm(path)


def _beside(samples: Path) -> Path:
    if samples.is_dir():
        return samples / "result.json"
    return samples.with_suffix(".result.json")


def _load_network(config: EvaluateConfig) -> FeatureNetwork:
    from repa_pipeline.encoders import ENCODERS, EncoderSpec
    from repa_pipeline.metrics.networks import NETWORKS, NetworkSpec, load_network

    load_plugins(config.plugins)
    name = config.network
    spec: EncoderSpec | NetworkSpec
    if name.startswith(_ENCODER):
        spec = encoder_spec(config, name.removeprefix(_ENCODER))
        entry: EncoderSpec | NetworkSpec = ENCODERS[name.removeprefix(_ENCODER)]
    else:
        spec, entry = network_spec(config, name), NETWORKS[name]
    if dataclasses.replace(entry, weights=spec.weights) != spec:
        raise ConfigError(
            f"repa.toml changes more of '{name}' than its weights, and scores by it would pass "
            "for those of the table's entry: give it a name of its own in a plugin"
        )
    weights = config.network_weights or spec.weights
    return load_network(name, weights=weights, device=choose_device(config.device))


def _metrics(
    config: EvaluateConfig, reference: Reference, ours: FeatureSet
) -> dict[str, float | None]:
    from repa_pipeline.metrics.frechet import FrechetReference
    from repa_pipeline.metrics.inception_score import inception_score
    from repa_pipeline.metrics.precision_recall import precision_recall

    whole = FrechetReference(reference.mu, reference.sigma)
    distance = whole.distance(*ours.pool.finalize()).distance
    spatial = None
    if ours.spatial and reference.mu_s is not None and reference.sigma_s is not None:
        spatial = FrechetReference(reference.mu_s, reference.sigma_s)
        spatial_distance = spatial.distance(*ours.spatial.finalize()).distance
    mode: Any = config.pr_mode
    precision, recall = precision_recall(reference.rows, ours.rows, mode=mode)
    score = None if ours.logits is None else inception_score(ours.logits, config.is_split)
    return {
        "frechet_distance": distance,
        "spatial_frechet_distance": spatial_distance if spatial else None,
        "inception_score": score,
        "precision": precision,
        "recall": recall,
    }
