"""The diffusion of DiT: 1000 noise levels, noise prediction, a learned variance, two samplers.

The chain is DDPM's (arXiv 2006.11239): `q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)`, so
`x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e` with `a_t` the product of the `1 - beta`. Timestep 0 is the
least noise, 999 the most. A model answers with the noise of each state, then with a value v of
each state's variance (Nichol & Dhariwal, arXiv 2102.09672, section 3.1; DiT, arXiv 2212.09748).

Samplers draw no random numbers, as those of samplers.py; states are float64.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.errors import ConfigError

NUM_TIMESTEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02

# answer(states, timestep, t_guidance): noise of each state, then v of each; float64 both ways.
# t_guidance = timestep / 1000 decides whether guidance is on.
NoiseFn = Callable[[States, float, float], States]


@dataclasses.dataclass(frozen=True)
class Level:
    """One noise level of a chain, and the step from it to the level before.

    alpha is the product of 1 - beta up to here, alpha_before up to the level before (1 at the
    first). The step's variance lies between posterior_log_variance and log(beta).
    """

    timestep: int
    beta: float
    alpha: float
    alpha_before: float
    posterior_log_variance: float

    @property
    def mean_of_x0(self) -> float:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
        return self.beta * math.sqrt(self.alpha_before) / (1 - self.alpha)

    @property
    def mean_of_xt(self) -> float:
        """Coefficient of x_t in it."""
        return (1 - self.alpha_before) * math.sqrt(1 - self.beta) / (1 - self.alpha)

    @property
    def noise_to_data(self) -> float:
        """sqrt(1 / alpha - 1): an error of the noise is this much error of x_0."""
        return math.sqrt(1 / self.alpha - 1)

    def x0(self, x: Tensor, noise: Tensor) -> Tensor:
        """The clean state that x at this level and its noise mean."""
        return x / math.sqrt(self.alpha) - self.noise_to_data * noise

    def log_variance(self, v: Tensor) -> Tensor:
        """Logarithm of the learned variance: v = -1 is the posterior's, 1 is beta."""
        share = (v + 1) / 2
        return share * math.log(self.beta) + (1 - share) * self.posterior_log_variance


@functools.lru_cache
def chain(num_levels: int = NUM_TIMESTEPS) -> tuple[Level, ...]:
    """Noise levels from the least to the most, `num_levels` of the 1000, the ends among them.

    Respaced as by Nichol & Dhariwal (section 4): levels evenly apart, and betas such that alpha
    at each level kept is what it was. Raises ConfigError for more than 1000.
    """
    timesteps = _spaced(num_levels)
    betas = torch.linspace(FIRST_BETA, LAST_BETA, NUM_TIMESTEPS, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)[list(timesteps)].tolist()
    before = [1.0, *alphas[:-1]]
    kept = [1 - a / b for a, b in zip(alphas, before, strict=True)]
    variances = [beta * (1 - b) / (1 - a) for beta, a, b in zip(kept, alphas, before, strict=True)]
    # The first level's posterior variance is 0: its logarithm is replaced by the next level's.
    variances[0] = variances[1] if num_levels > 1 else kept[0]
    return tuple(
        Level(timestep, beta, a, b, math.log(variance))
        for timestep, beta, a, b, variance in zip(
            timesteps, kept, alphas, before, variances, strict=True
        )
    )


def _spaced(num_levels: int) -> tuple[int, ...]:
    if not 1 <= num_levels <= NUM_TIMESTEPS:
        raise ConfigError(
            f"num_steps: got {num_levels}, expected 1 to {NUM_TIMESTEPS}: the chain has no more "
            "noise levels"
        )
    if num_levels == 1:
        return (NUM_TIMESTEPS - 1,)
    return tuple(round(i * (NUM_TIMESTEPS - 1) / (num_levels - 1)) for i in range(num_levels))


def timesteps_of(t: Tensor) -> Tensor:
    """Times [B] in [0, 1] as timesteps int64 [B]: floor(1000 t), 999 at t = 1."""
    return (t * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)


@dataclasses.dataclass(frozen=True)
class ChainTable:
    """Coefficients of all 1000 levels on a device, float32 [1000], to be indexed by timesteps."""

    sqrt_alpha: Tensor
    sqrt_rest: Tensor  # sqrt(1 - alpha)
    noise_to_mean: Tensor  # an error of the noise is this much error of the step's mean
    log_beta: Tensor
    posterior_log_variance: Tensor


