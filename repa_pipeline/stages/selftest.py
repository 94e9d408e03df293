"""`repa selftest`: our code against reference vectors, file by file and group by group.

    report = run_selftest("golden", device="cuda", dtype="bf16")

A vector file is recognised by its keys, never by its name or sizes. float32 (TF32 off) must agree
to the last digits; tf32 and bf16 show what a faster precision costs.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np

from repa_pipeline.device import float32_products
from repa_pipeline.errors import ConfigError, MissingError
from repa_pipeline.stages.selftest_arrays import array_groups, unknown_arrays
from repa_pipeline.stages.selftest_report import (
    Group,
    GroupResult,
    Precision,
    SelftestReport,
    Skipped,
    run_group,
)

__all__ = ["GroupResult", "SelftestReport", "Skipped", "run_selftest"]


class _NotVectors(Exception):
    """Why a file is not checked."""


def run_selftest(vectors: str, device: str = "cpu", dtype: Precision = "float32") -> SelftestReport:
    """Checks every vector file in a folder; see SelftestReport.

    Errors are max|a-b| / min(1, max|b|), but max|a-b| / max|b| for metrics and in tf32 and bf16.
    Metrics, crops and encoder inputs are always checked in their own precision, on the CPU.
    Raises MissingError when the folder is absent or nothing in it could be checked, ConfigError
    for an unknown dtype or a device that is not there.
    """
    folder = Path(vectors)
    _check(folder, device, dtype)
    results: list[GroupResult] = []
    skipped: list[Skipped] = []
    with float32_products(tf32=dtype == "tf32"):
        for path, groups in _recognised(folder, device, dtype, skipped):
            results += [run_group(path.name, group, dtype) for group in groups]
    if not results:
        raise MissingError(
            f"nothing in {vectors} can be checked: got "
            f"{[f'{skip.file} ({skip.reason})' for skip in skipped][:5]}, expected SiT vectors "
            "(.safetensors) or preprocessing, ADM metrics or resize vectors (.npz)"
        )
    return SelftestReport(str(vectors), device, dtype, tuple(results), tuple(skipped))


def plan_selftest(
    vectors: str, device: str = "cpu", dtype: Precision = "float32"
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """What `run_selftest` would check, as (file, group), and the files it would skip."""
    folder = Path(vectors)
    _check(folder, device, dtype)
    skipped: list[Skipped] = []
    found = _recognised(folder, device, dtype, skipped)
    return [(path.name, group.name) for path, groups in found for group in groups], skipped


def _recognised(
    folder: Path, device: str, dtype: Precision, skipped: list[Skipped]
) -> Iterator[tuple[Path, list[Group]]]:
    """Yields the vector files with their groups; adds the others to `skipped`."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            groups, unknown = _open(path, device, dtype)
        except _NotVectors as reason:
            skipped.append(Skipped(path.name, str(reason)))
            continue
        skipped += [Skipped(path.name, f"{name}: not known here") for name in unknown]
        yield path, groups


def _check(folder: Path, device: str, dtype: str) -> None:
    import torch

    if dtype not in get_args(Precision):
        raise ConfigError(f"dtype is '{dtype}': expected one of {', '.join(get_args(Precision))}")
    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is '{device}' but there is no CUDA device: use --device cpu")
    if not folder.is_dir():
        raise MissingError(f"no folder {folder}: give the folder with the reference vectors")


def _open(path: Path, device: str, dtype: Precision) -> tuple[list[Group], list[str]]:
    """The groups of a file, and the expected arrays in it that no group covers.

    Raises _NotVectors with the reason when the file is of no known format, cannot be read, or has
    not all the arrays of any group.
    """
    if path.suffix == ".npz" or zipfile.is_zipfile(path):
        groups, unknown = _open_npz(path)
    elif path.suffix == ".safetensors" or _looks_like_safetensors(path):
        groups, unknown = _open_safetensors(path, device, dtype)
    else:
        raise _NotVectors("not a vector file: neither safetensors nor npz")
    if not groups:
        raise _NotVectors(
            "no group of a known format has all its arrays"
            + (f"; not known here: {', '.join(unknown[:5])}" if unknown else "")
        )
    return groups, unknown


def _looks_like_safetensors(path: Path) -> bool:
    """Eight bytes of header length, then a JSON object."""
    with open(path, "rb") as file:
        length, first = int.from_bytes(file.read(8), "little"), file.read(1)
    return first == b"{" and length <= path.stat().st_size - 8


def _open_safetensors(path: Path, device: str, dtype: Precision) -> tuple[list[Group], list[str]]:
    from safetensors import SafetensorError, safe_open

    from repa_pipeline.stages.selftest_model import SitVectors

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if "config" not in metadata or not any(name.startswith("model.") for name in names):
                raise _NotVectors("not SiT vectors: no 'config' in the metadata or no 'model.*'")
            config = json.loads(metadata["config"])
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise _NotVectors(f"cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise _NotVectors("not SiT vectors: 'config' in the metadata is no JSON object")
    vectors = SitVectors(tensors, config, device, dtype)
    return vectors.groups(), vectors.unknown()


def _open_npz(path: Path) -> tuple[list[Group], list[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _NotVectors(f"cannot be read: {error}") from error
    return array_groups(arrays), unknown_arrays(arrays)
