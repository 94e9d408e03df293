"""DDPM's chain, DiT's loss and the two samplers against plain float64 transcriptions.

The transcriptions take the equations one by one, level by level, with numbers alone: DDPM is arXiv
2006.11239, Nichol & Dhariwal 2102.09672, DDIM 2010.02502.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from repa_pipeline.diffusion.ddpm import (
    NoiseFn,
    chain,
    chain_table,
    diffuse,
    sample_ddim,
    sample_ddpm,
    timesteps_of,
    variational_loss,
)
from repa_pipeline.diffusion.guidance import count_model_evaluations, guided
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.diffusion.sampling import SAMPLERS, choose_sampler
from repa_pipeline.errors import ConfigError, UnknownNameError

BETA = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
ALPHA_BAR = [math.prod(1 - beta for beta in BETA[: t + 1]) for t in range(1000)]


def double(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def posterior(t: int) -> tuple[float, float, float]:
    """Coefficients of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0), and its variance.

    DDPM, equation 7, of the whole chain.
    """
    before = ALPHA_BAR[t - 1] if t else 1.0
    rest = 1 - ALPHA_BAR[t]
    of_x0 = math.sqrt(before) * BETA[t] / rest
    of_xt = math.sqrt(1 - BETA[t]) * (1 - before) / rest
    return of_x0, of_xt, (1 - before) / rest * BETA[t]


# --- the chain ---------------------------------------------------------------------------------


def test_the_whole_chain_is_the_published_one() -> None:
    levels = chain()
    assert [level.timestep for level in levels] == list(range(1000))
    for t in (0, 1, 500, 999):
        level = levels[t]
        of_x0, of_xt, variance = posterior(t)
        assert level.beta == pytest.approx(BETA[t], rel=1e-9)
        assert level.alpha == pytest.approx(ALPHA_BAR[t], rel=1e-9)
        assert level.mean_of_x0 == pytest.approx(of_x0, rel=1e-8)
        assert level.mean_of_xt == pytest.approx(of_xt, rel=1e-8, abs=1e-12)
        if t:
            assert level.posterior_log_variance == pytest.approx(math.log(variance), rel=1e-8)
    assert levels[0].posterior_log_variance == levels[1].posterior_log_variance
    assert ALPHA_BAR[999] == pytest.approx(4.0358e-5, rel=1e-3)


@pytest.mark.parametrize("num_levels", [2, 7, 50, 250])
def test_a_respaced_chain_keeps_the_noise_of_its_levels(num_levels: int) -> None:
    levels = chain(num_levels)
    timesteps = [level.timestep for level in levels]
    assert (timesteps[0], timesteps[-1]) == (0, 999) and len(set(timesteps)) == num_levels
    gaps = {b - a for a, b in zip(timesteps, timesteps[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1
    product = 1.0
    for level in levels:
        assert level.alpha_before == pytest.approx(product, rel=1e-9)
        product *= 1 - level.beta
        assert level.alpha == pytest.approx(ALPHA_BAR[level.timestep], rel=1e-9)
        assert product == pytest.approx(level.alpha, rel=1e-9)


def test_more_levels_than_there_are_is_refused() -> None:
    for count in (0, 1001):
        with pytest.raises(ConfigError, match=f"num_steps: got {count}, expected 1 to 1000"):
            chain(count)
    assert [level.timestep for level in chain(1)] == [999]


def test_times_become_timesteps() -> None:
    t = torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9999, 1.0])
    assert timesteps_of(t).tolist() == [0, 0, 1, 500, 999, 999]


def test_diffused_states() -> None:
    x, e = double(3, 2, 2, seed=1), double(3, 2, 2, seed=2)
    timesteps = torch.tensor([0, 400, 999])
    got = diffuse(x, e, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        expected = math.sqrt(ALPHA_BAR[t]) * x[i] + math.sqrt(1 - ALPHA_BAR[t]) * e[i]
        torch.testing.assert_close(got[i], expected, rtol=0, atol=1e-6)
    assert diffuse(x.float(), e.float(), timesteps).dtype == torch.float32


# --- the loss ----------------------------------------------------------------------------------


def plain_variational_loss(x: Tensor, e: Tensor, t: int, predicted: Tensor, v: Tensor) -> float:
    """One sample's term, float64, number by number."""
    low = math.log(posterior(max(t, 1))[2])
    high = math.log(BETA[t])
    of_x0, of_xt, _ = posterior(t)
    total = 0.0
    for x0, noise, guess, value in zip(
        *(part.flatten().tolist() for part in (x, e, predicted, v)), strict=True
    ):
        x_t = math.sqrt(ALPHA_BAR[t]) * x0 + math.sqrt(1 - ALPHA_BAR[t]) * noise
        x0_guess = (x_t - math.sqrt(1 - ALPHA_BAR[t]) * guess) / math.sqrt(ALPHA_BAR[t])
        mean = of_x0 * x0_guess + of_xt * x_t
        log_variance = (value + 1) / 2 * high + (1 - value) / 2 * low
        if t:
            true_mean = of_x0 * x0 + of_xt * x_t
            # KL of two normal distributions
            total += 0.5 * (
                log_variance - low - 1 + math.exp(low - log_variance)
                + (true_mean - mean) ** 2 / math.exp(log_variance)
            )  # fmt: skip
        else:
            total += surprise(x0, mean, math.exp(0.5 * log_variance))
    return total / x.numel() / math.log(2)


