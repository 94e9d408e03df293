"""What changes during training: networks, optimiser, step count, sums since the last log line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repa_pipeline.config import as_json, from_json
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import StageError
from repa_pipeline.methods.base import FeatureInfo, Inputs, Method
from repa_pipeline.models import ModelSpec
from repa_pipeline.models.ema import Ema
from repa_pipeline.tables import resolve
from repa_pipeline.training.draws import seed_of

MAX_BAD_STEPS = 10


@dataclasses.dataclass
class TrainState:
    """Everything a checkpoint restores. `step` counts batches taken, skipped ones included."""

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    step: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    num_summed: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one step's scalars to the sums of the current log line."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()
        self.num_summed += 1

    def means(self, reset: bool) -> dict[str, float]:
        """Means over the steps since the last reset, skipped ones left out."""
        means = {name: float(total) / self.num_summed for name, total in self.sums.items()}
        if reset:
            self.sums, self.num_summed = {}, 0
        return means

    def to_checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values of everything that changes."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "sums": dict(self.sums),
            "num_summed": self.num_summed,
        }

    def restore(self, content: Mapping[str, Any]) -> None:
        """The inverse of `to_checkpoint`."""
        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]
        self.num_skipped = content["num_skipped"]
        self.skipped_in_a_row = content["skipped_in_a_row"]
        self.sums = dict(content["sums"])
        self.num_summed = content["num_summed"]


def new_state(config: TrainConfig, method: Method, device: str) -> TrainState:
    """Networks initialised from the seed, AdamW (REPA, Appendix D), EMA starting at the weights."""
    torch.manual_seed(seed_of(config.seed, "init"))
    model = method.build().to(device)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    return TrainState(model, Ema(model, config.ema_decay), optimizer)


def optimiser_step(config: TrainConfig, state: TrainState) -> Tensor:
    """Clips the gradients and applies them; returns their norm before clipping, a scalar.

    A norm that is not finite leaves weights, optimiser and EMA alone and is counted; raises
    StageError after MAX_BAD_STEPS in a row.
    """
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    if torch.isfinite(norm):
        state.optimizer.step()
        state.ema.update(state.model)
        state.skipped_in_a_row = 0
    else:
        state.num_skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= MAX_BAD_STEPS:
            raise StageError(
                f"gradients were not finite for {MAX_BAD_STEPS} steps in a row (step "
                f"{state.step}): lower --learning-rate, or try --qk-norm or --dtype float32; the "
                "last checkpoint is kept"
            )
    state.optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def build_method(loader: str, config: TrainConfig, model: ModelSpec, inputs: Inputs) -> Method:
    """The method that `loader` ("module:Class") names, built for these inputs."""
    method: Method = resolve(loader)(config, model, inputs)
    return method


def describe_run(
    loader: str, config: TrainConfig, model: ModelSpec, inputs: Inputs, latents: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says of itself, so that sampling needs nothing else; plain values."""
    described = dataclasses.asdict(inputs)
    for feature in described["features"]:
        feature["preserves"] = sorted(feature["preserves"])
        feature["grid"] = list(feature["grid"])
    described["features"] = list(described["features"])
    return {
        "method": loader,
        "config": as_json(config),
        "model_spec": dataclasses.asdict(model),
        "inputs": described,
        "latents": dict(latents),
    }


def method_of_checkpoint(content: Mapping[str, Any]) -> Method:
    """The method a checkpoint was trained with, ready to build and sample."""
    about = content["about"]
    features = tuple(
        FeatureInfo(f["name"], f["width"], tuple(f["grid"]), frozenset(f["preserves"]))
        for f in about["inputs"]["features"]
    )
    inputs = Inputs(**{**about["inputs"], "features": features})
    config: TrainConfig = from_json(TrainConfig, about["config"])
    return build_method(about["method"], config, ModelSpec(**about["model_spec"]), inputs)
