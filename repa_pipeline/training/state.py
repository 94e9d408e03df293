"""What changes during training: networks, averages, optimiser, step count, sums of the log line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import ConfigError, MismatchError
from repa_pipeline.methods.base import FeatureInfo, Inputs, Method, Phase
from repa_pipeline.models import ModelSpec
from repa_pipeline.models.ema import Ema, update_averages
from repa_pipeline.settings import as_json, from_json
from repa_pipeline.tables import resolve
from repa_pipeline.training.draws import seed_of
from repa_pipeline.training.meter import Meter
from repa_pipeline.training.world import World


@dataclasses.dataclass
class TrainState:
    """Everything a checkpoint restores. `step` counts batches taken, skipped ones included.

    ema: the average that is sampled; more_emas: those of --ema-extra.
    """

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    meter: Meter
    more_emas: tuple[Ema, ...] = ()
    step: int = 0

    def to_checkpoint(self, world: World | None = None) -> dict[str, Any]:
        """Tensors and plain values of everything that changes; the tensors are the live ones.

        Every rank must call it.
        """
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "more_emas": {str(ema.decay): ema.state_dict() for ema in self.more_emas},
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state_dict(world),
            "rng": _random_state(),
        }

    def restore(self, content: Mapping[str, Any], world: World | None = None) -> None:
        """The inverse of `to_checkpoint`.

        A checkpoint without an optimizer (an imported one) is refused with MismatchError; one from
        before there was a meter begins its log line anew.
        """
        if not content.get("optimizer"):
            raise MismatchError(
                f"the checkpoint of step {content['step']} has no optimizer state: it can be "
                "sampled, not trained on; start a new run"
            )
        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        for ema in self.more_emas:
            ema.load_state_dict(content["more_emas"][str(ema.decay)])
        self.optimizer.load_state_dict(content["optimizer"])
        if "meter" in content:
            self.meter.load_state_dict(content["meter"], world)
        _restore_random_state(content.get("rng", {}))
        self.step = content["step"]


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
    return TrainState(
        model,
        Ema(model, config.ema_decay),
        optimizer,
        Meter(device=device),
        tuple(Ema(model, decay) for decay in config.ema_extra),
    )


def optimiser_step(config: TrainConfig, state: TrainState) -> tuple[Tensor, Tensor]:
    """Clips the gradients and applies them: (their norm before clipping, whether it is bad).

    A bad norm, above --max-grad-norm or not finite, leaves weights, optimiser and averages alone.
    Both are scalars on the device, and nothing waits for them.
    """
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip).detach()
    bad = ~(norm <= config.max_grad_norm)
    skip: Any = state.optimizer
    skip.found_inf = (
        bad.float()
    )  # the fused kernel then changes nothing, its own step count neither
    state.optimizer.step()
    update_averages([state.ema, *state.more_emas], state.model, (~bad).float())
    state.optimizer.zero_grad(set_to_none=True)
    return norm, bad


def enter_phase(model: nn.Module, phase: Phase) -> None:
    """Lets gradients reach what `phase` trains, and nothing that is idle in it.

    Raises ConfigError for an idle part that the model does not have.
    """
    idle = {}
    for name in phase.idle:
        try:
            idle[name] = model.get_submodule(name)
        except AttributeError as error:
            raise ConfigError(
                f"the method calls '{name}' idle, and there is no such part"
            ) from error
    for part in idle.values():
        for parameter in part.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


def _random_state() -> dict[str, Any]:
    """torch's global generators: our own draws need none, a method's dropout may."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, Any]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


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
