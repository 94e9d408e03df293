"""Guidance inside an interval of times: classifier-free, or by a weaker model.

REPA, section 4.4; the interval: arXiv 2404.07724; autoguidance: arXiv 2406.02507.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.diffusion.samplers import LAST_T
from repa_pipeline.diffusion.sampling import SAMPLERS, AnswerFn, SamplerOptions

# model(states, t [B], condition [B]) -> an answer for each state, and what else it has to say
Model = Callable[[States, Tensor, Tensor], States]


def guided(
    model: Model,
    cond: Tensor,
    null_cond: Tensor,
    *,
    scale: float,
    interval: tuple[float, float],
    dtype: torch.dtype = torch.float32,
    weaker: Model | None = None,
) -> AnswerFn:
    """What the samplers ask: `u + scale (c - u)` while low <= t <= high, else c.

    c and u are the model's answers to `cond` and `null_cond` [B, ...], guided on all channels.
    What follows the answer for each state, a learned variance, is the condition's own. The batch
    is doubled, and the null condition evaluated, only inside the interval and when `scale` is not
    1. The model is called with states and times in `dtype`; the samplers' side is float64.

    weaker: autoguidance; u is this model's answer to `cond`, and it runs inside the interval alone.
    """
    low, high = interval
    both = torch.cat([cond, null_cond])

    def ask(asked: Model, states: States, t: float, cond: Tensor) -> States:
        inputs = tuple(state.to(dtype) for state in states)
        t_B = torch.full((len(inputs[0]),), t, dtype=dtype, device=inputs[0].device)
        return tuple(part.to(torch.float64) for part in asked(inputs, t_B, cond))

    def answer(states: States, t: float, t_guidance: float) -> States:
        if scale == 1.0 or not low <= t_guidance <= high:
            return ask(model, states, t, cond)
        if weaker is None:
            doubled = tuple(torch.cat([state, state]) for state in states)
            halves = [part.chunk(2) for part in ask(model, doubled, t, both)]
        else:
            own, others = ask(model, states, t, cond), ask(weaker, states, t, cond)
            halves = list(zip(own, others, strict=True))
        guided_ = (u + scale * (c - u) for c, u in halves[: len(states)])
        return (*guided_, *(c for c, _ in halves[len(states) :]))

    return answer


def count_model_evaluations(
    sampler: str,
    num_steps: int,
    *,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    last_t: float = LAST_T,
) -> int:
    """Forward passes of the model per sample, a guided evaluation counted as two.

    sampler: one of SAMPLERS. Counted by running the sampler itself on a toy model, so it cannot
    disagree with it. 250 SDE steps cost 250, guided on [0, 0.7] 422, guided always 500. Raises
    UnknownNameError for another sampler, ConfigError for steps that it cannot make.
    """
    return count_evaluations(
        sampler, num_steps, autoguided=False, scale=scale, interval=interval, last_t=last_t
    )[0]


def count_evaluations(
    sampler: str,
    num_steps: int,
    *,
    autoguided: bool,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    last_t: float = LAST_T,
) -> tuple[int, int]:
    """As `count_model_evaluations`: those of the model, and those of the weaker one."""
    spec = SAMPLERS[sampler]
    num_answers = 2 if spec.asks == "predict_noise" else 1
    counts = [0, 0]

    def counting(which: int) -> Model:
        def model(states: States, t_B: Tensor, cond: Tensor) -> States:
            counts[which] += len(t_B)
            return states * num_answers

        return model

    one = (torch.zeros(1),)
    weaker = counting(1) if autoguided else None
    answer = guided(counting(0), one[0], one[0], scale=scale, interval=interval, weaker=weaker)
    options = SamplerOptions(num_steps, increments=lambda _: one, last_t=last_t)
    spec.run(answer, one, options)
    return counts[0], counts[1]
