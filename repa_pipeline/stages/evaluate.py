"""`repa evaluate`: images -> features -> Fréchet distance, IS, precision and recall.

Definitions are the ADM suite's (guided-diffusion, evaluations/evaluator.py). The distance is called
FID only with the Inception network and a reference file; otherwise it is named for what it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import EvaluateConfig, IndexConfig
from repa_pipeline.data.index import read_index
from repa_pipeline.data.objects import LocalStore, json_bytes, open_store
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import ConfigError, MismatchError, MissingError
from repa_pipeline.registry import encoder_spec, load_plugins, network_spec
from repa_pipeline.training.runs import find_run, list_runs

if TYPE_CHECKING:
    import torch

    from repa_pipeline.metrics.networks import FeatureNetwork
    from repa_pipeline.metrics.statistics import RunningStatistics

Images = npt.NDArray[np.uint8]
_ENCODER = "encoder:"
_BLOCK_ROWS = 512


@dataclasses.dataclass
class FeatureSet:
    """Features of a set of images.

    pool, spatial: running statistics; rows: pool features float32 [n, D] kept for precision and
    recall; logits: float32 [N, K] in file order, or None.
    """

    pool: RunningStatistics
    spatial: RunningStatistics | None
    rows: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None


def evaluate(config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
    """Scores a set of samples; writes and returns the result.

    Raises MissingError for absent samples, weights or reference, MismatchError when sizes or
    networks do not fit, ConfigError when it would have to guess.
    """
    prepare_compute(config.threads)
    samples = find_samples(config)
    settings, resolution, count = _describe_samples(samples)
    output = Path(config.output) if config.output else _beside(samples)
    network = _load_network(config)
    blocks = _image_blocks(samples)
    ours = _extract(network, blocks, config, progress, "sample features", count, keep=count)
    reference, about = _reference(config, network, resolution, progress)
    result = {
        "kind": "Fréchet distance",
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
    return {**result, "path": str(output)}


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


def _extract(
    network: FeatureNetwork,
    blocks: Iterator[Images],
    config: EvaluateConfig,
    progress: Progress,
    title: str,
    total: int,
    keep: int,
) -> FeatureSet:
    """Runs the network over all images, keeping pool features of the first `keep`."""
    import torch

    from repa_pipeline.metrics.statistics import RunningStatistics

    pool, spatial = RunningStatistics(), RunningStatistics()
    rows: list[npt.NDArray[np.float32]] = []
    logits: list[npt.NDArray[np.float32]] = []
    kept = 0
    progress.start(title, total, 0, "images")
    try:
        for block in _rebatch(blocks, max(_BLOCK_ROWS, config.batch_size)):
            pixels = torch.from_numpy(block).permute(0, 3, 1, 2)
            found = [network.features(part) for part in torch.split(pixels, config.batch_size)]
            pools = _joined([features.pool for features in found])
            pool.update(pools)
            rows.append(pools[: max(0, keep - kept)])
            kept += len(rows[-1])
            spatials = [f.spatial for f in found if f.spatial is not None]
            if spatials:
                spatial.update(_joined(spatials))
            logits += [_joined([f.logits]) for f in found if f.logits is not None]
            progress.advance(len(block))
    finally:
        progress.finish()
    return FeatureSet(
        pool,
        spatial if spatial.n else None,
        np.concatenate(rows),
        np.concatenate(logits) if logits else None,
    )


def _joined(parts: list[torch.Tensor]) -> npt.NDArray[np.float32]:
    return np.concatenate([part.float().cpu().numpy() for part in parts])


def _rebatch(blocks: Iterator[Images], rows: int) -> Iterator[Images]:
    """Blocks of exactly `rows` images, the last one shorter; statistics want many rows a call."""
    waiting: list[Images] = []
    for block in blocks:
        waiting.append(block)
        while sum(map(len, waiting)) >= rows:
            joined = np.concatenate(waiting)
            yield joined[:rows]
            waiting = [joined[rows:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


@dataclasses.dataclass(frozen=True)
class Reference:
    """mu, sigma of pool and (where known) spatial features; rows float32 [n, D] for P/R."""

    mu: npt.NDArray[np.float64]
    sigma: npt.NDArray[np.float64]
    mu_s: npt.NDArray[np.float64] | None
    sigma_s: npt.NDArray[np.float64] | None
    rows: npt.NDArray[np.float32]


def _reference(
    config: EvaluateConfig, network: FeatureNetwork, resolution: int, progress: Progress
) -> tuple[Reference, dict[str, Any]]:
    if config.reference:
        return _reference_file(config, network, resolution, progress)
    store = open_store(config.workspace).child("cache")
    index = read_index(store)
    about = {
        "name": "the training source",
        "kind": "training source",
        "source": index.manifest["source"],
        "rows_digest": index.manifest["rows_digest"],
        "num_images": index.num_rows,
    }
    key = _reference_key(config, network, index.manifest, resolution)
    where = open_store(config.workspace).child("references")
    if where.size(key) is None:
        made = _from_source(config, network, index, resolution, progress)
        where.put(key, _pack(made))
    data = where.get(key)
    return _unpack(data), {**about, "sha256": hashlib.sha256(data).hexdigest()}


def _reference_key(
    config: EvaluateConfig, network: FeatureNetwork, manifest: Mapping[str, Any], resolution: int
) -> str:
    recipe = [network.name, network.weights_sha256, manifest["rows_digest"], manifest["decode"]]
    recipe += [resolution, config.reference_images]
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    return f"source.{network.name.replace(':', '-')}.{resolution}.{digest}.npz"


def _from_source(
    config: EvaluateConfig,
    network: FeatureNetwork,
    index: Any,
    resolution: int,
    progress: Progress,
) -> Reference:
    from repa_pipeline.config import EncodeConfig
    from repa_pipeline.stages.images import load_images
    from repa_pipeline.stages.index import open_config_source

    shared = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(IndexConfig)
        if hasattr(config, f.name)
    }
    images = EncodeConfig(**shared, **index.manifest["decode"], resolution=resolution)
    source = open_config_source(images)
    starts = range(0, index.num_rows, _BLOCK_ROWS)
    blocks = (load_images(source, index.entries[i : i + _BLOCK_ROWS], images)[0] for i in starts)
    found = _extract(
        network,
        blocks,
        config,
        progress,
        "reference features",
        index.num_rows,
        config.reference_images,
    )
    return _as_reference(found)


def _as_reference(found: FeatureSet) -> Reference:
    mu_s, sigma_s = found.spatial.finalize() if found.spatial else (None, None)
    return Reference(*found.pool.finalize(), mu_s, sigma_s, found.rows)


def _reference_file(
    config: EvaluateConfig, network: FeatureNetwork, resolution: int, progress: Progress
) -> tuple[Reference, dict[str, Any]]:
    from repa_pipeline.metrics.adm_file import adm_shape, read_adm, read_reference_statistics
    from repa_pipeline.weights import file_sha256

    path = Path(str(config.reference))
    statistics = read_reference_statistics(path)
    num_images, height, _, _ = adm_shape(path)
    if height != resolution:
        raise MismatchError(
            f"{path} holds images of {height} pixels, the samples have {resolution}: use the "
            "reference of the samples' resolution"
        )
    count = min(num_images, config.reference_images)
    blocks = _first(read_adm(path), count)
    found = _extract(network, blocks, config, progress, "reference features", count, keep=count)
    about = {
        "name": path.name,
        "kind": "file",
        "sha256": file_sha256(path),
        "num_images": num_images,
    }
    reference = Reference(
        statistics.mu, statistics.sigma, statistics.mu_s, statistics.sigma_s, found.rows
    )
    return reference, about


def _first(blocks: Iterator[Images], count: int) -> Iterator[Images]:
    for block in blocks:
        if count <= 0:
            return
        yield block[:count]
        count -= len(block)


def _metrics(
    config: EvaluateConfig, reference: Reference, ours: FeatureSet
) -> dict[str, float | None]:
    from repa_pipeline.metrics.frechet import FrechetReference
    from repa_pipeline.metrics.inception_score import inception_score
    from repa_pipeline.metrics.precision_recall import precision_recall

    whole = FrechetReference(reference.mu, reference.sigma)
    spatial = None
    if ours.spatial and reference.mu_s is not None and reference.sigma_s is not None:
        spatial = FrechetReference(reference.mu_s, reference.sigma_s)
        spatial_distance = spatial.distance(*ours.spatial.finalize()).distance
    mode: Any = config.pr_mode
    precision, recall = precision_recall(reference.rows, ours.rows, mode=mode)
    score = None if ours.logits is None else inception_score(ours.logits, config.is_split)
    return {
        "frechet_distance": whole.distance(*ours.pool.finalize()).distance,
        "spatial_frechet_distance": spatial_distance if spatial else None,
        "inception_score": score,
        "precision": precision,
        "recall": recall,
    }


def _pack(reference: Reference) -> bytes:
    arrays = {f.name: getattr(reference, f.name) for f in dataclasses.fields(reference)}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value for name, value in arrays.items() if value is not None})
    return buffer.getvalue()


def _unpack(data: bytes) -> Reference:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        return Reference(**{f.name: stored.get(f.name) for f in dataclasses.fields(Reference)})
