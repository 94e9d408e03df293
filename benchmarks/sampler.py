"""Sampling against the published sampler's plain form: images/s, guidance, number formats.

    python benchmarks/sampler.py [--model SiT-S/2] [--batch 4] [--steps 25] [--rounds 3] [--json]
    python benchmarks/sampler.py --suite gpu     SiT-XL/2, batch 64, under 10 minutes on an H100;
                                                 needs of the package's libraries torch, numpy,
                                                 timm, safetensors, pyarrow, crc32c alone

SDE Euler-Maruyama on random weights, latents [4, 32, 32], from random numbers to latents; decoding
is the same on either side and left out. Ways, in turns, the fastest round of each kept:

    plain      the reference's: float32 model whose alignment projector runs too, states in float64,
               all random numbers of a batch from one generator of the device
    float32    ours: no projector, random numbers sample by sample; before it is timed it is
               checked to give the plain way's latents on the same numbers
    tf32, bf16, compiled ones    on CUDA, or where --ways names them

each without guidance and with 1.8 on [0, 0.7], where the condition alone is evaluated outside the
interval. over_plain is images/s over those of plain at the same guidance; guided_cost is seconds
with guidance over seconds without, beside what the counted model evaluations say (422/250 at 250
steps). hours_50k and images_per_s_at_250 scale by evaluations to 250 steps. peak_share is twice the
multiply-adds of the evaluations over the device's dense bf16 peak.

distances: root mean square between latents of one seed, in that way and in float32; two_seeds is
that of float32 at two seeds, which no way should come near.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import command, save
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.diffusion.guidance import count_model_evaluations
from repa_pipeline.methods import METHODS
from repa_pipeline.methods.base import FeatureInfo, Inputs
from repa_pipeline.models import MODELS
from repa_pipeline.stages.flops import TRAINING_PASSES, latent_training_flops
from repa_pipeline.stages.sampler import Draws, LatentSampler, SampledModel, Steps
from repa_pipeline.training.parallel import compile_blocks
from repa_pipeline.training.speed import peak_flops
from repa_pipeline.training.state import build_method

SIDE, CHANNELS, NUM_CLASSES, TEACHER_WIDTH = 32, 4, 1000, 768
GUIDANCES = {"none": (1.0, (0.0, 1.0)), "interval": (1.8, (0.0, 0.7))}
FULL_STEPS, MANY = 250, 50_000
LAST_T = 0.04
CPU_WAYS = ("plain", "float32")
CUDA_WAYS = ("plain", "plain tf32", "float32", "tf32", "tf32 compiled", "bf16", "bf16 compiled")
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ways", default="", help="some of: " + ", ".join(CUDA_WAYS))
    parser.add_argument("--suite", choices=("gpu",))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    on_cuda = device.startswith("cuda")
    ways = tuple(arguments.ways.split(",")) if arguments.ways else CPU_WAYS
    if arguments.suite or (on_cuda and not arguments.ways):
        ways = CUDA_WAYS
    model = arguments.model or ("SiT-XL/2" if on_cuda else "SiT-S/2")
    batch = arguments.batch or (64 if on_cuda else 4)
    steps = arguments.steps or 25
    result = {
        "command": command(),
        "model": model,
        "batch": batch,
        "steps": steps,
        "device_name": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
        **Bench(model, device, batch, steps).measure(ways, arguments.rounds),
    }
    path = save(f"sampler.{'cuda' if on_cuda else 'cpu'}", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


class Bench:
    """One network of random weights, sampled in every way."""

    def __init__(self, model: str, device: str, batch: int, steps: int):
        prepare_compute(0)
        torch.manual_seed(0)
        self.model, self.device, self.batch, self.steps = model, device, batch, steps
        features = (FeatureInfo("dinov2-b", TEACHER_WIDTH, (16, 16), frozenset({"direction"})),)
        inputs = Inputs(256, CHANNELS, SIDE, NUM_CLASSES, features)
        config = TrainConfig(model=model)
        self.method = build_method(METHODS["repa"].loader, config, MODELS[model], inputs)
        self.network = filled(self.method.build()).to(device).eval().requires_grad_(False)
        self.about = {"config": {"path": "linear"}, "latents": {"scale": 1.0, "shift": 0.0}}
        self.compiled: nn.Module | None = None

    def measure(self, ways: tuple[str, ...], rounds: int) -> dict[str, Any]:
        self.check()
        seconds: dict[tuple[str, str], float] = {}
        pairs = list(itertools.product(ways, GUIDANCES))
        for way, guidance in pairs:
            self.latents(way, guidance, 0, steps=2)  # compiles, allocates
        for _ in range(rounds):
            for pair in pairs:
                took = self.timed(*pair)
                seconds[pair] = min(took, seconds.get(pair, took))
                print(f"{pair[0]}, guidance {pair[1]}: {took:.2f} s", file=sys.stderr)
        return {**self.rates(ways, seconds), "distances": self.distances(ways)}

    def rates(self, ways: tuple[str, ...], seconds: dict[tuple[str, str], float]) -> dict[str, Any]:
        counts = {name: self.evaluations(name, self.steps) for name in GUIDANCES}
        full = {name: self.evaluations(name, FULL_STEPS) for name in GUIDANCES}
        peak = peak_flops(self.device)
        per_image = latent_training_flops(MODELS[self.model], CHANNELS, SIDE) / TRAINING_PASSES
        found: dict[str, Any] = {
            "guided_cost_by_evaluations": round(counts["interval"] / counts["none"], 3),
            "guided_cost_at_250_steps": round(full["interval"] / full["none"], 3),
        }
        for way in ways:
            rows = {}
            for name in GUIDANCES:
                took = seconds[way, name]
                at_250 = self.batch / took * counts[name] / full[name]
                rows[name] = {
                    "over_plain": round(seconds["plain", name] / took, 3),
                    "images_per_s_at_250": float(f"{at_250:.4g}"),
                    "hours_50k": round(MANY / at_250 / 3600, 2),
                }
                if peak:
                    rate = per_image * counts[name] * self.batch / took
                    rows[name]["peak_share"] = round(rate / peak, 3)
            cost = seconds[way, "interval"] / seconds[way, "none"]
            found[way] = {"guided_cost": round(cost, 3), **rows}
        return found

    def evaluations(self, guidance: str, steps: int) -> int:
        scale, interval = GUIDANCES[guidance]
        return count_model_evaluations("sde", steps, scale=scale, interval=interval)

    def timed(self, way: str, guidance: str) -> float:
        self.wait()
        began = time.perf_counter()
        self.latents(way, guidance, 0)
        self.wait()
        return time.perf_counter() - began

    def latents(self, way: str, guidance: str, seed: int, steps: int = 0) -> Tensor:
        prepare_compute(0, tf32="tf32" in way)
        scale, interval = GUIDANCES[guidance]
        steps = steps or self.steps
        if way.startswith("plain"):
            generator = torch.Generator(self.device).manual_seed(seed)
            shape = (self.batch, CHANNELS, SIDE, SIDE)
            noise = torch.randn(shape, generator=generator, device=self.device)

            def increments(_: int) -> Tensor:
                made: Tensor = torch.randn(
                    shape, generator=generator, device=self.device, dtype=torch.float64
                )
                return made

            return self.plain(noise, increments, steps, scale, interval)
        dtype = "bf16" if "bf16" in way else "float32"
        sampler = self.sampler(Steps("sde", steps, scale, interval, dtype=dtype), way)
        return sampler.scaled(self.labels(), self.draws(seed))

    def sampler(self, steps: Steps, way: str = "") -> LatentSampler:
        network = self.network
        if "compiled" in way:
            if self.compiled is None:
                self.compiled = self.method.build().to(self.device).eval().requires_grad_(False)
                self.compiled.load_state_dict(self.network.state_dict())
                compile_blocks(self.compiled, dynamic=False)
            network = self.compiled
        return LatentSampler(SampledModel(self.method, network, self.about), steps, self.device)

    def draws(self, seed: int) -> Draws:
        shapes = self.method.state_shapes()
        return Draws.seeded(seed, range(self.batch), shapes, self.device)

    def labels(self) -> Any:
        return np.arange(self.batch, dtype=np.int64) * 7 % NUM_CLASSES

    @torch.no_grad()
    def plain(
        self,
        noise: Tensor,
        increments: Callable[[int], Tensor],
        num_steps: int,
        scale: float,
        interval: tuple[float, float],
    ) -> Tensor:
        """The reference's loop, in its own terms."""
        x = noise.double()
        y = torch.from_numpy(self.labels()).to(self.device)
        null = torch.full_like(y, NUM_CLASSES)
        times = [*torch.linspace(1.0, LAST_T, num_steps, dtype=torch.float64).tolist(), 0.0]
        for step, (t, t_next) in enumerate(itertools.pairwise(times)):
            guided = scale > 1 and interval[0] <= t <= interval[1]
            x_in = torch.cat([x, x]) if guided else x
            y_in = torch.cat([y, null]) if guided else y
            v = self.answer(x_in, t, y_in)
            drift = v + (1 - t) * v + x_in  # v - t score, where score = -((1 - t) v + x) / t
            if guided:
                cond, uncond = drift.chunk(2)
                drift = uncond + scale * (cond - uncond)
            x = x + (t_next - t) * drift
            if t_next > 0:
                x = x + math.sqrt(2 * t * (t - t_next)) * increments(step)
        return x

    def answer(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        t_B = torch.full((len(x),), t, dtype=torch.float32, device=self.device)
        depth = self.method.depth
        velocity, tokens = self.network.get_submodule("trunk")(x.float(), t_B, y, capture=depth)
        for projector in self.network.get_submodule("projectors").children():
            projector(tokens)  # the reference's forward pass has no way around it
        answer: Tensor = velocity.double()
        return answer

    def check(self) -> None:
        """Raises SystemExit unless ours and the plain loop agree on the same random numbers."""
        for name, (scale, interval) in GUIDANCES.items():
            draws = self.draws(1)
            (noise,) = draws.noise()
            drawn = [draws.increments(step)[0] for step in range(5)]
            plain = self.plain(noise, drawn.__getitem__, 6, scale, interval)
            sampler = self.sampler(Steps("sde", 6, scale, interval))
            ours = sampler.scaled(self.labels(), self.draws(1))
            worst = (ours - plain).abs().max().item()
            if worst > TOLERANCE:
                raise SystemExit(f"guidance {name}: ours is {worst:.2g} from the plain loop")

    def distances(self, ways: tuple[str, ...]) -> dict[str, float]:
        base = self.latents("float32", "interval", 0)
        other = self.latents("float32", "interval", 1)
        found = {
            way: rms(self.latents(way, "interval", 0) - base)
            for way in ways
            if not way.startswith("plain") and way != "float32"
        }
        return {**found, "two_seeds": rms(other - base)}

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def filled(network: nn.Module) -> nn.Module:
    """The network with random numbers where a fresh one has zeros, so that every part matters."""
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def rms(difference: Tensor) -> float:
    return float(f"{difference.square().mean().sqrt().item():.4g}")


if __name__ == "__main__":
    main()
