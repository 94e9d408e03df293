"""The parts of a step: averages, the optimiser that skips, the diagnosis, who is in the world."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repa_pipeline.data.reader import Reader
from repa_pipeline.errors import ConfigError
from repa_pipeline.models.ema import Ema, update_averages
from repa_pipeline.stages.train import TrainPlan, plan_training
from repa_pipeline.testing.caches import ToyTeacher, toy_train_config, write_toy_cache
from repa_pipeline.training.batches import BatchMaker, Micro
from repa_pipeline.training.diagnosis import explain
from repa_pipeline.training.state import TrainState, new_state, optimiser_step
from repa_pipeline.training.world import Stopping, World, rank_device, world_of_environment

# Averages.


class Parts(nn.Module):
    """Many tensors of different sizes, one above what a group holds, a frozen one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [(3,), (64, 65), (), (2048, 2100), (7, 5, 2), (1000, 333)]
        self.parts = nn.ParameterList([torch.randn(s, generator=generator) for s in sizes])
        self.parts[4].requires_grad_(False)
        self.register_buffer("count", torch.zeros(2))

    @torch.no_grad()
    def move(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parts:
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        self.count.add_(1)


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_to_advance_by_one_is_to_advance() -> None:
    module = Parts()
    told, untold = Ema(module, 0.99), Ema(module, 0.99)
    plain = [parameter.clone() for parameter in module.parts]
    for seed in range(1, 4):
        module.move(seed)
        update_averages([told], module, torch.ones(()))
        update_averages([untold], module)
        plain = [0.99 * old + 0.01 * new for old, new in zip(plain, module.parts, strict=True)]
    assert_equal(told.module, untold.module)
    for average, expected in zip(told.module.parameters(), plain, strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert told.module.get_buffer("count").tolist() == [3, 3]


def test_an_average_that_does_not_advance_stands_still() -> None:
    module = Parts()
    ema = Ema(module, 0.9)
    module.move(1)
    update_averages([ema], module)
    before = copy.deepcopy(ema.module)
    module.move(2)
    update_averages([ema], module, torch.zeros(()))
    for name, value in before.named_parameters():
        assert torch.equal(ema.module.get_parameter(name), value), name
    # And one that is where its module is does not drift.
    still = Ema(module, 0.9999)
    for _ in range(3):
        update_averages([still], module, torch.ones(()))
    assert_equal(still.module, module)


@pytest.mark.parametrize("advance", [None, 1.0, 0.0])
def test_several_decays_at_once_are_each_by_itself(advance: float | None) -> None:
    module, decays = Parts(), (0.5, 0.9, 0.9999)
    together = [Ema(module, decay) for decay in decays]
    apart = [Ema(module, decay) for decay in decays]
    told = None if advance is None else torch.tensor(advance)
    for seed in range(1, 4):
        module.move(seed)
        update_averages(together, module, told)
        for ema in apart:
            update_averages([ema], module, told)
    for one, other in zip(together, apart, strict=True):
        assert_equal(one.module, other.module)
    if advance != 0.0:
        first = [ema.module.get_parameter("parts.0") for ema in together]
        assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


# The optimiser.


@pytest.fixture
def plan(tmp_path: Path) -> TrainPlan:
    write_toy_cache(tmp_path, teachers=(ToyTeacher("a"), ToyTeacher("b", width=20)))
    config = toy_train_config(tmp_path, encoder=("a", "b"), ema_extra=(0.5,), weight_decay=0.1)
    return plan_training(config)


def give_gradients(state: TrainState, seed: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in state.model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    return trainable


def spoil_one(parameters: list[Tensor]) -> None:
    gradient = parameters[5].grad
    assert gradient is not None
    gradient.view(-1)[3] = math.nan


def is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(is_same(ours[k], theirs[k]) for k in ours)
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else bool(ours == theirs)


def step_counts(state: TrainState) -> set[float]:
    return {float(values["step"]) for values in state.optimizer.state.values()}


@pytest.mark.parametrize("kind", ["nan", "large"])
def test_a_skipped_step_never_happened(plan: TrainPlan, kind: str) -> None:
    config = dataclasses.replace(plan.config, max_grad_norm=1e5)
    state, twin = (new_state(config, plan.method, "cpu") for _ in range(2))
    for seed in (1, 2):
        for one in (state, twin):
            give_gradients(one, seed)
            _, bad = optimiser_step(config, one)
            assert not bad
    assert step_counts(state) == {2.0}

    for seed in (3, 4):
        gradients = give_gradients(state, seed, 1.0 if kind == "nan" else 1e6)
        if kind == "nan":
            spoil_one(gradients)
        norm, bad = optimiser_step(config, state)
        assert bad and not float(norm) <= 1e5
    assert step_counts(state) == {2.0}

    for one in (state, twin):
        give_gradients(one, 5)
        _, bad = optimiser_step(config, one)
        assert not bad
    assert step_counts(state) == step_counts(twin) == {3.0}
    ours, theirs = (one.to_checkpoint() for one in (state, twin))
    for part in ("model", "ema", "more_emas"):
        assert is_same(ours[part], theirs[part]), part
    assert is_same(ours["optimizer"]["state"], theirs["optimizer"]["state"])


def test_the_first_step_may_be_a_bad_one(plan: TrainPlan) -> None:
    state, twin = (new_state(plan.config, plan.method, "cpu") for _ in range(2))
    spoil_one(give_gradients(state, 0))
    _, bad = optimiser_step(plan.config, state)
    assert bad and step_counts(state) == {0.0}
    for one in (state, twin):
        give_gradients(one, 1)
        optimiser_step(plan.config, one)
    assert step_counts(state) == {1.0}
    assert_equal(state.model, twin.model)
    assert_equal(state.ema.module, twin.ema.module)


# The diagnosis.


@pytest.fixture
def micro(plan: TrainPlan) -> Micro:
    batches = BatchMaker(plan.config, plan.inputs, plan.method, "cpu")
    with Reader(plan.inputs.arrays, plan.order, first_step=0, last_step=1) as reader:
        (found,) = [micro for records in reader for micro in batches.micro_batches(records)]
    return found


@pytest.fixture
def state(plan: TrainPlan) -> TrainState:
    state = new_state(plan.config, plan.method, "cpu")
    give_gradients(state, 0, 0.01)
    optimiser_step(plan.config, state)  # zero initialisation would hide what overflows
    state.step = 7
    state.meter.worst_in_a_row = 3
    return state


def diagnosis(plan: TrainPlan, state: TrainState, micro: Micro) -> str:
    said = explain(plan.method, state, micro, contextlib.nullcontext())
    assert "\n" not in said
    assert said.startswith("3 steps in a row were skipped (now at step 7): ")
    assert said.endswith("the last checkpoint is kept")
    return said


def test_bad_inputs_are_named(plan: TrainPlan, state: TrainState, micro: Micro) -> None:
    latents = micro.batch.latents.clone()
    latents[2, 1, 0, 0] = math.nan
    spoiled = dataclasses.replace(micro.batch, latents=latents)
    said = diagnosis(plan, state, micro._replace(batch=spoiled))
    assert "the latents of the last batch are not finite (run `repa verify`)" in said
    first, second = micro.batch.features
    second = second.clone()
    second[0, 3, 4] = math.inf
    spoiled = dataclasses.replace(micro.batch, features=(first, second))
    said = diagnosis(plan, state, micro._replace(batch=spoiled))
    assert "the tokens of teacher 2 of the last batch are not finite" in said


def test_the_part_that_overflows_is_named(plan: TrainPlan, state: TrainState, micro: Micro) -> None:
    weight = state.model.get_parameter("trunk.blocks.1.mlp.fc1.weight")
    with torch.no_grad():
        weight.fill_(3e38)
    said = diagnosis(plan, state, micro)
    assert "the first values that are not finite come out of trunk.blocks.1.mlp.fc1" in said
    assert not state.model.get_submodule("trunk.blocks.1.mlp.fc1")._forward_hooks  # taken off


def test_a_hook_that_breaks_a_whole_block_is_seen(
    plan: TrainPlan, state: TrainState, micro: Micro
) -> None:
    block = state.model.get_submodule("trunk.blocks.2")
    block.register_forward_hook(lambda module, inputs, output: output * math.inf)
    assert "come out of trunk.blocks.2;" in diagnosis(plan, state, micro)


def test_bad_gradients_are_named(plan: TrainPlan, state: TrainState, micro: Micro) -> None:
    name = "projectors.1.2.weight"
    handle = state.model.get_parameter(name).register_hook(lambda grad: grad * math.nan)
    said = diagnosis(plan, state, micro)
    assert f"gradients of 1 of {count(state)} parameters are not finite, {name} for one" in said
    assert "the loss is " in said
    handle.remove()
    state.optimizer.zero_grad()
    state.model.get_parameter(name).register_hook(lambda grad: grad * 1e9)
    said = diagnosis(plan, state, micro)
    assert f"the last batch's gradients are finite, largest in {name} (norm " in said
    assert "see --max-grad-norm" in said


def count(state: TrainState) -> int:
    return sum(parameter.requires_grad for parameter in state.model.parameters())


def test_a_loss_that_breaks_by_itself_is_named(
    plan: TrainPlan, state: TrainState, micro: Micro, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., dict[str, Tensor]] = plan.method.loss

    def broken(*args: Any) -> dict[str, Tensor]:
        losses = real(*args)
        return {**losses, "loss": losses["loss"] / 0, "alignment": losses["alignment"] * math.nan}

    monkeypatch.setattr(plan.method, "loss", broken)
    said = diagnosis(plan, state, micro)
    assert "loss and alignment are not finite, though all parts of the model are" in said


# The world.

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_who_one_is_comes_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    assert world_of_environment() == World(0, 1, 0)
    environment.setenv("RANK", "3")  # of something else: nobody said how many
    assert world_of_environment() == World()
    for name, value in zip(NAMES, ("5", "8", "1"), strict=True):
        environment.setenv(name, value)
    world = world_of_environment()
    assert world == World(5, 8, 1) and not world.is_main
    assert rank_device("cpu") == "cpu"
    environment.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="RANK=5, WORLD_SIZE=8, LOCAL_RANK=None: expected three"):
        world_of_environment()


def test_a_rank_takes_the_device_of_its_local_number(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_device("auto") == "cuda"
    for name, value in zip(NAMES, ("5", "8", "1"), strict=True):
        environment.setenv(name, value)
    assert rank_device("auto") == rank_device("cuda") == "cuda:1"
    environment.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="--device cuda:2: this machine has 2 CUDA devices"):
        rank_device("auto")


def test_alone_nothing_is_shared() -> None:
    world, tensor = World(), torch.arange(3.0)
    assert world.sum(tensor) is tensor and world.share({"step": 4}) == {"step": 4}
    world.barrier()
    assert world.is_main


def test_sigterm_asks_to_stop_after_the_step() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stopping(World()) as stopping:
        assert not stopping.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked() and stopping.asked()
    assert signal.getsignal(signal.SIGTERM) is before
    with Stopping(World()) as stopping:
        stopping.ask()
        assert stopping.asked()


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Stopping(World()) as stopping:
            found.append((signal.getsignal(signal.SIGTERM), stopping.asked()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, False)]
