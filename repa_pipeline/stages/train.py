"""`repa train`: one rank's readable training loop over the cache.

No encoder, no image decode, no autoencoder in the process: it reads latents and teacher tokens,
and what it writes (runs/NAME) is all that sampling needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from repa_pipeline.config import EMBEDDED
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.order import Order, rank_slice
from repa_pipeline.data.reader import Reader
from repa_pipeline.device import prepare_compute
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import ConfigError, MismatchError, StageError
from repa_pipeline.methods import MethodSpec, auto_method, token_needs
from repa_pipeline.methods.base import Method, Phase
from repa_pipeline.models import ModelSpec
from repa_pipeline.registry import method_spec, model_spec
from repa_pipeline.stages.flops import countable_training_flops
from repa_pipeline.training.batches import BatchMaker, mirrored_views
from repa_pipeline.training.diagnosis import explain
from repa_pipeline.training.inputs import CacheInputs, open_inputs, read_options
from repa_pipeline.training.mirror import load_newest
from repa_pipeline.training.outputs import Outputs
from repa_pipeline.training.parallel import gradients_shared, prepare_blocks, shared_loss
from repa_pipeline.training.runs import LOCK_PATIENCE_S, Run, default_name, locked, open_run
from repa_pipeline.training.state import (
    TrainState,
    build_method,
    describe_run,
    enter_phase,
    new_state,
    optimiser_step,
)
from repa_pipeline.training.world import (
    Stopping,
    World,
    is_restarted_by_others,
    joined,
    never,
    rank_device,
    world_of_environment,
)

if TYPE_CHECKING:
    from repa_pipeline.stages.online import OnlineTeachers


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

    @property
    def compile(self) -> bool:
        """Whether the blocks are compiled: as asked, else on CUDA."""
        asked = self.config.compile
        return self.device.startswith("cuda") if asked is None else asked

    def outputs(self, run: Run, world: World, progress: Progress) -> Outputs:
        """What the run will tell and save."""
        inputs, described = self.inputs, self.inputs.describe()
        about = describe_run(
            self.method_spec.loader, self.config, self.model, described,
            inputs.latents.spec.manifest,
        )  # fmt: skip
        latents = described.latent_channels, described.latent_size
        flops = countable_training_flops(self.model, *latents)
        about["class_names"] = inputs.manifest["class_names"]
        about["data"] = inputs.digests()
        return Outputs(
            self.config, run, world, progress, device=self.device,
            flops_per_image=flops, about=about,
        )  # fmt: skip

    def online(self, steps: range, world: World) -> OnlineTeachers | None:
        """The teachers that run inside the step, to be entered for `steps`; None without any."""
        if not self.inputs.online:
            return None
        from repa_pipeline.stages.online import OnlineTeachers

        config = self.config
        return OnlineTeachers(
            config,
            self.inputs,
            self.order,
            steps=steps,
            local=rank_slice(config.batch_size, world.rank, world.size),
            device=self.device,
            dtype=self.dtype,
            compile=self.compile,
            views=functools.partial(mirrored_views, config) if config.flip else None,
        )


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a run stands: its folder, its steps, and how many of them this call made.

    last: means of the last log line. stopped: SIGTERM came, and the state was saved.
    """

    run: Run
    step: int
    num_new: int
    last: dict[str, float]
    stopped: bool = False