def surprise(x: float, mean: float, deviation: float) -> float:
    """Minus the log probability of the bin of x (DDPM, equation 13)."""

    def below(value: float) -> float:
        z = (value - mean) / deviation
        return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = 1.0 if x > 0.999 else below(x + 1 / 255)
    lower = 0.0 if x < -0.999 else below(x - 1 / 255)
    return -math.log(max(upper - lower, 1e-12))


@pytest.mark.parametrize("timestep", [0, 1, 10, 500, 999])
def test_the_variational_loss_is_the_plain_sum(timestep: int) -> None:
    x, e = 0.8 * double(4, 2, 3, 3, seed=1), double(4, 2, 3, 3, seed=2)
    predicted, v = e + 0.3 * double(4, 2, 3, 3, seed=3), double(4, 2, 3, 3, seed=4).tanh()
    timesteps = torch.full((4,), timestep)
    got = variational_loss(x.float(), e.float(), timesteps, predicted.float(), v.float())
    expected = [plain_variational_loss(x[i], e[i], timestep, predicted[i], v[i]) for i in range(4)]
    assert got.dtype == torch.float32 and got.shape == (4,)
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)


def test_the_variational_loss_takes_each_sample_at_its_own_level() -> None:
    x, e, predicted, v = (double(3, 2, 2, 2, seed=i).float() for i in range(4))
    timesteps = torch.tensor([0, 3, 900])
    whole = variational_loss(x, e, timesteps, predicted, v)
    for i in range(3):
        one = slice(i, i + 1)
        alone = variational_loss(x[one], e[one], timesteps[one], predicted[one], v[one])
        torch.testing.assert_close(whole[one], alone)


def test_the_mean_gets_no_gradient_from_it() -> None:
    x, e, predicted, v = (double(2, 2, 2, 2, seed=i).float() for i in range(4))
    predicted.requires_grad_(), v.requires_grad_()
    variational_loss(x, e, torch.tensor([0, 600]), predicted, v).sum().backward()
    assert predicted.grad is None
    assert v.grad is not None and bool(v.grad.flatten(1).any(dim=1).all())


def test_an_exact_answer_costs_nothing() -> None:
    x, e = double(2, 2, 2, 2, seed=1).float(), double(2, 2, 2, 2, seed=2).float()
    exact = variational_loss(x, e, torch.tensor([5, 600]), e, -torch.ones_like(e))
    torch.testing.assert_close(exact, torch.zeros(2), rtol=0, atol=1e-6)


