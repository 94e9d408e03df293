"""The samples that `repa evaluate` scores: in a folder of ours, an npz, or pictures in a source."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.data.array import ArraySpec
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.errors import ConfigError, DataError, MismatchError, MissingError
from repa_pipeline.metrics.adm_file import read_adm_settings
from repa_pipeline.stages.judge import (
    Judged,
    judge_name,
    of_samples,
    open_judged,
    standing_batch,
)
from repa_pipeline.stages.judge_images import (
    IMAGES,
    ImageSet,
    adm_images,
    sample_images,
    source_images,
)
from repa_pipeline.stages.judge_stage import JudgeStage, spec_of_images
from repa_pipeline.training.runs import find_run, list_runs

# Where features of pictures in a source go, in the workspace.
JUDGED = "judged"
# What `repa sample` leaves of the settings, and its tars of pictures.
SETTINGS, PICTURES = "settings.json", ("png", "jpeg")
KINDS = ("samples", *PICTURES)


@dataclasses.dataclass(frozen=True)
class ScoredSamples:
    """Samples to score.

    where: path or URL. spec: the array of their features, below `features`. stage: the pass that
    makes it, None where features alone were kept. result: where result.json goes. settings: how
    they were made, where it is known.
    """

    where: str
    features: str
    spec: ArraySpec
    stage: JudgeStage | None
    result: str
    settings: Mapping[str, Any] | None

    def judged(self) -> Judged:
        """The features, which must be finished."""
        return open_judged(open_store(self.features), self.spec.manifest["network"])


def open_scored_samples(config: EvaluateConfig, network: str) -> ScoredSamples:
    """The samples of `config`, in whichever form they are, to be scored by `network`.

    Reads manifests and headers, no pixels. Raises MissingError, ConfigError, DataError for
    samples (also for pictures class by class, whose inception score would be wrong), and as
    `judge_spec` for the network.
    """
    where = find_samples(config)
    if where.endswith(".npz"):
        return _of_npz(config, network, Path(where))
    if not _is_pattern(where):
        store, result = open_store(where), f"{where.rstrip('/')}/result.json"
        if _has(store, IMAGES):
            images = sample_images(_absolute(where))
            settings = _plain(images.spec.manifest)
            return _with_images(config, network, where, images, where, result, settings)
        if _has(store, judge_name(network)):
            spec = open_judged(store, network).array.spec
            return ScoredSamples(where, where, spec, None, result, _settings_of(spec, store))
        for pictures in PICTURES:
            if _has(store, pictures):
                return _of_pictures(config, network, f"{where.rstrip('/')}/{pictures}", result)
        _check_no_samples_of_ours(store, network)
    return _of_pictures(config, network, where, None)


def _of_npz(config: EvaluateConfig, network: str, path: Path) -> ScoredSamples:
    images = adm_images(path)
    with zipfile.ZipFile(path) as archive:
        if "mu.npy" in archive.namelist():
            raise DataError(
                f"{path} holds statistics (mu) beside its images: it is a reference, and the ADM "
                "suite would score those; give it as --reference, or a file of images alone"
            )
    features = path.with_suffix(".features") / images.sha256[:12]
    result = path.with_suffix(".result.json")
    settings = _read_settings(read_adm_settings(path))
    return _with_images(config, network, str(path), images, str(features), str(result), settings)


def _read_settings(text: str | None) -> Mapping[str, Any] | None:
    """The settings in a file that may be anybody's."""
    try:
        settings = json.loads(text or "")
    except ValueError:
        return None
    is_ours = isinstance(settings, dict) and settings.get("kind") in KINDS
    return settings if is_ours else None


