"""`repa reference`, and the reference that samples are compared with.

It is ADM's npz (the features of its images are made once and kept in the workspace), one of ours
(reference_file.py), or without one the statistics of the training source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repa_pipeline.config import EncodeConfig, IndexConfig
from repa_pipeline.config_evaluate import AUTO, EvaluateConfig, ReferenceConfig, ScoreConfig
from repa_pipeline.data.index import Index, read_index, read_manifest
from repa_pipeline.data.objects import LocalStore, ObjectStore, open_store
from repa_pipeline.engine.contracts import Executor, split_rows
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import MismatchError, MissingError, RepaError
from repa_pipeline.metrics.adm_file import adm_shape, read_reference_statistics
from repa_pipeline.metrics.adm_reference import write_adm_reference
from repa_pipeline.metrics.networks import is_published
from repa_pipeline.metrics.statistics import RunningStatistics
from repa_pipeline.stages.cached_rows import source_of
from repa_pipeline.stages.index import cache_store, ensure_index, open_config_source
from repa_pipeline.stages.judge import FORWARD_IMAGES, Judged, judge_spec
from repa_pipeline.stages.judge_images import Images, ImageSet, adm_images, indexed_images
from repa_pipeline.stages.judge_stage import JudgeStage, run_judge, spec_of_images
from repa_pipeline.stages.reference_file import (
    Reference,
    about_of,
    check_adm,
    check_fits,
    is_own,
    pack_reference,
    read_reference,
    unpack_reference,
)
from repa_pipeline.weights import file_sha256

FOLDER = "references"
DEFAULT_NETWORK = "encoder:dinov2-b"
ADM_NETWORK = "inception-v3"
# Rows of one update of the statistics: fewer cost more, and the number decides the last bits.
STATISTICS_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class MadeReference:
    """A finished reference, the images it is of, and whether it was made now."""

    path: Path
    reference: Reference
    images: ImageSet
    new: bool


def settle_network(config: ScoreConfig, reference: str | None) -> str:
    """The network of a score: the one asked for, else the reference's."""
    if config.network != AUTO:
        return config.network
    if reference is None:
        return DEFAULT_NETWORK
    about = about_of(Path(reference))
    return str(about["network"]["name"]) if about else ADM_NETWORK


def reference_identity(config: EvaluateConfig) -> Any:
    """What decides the reference, without making it; raises MissingError."""
    if config.reference:
        is_own(Path(config.reference))
        return file_sha256(config.reference)
    manifest = read_manifest(open_store(config.workspace).child("cache"))
    return [manifest["rows_digest"], manifest["decode"]]


def find_reference(
    config: EvaluateConfig,
    network: str,
    weights_sha256: str,
    resolution: int,
    executor: Executor,
    progress: Progress,
) -> Reference:
    """The reference of `config` for images of `resolution` pixels.

    Raises MissingError without the file or the index, MismatchError for one of another resolution,
    network or weights, DamagedError.
    """
    if not config.reference:
        return _of_training_source(config, network, resolution, executor, progress)
    path = Path(config.reference)
    if not is_own(path):
        return _of_adm(config, path, network, resolution, executor, progress)
    reference = read_reference(path)
    check_fits(path, reference.about, network, weights_sha256, resolution)
    return reference


def check_reference(config: EvaluateConfig, manifest: Mapping[str, Any]) -> None:
    """Raises what `find_reference` would, for features of this manifest, where the reference is
    absent or does not fit; makes nothing and runs no network."""
    network, resolution = manifest["network"], manifest["resolution"]
    if not config.reference:
        read_index(cache_store(_index_config(config)))
        return
    path = Path(config.reference)
    if is_own(path):
        about = read_reference(path).about
        check_fits(path, about, network, manifest["weights_sha256"], resolution)
        return
    statistics, (_, height, *_) = read_reference_statistics(path), adm_shape(path)
    check_adm(path, statistics, height, manifest)


def check_reference_inputs(config: ReferenceConfig) -> None:
    """Raises for an absent source or file, or weights; makes nothing and runs no network."""
    network = settle_network(config, config.adm)
    resolution = config.resolution
    if config.adm:
        read_reference_statistics(config.adm)
        resolution = adm_shape(config.adm)[1]
    else:
        open_config_source(_index_config(config))
    judge_spec(
        config,
        network,
        config.network_weights,
        resolution=resolution,
        num_rows=1,
        shard_rows=1,
        of={},
        any_weights=config.any_weights,
    )


