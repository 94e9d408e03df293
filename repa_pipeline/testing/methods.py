"""What every method must do, whatever it trains: `check_method(METHODS["repa"])`.

A plugin's own test is the same line with its own MethodSpec.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.methods import MethodSpec
from repa_pipeline.methods.base import (
    ANSWERS,
    Batch,
    FeatureInfo,
    Inputs,
    Method,
    Phase,
    answers_of,
)
from repa_pipeline.models import MODELS, ModelSpec
from repa_pipeline.training.state import build_method, new_state

_BATCH, _NUM_CLASSES = 6, 5
# Aligned methods have a second phase from here on.
_ALIGN_STEPS = 3
_MODEL = ModelSpec("conformance", 3, 32, 2, 2, align_depth=2)
_LOADERS = {spec.family: spec.loader for spec in MODELS.packaged.values()}


def conformance_inputs(num_teachers: int) -> Inputs:
    """Latents [4, 8, 8] of 5 classes and `num_teachers` teachers with a 4x4 grid."""
    preserves = frozenset({"direction", "magnitude"})
    teachers = (FeatureInfo(f"teacher-{i}", 12 + i, (4, 4), preserves) for i in range(num_teachers))
    return Inputs(64, 4, 8, _NUM_CLASSES, tuple(teachers))


def conformance_model(family: str) -> ModelSpec:
    """A tiny trunk of a family of MODELS; of SiT's for a method that brings its own."""
    family = family or _MODEL.family
    return dataclasses.replace(_MODEL, family=family, loader=_LOADERS[family])


def check_method(spec: MethodSpec, num_teachers: int = 2, **settings: Any) -> None:
    """Raises AssertionError, saying what is wrong, for a method that breaks the contract.

    `settings` are further settings of `repa train`.
    """
    plain: dict[str, Any] = {"projector_width": 16, "align_steps": _ALIGN_STEPS}
    config = TrainConfig(device="cpu", learning_rate=1e-3, **{**plain, **settings})
    inputs = conformance_inputs(num_teachers if spec.uses_features else 0)
    method = build_method(spec.loader, config, conformance_model(spec.family), inputs)
    model = _build_alike(method, config)
    ema = new_state(config, method, "cpu").ema.module
    batch = _batch(inputs, method.null_label)
    _check_states(method, batch)
    _check_phases(spec, method, model, ema, batch)
    _check_means(method, model, ema, batch)
    _check_answers(method, model)


def _build_alike(method: Method, config: TrainConfig) -> nn.Module:
    """A built model whose zero-initialised layers were moved off zero; equal seeds, equal model."""
    model = new_state(config, method, "cpu").model
    again = new_state(config, method, "cpu").model
    assert all(torch.equal(a, b) for a, b in _pairs(model, again)), "build() is not seeded"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def _batch(inputs: Inputs, null_label: int) -> Batch:
    """Every class once, and the null label."""
    generator = torch.Generator().manual_seed(2)
    shape = (_BATCH, inputs.latent_channels, inputs.latent_size, inputs.latent_size)
    return Batch(
        latents=torch.randn(shape, generator=generator),
        features=tuple(
            torch.randn((_BATCH, info.grid[0] * info.grid[1], info.width), generator=generator)
            for info in inputs.features
        ),
        cond=torch.tensor([*range(_NUM_CLASSES), null_label]),
    )


def _draws(method: Method) -> tuple[Tensor, States]:
    generator = torch.Generator().manual_seed(3)
    t = torch.rand(_BATCH, generator=generator)
    shapes = method.state_shapes()
    return t, tuple(torch.randn((_BATCH, *shape), generator=generator) for shape in shapes)


def _check_states(method: Method, batch: Batch) -> None:
    states, shapes = method.states(batch), method.state_shapes()
    assert [tuple(s.shape[1:]) for s in states] == [tuple(s) for s in shapes], "state_shapes()"
    assert torch.equal(states[0], batch.latents), "the latents are the first state"


