"""`repa train`: one rank's readable training loop over the cache.

No encoder, no image decode, no autoencoder in the process: it reads latents and teacher tokens,
and what it writes (runs/NAME) is all that sampling needs.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import torch

from repa_pipeline.config import EMBEDDED
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.order import Order
from repa_pipeline.data.reader import Reader
from repa_pipeline.device import choose_device, prepare_compute
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import ConfigError
from repa_pipeline.methods import MethodSpec
from repa_pipeline.methods.base import Method
from repa_pipeline.models import ModelSpec
from repa_pipeline.observe import RunLog
from repa_pipeline.registry import method_spec, model_spec
from repa_pipeline.training.batches import BatchMaker, mirrored_views
from repa_pipeline.training.checkpoint import load_newest, prune, save_checkpoint
from repa_pipeline.training.inputs import CacheInputs, open_inputs
from repa_pipeline.training.previews import Previews
from repa_pipeline.training.runs import Run, default_name, locked, note_settings, open_run
from repa_pipeline.training.state import (
    TrainState,
    build_method,
    describe_run,
    new_state,
    optimiser_step,
)


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A run, checked and ready: what `--dry-run` shows and `train` executes."""

    config: TrainConfig
    name: str
    inputs: CacheInputs
    method_spec: MethodSpec
    model: ModelSpec
    method: Method
    device: str
    dtype: str
    order: Order

    def decided(self) -> dict[str, Any]:
        """What, beside the settings, decides the curve of the run."""
        return {
            "method": self.method_spec.name,
            "model": dataclasses.asdict(self.model),
            "dtype": self.dtype,
            "data": self.inputs.digests(),
        }


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a run stands: its folder, its steps, and how many of them this call made."""

    run: Run
    step: int
    num_new: int
    last: dict[str, float]


def plan_training(config: TrainConfig) -> TrainPlan:
    """Opens the cache and checks every setting against it; builds nothing yet."""
    name = config.method
    if name == "auto":
        name = "sit" if config.encoder in (("none",), ()) else "repa"
    spec = method_spec(config, name)
    inputs = open_inputs(config, uses_features=spec.uses_features, needs=spec.needs)
    _check_preset(config, inputs)
    model = model_spec(config, config.model)
    teachers = tuple(teacher.describe().name for teacher in inputs.teachers)
    device = choose_device(config.device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bf16" if device.startswith("cuda") else "float32"
    if config.accumulate > config.batch_size:
        raise ConfigError(
            f"accumulate {config.accumulate} is larger than batch_size {config.batch_size}"
        )
    return TrainPlan(
        config=config,
        name=config.name or default_name(config, teachers, spec.name),
        inputs=inputs,
        method_spec=spec,
        model=model,
        method=build_method(spec.loader, config, model, inputs.describe()),
        device=device,
        dtype=dtype,
        order=Order(
            num_rows=inputs.latents.spec.num_rows,
            shard_rows=inputs.latents.spec.layout.shard_rows,
            batch_size=config.batch_size,
            seed=config.seed,
            lanes=config.lanes,
            window=config.window,
        ),
    )


def _check_preset(config: TrainConfig, inputs: CacheInputs) -> None:
    """Raises ConfigError when the embedded digits' defaults were taken for another cache.

    It happens where the workspace is remote and no source was named.
    """
    source = inputs.manifest["source"]
    if config.preset == "digits" and config.source == EMBEDDED and source != EMBEDDED:
        raise ConfigError(
            f"the cache at {config.workspace} is of {source}, the defaults are those of "
            f"{EMBEDDED}: give --source as it was encoded, or --preset imagenet"
        )


def train(plan: TrainPlan, progress: Progress) -> TrainResult:
    """Trains to `config.steps`, going on from the newest sound checkpoint of the run.

    On CPU the result is bit-equal however often it was interrupted. Raises RepaError children for
    what the user can mend; every checkpoint already written stays.
    """
    config = plan.config
    run = open_run(config, plan.name, plan.decided())
    with locked(run):
        prepare_compute(config.threads)
        state = new_state(config, plan.method, plan.device)
        saved, faults = load_newest(run.checkpoints, "cpu")
        if saved:
            state.restore(saved)
        del saved  # as large as the state itself
        first_step = state.step
        if first_step >= config.steps:
            return TrainResult(run, first_step, 0, {})
        note_settings(run, config)
        log = RunLog(run.folder, from_step=first_step, every=config.log_every)
        for fault in faults:
            log.event(first_step, "checkpoint_refused", reason=fault)
            print(f"going back to step {first_step:,}: {fault}", file=sys.stderr)
        previews = Previews(config, run.folder / "previews", log)
        progress.start(f"train {run.name}", config.steps, first_step, "steps")
        try:
            last = _loop(plan, state, run, log, previews, progress)
            previews.poll(wait=True)
        finally:
            progress.finish()
            log.close()
    return TrainResult(run, state.step, state.step - first_step, last)


def _loop(
    plan: TrainPlan,
    state: TrainState,
    run: Run,
    log: RunLog,
    previews: Previews,
    progress: Progress,
) -> dict[str, float]:
    """The training loop. Returns the last logged means."""
    config, method, device = plan.config, plan.method, plan.device
    batches = BatchMaker(config, plan.inputs, method, device)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=plan.dtype == "bf16")
    means: dict[str, float] = {}
    clock, waited, since = time.perf_counter(), 0.0, state.step
    reader = Reader(
        plan.inputs.arrays,
        plan.order,
        first_step=state.step,
        last_step=config.steps,
        mirrored=plan.inputs.mirrored,
        views=functools.partial(mirrored_views, config),
    )
    with reader:
        for records in reader:
            # One optimiser step: the loss is a mean over the global batch, whatever its parts.
            scalars: dict[str, torch.Tensor] = {}
            for batch, t, noise, share in batches.micro_batches(records):
                with autocast:
                    losses = method.loss(state.model, state.ema.module, batch, t, noise)
                (losses["loss"] * share).backward()  # type: ignore[no-untyped-call]
                for name, value in losses.items():
                    scalars[name] = scalars.get(name, 0.0) + value.detach().mean() * share
            scalars["grad_norm"] = optimiser_step(config, state)
            state.step += 1
            if not state.skipped_in_a_row:
                state.add(scalars)

            if state.step % config.log_every == 0 or state.step == config.steps:
                # An extended run goes on with the sums of an interval that its end cut short.
                means = state.means(reset=state.step % config.log_every == 0)
                elapsed = time.perf_counter() - clock
                speed = {
                    "images_per_s": (state.step - since) * config.batch_size / elapsed,
                    "data_wait": (reader.wait_s - waited) / elapsed,
                    "skipped_steps": float(state.num_skipped),
                }
                log.scalars(state.step, {**means, **speed})
                previews.poll()
                clock, waited, since = time.perf_counter(), reader.wait_s, state.step
            progress.advance(1, loss=means.get("loss", float("nan")))

            if _is_due(state.step, config):
                log.flush()
                path = _save(plan, state, run, previews)
                if config.preview_every and state.step % config.preview_every == 0:
                    previews.start(state.step, path)
    return means


def _is_due(step: int, config: TrainConfig) -> bool:
    """Whether a checkpoint follows `step`: by its own rhythm, for a preview, or at the end."""
    preview = config.preview_every and step % config.preview_every == 0
    return step % config.checkpoint_every == 0 or bool(preview) or step == config.steps


def _save(plan: TrainPlan, state: TrainState, run: Run, previews: Previews) -> Path:
    about = describe_run(
        plan.method_spec.loader,
        plan.config,
        plan.model,
        plan.inputs.describe(),
        plan.inputs.latents.spec.manifest,
    )
    about["class_names"] = plan.inputs.manifest["class_names"]
    about["data"] = plan.inputs.digests()
    path = save_checkpoint(run.checkpoints, state.step, {**state.to_checkpoint(), "about": about})
    prune(run.checkpoints, plan.config.keep, previews.steps_in_use)
    return path
