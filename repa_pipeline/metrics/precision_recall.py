"""Improved precision and recall (Kynkaanniemi et al. 2019) on raw pool features.

A sample is inside the reference's manifold when it lies within the radius of some reference image:
the squared distance to that image's k-th nearest other one. Three arithmetics:

float32, float64   plain
adm_fp16           as the ADM suite: features rounded to float16, and every step of
                   |u|^2 - 2 u.v + |v|^2 too (sums inside a product run in float32); a tile of
                   10,000 x 10,000 pairs that overflows float16 is done in float32 instead

Published numbers of the field are adm_fp16; float32 is about 0.001 (precision) and 0.0024
(recall) below them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repa_pipeline.errors import ConfigError, DataError, MismatchError

Mode = Literal["float32", "float64", "adm_fp16"]
Features = NDArray[np.floating[Any]]
Distances = Callable[[Features], Features]

TILE_ROWS = 10_000  # the ADM suite's: it decides which pairs fall back to float32 together
CHUNK_ROWS = 1_000  # rows of a tile held at once: 40 MB in float32
HALF_MAX = 65_504.0


def precision_recall(
    reference: Features, samples: Features, *, k: int = 3, mode: Mode = "float32"
) -> tuple[float, float]:
    """Precision (share of samples in the reference's manifold) and recall (the reverse).

    reference [N, D], samples [M, D], float32, N and M above k. Never holds the whole distance
    matrix. Raises ConfigError on an unknown mode, DataError on too few rows.
    """
    if mode not in get_args(Mode):
        raise ConfigError(
            f"precision_recall mode is '{mode}': expected one of {', '.join(get_args(Mode))}"
        )
    if reference.ndim != 2 or reference.shape[1:] != samples.shape[1:]:
        raise MismatchError(
            f"features of shapes {reference.shape} and {samples.shape}: expected [N, D] and [M, D]"
        )
    if min(len(reference), len(samples)) <= k:
        raise DataError(
            f"precision and recall of {len(reference)} against {len(samples)} images with k = {k}: "
            f"at least {k + 1} of each are needed"
        )
    reference_radii = manifold_radii(reference, k=k, mode=mode)
    sample_radii = manifold_radii(samples, k=k, mode=mode)
    reference_in = np.zeros(len(reference), dtype=bool)
    sample_in = np.zeros(len(samples), dtype=bool)
    for rows, columns, squared in _distance_blocks(reference, samples, mode):
        sample_in[columns] |= (squared <= reference_radii[rows, None]).any(axis=0)
        reference_in[rows] |= (squared <= sample_radii[None, columns]).any(axis=1)
    return float(sample_in.mean()), float(reference_in.mean())


def manifold_radii(features: Features, *, k: int, mode: Mode) -> Features:
    """Squared distance [N] from each row of features [N, D] to its k-th nearest other row."""
    # k + 1 smallest, because a point's distance to itself is one of them
    smallest = np.full((len(features), k + 1), np.inf, dtype=_result_dtype(mode))
    for rows, _, squared in _distance_blocks(features, features, mode):
        candidates = np.concatenate([smallest[rows], squared], axis=1)
        smallest[rows] = np.partition(candidates, k, axis=1)[:, : k + 1]
    radii: Features = smallest.max(axis=1)
    return radii


def _distance_blocks(
    u: Features, v: Features, mode: Mode
) -> Iterator[tuple[slice, slice, Features]]:
    """Squared distances between all rows, as (rows of u, rows of v, block)."""
    for tile in _slices(0, len(u), TILE_ROWS):
        for columns in _slices(0, len(v), TILE_ROWS):
            distances = _tile_distances(u[tile], v[columns], mode)
            for rows in _slices(tile.start, tile.stop, CHUNK_ROWS):
                yield rows, columns, distances(u[rows])


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, stop)) for begin in range(start, stop, step)]


def _result_dtype(mode: Mode) -> type[np.floating[Any]]:
    return np.float64 if mode == "float64" else np.float32


def _tile_distances(u: Features, v: Features, mode: Mode) -> Distances:
    """The function from rows of u to their distances to all of v."""
    if mode == "adm_fp16":
        distances = _half_distances_to(v)
        if not _overflows(distances, u, v):
            return distances
    return _plain_distances_to(v, _result_dtype(mode))


def _plain_distances_to(v_MD: Features, dtype: type[np.floating[Any]]) -> Distances:
    v_MD = v_MD.astype(dtype, copy=False)
    norm_v_M = _squared_norms(v_MD)

    def distances(u_ND: Features) -> Features:
        u_ND = u_ND.astype(dtype, copy=False)
        squared_NM: Features = u_ND @ v_MD.T
        squared_NM *= -2
        squared_NM += _squared_norms(u_ND)[:, None]
        squared_NM += norm_v_M
        np.maximum(squared_NM, 0, out=squared_NM)
        return squared_NM

    return distances


def _half_distances_to(v_MD: Features) -> Distances:
    """float16 at every step, results as float32.

    In torch, because numpy's float16 arithmetic is ten times slower; the roundings are the same.
    """
    rounded_v_MD, norm_v_M = _rounded_to_half(v_MD)

    def distances(u_ND: Features) -> Features:
        rounded_u_ND, norm_u_N = _rounded_to_half(u_ND)
        squared_NM = torch.from_numpy(rounded_u_ND @ rounded_v_MD.T).half()
        squared_NM *= -2
        squared_NM += norm_u_N[:, None]
        squared_NM += norm_v_M
        result: Features = squared_NM.clamp_(min=0).float().numpy()
        return result

    return distances


def _rounded_to_half(rows_ND: Features) -> tuple[Features, Tensor]:
    """The rows rounded to float16 (held as float32), and their squared norms in float16."""
    half_ND = torch.tensor(rows_ND).half()
    norm_N = half_ND.square().float().sum(dim=1).half()
    return half_ND.float().numpy(), norm_N


def _overflows(distances: Distances, u: Features, v: Features) -> bool:
    # |u - v|^2 and every step towards it stay below 2 (|u|^2 + |v|^2): mostly this settles it
    if 2.1 * (_squared_norms(u).max() + _squared_norms(v).max()) < HALF_MAX:
        return False
    chunks = _slices(0, len(u), CHUNK_ROWS)
    return not all(np.isfinite(distances(u[rows])).all() for rows in chunks)


def _squared_norms(rows: Features) -> Features:
    norms: Features = np.square(rows).sum(axis=1)
    return norms
