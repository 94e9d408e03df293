"""Why steps are skipped: looks for the first thing that is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from repa_pipeline.methods.base import Method
from repa_pipeline.training.batches import Micro
from repa_pipeline.training.state import TrainState

_ADVICE = "lower --learning-rate, or try --qk-norm or --dtype float32; the last checkpoint is kept"


def explain(
    method: Method, state: TrainState, micro: Micro, autocast: AbstractContextManager[Any]
) -> str:
    """One line: how many steps in a row were skipped, why the last one, and what to do.

    Runs the last micro-batch once more; the model's gradients are used up.
    """
    found = _look(method, state.model, state.ema.module, micro, autocast)
    count = state.meter.worst_in_a_row
    return f"{count} steps in a row were skipped (now at step {state.step:,}): {found}; {_ADVICE}"


def _look(
    method: Method,
    model: nn.Module,
    ema: nn.Module,
    micro: Micro,
    autocast: AbstractContextManager[Any],
) -> str:
    batch = micro.batch
    inputs = [("the latents", batch.latents)]
    inputs += [(f"the tokens of teacher {i + 1}", f) for i, f in enumerate(batch.features)]
    for what, tensor in inputs:
        if not _is_finite(tensor):
            return f"{what} of the last batch are not finite (run `repa verify`)"
    seen: list[str] = []
    hooks = [
        module.register_forward_hook(_noting(seen, name)) for name, module in model.named_modules()
    ]
    try:
        with autocast:
            losses = method.loss(model, ema, batch, micro.t, micro.noise)
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        return f"the first values that are not finite come out of {seen[0]}"
    bad = [name for name, value in losses.items() if not _is_finite(value)]
    if bad:
        return f"{' and '.join(bad)} are not finite, though all parts of the model are"
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    return _look_at_gradients(model, float(losses["loss"].detach()))


def _look_at_gradients(model: nn.Module, loss: float) -> str:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, grad in grads.items() if not _is_finite(grad)]
    if bad:
        return (
            f"the loss is {loss:.4g}, gradients of {len(bad)} of {len(grads)} parameters are not "
            f"finite, {bad[-1]} for one"
        )
    norms = {name: float(grad.norm()) for name, grad in grads.items()}
    largest = max(norms, key=lambda name: norms[name], default="none")
    return (
        f"the loss is {loss:.4g} and the last batch's gradients are finite, largest in {largest} "
        f"(norm {norms.get(largest, 0.0):.4g}, see --max-grad-norm)"
    )


def _noting(seen: list[str], name: str) -> Any:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if not seen and any(not _is_finite(tensor) for tensor in _tensors(output)):
            seen.append(name or type(module).__name__)

    return note


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