@functools.lru_cache
def chain_table(device: torch.device) -> ChainTable:
    """The table of the whole chain on `device`, made once, so that no step waits for a copy."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).float().to(device)

    levels = chain()
    return ChainTable(
        sqrt_alpha=column([math.sqrt(level.alpha) for level in levels]),
        sqrt_rest=column([math.sqrt(1 - level.alpha) for level in levels]),
        noise_to_mean=column([level.mean_of_x0 * level.noise_to_data for level in levels]),
        log_beta=column([math.log(level.beta) for level in levels]),
        posterior_log_variance=column([level.posterior_log_variance for level in levels]),
    )


def diffuse(x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """States sqrt(alpha) x + sqrt(1 - alpha) e at `timesteps` [B], of data x and noise [B, ...]."""
    table = chain_table(x.device)
    alpha, rest = _at(table.sqrt_alpha, timesteps, x), _at(table.sqrt_rest, timesteps, x)
    return alpha * x + rest * noise


def variational_loss(
    x: Tensor, noise: Tensor, timesteps: Tensor, predicted: Tensor, v: Tensor
) -> Tensor:
    """The term of the variational bound at `timesteps`, bits a dimension, float32 [B].

    From level t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); from level 0 it is minus
    the logarithm of the probability of x_0 in bins of 2/255 (arXiv 2102.09672, section 2.1; DiT
    keeps the bins for latents). x, noise, predicted, v: [B, ...]. The mean is detached: the
    gradient reaches v alone (section 3.1).

    At a uniform t, 1000 times this is an estimate of L_vlb, and L_hybrid = L_simple + 0.001 L_vlb:
    it is added to the mean squared error of the noise with weight 1, as in DiT's code.
    """
    table, v = chain_table(x.device), v.float()
    low = _at(table.posterior_log_variance, timesteps, v)
    share = (v + 1) / 2
    log_variance = share * _at(table.log_beta, timesteps, v) + (1 - share) * low
    # Both means are of the same x_t, so they differ by the error of the noise alone; at level 0
    # the posterior's mean is x_0 itself.
    error = predicted.detach().float() - noise.float()
    difference = _at(table.noise_to_mean, timesteps, error) * error
    divergence = 0.5 * (
        log_variance - low - 1 + torch.exp(low - log_variance)
        + difference.square() * torch.exp(-log_variance)
    )  # fmt: skip
    surprise = _surprise_in_bins(x.float(), difference, 0.5 * log_variance)
    first = (timesteps == 0).view(-1, *(1,) * (x.ndim - 1))
    return torch.where(first, surprise, divergence).flatten(1).mean(dim=1) / math.log(2)


def _surprise_in_bins(x: Tensor, difference: Tensor, log_deviation: Tensor) -> Tensor:
    """Minus the log probability of the bin of x, whose distance from the mean is `difference`.

    Bins beyond -0.999 and 0.999 reach to infinity. The normal distribution function is the tanh
    approximation of the published code.
    """
    scale = torch.exp(-log_deviation)
    upper = _normal_cdf(scale * (difference + 1 / 255))
    lower = _normal_cdf(scale * (difference - 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    return -torch.log((upper - lower).clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(column: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """Entries [B] of a column, shaped and typed to multiply a state [B, ...]."""
    return column[timesteps].to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def sample_ddpm(
    answer: NoiseFn, noise: States, *, num_steps: int, increments: Callable[[int], States]
) -> States:
    """Ancestral sampling with the learned variance, from noise [B, ...] to data; float64.

    num_steps evaluations on the respaced chain, the last without noise (DDPM, algorithm 2).
    `increments(i)` gives the standard normal increments of noisy step i, shaped like `noise`.
    """
    x = _double(noise)
    for step, level in enumerate(reversed(chain(num_steps))):
        noises, values = _answer(answer, x, level)
        means = tuple(
            level.mean_of_x0 * level.x0(state, e) + level.mean_of_xt * state
            for state, e in zip(x, noises, strict=True)
        )
        if step == num_steps - 1:
            return means
        x = tuple(
            mean + torch.exp(0.5 * level.log_variance(v)) * e
            for mean, v, e in zip(means, values, _double(increments(step)), strict=True)
        )
    return x


def sample_ddim(
    answer: NoiseFn,
    noise: States,
    *,
    num_steps: int,
    increments: Callable[[int], States],
    eta: float = 0.0,
) -> States:
    """DDIM (arXiv 2010.02502, equation 12) on the respaced chain of `sample_ddpm`; float64.

    eta 0 is deterministic and asks for no increments; eta 1 adds the noise of DDPM's posterior.
    The learned variance is not used.
    """
    x = _double(noise)
    for step, level in enumerate(reversed(chain(num_steps))):
        noises, _ = _answer(answer, x, level)
        rest = 1 - level.alpha_before
        deviation = eta * math.sqrt(rest / (1 - level.alpha) * level.beta)
        along = math.sqrt(max(rest - deviation**2, 0.0))
        x = tuple(
            math.sqrt(level.alpha_before) * level.x0(state, e) + along * e
            for state, e in zip(x, noises, strict=True)
        )
        if deviation:
            fresh = _double(increments(step))
            x = tuple(state + deviation * e for state, e in zip(x, fresh, strict=True))
    return x


def _answer(answer: NoiseFn, x: States, level: Level) -> tuple[States, States]:
    given = answer(x, float(level.timestep), level.timestep / NUM_TIMESTEPS)
    return given[: len(x)], given[len(x) :]


def _double(states: States) -> States:
    return tuple(state.to(torch.float64) for state in states)
