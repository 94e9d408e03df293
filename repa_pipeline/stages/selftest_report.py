"""What a self-test reports, and how far two arrays are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

Precision = Literal["float32", "tf32", "bf16"]
Kind = Literal["forward", "gradient", "sampler", "crop", "preprocess", "resize", "metric"]

_OWN_PRECISION: dict[str, float] = {
    "crop": 0.0,
    "preprocess": 1e-5,
    "resize": 1e-6,
    "metric": 1e-6,
}
_MODEL_KINDS: dict[str, dict[str, float | None]] = {
    "float32": {"forward": 1e-4, "gradient": 1e-4, "sampler": 1e-4},
    "tf32": {"forward": 2e-2, "gradient": 5e-2, "sampler": None},
    "bf16": {"forward": 2e-2, "gradient": 5e-2, "sampler": None},
}


class Comparison(NamedTuple):
    """Two arrays that should agree.

    `terms`: the size of the terms that a value is the mean of, where they may cancel to almost
    nothing (cosines: 1), so that rounding is judged against them and not against the remainder.
    """

    name: str
    ours: Any
    expected: Any
    terms: float | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Comparisons that are run and reported together; `run` does the work."""

    name: str
    kind: Kind
    run: Callable[[], Iterator[Comparison]]


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """A group's outcome.

    `worst` is the largest error of its arrays and `worst_array` where it is; None when an array
    could not be compared, and then `problem` says why. `tolerance` None: reported only.
    """

    file: str
    group: str
    worst: float | None
    tolerance: float | None
    passed: bool
    num_arrays: int
    worst_array: str
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file, or an array of a file, that no check was run on."""

    file: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SelftestReport:
    """Everything a self-test found; `passed` when no group failed."""

    vectors: str
    device: str
    dtype: Precision
    groups: tuple[GroupResult, ...]
    skipped: tuple[Skipped, ...]

    @property
    def passed(self) -> bool:
        return all(group.passed for group in self.groups)


def tolerance(kind: Kind, dtype: Precision) -> float | None:
    """The largest error that passes; None where errors are only reported."""
    return _OWN_PRECISION[kind] if kind in _OWN_PRECISION else _MODEL_KINDS[dtype][kind]


def run_group(file: str, group: Group, dtype: Precision) -> GroupResult:
    """Runs one group; whatever goes wrong inside is the group's failure, not the self-test's."""
    limit = tolerance(group.kind, dtype)
    strict = group.kind != "metric" and (group.kind in _OWN_PRECISION or dtype == "float32")
    worst, worst_array, num_arrays = 0.0, "", 0
    try:
        for comparison in group.run():
            num_arrays += 1
            error = _error(comparison, strict)
            if error > worst or not worst_array:
                worst, worst_array = error, comparison.name
        if not num_arrays:
            raise ValueError("nothing was compared")
    except Exception as error:
        # A self-test must report on every group, also when the code under test breaks.
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        return GroupResult(
            file, group.name, None, limit, False, num_arrays, worst_array, problem[:500]
        )
    passed = limit is None or worst <= limit
    return GroupResult(file, group.name, worst, limit, passed, num_arrays, worst_array)


def _error(comparison: Comparison, strict: bool) -> float:
    """max|a-b| / max|b|; strict: / min(1, max|b|). Absolute when b is all zero."""
    name = comparison.name
    a = np.asarray(comparison.ours, dtype=np.float64)
    b = np.asarray(comparison.expected, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{name} has shape {a.shape}, expected {b.shape}")
    for which, array in (("our", a), ("the expected", b)):
        if not np.isfinite(array).all():
            raise ValueError(f"{which} {name} is not finite")
    if a.size == 0:
        return 0.0
    size = float(np.abs(b).max())
    if comparison.terms is not None:
        # float32 keeps seven digits of the terms: a hundredth of them still has five
        size = max(size, comparison.terms / 100 if strict else comparison.terms)
    scale = min(1.0, size) if strict else size
    return float(np.abs(a - b).max()) / (scale or 1.0)
