"""From noise to data: Euler and Heun on the ODE, Euler-Maruyama on the SDE (REPA, Appendix D).

Samplers draw no random numbers: noise and Brownian increments come from the caller, so a sample is
a function of its own seed alone. States are float64; the velocity function decides the model's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from repa_pipeline.diffusion.interpolant import Path, States, score_from_velocity

# velocity(states, t, t_guidance): states and answer float64; t is the time of the states, and
# t_guidance the time that decides whether guidance is on.
VelocityFn = Callable[[States, float, float], States]

LAST_T = 0.04


def ode_times(num_steps: int) -> list[float]:
    """The num_steps + 1 points of the ODE samplers, from 1 to 0."""
    return _points(1.0, 0.0, num_steps + 1)


def sde_times(num_steps: int, last_t: float = LAST_T) -> list[float]:
    """The num_steps + 1 points of the SDE sampler: 1 to `last_t`, then 0."""
    return [*_points(1.0, last_t, num_steps), 0.0]


def sample_ode(
    velocity: VelocityFn,
    noise: States,
    *,
    num_steps: int,
    heun: bool,
    path: Path | None = None,
) -> States:
    """Integrates dx = v dt from noise [B, ...] at t = 1 to data at t = 0; float64.

    Euler: num_steps evaluations. Heun: 2 num_steps - 1, since the last step is Euler's; its second
    evaluation keeps or drops guidance as the first did. The velocity is the drift on every path,
    so `path` changes nothing here.
    """
    times = ode_times(num_steps)
    x = _double(noise)
    for t, t_next in itertools.pairwise(times):
        slope = velocity(x, t, t)
        ahead = _step(x, slope, t_next - t)
        if heun and t_next > 0:
            second = velocity(ahead, t_next, t)
            slope = tuple((a + b) / 2 for a, b in zip(slope, second, strict=True))
            ahead = _step(x, slope, t_next - t)
        x = ahead
    return x


def sample_sde(
    velocity: VelocityFn,
    noise: States,
    *,
    num_steps: int,
    path: Path,
    increments: Callable[[int], States],
    last_t: float = LAST_T,
) -> States:
    """Integrates the reverse SDE from noise [B, ...] at t = 1 to data at t = 0; float64.

    Drift `v - w/2 * score` and diffusion `sqrt(w)` with w = 2 t, as the reference writes them.
    num_steps evaluations: num_steps - 1 noisy steps, then one without noise from `last_t` to 0.
    `increments(i)` gives the standard normal increments of noisy step i, shaped like `noise`.
    """
    *times, end = sde_times(num_steps, last_t)
    x = _double(noise)
    for step, (t, t_next) in enumerate(itertools.pairwise(times)):
        x = _step(x, _drift(velocity, path, x, t), t_next - t)
        spread = math.sqrt(2 * t * (t - t_next))
        x = tuple(a + spread * b for a, b in zip(x, _double(increments(step)), strict=True))
    return _step(x, _drift(velocity, path, x, times[-1]), end - times[-1])


def _drift(velocity: VelocityFn, path: Path, x: States, t: float) -> States:
    v = velocity(x, t, t)
    scores = score_from_velocity(path, v, x, torch.tensor(t, dtype=torch.float64))
    return tuple(a - t * score for a, score in zip(v, scores, strict=True))


def _points(first: float, last: float, count: int) -> list[float]:
    points: list[float] = torch.linspace(first, last, count, dtype=torch.float64).tolist()
    return points


def _step(x: States, slope: States, dt: float) -> States:
    return tuple(a + dt * b for a, b in zip(x, slope, strict=True))


def _double(states: States) -> States:
    return tuple(_as_double(state) for state in states)


def _as_double(state: Tensor) -> Tensor:
    return state.to(torch.float64)