def test_the_table_of_a_device_is_made_once() -> None:
    assert chain_table(torch.device("cpu")) is chain_table(torch.device("cpu"))


# --- the samplers ------------------------------------------------------------------------------


def toy_answer(states: States, timestep: float, t_guidance: float) -> States:
    """An answer that depends on everything."""
    assert t_guidance == timestep / 1000
    noise = tuple(torch.tanh(state * (1 + timestep / 700) + 0.1) for state in states)
    values = tuple(torch.cos(state + timestep) for state in states)
    return (*noise, *values)


def respaced(num_steps: int) -> list[tuple[int, float, float, float]]:
    """(timestep, new beta, alpha bar, alpha bar before) from the least noise to the most."""
    timesteps = [round(i * 999 / (num_steps - 1)) for i in range(num_steps)]
    bars = [ALPHA_BAR[t] for t in timesteps]
    before = [1.0, *bars[:-1]]
    return [(t, 1 - bar / b, bar, b) for t, bar, b in zip(timesteps, bars, before, strict=True)]


def plain_ddpm(x: Tensor, num_steps: int, increments: list[Tensor]) -> Tensor:
    levels = respaced(num_steps)
    for step, (t, beta, bar, before) in enumerate(reversed(levels)):
        noise, v = toy_answer((x,), float(t), t / 1000)
        x0 = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        mean = math.sqrt(before) * beta / (1 - bar) * x0
        mean = mean + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * x
        if step == num_steps - 1:
            return mean
        low = math.log((1 - before) / (1 - bar) * beta)
        log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * low
        x = mean + torch.exp(log_variance / 2) * increments[step]
    return x


def plain_ddim(x: Tensor, num_steps: int, eta: float, increments: list[Tensor]) -> Tensor:
    for step, (t, _, bar, before) in enumerate(reversed(respaced(num_steps))):
        noise, _ = toy_answer((x,), float(t), t / 1000)
        x0 = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        sigma = eta * math.sqrt((1 - before) / (1 - bar)) * math.sqrt(1 - bar / before)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * noise
        if step < num_steps - 1:
            x = x + sigma * increments[step]
    return x


@pytest.mark.parametrize("num_steps", [2, 10, 250])
def test_ddpm_is_the_plain_loop(num_steps: int) -> None:
    noise = double(3, 2, 4, 4)
    fresh = [double(3, 2, 4, 4, seed=10 + i) for i in range(num_steps - 1)]
    asked: list[int] = []

    def increments(step: int) -> States:
        asked.append(step)
        return (fresh[step],)

    (x,) = sample_ddpm(toy_answer, (noise,), num_steps=num_steps, increments=increments)
    assert asked == list(range(num_steps - 1)) and x.dtype == torch.float64
    torch.testing.assert_close(x, plain_ddpm(noise, num_steps, fresh), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_plain_loop(eta: float) -> None:
    noise = double(3, 2, 4, 4)
    fresh = [double(3, 2, 4, 4, seed=10 + i) for i in range(19)]
    asked: list[int] = []

    def increments(step: int) -> States:
        asked.append(step)
        return (fresh[step],)

    (x,) = sample_ddim(toy_answer, (noise.float(),), num_steps=20, increments=increments, eta=eta)
    assert asked == (list(range(19)) if eta else [])
    expected = plain_ddim(noise.float().double(), 20, eta, fresh)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-9)


def gaussian_answer(std: float) -> NoiseFn:
    """The exact noise of data N(0, std^2), and the posterior's variance."""

    def answer(states: States, timestep: float, t_guidance: float) -> States:
        bar = ALPHA_BAR[int(timestep)]
        share = math.sqrt(1 - bar) / (bar * std**2 + 1 - bar)
        noise = tuple(share * state for state in states)
        return (*noise, *(torch.zeros_like(state) for state in states))

    return answer