def make_reference(
    config: ReferenceConfig, executor: Executor, progress: Progress
) -> MadeReference:
    """Makes the reference of `config` where it does not stand yet.

    Raises as the index stage and the judge stage do, MismatchError when another one stands there.
    """
    network = settle_network(config, config.adm)
    if config.adm:
        given = Path(config.adm)
        images: ImageSet = adm_images(given, config.reference_images)
        name = config.name or given.stem
    else:
        settled, index = _index_for(config, executor, progress)
        images = indexed_images(settled, index)
        name = config.name or config.source.rstrip("/").rpartition("/")[2]
    stage = _stage(config, network, images, name)
    path = _output(config, name, network, images.resolution)
    new = not path.exists()
    if new:
        store = LocalStore(str(path.parent))
        if config.adm:
            made = _of_adm(config, given, network, images.resolution, executor, progress)
            made = dataclasses.replace(made, about={**made.about, "name": name})
            store.put_new(path.name, pack_reference(made))
        else:
            about = {"name": name, "kind": "own", **_source_of(index)}
            with _unless_made_meanwhile(store, path.name):
                made = _reduced(config, stage, about, executor, progress)
                store.put_new(path.name, pack_reference(made))
    found = read_reference(path)
    if found.about["features"] != stage.spec.fingerprint:
        raise MismatchError(
            f"{path} is a reference of other images or settings ({found.about['name']}, "
            f"{found.about['num_images']:,} images): give another --name or --output"
        )
    kept, wanted = len(found.rows), min(config.reference_images, images.num_rows)
    if kept != wanted:
        raise MismatchError(
            f"{path} keeps {kept:,} images for precision, recall and KID, expected {wanted:,}: set "
            f"--reference-images {kept}, or give another --name or --output"
        )
    if not config.adm:
        _remove(open_store(stage.url))
    return MadeReference(path, found, images, new)


def write_adm_layout(config: ReferenceConfig, made: MadeReference) -> Path:
    """Writes statistics and the first images in ADM's layout, for the tools of others."""
    target, images = Path(str(config.adm_npz)), made.images
    count = min(config.reference_images, images.num_rows)
    shape = (count, images.resolution, images.resolution, 3)
    statistics = {key: value for key, value in made.reference.arrays.items() if key != "rows"}
    write_adm_reference(target, _blocks(images, count), shape, statistics)
    return target


def statistics_of(judged: Judged, part: str) -> RunningStatistics:
    """Statistics of one part of the features, in index order."""
    found = RunningStatistics()
    for rows in judged.parts(part, STATISTICS_ROWS):
        found.update(rows)
    return found


def _blocks(images: ImageSet, count: int) -> Iterator[Images]:
    read = images.open()
    for shard in split_rows(images.num_rows, images.shard_rows):
        if shard.start >= count:
            return
        yield read(shard)[: count - shard.start]


def _of_training_source(
    config: EvaluateConfig,
    network: str,
    resolution: int,
    executor: Executor,
    progress: Progress,
) -> Reference:
    index = read_index(cache_store(_index_config(config)))
    settled = _encode_config(config, resolution)
    settled = dataclasses.replace(settled, source=source_of(config, index))
    stage = _stage(config, network, indexed_images(settled, index), "source")
    recipe = [stage.spec.fingerprint, config.reference_images]
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    key = f"source.{network.replace(':', '-')}.{resolution}.{digest}.npz"
    where = open_store(config.workspace).child(FOLDER)
    if where.size(key) is None:
        about = {"name": "the training source", "kind": "training source", **_source_of(index)}
        with _unless_made_meanwhile(where, key):
            where.put(key, pack_reference(_reduced(config, stage, about, executor, progress)))
    _remove(open_store(stage.url))  # also what one that was killed here left behind
    return unpack_reference(where.get(key), f"{where.url}/{key}")


