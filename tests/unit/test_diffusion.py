"""Paths, losses, samplers and guidance against closed forms and plain loops.

The closed form: data N(0, S^2), so x_t is N(0, alpha^2 S^2 + sigma^2) and velocity and score are
linear in x.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa_pipeline.diffusion.guidance import count_model_evaluations, guided
from repa_pipeline.diffusion.interpolant import (
    PATHS,
    Path,
    States,
    draw_t,
    interpolate,
    score_from_velocity,
)
from repa_pipeline.diffusion.losses import alignment_loss, alignment_per_sample, denoising_loss
from repa_pipeline.diffusion.samplers import (
    VelocityFn,
    ode_times,
    sample_ode,
    sample_sde,
    sde_times,
)
from repa_pipeline.errors import UnknownNameError
from repa_pipeline.models.projector import build_projector
from repa_pipeline.models.sit import SiT, SiTConfig

S = 0.5
paths = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))


def double(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gaussian_velocity(path: Path, x: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = path.alpha(t), path.sigma(t)
    slope = path.d_alpha(t) * alpha * S**2 + path.d_sigma(t) * sigma
    return x * slope / (alpha**2 * S**2 + sigma**2)


def gaussian_model(path: Path) -> VelocityFn:
    def velocity(states: States, t: float, t_guidance: float) -> States:
        time = torch.tensor(t, dtype=torch.float64)
        return tuple(gaussian_velocity(path, state, time) for state in states)

    return velocity


# --- interpolant -------------------------------------------------------------------------------


@paths
def test_path_ends_at_data_and_noise(path: Path) -> None:
    x, e = (double(3, 4, seed=1),), (double(3, 4, seed=2),)
    (start,), _ = interpolate(path, x, e, torch.zeros(3, dtype=torch.float64))
    (end,), _ = interpolate(path, x, e, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(start, x[0])
    torch.testing.assert_close(end, e[0])


@paths
def test_velocity_is_the_derivative_in_time(path: Path) -> None:
    x, e = (double(5, 2, 3, seed=1),), (double(5, 2, 3, seed=2),)
    t, h = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 1e-5
    _, (v,) = interpolate(path, x, e, t)
    (ahead,), _ = interpolate(path, x, e, t + h)
    (behind,), _ = interpolate(path, x, e, t - h)
    torch.testing.assert_close(v, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-8)


def test_linear_velocity_is_noise_minus_data() -> None:
    x, e = (
        (torch.randn(2, 4, 8, 8), torch.randn(2, 7)),
        (torch.randn(2, 4, 8, 8), torch.randn(2, 7)),
    )
    x_t, v = interpolate(PATHS["linear"], x, e, torch.tensor([0.25, 0.5]))
    for i in range(2):
        torch.testing.assert_close(v[i], e[i] - x[i])
        torch.testing.assert_close(x_t[i][0], 0.75 * x[i][0] + 0.25 * e[i][0])
        torch.testing.assert_close(x_t[i][1], 0.5 * x[i][1] + 0.5 * e[i][1])


@paths
def test_lognormal_times_have_that_noise_to_data_ratio(path: Path) -> None:
    z = double(100)
    t = draw_t("lognormal", path.name, z)
    torch.testing.assert_close(path.sigma(t) / path.alpha(t), z.exp())
    assert 0 < t.min() and t.max() < 1


def test_uniform_times_are_the_draw() -> None:
    u = torch.rand(5)
    assert torch.equal(draw_t("uniform", "cosine", u), u)


def test_unknown_names_are_answered_with_the_known() -> None:
    with pytest.raises(UnknownNameError, match="lognormal, uniform"):
        draw_t("normal", "linear", torch.rand(2))
    with pytest.raises(UnknownNameError, match="cosine, linear"):
        draw_t("uniform", "linaer", torch.rand(2))
    with pytest.raises(UnknownNameError, match="ddim, ddpm, euler, heun, sde"):
        count_model_evaluations("dpm", 10)


@paths
def test_score_of_a_gaussian(path: Path) -> None:
    x = double(6, 3)
    t = torch.linspace(0.05, 1.0, 6, dtype=torch.float64)
    v = torch.stack([gaussian_velocity(path, row, time) for row, time in zip(x, t, strict=True)])
    (score,) = score_from_velocity(path, (v,), (x,), t)
    variance = path.alpha(t) ** 2 * S**2 + path.sigma(t) ** 2
    torch.testing.assert_close(score, -x / variance[:, None])
    (one,) = score_from_velocity(path, (v[2],), (x[2],), t[2])
    torch.testing.assert_close(one, score[2])


# --- losses ------------------------------------------------------------------------------------


def test_denoising_loss_is_per_sample_and_adds_states() -> None:
    a, b = torch.randn(3, 4, 8, 8), torch.randn(3, 7)
    zero = (torch.zeros_like(a), torch.zeros_like(b))
    expected = torch.stack([a[i].square().mean() + b[i].square().mean() for i in range(3)])
    torch.testing.assert_close(denoising_loss((a, b), zero), expected)
    torch.testing.assert_close(denoising_loss(a, zero[0]) + denoising_loss(b, zero[1]), expected)


def test_alignment_loss_equals_the_per_sample_loop() -> None:
    projected = [torch.randn(5, 16, 24), torch.randn(5, 16, 40)]
    targets = [torch.randn(5, 16, 24), torch.randn(5, 16, 40)]
    total = 0.0
    for ours, theirs in zip(projected, targets, strict=True):
        for sample in range(5):
            for token in range(16):
                a, b = ours[sample, token], theirs[sample, token]
                total -= (a @ b / (a.norm() * b.norm())).item() / 16
    assert alignment_loss(projected, targets).item() == pytest.approx(total / (2 * 5), abs=1e-6)
    per_sample = alignment_per_sample(projected, targets)
    assert per_sample.shape == (5,)
    assert per_sample.mean().item() == pytest.approx(total / (2 * 5), abs=1e-6)


def test_alignment_is_the_product_of_normalised_tokens_zeros_too() -> None:
    ours = torch.randn(3, 16, 24)
    theirs = 100 * torch.randn(3, 16, 24)
    theirs[1, 4] = 0
    theirs[2] *= 1e-8
    one, other = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    alignment = alignment_per_sample([one], [theirs])
    plain = -(F.normalize(other, dim=-1) * F.normalize(theirs, dim=-1)).sum(-1).mean(-1)
    torch.testing.assert_close(alignment, plain)
    alignment.sum().backward()
    plain.sum().backward()
    assert one.grad is not None and bool(one.grad.abs().sum() > 0)
    torch.testing.assert_close(one.grad, other.grad)
    zero = torch.zeros(1, 2, 24, requires_grad=True)
    alignment_loss([zero], [torch.zeros(1, 2, 24)]).backward()
    assert zero.grad is not None and not zero.grad.any()


def test_alignment_loss_ignores_length_and_reaches_its_bounds() -> None:
    tokens = torch.randn(2, 4, 8)
    assert alignment_loss([3 * tokens], [tokens]).item() == pytest.approx(-1)
    assert alignment_loss([-tokens], [tokens]).item() == pytest.approx(1)


def test_alignment_loss_survives_half_precision() -> None:
    tokens = torch.full((1, 2, 768), 3000.0, dtype=torch.float16)
    assert alignment_loss([tokens], [tokens]).item() == pytest.approx(-1)


# --- samplers ----------------------------------------------------------------------------------


def test_time_grids() -> None:
    assert ode_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    times = sde_times(250)
    assert len(times) == 251
    assert times[0] == 1.0 and times[-1] == 0.0
    assert times[249] == pytest.approx(0.04)
    assert times[1] == pytest.approx(1 - 0.96 / 249)
    assert sde_times(1) == [1.0, 0.0]


@paths
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_ode_reaches_the_data_at_its_order(path: Path, heun: bool, order: int) -> None:
    # the ODE maps N(0, 1) to N(0, S^2): every noise to S times itself
    noise = (double(4, 3),)
    errors = [
        (
            sample_ode(gaussian_model(path), noise, num_steps=n, heun=heun, path=path)[0]
            - S * noise[0]
        )
        .abs()
        .max()
        .item()
        for n in (40, 80)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] < (1e-3 if heun else 2e-2)


@paths
def test_sde_samples_have_the_variance_of_the_data(path: Path) -> None:
    noise = (double(20_000),)
    steps: list[int] = []

    def increments(step: int) -> States:
        steps.append(step)
        return (double(20_000, seed=100 + step),)

    (x,) = sample_sde(gaussian_model(path), noise, num_steps=250, path=path, increments=increments)
    assert steps == list(range(249))
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.std().item() == pytest.approx(S, rel=0.03)


def test_last_sde_step_is_noise_free() -> None:
    noise = (double(3),)
    (x,) = sample_sde(
        lambda states, t, t_guidance: tuple(torch.zeros_like(state) for state in states),
        noise,
        num_steps=1,
        path=PATHS["linear"],
        increments=lambda step: pytest.fail("no noisy step"),
    )
    # score of v = 0 at t = 1 is -x, the drift v - t * score is x, and the step is -1
    torch.testing.assert_close(x, torch.zeros(3, dtype=torch.float64))


def test_two_states_are_sampled_as_each_alone() -> None:
    path = PATHS["linear"]
    model, a, b = gaussian_model(path), double(2, 4, 8, 8), double(2, 7, seed=5)
    noise = {
        "a": [double(2, 4, 8, 8, seed=i) for i in range(9)],
        "b": [double(2, 7, seed=i) for i in range(9)],
    }
    both = sample_sde(
        model, (a, b), num_steps=10, path=path,
        increments=lambda i: (noise["a"][i], noise["b"][i]),
    )  # fmt: skip
    (alone,) = sample_sde(
        model, (b,), num_steps=10, path=path, increments=lambda i: (noise["b"][i],)
    )
    assert torch.equal(both[1], alone)
    ode = sample_ode(model, (a, b), num_steps=5, heun=True, path=path)
    assert torch.equal(ode[0], sample_ode(model, (a,), num_steps=5, heun=True, path=path)[0])


def test_heun_keeps_the_guidance_of_its_first_evaluation() -> None:
    calls: list[tuple[float, float]] = []

    def velocity(states: States, t: float, t_guidance: float) -> States:
        calls.append((t, t_guidance))
        return states

    sample_ode(velocity, (double(1),), num_steps=2, heun=True)
    assert calls == [(1.0, 1.0), (0.5, 1.0), (0.5, 0.5)]


# --- guidance ----------------------------------------------------------------------------------


class Recorder:
    """A linear toy model that remembers how it was called."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, states: States, t_B: Tensor, cond: Tensor) -> States:
        assert len(states[0]) == len(t_B) == len(cond)
        self.batches.append(len(t_B))
        self.dtypes |= {states[0].dtype, t_B.dtype}
        return tuple(state * (1 + t_B[:, None]) + cond[:, None] for state in states)