def test_samples_have_the_spread_of_the_data() -> None:
    noise, steps = (double(20_000),), 250
    answer = gaussian_answer(0.5)
    (ancestral,) = sample_ddpm(
        answer, noise, num_steps=steps, increments=lambda i: (double(20_000, seed=100 + i),)
    )
    assert ancestral.std().item() == pytest.approx(0.5, rel=0.03)
    (straight,) = sample_ddim(answer, noise, num_steps=steps, increments=lambda i: noise)
    torch.testing.assert_close(straight, 0.5 * noise[0], rtol=0.02, atol=0)


def test_two_states_are_sampled_as_each_alone() -> None:
    a, b = double(2, 4, 3, 3), double(2, 7, seed=5)
    fresh = {"a": double(9, 2, 4, 3, 3, seed=6), "b": double(9, 2, 7, seed=7)}
    both = sample_ddpm(
        toy_answer, (a, b), num_steps=10, increments=lambda i: (fresh["a"][i], fresh["b"][i])
    )
    (alone,) = sample_ddpm(toy_answer, (b,), num_steps=10, increments=lambda i: (fresh["b"][i],))
    assert len(both) == 2 and torch.equal(both[1], alone)


# --- guidance and the table --------------------------------------------------------------------


def test_guidance_combines_the_noise_and_keeps_the_conditions_variance() -> None:
    calls: list[int] = []

    def model(states: States, t_B: Tensor, cond: Tensor) -> States:
        calls.append(len(cond))
        return states[0] + cond[:, None], 10 * states[0] + cond[:, None]

    x, cond, null = double(2, 4), torch.tensor([1, 2]), torch.tensor([5, 5])
    answer = guided(model, cond, null, scale=3.0, interval=(0.0, 0.4), dtype=torch.float64)
    noise, v = answer((x,), 400.0, 0.4)
    c, u = x + cond[:, None], x + 5
    torch.testing.assert_close(noise, u + 3 * (c - u))
    torch.testing.assert_close(v, 10 * x + cond[:, None])
    noise, v = answer((x,), 401.0, 0.401)
    torch.testing.assert_close(noise, c)
    torch.testing.assert_close(v, 10 * x + cond[:, None])
    assert calls == [4, 2]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_model_evaluations(sampler: str) -> None:
    assert count_model_evaluations(sampler, 250) == 250
    assert count_model_evaluations(sampler, 250, scale=1.5) == 500
    inside = sum(level.timestep <= 700 for level in chain(250))
    count = count_model_evaluations(sampler, 250, scale=1.5, interval=(0.0, 0.7))
    assert count == 250 + inside == 425
    with pytest.raises(ConfigError, match="got 1001, expected 1 to 1000"):
        count_model_evaluations(sampler, 1001)


def test_samplers_are_chosen_by_what_a_model_answers() -> None:
    def chosen(name: str, answer: str) -> str:
        return choose_sampler(name, {answer}, "a checkpoint of M").name

    assert [chosen(n, "velocity") for n in ("auto", "ode", "heun")] == ["sde", "euler", "heun"]
    assert [chosen(n, "predict_noise") for n in ("auto", "ode", "ddim")] == ["ddpm", "ddim", "ddim"]
    wrong = "sampler euler does not fit a checkpoint of M: use --sampler with one of ddpm, ddim"
    with pytest.raises(ConfigError, match=wrong):
        chosen("euler", "predict_noise")
    with pytest.raises(ConfigError, match="ddpm does not fit .* one of sde, euler, heun"):
        chosen("ddpm", "velocity")
    with pytest.raises(UnknownNameError, match="did you mean 'euler'"):
        chosen("eulr", "velocity")
    with pytest.raises(ConfigError, match="neither velocities nor noise"):
        choose_sampler("auto", (), "a checkpoint of M")


def test_the_choices_of_the_command_are_the_table() -> None:
    from repa_pipeline.config_sample import SampleConfig

    (choices,) = (
        field.metadata["choices"]
        for field in SampleConfig.__dataclass_fields__.values()
        if field.name == "sampler"
    )
    assert set(choices) == {"auto", "ode", *SAMPLERS}