def _of_adm(
    config: ScoreConfig,
    path: Path,
    network: str,
    resolution: int,
    executor: Executor,
    progress: Progress,
) -> Reference:
    """ADM's own statistics with the features of its images, which are kept in the workspace."""
    statistics = read_reference_statistics(path)
    images = adm_images(path, config.reference_images)
    stage = _stage(config, network, images, "adm")
    fits = {**stage.spec.manifest, "resolution": resolution}
    check_adm(path, statistics, images.resolution, fits)
    judged = run_judge(stage, executor, progress)
    about = {
        "name": path.name,
        "kind": "adm",
        "file": path.name,
        "sha256": images.sha256,
        "adm_file": path.name,
        "adm_sha256": images.sha256,
        "num_images": adm_shape(path)[0],
        **_made_with(stage),
    }
    return Reference(
        statistics.mu,
        statistics.sigma,
        statistics.mu_s,
        statistics.sigma_s,
        judged.first_pool(config.reference_images),
        about,
    )


def _reduced(
    config: ScoreConfig,
    stage: JudgeStage,
    about: Mapping[str, Any],
    executor: Executor,
    progress: Progress,
) -> Reference:
    """Features of all images, brought down to statistics and the first rows."""
    judged = run_judge(stage, executor, progress)
    mu, sigma = statistics_of(judged, "pool").finalize()
    mu_s, sigma_s = None, None
    if judged.widths.spatial:
        mu_s, sigma_s = statistics_of(judged, "spatial").finalize()
    rows = judged.first_pool(config.reference_images)
    told = {**about, "num_images": judged.num_rows, **_made_with(stage)}
    return Reference(mu, sigma, mu_s, sigma_s, rows, told)


def _stage(config: ScoreConfig, network: str, images: ImageSet, name: str) -> JudgeStage:
    """The pass over reference images, in a folder of the workspace that its recipe names."""
    spec = spec_of_images(config, network, images, FORWARD_IMAGES)
    folder = f"{name}.{spec.fingerprint[:12]}.features"
    url = open_store(config.workspace).child(FOLDER).child(folder).url
    return JudgeStage(config, config.network_weights, images, url, spec, "reference features")


def _made_with(stage: JudgeStage) -> dict[str, Any]:
    manifest = stage.spec.manifest
    name, digest = manifest["network"], manifest["weights_sha256"]
    published = is_published(name, digest)
    return {
        "resolution": manifest["resolution"],
        "network": {"name": name, "weights_sha256": digest, "published": published},
        "features": stage.spec.fingerprint,
    }


@contextlib.contextmanager
def _unless_made_meanwhile(store: ObjectStore, key: str) -> Iterator[None]:
    """Lets an error pass where another driver, which shares the features, was faster: it removes
    them when its reference stands."""
    try:
        yield
    except (RepaError, OSError):
        if store.size(key) is None:
            raise


def _source_of(index: Index) -> dict[str, Any]:
    manifest = index.manifest
    return {key: manifest[key] for key in ("source", "rows_digest", "decode")}


def _index_for(
    config: ReferenceConfig, executor: Executor, progress: Progress
) -> tuple[EncodeConfig, Index]:
    """The rows of the source: those of the workspace's cache where it is of this source, else an
    index of the reference's own."""
    settled = _encode_config(config, config.resolution)
    store = cache_store(settled)
    cached = store.size("manifest.json") is not None
    if cached and read_manifest(store)["source"] == config.source:
        return settled, read_index(store)
    digest = hashlib.sha256(config.source.encode()).hexdigest()[:12]
    own = open_store(config.workspace).child(FOLDER).child(f"index.{digest}").url
    settled = dataclasses.replace(settled, workspace=own)
    return settled, ensure_index(settled, executor, progress)


def _encode_config(config: ScoreConfig, resolution: int) -> EncodeConfig:
    index = _index_config(config)
    shared = {f.name: getattr(index, f.name) for f in dataclasses.fields(IndexConfig)}
    return EncodeConfig(**shared, resolution=resolution)


def _index_config(config: ScoreConfig) -> IndexConfig:
    names = {f.name for f in dataclasses.fields(IndexConfig)}
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return IndexConfig(**{name: value for name, value in known.items() if name in names})


def _output(config: ReferenceConfig, name: str, network: str, resolution: int) -> Path:
    if config.output:
        return Path(config.output)
    store = open_store(config.workspace).child(FOLDER)
    if not isinstance(store, LocalStore):
        raise MissingError(f"{config.workspace} is no folder: give the file with --output")
    return store.root / f"{name}.{network.replace(':', '-')}.{resolution}.npz"


def _remove(store: ObjectStore) -> None:
    """Deletes features that a reference was reduced from."""
    for key in list(store.keys()):
        store.delete(key)
    if isinstance(store, LocalStore):
        shutil.rmtree(store.root, ignore_errors=True)