def test_guidance_is_the_formula_inside_and_plain_outside() -> None:
    model, x = Recorder(), double(3, 2)
    cond, null = torch.tensor([1, 2, 3]), torch.tensor([10, 10, 10])
    velocity = guided(model, cond, null, scale=1.8, interval=(0.2, 0.7))
    plain = guided(Recorder(), cond, null, scale=1.0, interval=(0.2, 0.7))
    for t in (0.19, 0.71, 1.0):
        assert torch.equal(velocity((x,), t, t)[0], plain((x,), t, t)[0])
    assert model.batches == [3, 3, 3]
    for t in (0.2, 0.5, 0.7):
        (got,) = velocity((x,), t, t)
        base = x * (1 + t)
        conditional, unconditional = base + cond[:, None], base + 10
        expected = unconditional + 1.8 * (conditional - unconditional)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert got.dtype == torch.float64
    assert model.batches[3:] == [6, 6, 6]
    assert model.dtypes == {torch.float32}


def test_scale_one_never_doubles_the_batch() -> None:
    model = Recorder()
    velocity = guided(model, torch.zeros(2), torch.ones(2), scale=1.0, interval=(0.0, 1.0))
    velocity((double(2, 2),), 0.5, 0.5)
    assert model.batches == [2]


def test_guidance_follows_the_time_it_is_told() -> None:
    model = Recorder()
    velocity = guided(model, torch.zeros(2), torch.ones(2), scale=2.0, interval=(0.0, 0.5))
    velocity((double(2, 2),), 0.4, 0.6)
    velocity((double(2, 2),), 0.6, 0.4)
    assert model.batches == [2, 4]


