"""The path between data and noise, and how times are drawn on it (REPA, section 2; SiT, 2.2).

t = 0 is data, t = 1 is noise: `x_t = alpha(t) x + sigma(t) e`, velocity its derivative in t.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from repa_pipeline.errors import UnknownNameError
from repa_pipeline.tables import Table

States = tuple[Tensor, ...]
Schedule = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Path:
    """The two coefficients of a path and their derivatives; each maps times to values."""

    name: str
    alpha: Schedule
    sigma: Schedule
    d_alpha: Schedule
    d_sigma: Schedule


_QUARTER = math.pi / 2

PATHS: Table[Path] = Table(
    "path",
    [
        Path(
            "linear",
            alpha=lambda t: 1 - t,
            sigma=lambda t: t,
            d_alpha=lambda t: -torch.ones_like(t),
            d_sigma=torch.ones_like,
        ),
        Path(
            "cosine",
            alpha=lambda t: torch.cos(_QUARTER * t),
            sigma=lambda t: torch.sin(_QUARTER * t),
            d_alpha=lambda t: -_QUARTER * torch.sin(_QUARTER * t),
            d_sigma=lambda t: _QUARTER * torch.cos(_QUARTER * t),
        ),
    ],
)

# Which random number each weighting of times turns into t.
WEIGHTINGS: Mapping[str, str] = {"uniform": "uniform", "lognormal": "normal"}


def interpolate(path: Path, x: States, e: States, t: Tensor) -> tuple[States, States]:
    """States x_t and their velocities v at times t [B], from data x and noise e [B, ...].

    Each state keeps its shape and dtype; v is the regression target of the trunk.
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    d_alpha, d_sigma = path.d_alpha(t), path.d_sigma(t)
    pairs = list(zip(x, e, strict=True))
    x_t = tuple(_mix(alpha, data, sigma, noise) for data, noise in pairs)
    v = tuple(_mix(d_alpha, data, d_sigma, noise) for data, noise in pairs)
    return x_t, v


def _mix(a_B: Tensor, data: Tensor, b_B: Tensor, noise: Tensor) -> Tensor:
    return _like(a_B, data) * data + _like(b_B, data) * noise


def _like(coefficient: Tensor, state: Tensor) -> Tensor:
    """A coefficient [B] or [] shaped and typed to multiply a state [B, ...]."""
    trailing = (1,) * (state.ndim - 1) if coefficient.ndim else ()
    return coefficient.to(state.dtype).reshape(coefficient.shape + trailing)


def draw_t(weighting: str, path_name: str, draw: Tensor) -> Tensor:
    """Times [B] in [0, 1] from random numbers: uniform in [0, 1) or standard normal (WEIGHTINGS).

    "uniform": t is the draw. "lognormal": s = exp(draw) is sigma / alpha, brought to the path's t.
    Raises UnknownNameError for another weighting or path.
    """
    if weighting not in WEIGHTINGS:
        raise UnknownNameError(
            f"unknown weighting '{weighting}': known are {', '.join(sorted(WEIGHTINGS))}"
        )
    path = PATHS[path_name]
    if weighting == "uniform":
        return draw
    ratio = draw.exp()
    return ratio / (1 + ratio) if path.name == "linear" else ratio.atan() / _QUARTER


def score_from_velocity(path: Path, v: States, x: States, t: Tensor) -> States:
    """Scores of the states x [B, ...] with velocities v at times t ([B] or [], above 0).

    `(r v - x) / (sigma^2 - r sigma' sigma)` with `r = alpha / alpha'` (SiT, Appendix A.3).
    """
    ratio = path.alpha(t) / path.d_alpha(t)
    sigma = path.sigma(t)
    variance = sigma**2 - ratio * path.d_sigma(t) * sigma
    return tuple(
        (_like(ratio, state) * velocity - state) / _like(variance, state)
        for velocity, state in zip(v, x, strict=True)
    )
