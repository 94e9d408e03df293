"""Features of image sets, and the reference that samples are compared with.

The reference is an ADM-style npz, or the training source, whose statistics are made once and kept
in WORKSPACE/references.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import EncodeConfig, IndexConfig
from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.data.index import Index, read_index
from repa_pipeline.data.objects import open_store
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import MismatchError
from repa_pipeline.weights import file_sha256

if TYPE_CHECKING:
    import torch

    from repa_pipeline.metrics.networks import FeatureNetwork
    from repa_pipeline.metrics.statistics import RunningStatistics

Images = npt.NDArray[np.uint8]
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


def extract_features(
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


def find_reference(
    config: EvaluateConfig, network: FeatureNetwork, resolution: int, progress: Progress
) -> tuple[Reference, dict[str, Any]]:
    """The reference of `config` and what a result says of it.

    Raises MissingError without the file or the index, MismatchError for another resolution.
    """
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
    index: Index,
    resolution: int,
    progress: Progress,
) -> Reference:
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
    stops = (min(start + _BLOCK_ROWS, index.num_rows) for start in starts)
    blocks = (
        load_images(source, index.rows(start, stop), images)[0]
        for start, stop in zip(starts, stops, strict=True)
    )
    found = extract_features(
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
    found = extract_features(
        network, blocks, config, progress, "reference features", count, keep=count
    )
    if found.rows.shape[1] != len(statistics.mu):
        raise MismatchError(
            f"{path} has statistics of width {len(statistics.mu)}, network {network.name} gives "
            f"{found.rows.shape[1]}: use the network that the reference was made with"
        )
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


def _pack(reference: Reference) -> bytes:
    arrays = {f.name: getattr(reference, f.name) for f in dataclasses.fields(reference)}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value for name, value in arrays.items() if value is not None})
    return buffer.getvalue()


def _unpack(data: bytes) -> Reference:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        return Reference(**{f.name: stored.get(f.name) for f in dataclasses.fields(Reference)})