def test_the_model_is_called_in_the_dtype_asked_for() -> None:
    model = Recorder()
    velocity = guided(
        model, torch.zeros(2), torch.ones(2), scale=2.0, interval=(0, 1), dtype=torch.float64
    )
    velocity((double(2, 2),), 0.4, 0.4)
    assert model.dtypes == {torch.float64}


@pytest.mark.parametrize(
    ("scale", "interval", "expected"),
    [(1.0, (0.0, 1.0), 250), (1.8, (0.0, 0.7), 422), (1.8, (0.0, 1.0), 500)],
)
def test_model_evaluations_of_the_published_sde(
    scale: float, interval: tuple[float, float], expected: int
) -> None:
    count = count_model_evaluations("sde", 250, scale=scale, interval=interval)
    assert count == expected
    model = Recorder()
    velocity = guided(model, torch.zeros(1), torch.ones(1), scale=scale, interval=interval)
    still = torch.zeros(1, 1, dtype=torch.float64)
    sample_sde(
        velocity, (still,), num_steps=250, path=PATHS["linear"], increments=lambda step: (still,)
    )
    assert sum(model.batches) == expected


def test_model_evaluations_of_the_ode() -> None:
    assert count_model_evaluations("euler", 50) == 50
    assert count_model_evaluations("heun", 50) == 99
    assert count_model_evaluations("heun", 50, scale=1.5) == 198
    # t = 0.5, 0.4, 0.3, 0.2 twice, t = 0.1 once, each guided
    assert count_model_evaluations("heun", 10, scale=1.5, interval=(0.0, 0.55)) == 19 + 9


def test_sampling_never_calls_the_projectors() -> None:
    config = SiTConfig(8, 4, 2, 32, 2, 4, 10)
    whole = nn.ModuleDict({"model": SiT(config), "projector": build_projector(32, 64, 24)})
    calls: list[str] = []
    for name, module in whole.items():
        module.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
    labels = torch.tensor([1, 2])
    velocity = guided(
        lambda states, t, y: (whole["model"](states[0], t, y),),
        labels,
        torch.full_like(labels, 10),
        scale=1.5,
        interval=(0.0, 0.7),
    )
    with torch.no_grad():
        (x,) = sample_ode(velocity, (double(2, 4, 8, 8),), num_steps=3, heun=True)
    assert calls == ["model"] * 5
    assert math.isfinite(x.sum().item())
