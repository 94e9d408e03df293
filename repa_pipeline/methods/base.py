"""What a method is: the arrays it reads, its networks, its loss, and how it is sampled.

Interpolant, samplers and EMA act on a tuple of states, latents first, so a method may diffuse more
than the latents (a class token beside them, say). The trainer owns data order, random draws,
optimiser and checkpoints; the method owns everything about the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.models import ModelSpec


@dataclass(frozen=True)
class FeatureInfo:
    """A teacher as its sealed array describes it.

    grid is (rows, columns) of patch tokens; preserves what of a token is kept in what was opened;
    class_token whether the class token is stored too.
    """

    name: str
    width: int
    grid: tuple[int, int]
    preserves: frozenset[str]
    class_token: bool = False


@dataclass(frozen=True)
class Inputs:
    """What the cache offers a method; latents are [latent_channels, latent_size, latent_size]."""

    resolution: int
    latent_channels: int
    latent_size: int
    num_classes: int
    features: tuple[FeatureInfo, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device.

    latents: float32 [B, C, h, w], a fresh posterior sample, scaled. features: for each teacher
    its patch tokens float32 [B, T, D], decoded; without "magnitude" in the method's needs their
    length means nothing; empty in a phase that reads none. cond: int64 [B], the class, the null
    label where it was dropped. class_tokens: for each teacher float32 [B, D], None where the
    cache does not keep it. step: the optimiser step, counted from 0.
    """

    latents: Tensor
    features: tuple[Tensor, ...]
    cond: Tensor
    class_tokens: tuple[Tensor | None, ...] = ()
    step: int = 0


@dataclass(frozen=True)
class Phase:
    """Steps from `start` on, up to the next phase, in which the same parts are trained.

    uses_features: whether teacher tokens are read. idle: submodules that get no gradient.
    """

    start: int = 0
    uses_features: bool = False
    idle: tuple[str, ...] = ()


class Method(Protocol):
    """Built as `Class(config, model_spec, inputs)`; raises RepaError for what cannot work.

    A method is also a VelocityMethod or a NoiseMethod: that is what decides how it is sampled.
    """

    def __init__(self, config: TrainConfig, model: ModelSpec, inputs: Inputs): ...

    def build(self) -> nn.Module:
        """The trainable module, trunk and heads, initialised from torch's global generator."""
        ...

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one sample of each state, latents first."""
        ...

    def states(self, batch: Batch) -> States:
        """The clean states of a batch, each [B, ...], latents first."""
        ...

    def phases(self) -> tuple[Phase, ...]:
        """What is trained when: one phase from step 0 on, or several in the order of their start.

        Optimiser, EMA and checkpoints keep every part; the trainer rebuilds what else depends on
        the parts between two phases.
        """
        ...

    def loss(
        self, model: nn.Module, ema: nn.Module, batch: Batch, t: Tensor, noise: States
    ) -> dict[str, Tensor]:
        """What is minimised, the scalar "loss", a mean over the batch; the others are logged.

        Those are scalars, means over the batch, or a value a sample [B] (then also logged by t).
        t: float32 [B]; noise: standard normal, shaped like `states(batch)`; `ema` is frozen.
        """
        ...

    @property
    def null_label(self) -> int:
        """The label of the unconditional model."""
        ...


class VelocityMethod(Method, Protocol):
    """A method that the samplers sde, euler and heun fit."""

    def velocity(self, model: nn.Module, states: States, t: Tensor, cond: Tensor) -> States:
        """Velocities of the states at times t [B]; heads that sampling does not need stay idle."""
        ...


class NoiseMethod(Method, Protocol):
    """A method that the samplers ddpm and ddim fit."""

    def predict_noise(
        self, model: nn.Module, states: States, timesteps: Tensor, cond: Tensor
    ) -> States:
        """The noise in each state at whole timesteps [B] (0 to 999, any dtype), then the value v
        of each state's learned variance (diffusion/ddpm.py); idle heads as in `velocity`."""
        ...


# What a sampler may ask a method (diffusion/sampling.py); a method has one of them.
ANSWERS = ("velocity", "predict_noise")


def answers_of(method: Method) -> frozenset[str]:
    """The names of the functions of ANSWERS that a method has."""
    return frozenset(name for name in ANSWERS if hasattr(method, name))