def plan_training(config: TrainConfig) -> TrainPlan:
    """Opens the cache and checks every setting against it; builds nothing yet."""
    model = model_spec(config, config.model)
    name = config.method
    if name == "auto":
        name = auto_method(model.family, aligned=config.encoder not in (("none",), ()))
    spec = method_spec(config, name)
    needs = token_needs(spec, config)
    inputs = open_inputs(config, uses_features=spec.uses_features, needs=needs)
    _check_preset(config, inputs)
    teachers = tuple(teacher.describe().name for teacher in inputs.teachers)
    device = rank_device(config.device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bf16" if device.startswith("cuda") else "float32"
    num_ranks = world_of_environment().size
    if config.accumulate * num_ranks > config.batch_size:
        raise ConfigError(
            f"accumulate {config.accumulate} x {num_ranks} ranks is larger than batch_size "
            f"{config.batch_size}: use fewer"
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


def train(plan: TrainPlan, progress: Progress, notice: Callable[[], bool] = never) -> TrainResult:
    """Trains to `config.steps`, going on from the newest sound checkpoint of the run.

    Called by every rank. On CPU the result is bit-equal however often it was interrupted. SIGTERM
    saves and ends early (`TrainResult.stopped`), and so does `notice`, which is asked at every
    step. Raises RepaError children for what the user can mend; every checkpoint already written
    stays.
    """
    config = plan.config
    prepare_compute(config.threads, config.tf32)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(joined(plan.device))
        stopping = stack.enter_context(Stopping(world, notice))
        run = _open_run(plan, world, stack)
        state, faults = _restored(plan, run, world)
        first_step = state.step
        outputs = stack.enter_context(plan.outputs(run, world, progress))
        outputs.begin(first_step, faults)  # of a finished run: what an earlier end left undone
        prepare_blocks(config, state.model, plan.compile)
        phases = plan.method.phases()
        ends = [*(phase.start for phase in phases[1:]), config.steps]
        stopped = False
        for phase, end in zip(phases, ends, strict=True):
            if state.step < min(end, config.steps) and not stopped:
                steps = range(state.step, min(end, config.steps))
                stopped = _train_phase(plan, phase, steps, state, world, outputs, stopping)
        is_finished = outputs.finish(lambda: stopped or stopping.heard())
        stopped = stopped or not is_finished
    return TrainResult(run, state.step, state.step - first_step, outputs.means, stopped)


def _train_phase(
    plan: TrainPlan,
    phase: Phase,
    steps: range,
    state: TrainState,
    world: World,
    outputs: Outputs,
    stopping: Stopping,
) -> bool:
    """The training loop over `steps`, all in `phase`: one rank's part of it.

    Returns whether it was asked to stop early.
    """
    config, method, meter = plan.config, plan.method, state.meter
    enter_phase(state.model, phase)
    autocast = torch.autocast(plan.device.split(":")[0], torch.bfloat16, plan.dtype == "bf16")
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(_reader(plan, phase, steps, world))
        online = plan.online(steps, world) if phase.uses_features else None
        batches = BatchMaker(config, plan.inputs, method, plan.device, world, online)
        loss_of = shared_loss(method, state.model, state.ema.module, world, batches.accumulates)
        outputs.follow(reader, *([stack.enter_context(online)] if online else []))
        for records in reader:
            # One optimiser step: the loss is a mean over the global batch, whatever its parts.
            for number, micro in enumerate(batches.micro_batches(records), start=1):
                with gradients_shared(loss_of, number == batches.num_micro):
                    with autocast:
                        losses = loss_of(micro.batch, micro.t, micro.noise)
                    # Ranks average their gradients, and the sum of all shares is wanted.
                    (losses["loss"] * (micro.share * world.size)).backward()
                meter.add(losses, micro.t, micro.share)
            norm, bad = optimiser_step(config, state)
            meter.end_step(norm, bad)
            state.step += 1

            stop = stopping.asked()
            if state.step % config.log_every == 0 or state.step == config.steps:
                # An extended run goes on with the sums of an interval that its end cut short.
                outputs.log(state.step, meter.read(world, state.step % config.log_every == 0))
                if meter.worst_in_a_row >= config.max_bad_steps:
                    raise StageError(explain(method, state, micro, autocast))
            if stop or _is_due(state.step, config):
                outputs.save(state, plan.order.state(state.step))
            outputs.advance()
            if stop:
                return True
    return False


def _is_due(step: int, config: TrainConfig) -> bool:
    """Whether a checkpoint follows `step`: by its own rhythm, for a preview, or at the end."""
    rhythms = (config.checkpoint_every, config.preview_every, config.evaluate_every)
    return step == config.steps or any(every and step % every == 0 for every in rhythms)


def _open_run(plan: TrainPlan, world: World, stack: contextlib.ExitStack) -> Run:
    """The run's folder, held by rank 0's lock until `stack` ends; the others come after."""
    config = plan.config
    if world.is_main:
        run = open_run(config, plan.name, plan.decided())
        patience_s = LOCK_PATIENCE_S if is_restarted_by_others() else 0.0
        stack.enter_context(locked(run, patience_s))
    world.barrier()
    return open_run(dataclasses.replace(config, resume=True), plan.name, plan.decided())


def _restored(plan: TrainPlan, run: Run, world: World) -> tuple[TrainState, list[str]]:
    """The state of the newest sound checkpoint, or a new one, and what was wrong with newer ones.

    Rank 0 looks first (and fetches); raises MismatchError when another rank finds another step.
    """
    state = new_state(plan.config, plan.method, plan.device)
    saved, faults = load_newest(run, plan.config) if world.is_main else (None, [])
    step = world.share(saved["step"] if saved else 0)
    if not world.is_main and step:
        saved, _ = load_newest(run, plan.config, step=step)
    if (saved["step"] if saved else 0) != step:
        raise MismatchError(
            f"rank {world.rank} finds no checkpoint of step {step:,} at {run.checkpoints}: give "
            "--checkpoints a folder or URL that every machine sees"
        )
    if saved:
        state.restore(saved, world)
    return state, faults


def _reader(plan: TrainPlan, phase: Phase, steps: range, world: World) -> Reader:
    """This rank's records of `steps`: latents alone in a phase without features."""
    config, inputs = plan.config, plan.inputs
    count = len(inputs.arrays) if phase.uses_features else 1
    return Reader(
        inputs.arrays[:count],
        plan.order,
        first_step=steps.start,
        last_step=steps.stop,
        rank=world.rank,
        world_size=world.size,
        mirrored=inputs.mirrored[:count],
        views=functools.partial(mirrored_views, config),
        **read_options(config, plan.device),
    )
