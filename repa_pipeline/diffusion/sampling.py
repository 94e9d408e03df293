"""The table SAMPLERS: every sampler by name, and which of a model's answers it asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from repa_pipeline.diffusion.ddpm import sample_ddim, sample_ddpm
from repa_pipeline.diffusion.interpolant import PATHS, Path, States
from repa_pipeline.diffusion.samplers import LAST_T, sample_ode, sample_sde
from repa_pipeline.errors import ConfigError
from repa_pipeline.tables import Table

# answer(states, t, t_guidance): velocities (VelocityFn) or noise and variance (NoiseFn); float64
AnswerFn = Callable[[States, float, float], States]


@dataclass(frozen=True)
class SamplerOptions:
    """What samplers may be told; each takes what it knows.

    increments(i) gives the standard normal increments of noisy step i; eta is DDIM's.
    """

    num_steps: int
    increments: Callable[[int], States]
    path: Path = PATHS["linear"]
    last_t: float = LAST_T
    eta: float = 0.0


@dataclass(frozen=True)
class SamplerSpec:
    """One sampler: `run(answer, noise, options)` gives the states at the end.

    asks: the function of a method that answers it, "velocity" or "predict_noise".
    """

    name: str
    asks: str
    run: Callable[[AnswerFn, States, SamplerOptions], States]
    deterministic: bool = False


def _sde(answer: AnswerFn, noise: States, options: SamplerOptions) -> States:
    return sample_sde(
        answer,
        noise,
        num_steps=options.num_steps,
        path=options.path,
        increments=options.increments,
        last_t=options.last_t,
    )


def _ode(heun: bool) -> Callable[[AnswerFn, States, SamplerOptions], States]:
    def run(answer: AnswerFn, noise: States, options: SamplerOptions) -> States:
        return sample_ode(answer, noise, num_steps=options.num_steps, heun=heun, path=options.path)

    return run


def _ddpm(answer: AnswerFn, noise: States, options: SamplerOptions) -> States:
    return sample_ddpm(answer, noise, num_steps=options.num_steps, increments=options.increments)


def _ddim(answer: AnswerFn, noise: States, options: SamplerOptions) -> States:
    return sample_ddim(
        answer,
        noise,
        num_steps=options.num_steps,
        increments=options.increments,
        eta=options.eta,
    )


# The first that fits is the default.
SAMPLERS: Table[SamplerSpec] = Table(
    "sampler",
    [
        SamplerSpec("sde", "velocity", _sde),
        SamplerSpec("euler", "velocity", _ode(heun=False), deterministic=True),
        SamplerSpec("heun", "velocity", _ode(heun=True), deterministic=True),
        SamplerSpec("ddpm", "predict_noise", _ddpm),
        SamplerSpec("ddim", "predict_noise", _ddim, deterministic=True),
    ],
)


def choose_sampler(name: str, answers: Collection[str], what: str) -> SamplerSpec:
    """The sampler `name` for a model that gives `answers`; `what` names the model in an error.

    "auto" is the first that fits (sde, ddpm), "ode" the first deterministic one (euler, ddim).
    Raises ConfigError for one that does not fit, UnknownNameError for one that is not known.
    """
    fitting = [spec for spec in SAMPLERS.values() if spec.asks in answers]
    if name == "ode":
        fitting = [spec for spec in fitting if spec.deterministic]
    if name in ("auto", "ode"):
        if not fitting:
            raise ConfigError(f"{what} gives neither velocities nor noise: it cannot be sampled")
        return fitting[0]
    spec = SAMPLERS[name]
    if spec not in fitting:
        fit = ", ".join(other.name for other in fitting)
        raise ConfigError(f"sampler {name} does not fit {what}: use --sampler with one of {fit}")
    return spec
