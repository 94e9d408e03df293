"""Self-test of image preparation and metrics against npz vector files.

Three formats, recognised by their keys: preprocessing (crops, encoder inputs, position embeddings),
ADM metrics, and TensorFlow 1's resize. All run on the CPU in their own precision, whatever the
self-test's device and dtype: these are the paths whose last bits matter.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from repa_pipeline.stages.selftest_report import Comparison, Group

Arrays = Mapping[str, np.ndarray[Any, Any]]

ENCODER_STRIDE = 5
RESIZE_STRIDE = 9
RESIZE_SIZE = 299

# name of the arithmetic in the vectors -> mode of precision_recall
PRECISION_MODES: Mapping[str, str] = {
    "adm_fp16": "adm_fp16",
    "fp64": "float64",
    "fp32": "float32",
}

_ENCODER = r"pre_(?!in$)(.+?)(?<!_shape)"
_MANIFOLD = r"expect_(precision|recall)_(.+)"
_SPLIT = r"expect_is_split_(\d+)"


def array_groups(arrays: Arrays) -> list[Group]:
    """The groups whose arrays are all there; none when the file is of no known format."""
    return [*_preprocess_groups(arrays), *_metric_groups(arrays), *_resize_groups(arrays)]


def unknown_arrays(arrays: Arrays) -> list[str]:
    """Expected outputs that name an encoder, metric or arithmetic that is not known here."""
    from repa_pipeline.encoders.rules import PREPROCESS

    encoders = [name for name, key in _matches(arrays, _ENCODER) if key[1] not in PREPROCESS]
    manifolds = {f"expect_{m}_{mode}" for m in ("precision", "recall") for mode in PRECISION_MODES}
    known = {
        "expect_fid",
        "expect_sfid",
        *manifolds,
        *(name for name, _ in _matches(arrays, _SPLIT)),
    }
    metrics = [name for name in arrays if name.startswith("expect_") and name not in known]
    return [*(encoders if "pre_in" in arrays else []), *metrics]


def _preprocess_groups(arrays: Arrays) -> Iterator[Group]:
    from repa_pipeline.encoders.rules import PREPROCESS

    crops = [
        key[1] for _, key in _matches(arrays, r"crop(\w+)_in") if f"crop{key[1]}_out" in arrays
    ]
    if crops:
        yield Group("center crop", "crop", functools.partial(_crops, arrays, crops))
    for name, key in _matches(arrays, _ENCODER):
        if "pre_in" in arrays and key[1] in PREPROCESS:
            run = functools.partial(_encoder_input, arrays, name, key[1])
            yield Group(f"preprocess {key[1]}", "preprocess", run)
    positions = [(name, int(key[1])) for name, key in _matches(arrays, r"pos_out_(\d+)")]
    if "pos_in" in arrays and positions:
        run = functools.partial(_positions, arrays, positions)
        yield Group("position embedding", "preprocess", run)


def _metric_groups(arrays: Arrays) -> Iterator[Group]:
    for metric, features in (("fid", "pool"), ("sfid", "spatial")):
        if _has(arrays, f"expect_{metric}", f"ref_{features}", f"smp_{features}"):
            run = functools.partial(_frechet, arrays, metric, features)
            yield Group(metric, "metric", run)
    splits = [(name, int(key[1])) for name, key in _matches(arrays, _SPLIT)]
    if splits and _has(arrays, "smp_pool", "softmax_w"):
        yield Group("inception score", "metric", functools.partial(_scores, arrays, splits))
    modes = {key[2] for _, key in _matches(arrays, _MANIFOLD)} & PRECISION_MODES.keys()
    if _has(arrays, "ref_pool", "smp_pool"):
        for mode in sorted(modes):
            run = functools.partial(_precision_recall, arrays, mode)
            yield Group(f"precision and recall {mode}", "metric", run)


def _resize_groups(arrays: Arrays) -> Iterator[Group]:
    sizes = [key[1] for _, key in _matches(arrays, r"im(\d+)") if f"resized{key[1]}" in arrays]
    if sizes:
        yield Group("tf1 resize", "resize", functools.partial(_resizes, arrays, sizes))


def _crops(arrays: Arrays, numbers: list[str]) -> Iterator[Comparison]:
    from PIL import Image

    from repa_pipeline.data.image import adm_center_crop

    for number in numbers:
        expected = arrays[f"crop{number}_out"]
        image = Image.fromarray(arrays[f"crop{number}_in"])
        ours = adm_center_crop(image, expected.shape[0])
        yield Comparison(f"crop{number}_out", ours, expected)


def _encoder_input(arrays: Arrays, name: str, encoder: str) -> Iterator[Comparison]:
    import torch

    from repa_pipeline.encoders.preprocess import PREPROCESS, preprocess

    with torch.no_grad():
        ours = preprocess(torch.from_numpy(arrays["pre_in"]), PREPROCESS[encoder]).numpy()
    if f"{name}_shape" in arrays:
        yield Comparison(f"{name}_shape", ours.shape, arrays[f"{name}_shape"])
    yield Comparison(name, ours[:, :, ::ENCODER_STRIDE, ::ENCODER_STRIDE], arrays[name])


def _positions(arrays: Arrays, outputs: list[tuple[str, int]]) -> Iterator[Comparison]:
    import torch

    from repa_pipeline.encoders.preprocess import resample_pos_embed

    pos = torch.from_numpy(arrays["pos_in"])
    for name, side in outputs:
        num_prefix = arrays[name].shape[1] - side**2
        ours = resample_pos_embed(pos, (side, side), num_prefix).numpy()
        yield Comparison(name, ours, arrays[name])


def _frechet(arrays: Arrays, metric: str, features: str) -> Iterator[Comparison]:
    from repa_pipeline.metrics.frechet import FrechetReference
    from repa_pipeline.metrics.statistics import RunningStatistics

    statistics = RunningStatistics()
    statistics.update(arrays[f"ref_{features}"])
    reference = FrechetReference(*statistics.finalize())
    distance = reference.distance_from_features(arrays[f"smp_{features}"]).distance
    yield Comparison(f"expect_{metric}", distance, arrays[f"expect_{metric}"])


def _scores(arrays: Arrays, splits: list[tuple[str, int]]) -> Iterator[Comparison]:
    from repa_pipeline.metrics.inception_score import inception_score

    logits = arrays["smp_pool"] @ arrays["softmax_w"]
    for name, split_size in splits:
        yield Comparison(name, inception_score(logits, split_size), arrays[name])


def _precision_recall(arrays: Arrays, mode: str) -> Iterator[Comparison]:
    from repa_pipeline.metrics.precision_recall import precision_recall

    precision: Callable[..., tuple[float, float]] = precision_recall
    ours = precision(arrays["ref_pool"], arrays["smp_pool"], k=3, mode=PRECISION_MODES[mode])
    for metric, value in zip(("precision", "recall"), ours, strict=True):
        name = f"expect_{metric}_{mode}"
        if name in arrays:
            yield Comparison(name, value, arrays[name])


def _resizes(arrays: Arrays, sizes: list[str]) -> Iterator[Comparison]:
    from repa_pipeline.metrics.resize import tf1_bilinear_resize

    for size in sizes:
        ours = tf1_bilinear_resize(arrays[f"im{size}"], RESIZE_SIZE)
        name = f"resized{size}"
        yield Comparison(name, ours[:, ::RESIZE_STRIDE, ::RESIZE_STRIDE], arrays[name])


def _has(arrays: Arrays, *names: str) -> bool:
    return all(name in arrays for name in names)


def _matches(arrays: Arrays, pattern: str) -> list[tuple[str, re.Match[str]]]:
    found = ((name, re.fullmatch(pattern, name)) for name in arrays)
    return [(name, match) for name, match in found if match]
