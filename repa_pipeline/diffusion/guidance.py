"""Classifier-free guidance inside an interval of times (REPA, section 4.4; arXiv 2404.07724)."""

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
) -> AnswerFn:
    """What the samplers ask: `u + scale (c - u)` while low <= t <= high, else c.

    c and u are the model's answers to `cond` and `null_cond` [B, ...], guided on all channels.
    What follows the answer for each state, a learned variance, is the condition's own. The batch
    is doubled, and the null condition evaluated, only inside the interval and when `scale` is not
    1. The model is called with states and times in `dtype`; the samplers' side is float64.
    """
    low, high = interval
    both = torch.cat([cond, null_cond])

    def answer(states: States, t: float, t_guidance: float) -> States:
        guide = scale != 1.0 and low <= t_guidance <= high
        inputs = tuple(torch.cat([state, state]) if guide else state for state in states)
        inputs = tuple(state.to(dtype) for state in inputs)
        t_B = torch.full((len(inputs[0]),), t, dtype=dtype, device=inputs[0].device)
        answers = model(inputs, t_B, both if guide else cond)
        doubles = tuple(part.to(torch.float64) for part in answers)
        if not guide:
            return doubles
        rest = (part.chunk(2)[0] for part in doubles[len(states) :])
        return (*(_combine(part, scale) for part in doubles[: len(states)]), *rest)

    return answer


def _combine(answer: Tensor, scale: float) -> Tensor:
    conditional, unconditional = answer.chunk(2)
    return unconditional + scale * (conditional - unconditional)


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
    spec, count = SAMPLERS[sampler], 0
    num_answers = 2 if spec.asks == "predict_noise" else 1

    def model(states: States, t_B: Tensor, cond: Tensor) -> States:
        nonlocal count
        count += len(t_B)
        return states * num_answers

    one = (torch.zeros(1),)
    answer = guided(model, one[0], one[0], scale=scale, interval=interval)
    options = SamplerOptions(num_steps, increments=lambda _: one, last_t=last_t)
    spec.run(answer, one, options)
    return count
