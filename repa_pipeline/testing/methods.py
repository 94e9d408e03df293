"""What every method must do, whatever it trains: `check_method(METHODS["repa"])`.

A plugin's own test is the same line with its own MethodSpec.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.diffusion.interpolant import States
from repa_pipeline.methods import MethodSpec
from repa_pipeline.methods.base import Batch, FeatureInfo, Inputs, Method
from repa_pipeline.models import ModelSpec
from repa_pipeline.training.state import build_method, new_state

_BATCH, _NUM_CLASSES = 6, 5
_MODEL = ModelSpec("conformance", 3, 32, 2, 2, align_depth=2)


def conformance_inputs(num_teachers: int) -> Inputs:
    """Latents [4, 8, 8] of 5 classes and `num_teachers` teachers with a 4x4 grid."""
    preserves = frozenset({"direction", "magnitude"})
    teachers = (FeatureInfo(f"teacher-{i}", 12 + i, (4, 4), preserves) for i in range(num_teachers))
    return Inputs(64, 4, 8, _NUM_CLASSES, tuple(teachers))


def check_method(spec: MethodSpec, num_teachers: int = 2) -> None:
    """Raises AssertionError, saying what is wrong, for a method that breaks the contract."""
    config = TrainConfig(projector_width=16, device="cpu", learning_rate=1e-3)
    inputs = conformance_inputs(num_teachers if spec.uses_features else 0)
    method = build_method(spec.loader, config, _MODEL, inputs)
    model = _build_alike(method, config)
    ema = new_state(config, method, "cpu").ema.module
    batch = _batch(inputs, method.null_label)
    _check_states(method, batch)
    _check_loss(method, model, ema, batch)
    _check_means(method, model, ema, batch)
    _check_velocity(method, model)


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


def _check_loss(method: Method, model: nn.Module, ema: nn.Module, batch: Batch) -> None:
    t, noise = _draws(method)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    assert method.phases()[0].start == 0, "phases() do not begin at step 0"
    losses = method.loss(model, ema, batch, t, noise)
    assert "loss" in losses, f"loss() has no 'loss', only {sorted(losses)}"
    for name, value in losses.items():
        shapes = [()] if name == "loss" else [(), (_BATCH,)]
        assert tuple(value.shape) in shapes, f"'{name}' has shape {tuple(value.shape)}"
        assert torch.isfinite(value).all(), f"'{name}' is {value}"
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            reached = parameter.grad is not None and bool(parameter.grad.any())
            assert reached, f"no gradient reaches {name}"
    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in ema.parameters()), "the EMA got a gradient"
    assert all(torch.equal(v, before[n]) for n, v in ema.state_dict().items()), "the EMA moved"


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


def _check_velocity(method: Method, model: nn.Module) -> None:
    t, states = _draws(method)
    cond = torch.arange(_BATCH) % _NUM_CLASSES
    with torch.no_grad():
        velocity = method.velocity(model, states, t, cond)
        null = method.velocity(model, states, t, torch.full_like(cond, method.null_label))
        alone = method.velocity(model, tuple(s[:1] for s in states), t[:1], cond[:1])
    for state, v, v_null, v_alone in zip(states, velocity, null, alone, strict=True):
        assert v.shape == state.shape and bool(torch.isfinite(v).all()), "velocity()"
        assert v_null.shape == state.shape and bool(torch.isfinite(v_null).all()), "null_label"
        assert torch.allclose(v[:1], v_alone, atol=1e-5), "a sample's velocity depends on others"
    assert not torch.equal(velocity[0], null[0]), "the null label changes nothing"


def _pairs(a: nn.Module, b: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a.state_dict().values(), b.state_dict().values(), strict=True))
