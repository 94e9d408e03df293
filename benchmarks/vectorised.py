"""Loss, EMA and optimiser of the trainer against the reference's way of doing each.

    python benchmarks/vectorised.py [--batch 32] [--rounds 10] [--json]

At the shapes of SiT-B/2 aligned with DINOv2-B, float32. Before they are timed, both ways are
checked to give the same numbers. They take turns, the fastest of each is kept; on CUDA the device
is waited for at the ends of a turn. gain = seconds of the plain way / seconds of ours.

    loss             alignment, forward and backward: whole tensors | a loop over samples, each
                     normalised by itself
    ema, ema of 3    one average, three: many tensors a kernel, moved by a weight on the device |
                     a loop over the names of an OrderedDict
    optimiser        fused AdamW that skips by a flag on the device | AdamW(foreach=False,
                     fused=False), which has no skipping
    after backward   `optimiser_step`: clip, AdamW, one average, gradients dropped | the norm tensor
                     by tensor, the two loops above, a look at the norm, gradients dropped
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import command, save
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.diffusion.losses import alignment_per_sample
from repa_pipeline.models import MODELS, build_model
from repa_pipeline.models.ema import Ema, update_averages
from repa_pipeline.models.projector import build_projector
from repa_pipeline.training.meter import Meter
from repa_pipeline.training.state import TrainState, optimiser_step

MODEL, TOKENS, WIDTH = "SiT-B/2", 256, 768
DECAYS = (0.9999, 0.999, 0.99)
CONFIG = TrainConfig(model=MODEL)
Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=0, help="0: 256 on CUDA, 32 on the CPU")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    on_cuda = device.startswith("cuda")
    batch = arguments.batch or (256 if on_cuda else 32)
    prepare_compute(0)
    torch.manual_seed(0)
    found = {
        name: compare(*make(device), arguments.rounds, device)
        for name, make in {
            "loss": lambda device: loss_ways(batch, device),
            "ema": lambda device: ema_ways(DECAYS[:1], device),
            "ema of 3": lambda device: ema_ways(DECAYS, device),
            "optimiser": optimiser_ways,
            "after backward": step_ways,
        }.items()
    }
    result = {
        "command": command(),
        "model": MODEL,
        "batch": batch,
        "device_name": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "gain": {name: one["gain"] for name, one in found.items()},
        "ms": {name: one["ms"] for name, one in found.items()},
    }
    path = save("vectorised.cuda" if on_cuda else "vectorised", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def compare(ours: Run, plain: Run, rounds: int, device: str) -> dict[str, Any]:
    best = {"ours": float("inf"), "plain": float("inf")}
    for number in range(rounds + 1):  # the first chooses kernels
        for name, run in (("ours", ours), ("plain", plain)):
            seconds = timed(run, device)
            best[name] = min(best[name], seconds) if number else float("inf")
    ms = {name: round(1000 * seconds, 3) for name, seconds in best.items()}
    return {"gain": round(best["plain"] / best["ours"], 2), "ms": ms}


def timed(run: Run, device: str) -> float:
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def loss_ways(batch: int, device: str) -> tuple[Run, Run]:
    shape = (batch, TOKENS, WIDTH)
    projected = torch.randn(shape, device=device, requires_grad=True)
    target = torch.randn(shape, device=device)

    def ours() -> tuple[Tensor, ...]:
        loss = alignment_per_sample([projected], [target]).mean()
        return loss, *torch.autograd.grad(loss, projected)

    def plain() -> tuple[Tensor, ...]:
        loss = alignment_by_loop([projected], [target])
        return loss, *torch.autograd.grad(loss, projected)

    for one, other in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)
    return ours, plain


def alignment_by_loop(projected: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Teacher by teacher, sample by sample."""
    total = torch.zeros((), device=projected[0].device)
    for ours, theirs in zip(projected, targets, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            one, other = F.normalize(one, dim=-1), F.normalize(other, dim=-1)
            total = total + (-(one * other).sum(dim=-1)).mean()
    return total / (len(projected) * len(projected[0]))


def network(device: str) -> nn.Module:
    trunk = build_model(MODELS[MODEL], input_size=32, in_channels=4, num_classes=1000)
    heads = nn.ModuleList([build_projector(WIDTH, CONFIG.projector_width, WIDTH)])
    return nn.ModuleDict({"trunk": trunk, "projectors": heads}).to(device)


@torch.no_grad()
def ema_ways(decays: tuple[float, ...], device: str) -> tuple[Run, Run]:
    model = network(device)
    averages = [Ema(model, decay) for decay in decays]
    copies = [(copy.deepcopy(average.module), average.decay) for average in averages]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    advance = torch.ones((), device=device)

    def ours() -> None:
        update_averages(averages, model, advance)

    def plain() -> None:
        for average, decay in copies:
            ema_by_loop(average, model, decay)

    for _ in range(3):
        ours()
        plain()
    for average, (other, _) in zip(averages, copies, strict=True):
        assert_same(average.module, other)
    return ours, plain


@torch.no_grad()
def ema_by_loop(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Name by name."""
    averaged = OrderedDict(average.named_parameters())
    for name, parameter in OrderedDict(model.named_parameters()).items():
        averaged[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


def optimiser_ways(device: str) -> tuple[Run, Run]:
    (model, fused), (other, loop) = twins(device)
    good: Any = fused
    good.found_inf = torch.zeros((), device=device)

    def ours() -> None:
        fused.step()

    def plain() -> None:
        loop.step()

    ours()
    plain()
    assert_same(model, other)
    return ours, plain


def step_ways(device: str) -> tuple[Run, Run]:
    (model, fused), (other, loop) = twins(device)
    state = TrainState(model, Ema(model, DECAYS[0]), fused, Meter(device))
    average = copy.deepcopy(other).requires_grad_(False)
    grads = {id(p): p.grad for m in (model, other) for p in m.parameters()}
    config = TrainConfig(model=MODEL, clip=1e-3)  # clips every time: a gradient is used again

    def give(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = grads[id(parameter)]

    def ours() -> None:
        give(model)
        optimiser_step(config, state)

    def plain() -> None:
        give(other)
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), config.clip, foreach=False)
        if float(norm) <= config.max_grad_norm:
            loop.step()
            ema_by_loop(average, other, DECAYS[0])
        loop.zero_grad(set_to_none=True)

    ours()
    plain()
    assert_same(model, other)
    assert_same(state.ema.module, average)
    return ours, plain


def twins(
    device: str,
) -> tuple[tuple[nn.Module, torch.optim.AdamW], tuple[nn.Module, torch.optim.AdamW]]:
    """The same network and gradients twice: with a fused optimiser, with one that loops."""
    model = network(device)
    other = copy.deepcopy(model)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if one.requires_grad:
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
    settings = {"lr": CONFIG.learning_rate, "weight_decay": CONFIG.weight_decay}
    ways = [{"fused": True}, {"fused": False, "foreach": False}]
    pairs = [
        (module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad],
                                   betas=(0.9, CONFIG.beta2), **settings, **way))
        for module, way in zip((model, other), ways, strict=True)
    ]  # fmt: skip
    return pairs[0], pairs[1]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


if __name__ == "__main__":
    main()