def _of_pictures(
    config: EvaluateConfig, network: str, where: str, result: str | None
) -> ScoredSamples:
    """Pictures in a source; `result`: where result.json goes, else beside their features."""
    images = source_images(where, config.scratch, config.scratch_gb, config.decode_threads)
    settings = None if _is_pattern(where) else _kept_settings(open_store(where))
    features = open_store(config.workspace).child(JUDGED).child(images.listing[:12]).url
    result = result or f"{features}/result.json"
    samples = _with_images(config, network, where, images, features, result, settings)
    has_score = samples.spec.manifest["widths"]["logits"] and config.is_split < images.num_rows
    if images.by_class and has_score:
        raise DataError(
            f"the pictures of {where} stand class by class: the inception score of blocks in that "
            f"order would be wrong; give --is-split {images.num_rows} for one block of all, or put "
            "them into one folder in an order of their own"
        )
    return samples


def _with_images(
    config: EvaluateConfig,
    network: str,
    where: str,
    images: ImageSet,
    features: str,
    result: str,
    settings: Mapping[str, Any] | None,
) -> ScoredSamples:
    url = _absolute(config.features or features)
    spec = spec_of_images(config, network, images, standing_batch(open_store(url), network))
    stage = JudgeStage(config, config.network_weights, images, url, spec, "sample features")
    return ScoredSamples(where, url, spec, stage, result, settings)


def find_samples(config: EvaluateConfig) -> str:
    """Path or URL of the samples to score; refuses to guess between several."""
    if config.samples:
        is_elsewhere = "://" in config.samples or _is_pattern(config.samples)
        if not is_elsewhere and not Path(config.samples).exists():
            raise MissingError(f"no samples at {config.samples}: check --samples")
        return config.samples
    runs = [find_run(config, config.run)] if config.run else list_runs(config)
    seals = [seal for run in runs for seal in sorted(run.folder.glob("samples/*/*/seal.json"))]
    arrays = [seal.parent for seal in seals]
    known = [a for a in arrays if a.name in (IMAGES, *PICTURES) or a.name.startswith("judge.")]
    folders = list(dict.fromkeys(array.parent for array in known))
    if not folders:
        raise MissingError("no finished samples in the workspace: run `repa sample` first")
    if len(folders) > 1:
        listed = ", ".join(str(folder) for folder in folders)
        raise ConfigError(f"{len(folders)} sets of samples ({listed}): choose with --samples")
    return str(folders[0])


def _is_pattern(samples: str) -> bool:
    return any(sign in samples for sign in ("{", "*", "?", "[", "::"))


def _check_no_samples_of_ours(store: ObjectStore, network: str) -> None:
    """Raises MissingError for a sample folder without anything that can be scored."""
    names = store.list("")
    is_ours = SETTINGS in names or IMAGES in names
    if is_ours and not any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in names):
        raise MissingError(
            f"{store.url} holds no finished images, pictures or features of {network}: finish "
            f"`repa sample`, decode its latents, or sample with --score {network}"
        )


def _absolute(where: str) -> str:
    """Workers need not run in the driver's folder."""
    return where if "://" in where else str(Path(where).resolve())


def _has(store: ObjectStore, array: str) -> bool:
    return store.size(f"{array}/seal.json") is not None


def _settings_of(features: ArraySpec, store: ObjectStore) -> Mapping[str, Any] | None:
    """How the images were made that features alone are left of; raises MismatchError for settings
    of other images, whose score would pass for these."""
    settings = _kept_settings(store)
    if settings is None:
        return None
    side, shard_rows = features.manifest["resolution"], features.layout.shard_rows
    layout = RecordLayout((side, side, 3), "uint8", shard_rows)
    images = ArraySpec(IMAGES, features.num_rows, layout, settings)
    if of_samples(images) != features.manifest["of"]:
        raise MismatchError(
            f"{store.url}/{SETTINGS} is not what the features there were made with: put the right "
            "one back, or remove it for a score of samples of which nothing is known"
        )
    return settings


def _kept_settings(store: ObjectStore) -> Mapping[str, Any] | None:
    """The settings in a folder that may be anybody's."""
    if store.size(SETTINGS) is None:
        return None
    return _read_settings(store.get(SETTINGS).decode(errors="replace"))


def _plain(manifest: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dict(manifest)))
    return values
