"""`repa evaluate`: images -> features -> Fréchet distance, IS, precision, recall, KID.

Definitions are the ADM suite's (guided-diffusion, evaluations/evaluator.py). What a distance is
called: "FID" (and "sFID") with the published Inception-v3 against ADM's reference file; "FID to
NAME" with it against a reference of `repa reference`; "Fréchet distance to the training source"
without a reference; else "Fréchet distance". Features are kept: a rerun does the mathematics alone.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.data.array import fingerprint
from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes, open_store
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.engine.contracts import Executor
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import ConfigError
from repa_pipeline.metrics.networks import ENCODER_PREFIX, Widths, is_published
from repa_pipeline.metrics.published import comparison
from repa_pipeline.stages.judge_stage import run_judge
from repa_pipeline.stages.reference import find_reference, reference_identity, settle_network
from repa_pipeline.stages.reference_file import Reference
from repa_pipeline.stages.scored_samples import ScoredSamples, open_scored_samples
from repa_pipeline.stages.scores import (
    METRICS_IN_ORDER,
    NEIGHBOURS,
    Scores,
    check_counts,
    compute_scores,
)

# What decides a result besides features and reference.
_DECIDES = (
    *("reference_images", "pr_mode", "is_split", "kid_subsets", "kid_size", "kid_seed"),
    *("blocks", "allow_few"),
)
# What a result says of how its samples were made; None where their maker does not say it.
_PROTOCOL = (
    *("model", "step", "checkpoint_sha256", "labels", "sampler", "num_steps", "cfg", "interval"),
    *("decoder", "dtype", "tf32", "uint8", "seed"),
)


def evaluate(
    config: EvaluateConfig, progress: Progress, executor: Executor | None = None
) -> dict[str, Any]:
    """Scores a set of samples; writes and returns the result.

    Features are made by `executor` (this process without one), or found. A result that stands
    there for the same samples, network, reference and settings is returned as it is, with "new"
    False. Raises MissingError for absent samples, weights or reference, MismatchError when sizes
    or networks do not fit, DataError for too few samples, ConfigError when it would have to guess.
    """
    prepare_compute(config.threads)
    executor = executor or LocalExecutor(config.retries)
    samples = open_scored_samples(config, settle_network(config, config.reference))
    manifest = samples.spec.manifest
    check_counts(config, samples.spec.num_rows, Widths(**manifest["widths"]))
    recipe = {
        "features": samples.spec.fingerprint,
        "reference": reference_identity(config),
        **{name: getattr(config, name) for name in _DECIDES},
    }
    where = config.output or samples.result
    store, key = _parted(where)
    standing = {} if store.size(key) is None else get_json(store, key)
    if standing and "recipe" not in standing:
        raise ConfigError(f"{where} is no result of `repa evaluate`: give another --output")
    new = standing.get("recipe") != recipe
    result = standing
    if new:
        reference = find_reference(
            config,
            manifest["network"],
            manifest["weights_sha256"],
            manifest["resolution"],
            executor,
            progress,
        )
        judged = run_judge(samples.stage, executor, progress) if samples.stage else samples.judged()
        scores = compute_scores(config, judged, reference)
        result = {"recipe": recipe, **_result(config, samples, reference, scores)}
        if standing:
            store.put(_aside(key, standing), json_bytes(standing))
        store.put(key, json_bytes(result))
    # As the file has its names sorted, a result that was found would be told in another order.
    metrics = {name: result["metrics"][name] for name in METRICS_IN_ORDER}
    told = {**result, "metrics": metrics, "path": where, "new": new}
    return {**told, "compare": comparison(result)} if config.compare else told


def summary(result: Mapping[str, Any]) -> str:
    """The result in one line."""
    names, errors = result["names"], result["standard_errors"]
    shown = []
    for name, value in result["metrics"].items():
        if value is not None:
            error = f" ± {errors[name]['value']:.2g}" if name in errors else ""
            shown.append(f"{names.get(name, name)} {value:.4g}{error}")
    unknown = "" if result["sample_settings"] else "; how the samples were made is not known"
    return (
        f"{', '.join(shown)} ({result['num_samples']:,} samples, network "
        f"{result['network']['name']}, against {result['reference']['name']}{unknown})"
    )


def _result(
    config: EvaluateConfig, samples: ScoredSamples, reference: Reference, scores: Scores
) -> dict[str, Any]:
    manifest, settings = samples.spec.manifest, samples.settings
    name, digest = manifest["network"], manifest["weights_sha256"]
    network = {"name": name, "weights_sha256": digest, "published": is_published(name, digest)}
    kind, names = name_distances(network, reference.about)
    return {
        "kind": kind,
        "names": names,
        "metrics": scores.metrics,
        "standard_errors": scores.standard_errors,
        "clipped_eigenvalues": scores.clipped,
        "kid": scores.kid,
        "num_samples": samples.spec.num_rows,
        "samples": samples.where,
        "sample_settings": settings,
        "protocol": {key: (settings or {}).get(key) for key in _PROTOCOL},
        "network": network,
        "reference": dict(reference.about),
        "precision_recall": {
            "mode": config.pr_mode,
            "k": NEIGHBOURS,
            "reference": len(reference.rows),
        },
        "inception_score_block": config.is_split,
        "resolution": manifest["resolution"],
        "device": choose_device(config.device),
        "tf32": False,
        "versions": _versions(name),
    }


def name_distances(
    network: Mapping[str, Any], reference: Mapping[str, Any]
) -> tuple[str, dict[str, str]]:
    """What the distance is called, and names of metrics that have a name of the field."""
    inception = network["name"] == "inception-v3" and network["published"]
    kind, to = reference["kind"], f"to {reference['name']}"
    if kind == "training source":
        return "Fréchet distance to the training source", {}
    if inception and kind == "adm":
        return "FID", {"frechet_distance": "FID", "spatial_frechet_distance": "sFID"}
    if inception:
        names = {"frechet_distance": f"FID {to}", "spatial_frechet_distance": f"sFID {to}"}
        return f"FID {to}", names
    if network["name"] == "fd-dinov2" and kind == "own":
        return f"FD-DINOv2 {to}", {"frechet_distance": f"FD-DINOv2 {to}"}
    return "Fréchet distance", {}


def _versions(network: str) -> dict[str, str]:
    names = ["repa-pipeline", "torch", "numpy"]
    names += ["torch-fidelity"] if network == "inception-v3" else []
    names += ["timm", "pillow"] if network == "fd-dinov2" else []
    names += ["timm"] if network.startswith(ENCODER_PREFIX) else []
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def _parted(where: str) -> tuple[ObjectStore, str]:
    """The store that an object's path or URL is in, and its key there."""
    folder, _, name = where.rpartition("/")
    return open_store(folder or "."), name


def _aside(key: str, standing: Mapping[str, Any]) -> str:
    """Where a result of other settings goes: one network's score does not replace another's."""
    network = str(standing["network"]["name"]).replace(":", "-")
    digest = fingerprint(standing.get("recipe", {}))[:8]
    return f"{key.removesuffix('.json')}.{network}.{digest}.json"
