"""Self-test of the trunk, losses, gradients and samplers against a SiT vector file.

A SiT vector file is a safetensors file with the constructor arguments in its metadata (`config`)
and a reference state dict under `model.`. Sizes, projectors and step counts come from the file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repa_pipeline.diffusion.guidance import guided
from repa_pipeline.diffusion.interpolant import PATHS, States, interpolate
from repa_pipeline.diffusion.losses import alignment_loss, denoising_loss
from repa_pipeline.diffusion.samplers import VelocityFn, sample_ode, sample_sde
from repa_pipeline.models.projector import build_projector
from repa_pipeline.models.reference import (
    config_from_reference,
    rename_blocks,
    split_reference_state,
)
from repa_pipeline.models.sit import SiT
from repa_pipeline.stages.selftest_report import Comparison, Group, Precision

ODE_STEPS = 10
ALIGNMENT_WEIGHT = 0.5

# name in the vectors -> guidance scale and interval
GUIDANCE: Mapping[str, tuple[float, tuple[float, float]]] = {
    "plain": (1.0, (0.0, 1.0)),
    "cfg": (1.8, (0.0, 1.0)),
    "interval": (1.8, (0.0, 0.7)),
    "interval2": (2.5, (0.2, 0.8)),
}

_LABEL_TABLE = "y_embedder.embedding_table.weight"
_LOSS = re.compile(r"loss\.(?P<path>[^.]+)\.(?P<weighting>[^.]+)\.(?:denoising|proj)")
_SAMPLE = re.compile(
    r"sample\.(?:ode\.(?P<ode>[^.]+)\.(?P<ode_guidance>[^.]+)\.(?P<solver>[^.]+)"
    r"|sde\.(?P<sde>[^.]+)\.(?P<sde_guidance>[^.]+))"
)


class SitVectors:
    """One vector file: its tensors, and the model they describe, built when first needed."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        device: str,
        dtype: Precision,
    ):
        self.tensors, self.arguments = tensors, config
        self.device, self.dtype = torch.device(device), dtype
        self.state = {
            name.removeprefix("model."): tensor.float()
            for name, tensor in tensors.items()
            if name.startswith("model.")
        }

    def groups(self) -> list[Group]:
        """The groups whose arrays are all there."""
        found = []
        if self._has("forward.x", "forward.t", "forward.y") and self._names(r"forward\.(out|z\d+)"):
            found.append(Group("forward", "forward", self._forward))
        for path, weighting in sorted(self._loss_settings()):
            run = functools.partial(self._loss, path, weighting)
            found.append(Group(f"loss {path}/{weighting}", "forward", run))
        if self._names(r"grad\..+") and self._has_loss_inputs("linear", "uniform"):
            found.append(Group("gradients", "gradient", self._gradients))
        for kind in ("ode", "sde"):
            for path in PATHS:
                if self._sample_names(kind, path):
                    run = functools.partial(self._samples, kind, path)
                    found.append(Group(f"{kind} {path}", "sampler", run))
        return found

    def unknown(self) -> list[str]:
        """Expected outputs that name a path, guidance or solver that is not known here."""
        losses = [(name, _LOSS.fullmatch(name)) for name in self.tensors]
        unknown = [name for name, match in losses if match and match["path"] not in PATHS]
        known = [self._outputs(kind, path) for kind in ("ode", "sde") for path in PATHS]
        samples = set(self._names(r"sample\.(ode|sde)\..+")) - {"sample.sde.increments"}
        return unknown + sorted(samples.difference(*known))

    @functools.cached_property
    def model(self) -> SiT:
        """The trunk with the file's weights, eval mode."""
        model_state, _ = split_reference_state(self.state, num_classes=self.num_classes)
        config = config_from_reference(model_state, num_heads=int(self.arguments["num_heads"]))
        model = SiT(config)
        model.load_state_dict(model_state)
        return model.to(self.device).eval()

    @functools.cached_property
    def projectors(self) -> nn.ModuleList:
        """The alignment heads with the file's weights; as many as the file has."""
        _, state = split_reference_state(self.state)
        count = len({name.partition(".")[0] for name in state})
        heads = nn.ModuleList(
            build_projector(
                state[f"{n}.0.weight"].shape[1],
                state[f"{n}.0.weight"].shape[0],
                state[f"{n}.4.weight"].shape[0],
            )
            for n in range(count)
        )
        heads.load_state_dict(state)
        return heads.to(self.device).eval()

    @property
    def num_classes(self) -> int:
        rows = self.state[_LABEL_TABLE].shape[0]
        return int(self.arguments.get("num_classes", rows - 1))

    @torch.no_grad()
    def _forward(self) -> Iterator[Comparison]:
        velocity, projected = self._evaluate(
            self._input("forward.x"), self._input("forward.t"), self._labels("forward.y")
        )
        for name in self._names(r"forward\.(out|z\d+)"):
            number = name.removeprefix("forward.z")
            yield self._compare(name, projected[int(number)] if number.isdigit() else velocity)

    @torch.no_grad()
    def _loss(self, path: str, weighting: str) -> Iterator[Comparison]:
        denoising, alignment = self._losses(path, weighting)
        prefix = f"loss.{path}.{weighting}"
        if self._has(f"{prefix}.denoising"):
            yield self._compare(f"{prefix}.denoising", denoising)
        if self._has(f"{prefix}.proj"):
            yield self._compare(f"{prefix}.proj", alignment, terms=1.0)

    def _gradients(self) -> Iterator[Comparison]:
        denoising, alignment = self._losses("linear", "uniform")
        total = denoising.mean() + ALIGNMENT_WEIGHT * alignment
        self.model.zero_grad(set_to_none=True)
        self.projectors.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        labels = torch.unique(self._labels("loss.y"))
        for name in self._names(r"grad\..+"):
            parameter = self._parameter(name.removeprefix("grad."))
            gradient = parameter.grad
            if gradient is None:
                raise ValueError(f"{name}: the loss does not reach this parameter")
            yield self._compare(name, gradient[labels] if name.endswith(_LABEL_TABLE) else gradient)

    @torch.no_grad()
    def _samples(self, kind: str, path: str) -> Iterator[Comparison]:
        noise: States = (self._on_device("sample.noise"),)
        for name in self._sample_names(kind, path):
            guidance, _, solver = name.removeprefix(f"sample.{kind}.{path}.").partition(".")
            velocity = self._velocity(guidance)
            if kind == "ode":
                (sample,) = sample_ode(velocity, noise, num_steps=ODE_STEPS, heun=solver == "heun")
            else:
                (sample,) = sample_sde(
                    velocity,
                    noise,
                    num_steps=len(self.tensors["sample.sde.increments"]) + 1,
                    path=PATHS[path],
                    increments=self._increments,
                )
            yield self._compare(name, sample)

    def _increments(self, step: int) -> States:
        return (self.tensors["sample.sde.increments"][step].to(self.device),)

    def _velocity(self, guidance: str) -> VelocityFn:
        def model(states: States, t_B: Tensor, labels: Tensor) -> States:
            with self._autocast():
                return (self.model(states[0], t_B, labels),)

        labels = self._labels("sample.y")
        scale, interval = GUIDANCE[guidance]
        null = torch.full_like(labels, self.model.null_label)
        return guided(model, labels, null, scale=scale, interval=interval)

    def _losses(self, path: str, weighting: str) -> tuple[Tensor, Tensor]:
        """Denoising loss of each sample, and the alignment loss (0 without projectors)."""
        t = self._input(f"loss.{path}.{weighting}.t")
        latents = self._input("loss.latents")
        noise = self._input(f"loss.{path}.{weighting}.noise")
        (x_t,), target = interpolate(PATHS[path], (latents,), (noise,), t.flatten())
        velocity, projected = self._evaluate(x_t, t.flatten(), self._labels("loss.y"))
        denoising = denoising_loss((velocity,), target)
        if not projected:
            return denoising, denoising.new_zeros(())
        targets = [self._input(f"loss.target{n}") for n in range(len(projected))]
        return denoising, alignment_loss(projected, targets)

    def _evaluate(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        with self._autocast():
            if not len(self.projectors):
                return self.model(x, t, y), []
            velocity, tokens = self.model(x, t, y, capture=int(self.arguments["encoder_depth"]))
            return velocity, [head(tokens) for head in self.projectors]

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.dtype == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _parameter(self, reference_name: str) -> Tensor:
        if reference_name.startswith("projectors."):
            return self.projectors.get_parameter(reference_name.removeprefix("projectors."))
        renamed = dict(zip(self.state, rename_blocks(self.state), strict=True))
        return self.model.get_parameter(renamed.get(reference_name, reference_name))

    def _compare(self, name: str, ours: Tensor, terms: float | None = None) -> Comparison:
        return Comparison(name, _array(ours), _array(self.tensors[name]), terms)

    def _input(self, name: str) -> Tensor:
        return self._on_device(name).float()

    def _labels(self, name: str) -> Tensor:
        return self._on_device(name).long()

    def _on_device(self, name: str) -> Tensor:
        return self.tensors[name].to(self.device)

    def _has(self, *names: str) -> bool:
        return all(name in self.tensors for name in names)

    def _names(self, pattern: str) -> list[str]:
        return [name for name in self.tensors if re.fullmatch(pattern, name)]

    def _has_loss_inputs(self, path: str, weighting: str) -> bool:
        prefix = f"loss.{path}.{weighting}"
        heads = {name.split(".")[1] for name in self.state if name.startswith("projectors.")}
        targets = (f"loss.target{n}" for n in heads)
        return self._has("loss.latents", "loss.y", f"{prefix}.t", f"{prefix}.noise", *targets)

    def _loss_settings(self) -> set[tuple[str, str]]:
        matches = (_LOSS.fullmatch(name) for name in self.tensors)
        found = {(match["path"], match["weighting"]) for match in matches if match}
        return {pair for pair in found if pair[0] in PATHS and self._has_loss_inputs(*pair)}

    def _sample_names(self, kind: str, path: str) -> list[str]:
        inputs = ["sample.noise", "sample.y"]
        inputs += ["sample.sde.increments"] if kind == "sde" else []
        return self._outputs(kind, path) if self._has(*inputs) else []

    def _outputs(self, kind: str, path: str) -> list[str]:
        """Names of the expected samples of one path, with a guidance and solver we know."""
        found = []
        for name in self.tensors:
            match = _SAMPLE.fullmatch(name)
            if match is None or match[kind] != path or match[f"{kind}_guidance"] not in GUIDANCE:
                continue
            if kind == "sde" or match["solver"] in ("euler", "heun"):
                found.append(name)
        return found


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().double().cpu().numpy()
    return array
