"""The class each sample is asked for: by a rule, from its index and the seed, or of a file."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.errors import ConfigError, DamagedError, DataError, MissingError
from repa_pipeline.training.draws import seed_of

FROM_FILE = "file"
LABELS_FILE = "labels.npy"
_SUFFIXES = (".npy", ".txt")

Classes = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which class sample k is of: `rule` says, or `listed` (of a file), which then has it at k."""

    rule: str
    seed: int
    num_classes: int
    listed: Classes | None = None

    def of(self, indices: Sequence[int]) -> Classes:
        """int64 [B]: the classes of samples `indices`."""
        if self.listed is None:
            return sample_labels(self.rule, self.seed, list(indices), self.num_classes)
        return self.listed[list(indices)]

    @property
    def recipe(self) -> dict[str, Any]:
        """What a manifest says of them."""
        if self.listed is None:
            return {"labels": self.rule}
        return {"labels": FROM_FILE, "labels_sha256": _digest(self.listed)}

    def keep(self, store: ObjectStore) -> None:
        """Writes the classes of a file beside the samples, once."""
        if self.listed is not None:
            store.put_new(LABELS_FILE, _npy(self.listed))


def settle_labels(
    given: str, seed: int, num_classes: int, num_images: int, *, sorted_too: bool = False
) -> Labels:
    """The labels that --labels names. Raises ConfigError for an unknown rule, DataError for a file
    that does not hold a class an image in an order fit for a score, MissingError without it."""
    if not given.endswith(_SUFFIXES):
        sample_labels(given, seed, [0], num_classes)
        return Labels(given, seed, num_classes)
    listed = _read_file(Path(given))
    if len(listed) != num_images:
        raise DataError(
            f"labels {given}: got {len(listed):,} classes, expected one for each of "
            f"{num_images:,} images: set --num-images {len(listed)} or give another file"
        )
    wrong = np.flatnonzero((listed < 0) | (listed >= num_classes))
    if len(wrong):
        raise DataError(
            f"labels {given}: got {listed[wrong[0]]} at {wrong[0]}, expected classes from 0 to "
            f"{num_classes - 1}"
        )
    if not sorted_too and stands_by_class(listed):
        raise DataError(
            f"labels {given} stand class by class: the inception score of blocks in file order "
            "would be wrong; shuffle the file, or say --sorted-labels where no score is taken"
        )
    return Labels(FROM_FILE, seed, num_classes, listed)


def labels_of(
    manifest: Mapping[str, Any], num_images: int, store: ObjectStore | None = None
) -> Classes:
    """int64 [num_images]: the classes that the samples of a manifest were asked for.

    `store`: the samples' folder, where the classes of a file are kept. Raises MissingError or
    DamagedError where they are not.
    """
    return kept_labels(manifest, store).of(range(num_images))


def kept_labels(manifest: Mapping[str, Any], store: ObjectStore | None = None) -> Labels:
    """The labels of finished samples; see `labels_of`."""
    rule, seed, num_classes = (manifest[name] for name in ("labels", "seed", "num_classes"))
    if rule != FROM_FILE:
        return Labels(rule, seed, num_classes)
    if store is None:
        raise MissingError("the samples' classes are of a file: give the folder that keeps them")
    listed = _parsed(store.get(LABELS_FILE), f"{store.url}/{LABELS_FILE}")
    if _digest(listed) != manifest["labels_sha256"]:
        raise DamagedError(f"{store.url}/{LABELS_FILE} is not what the samples were made with")
    return Labels(rule, seed, num_classes, listed)


def sample_labels(rule: str, seed: int, indices: list[int], num_classes: int) -> Classes:
    """int64 [B]: the class of each sample, from its own index and the seed alone.

    random: uniform; balanced: index % num_classes; a number: that class. Raises ConfigError.
    """
    if rule == "balanced":
        return np.array([k % num_classes for k in indices], np.int64)
    if rule == "random":
        return np.array([seed_of(seed, k, "label") % num_classes for k in indices], np.int64)
    if not rule.isdecimal() or int(rule) >= num_classes:
        raise ConfigError(
            f"labels: got '{rule}', expected random, balanced or a class from 0 to "
            f"{num_classes - 1}, or a .npy or .txt file"
        )
    return np.full(len(indices), int(rule), np.int64)


def stands_by_class(labels: Classes) -> bool:
    """Whether several classes of several images each stand one after another."""
    num_runs = 1 + int((labels[1:] != labels[:-1]).sum())
    num_classes = len(np.unique(labels))
    return 1 < num_classes == num_runs < len(labels)


def _read_file(path: Path) -> Classes:
    if not path.is_file():
        raise MissingError(f"no labels file {path}: check --labels")
    data = path.read_bytes()
    if path.suffix == ".npy":
        return _parsed(data, str(path))
    try:
        return np.array([int(word) for word in data.decode().split()], np.int64)
    except ValueError as error:
        raise DataError(f"labels {path}: {error}; expected whole numbers, one a line") from None


def _parsed(data: bytes, where: str) -> Classes:
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"labels {where} are no .npy array of whole numbers: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "an npz"
        raise DataError(f"labels {where}: got {what}, expected whole numbers [images]")
    return found.astype(np.int64)


def _npy(labels: Classes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, labels, allow_pickle=False)
    return buffer.getvalue()


def _digest(labels: Classes) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