def _check_phases(
    spec: MethodSpec, method: Method, model: nn.Module, ema: nn.Module, batch: Batch
) -> None:
    phases = method.phases()
    starts = [phase.start for phase in phases]
    assert starts[:1] == [0], "phases() do not begin at step 0"
    assert starts == sorted(set(starts)), f"phases() start at {starts}, not one after the other"
    read = any(phase.uses_features for phase in phases)
    assert read == spec.uses_features, "phases() and the entry differ on reading features"
    for phase in phases:
        features = batch.features if phase.uses_features else ()
        given = dataclasses.replace(batch, features=features, step=phase.start)
        _check_loss(method, model, ema, given, phase)


def _check_loss(
    method: Method, model: nn.Module, ema: nn.Module, batch: Batch, phase: Phase
) -> None:
    t, noise = _draws(method)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    losses = method.loss(model, ema, batch, t, noise)
    assert "loss" in losses, f"loss() has no 'loss', only {sorted(losses)}"
    for name, value in losses.items():
        shapes = [()] if name == "loss" else [(), (_BATCH,)]
        assert tuple(value.shape) in shapes, f"'{name}' has shape {tuple(value.shape)}"
        assert torch.isfinite(value).all(), f"'{name}' is {value}"
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    idle = {name for part in phase.idle for name in _parameters_of(model, part)}
    for name, parameter in model.named_parameters():
        if name in idle:
            assert parameter.grad is None, f"a gradient reaches {name}, idle from {phase.start} on"
        elif parameter.requires_grad:
            reached = parameter.grad is not None and bool(parameter.grad.any())
            assert reached, f"no gradient reaches {name}"
    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in ema.parameters()), "the EMA got a gradient"
    assert all(torch.equal(v, before[n]) for n, v in ema.state_dict().items()), "the EMA moved"


def _parameters_of(model: nn.Module, part: str) -> list[str]:
    return [f"{part}.{name}" for name, _ in model.get_submodule(part).named_parameters()]


def _check_means(method: Method, model: nn.Module, ema: nn.Module, batch: Batch) -> None:
    """Each value is a mean over the batch: parts weighted by their share give the whole."""
    t, noise = _draws(method)
    with torch.no_grad():
        whole = method.loss(model, ema, batch, t, noise)
        whole = {name: value.mean() for name, value in whole.items()}
        summed = {name: torch.zeros(()) for name in whole}
        for part in (slice(0, 2), slice(2, _BATCH)):
            features = tuple(tokens[part] for tokens in batch.features)
            cut = Batch(batch.latents[part], features, batch.cond[part])
            found = method.loss(model, ema, cut, t[part], tuple(e[part] for e in noise))
            for name, value in found.items():
                summed[name] += value.mean() * len(t[part]) / _BATCH
    for name, value in whole.items():
        assert torch.allclose(summed[name], value, atol=1e-5), f"'{name}' is no mean over the batch"


def _check_answers(method: Method, model: nn.Module) -> None:
    """What samplers ask: one of ANSWERS, a function of each sample alone."""
    names = answers_of(method)
    assert len(names) == 1, f"a method has one of {', '.join(ANSWERS)}, not {sorted(names)}"
    (name,) = names
    ask = getattr(method, name)
    t, states = _draws(method)
    if name == "predict_noise":
        t = (1000 * t).floor()
    cond = torch.arange(_BATCH) % _NUM_CLASSES
    with torch.no_grad():
        answers = ask(model, states, t, cond)
        null = ask(model, states, t, torch.full_like(cond, method.null_label))
        alone = ask(model, tuple(s[:1] for s in states), t[:1], cond[:1])
    expected = states if name == "velocity" else states * 2
    for state, v, v_null, v_alone in zip(expected, answers, null, alone, strict=True):
        assert v.shape == state.shape and bool(torch.isfinite(v).all()), f"{name}()"
        assert v_null.shape == state.shape and bool(torch.isfinite(v_null).all()), "null_label"
        assert torch.allclose(v[:1], v_alone, atol=1e-5), f"a sample's {name} depends on others"
    assert not torch.equal(answers[0], null[0]), "the null label changes nothing"


def _pairs(a: nn.Module, b: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a.state_dict().values(), b.state_dict().values(), strict=True))
