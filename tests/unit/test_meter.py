"""Logged means against a plain loop over samples, however a step is cut into parts."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from repa_pipeline.errors import DataError
from repa_pipeline.training.meter import Meter, bin_name

BATCH, STEPS, BAD = 7, 5, 2


class Alone:
    """A world of one rank."""

    rank, size = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


class Ranks:
    """Two ranks in two threads, which wait for each other in `sum`."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.held: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def together(self, act: Callable[[Rank], Any]) -> list[Any]:
        """What `act` returns on each rank."""
        found: list[Any] = [None, None]

        def run(rank: int) -> None:
            found[rank] = act(Rank(self, rank))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Rank:
    size = 2

    def __init__(self, ranks: Ranks, rank: int):
        self.ranks, self.rank = ranks, rank

    def sum(self, tensor: Tensor) -> Tensor:
        self.ranks.held[self.rank] = tensor
        self.ranks.barrier.wait()
        total = self.ranks.held[0] + self.ranks.held[1]
        self.ranks.barrier.wait()
        return total


def step_of(step: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Per-sample losses [BATCH], t [BATCH] and the gradient norm of a step."""
    generator = torch.Generator().manual_seed(step)
    t = torch.rand(BATCH, generator=generator)
    t[0], t[1], t[2] = 0.0, 1.0, 0.3
    losses = {
        "denoising": torch.rand(BATCH, generator=generator) + 1,
        "alignment": -torch.rand(BATCH, generator=generator),
    }
    norm = torch.rand((), generator=generator)
    if step == BAD:
        losses["denoising"][3] = math.nan
        norm = torch.tensor(math.inf)
    return losses, t, norm


def feed(meter: Meter, step: int, parts: list[slice]) -> None:
    losses, t, norm = step_of(step)
    for part in parts:
        cut = {name: values[part] for name, values in losses.items()}
        scalar = (cut["denoising"] + cut["alignment"]).mean()
        meter.add({"loss": scalar, **cut}, t[part], len(t[part]) / BATCH)
    meter.end_step(norm, ~torch.isfinite(norm))


def plain_means(steps: Iterator[int] | range) -> dict[str, float]:
    """Sample by sample in Python floats; bad steps are left out."""
    values: dict[str, list[float]] = {}
    for step in steps:
        losses, t, norm = step_of(step)
        if step == BAD:
            continue
        values.setdefault("grad_norm", []).append(float(norm))
        for i in range(BATCH):
            both = {name: float(value[i]) for name, value in losses.items()}
            values.setdefault("loss", []).append(sum(both.values()))
            low = min(int(float(t[i]) * 10), 9)
            for name, value in both.items():
                values.setdefault(name, []).append(value)
                values.setdefault(f"{name}/t0.{low}-{(low + 1) / 10}", []).append(value)
    return {name: math.fsum(v) / len(v) for name, v in values.items()}


WHOLE = [slice(0, BATCH)]
UNEQUAL = [slice(0, 1), slice(1, 5), slice(5, BATCH)]


@pytest.mark.parametrize("parts", [WHOLE, UNEQUAL], ids=["whole", "unequal"])
@pytest.mark.parametrize("world", [None, Alone()], ids=["none", "alone"])
def test_means_are_those_of_a_plain_loop(parts: list[slice], world: Any) -> None:
    meter = Meter()
    for step in range(STEPS):
        feed(meter, step, parts)
    means = meter.read(world)
    assert means.pop("skipped_steps") == 1.0
    expected = plain_means(range(STEPS))
    assert means == pytest.approx(expected, rel=1e-6) and means.keys() == expected.keys()
    assert "denoising/t0.0-0.1" in means and "denoising/t0.9-1.0" in means
    assert not [name for name in means if name.startswith("loss/")]

    # A new interval knows nothing of the old one; what was skipped counts on.
    assert meter.read(world) == {"skipped_steps": 1.0}
    feed(meter, 3, parts)
    again = meter.read(world, reset=False)
    assert again["skipped_steps"] == 1.0 and meter.read(world) == again
    again.pop("skipped_steps")
    assert again == pytest.approx(plain_means(range(3, 4)), rel=1e-6)


def test_parts_change_no_more_than_rounding() -> None:
    whole, parts = Meter(), Meter()
    for step in range(STEPS):
        feed(whole, step, WHOLE)
        feed(parts, step, UNEQUAL)
    # "loss" is a mean in float32 before it comes here; the others are summed in float64.
    ours, theirs = parts.read(), whole.read()
    assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-6)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_two_ranks_tell_the_same_and_that_of_one() -> None:
    alone, ranks = Meter(), Ranks()
    for step in range(STEPS):
        feed(alone, step, WHOLE)
    cuts = [[slice(0, 1), slice(1, 4)], [slice(4, BATCH)]]

    def act(world: Rank) -> dict[str, float]:
        meter = Meter()
        for step in range(STEPS):
            feed(meter, step, cuts[world.rank])
        return meter.read(world)

    first, second = ranks.together(act)
    assert first == second
    assert first == pytest.approx(alone.read(), rel=1e-6)


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_resumed_interval_is_the_same_to_the_bit(stop: int) -> None:
    cuts = [[slice(0, 1), slice(1, 4)], [slice(4, BATCH)]]

    def act(world: Rank) -> tuple[dict[str, float], dict[str, float], Any]:
        undisturbed, first, second = Meter(), Meter(), Meter()
        for step in range(STEPS):
            feed(undisturbed, step, cuts[world.rank])
            feed(first if step < stop else second, step, cuts[world.rank])
            if step + 1 == stop:
                second.load_state_dict(first.state_dict(world), world)
        state = undisturbed.state_dict(world)
        return undisturbed.read(world), second.read(world), state

    (whole, resumed, state), (_, other, _) = Ranks().together(act)
    assert resumed == whole == other

    # One rank goes on with what both had.
    alone = Meter()
    alone.load_state_dict(state)
    assert alone.read() == pytest.approx(whole, rel=1e-12)

    def split(world: Rank) -> dict[str, float]:
        meter = Meter()
        meter.load_state_dict(alone_state, world)
        return meter.read(world)

    alone = Meter()
    alone.load_state_dict(state)
    alone_state = alone.state_dict()
    assert Ranks().together(split) == [pytest.approx(whole, rel=1e-12)] * 2


def test_state_is_plain_and_its_own(tmp_path: Any) -> None:
    meter = Meter()
    feed(meter, 0, UNEQUAL)
    state = meter.state_dict()
    torch.save(state, tmp_path / "state.pt")
    feed(meter, 1, UNEQUAL)  # does not reach what was saved
    loaded = Meter()
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    expected = Meter()
    feed(expected, 0, UNEQUAL)
    assert loaded.read() == expected.read()
    with pytest.raises(DataError, match="10 buckets of t, expected 4"):
        Meter(num_bins=4).load_state_dict(state)


def test_bad_steps_in_a_row() -> None:
    meter = Meter()

    def steps(*bad: bool) -> int:
        for is_bad in bad:
            meter.add({"loss": torch.ones(())}, torch.zeros(2), 1.0)
            meter.end_step(torch.ones(()), torch.tensor(is_bad))
        meter.read()
        return meter.worst_in_a_row

    assert steps(False, True, False) == 1
    assert steps(False, True, True) == 2
    assert steps(True) == 3  # goes on over the reading
    assert steps(False) == 3  # the interval began with three
    assert steps(False) == 0
    restored = Meter()
    assert steps(True, True) == 2
    restored.load_state_dict(meter.state_dict())
    meter = restored
    assert steps(True) == 3
    assert meter.read()["skipped_steps"] == 7.0


def test_an_interval_without_a_good_step_has_no_means() -> None:
    meter = Meter()
    feed(meter, BAD, WHOLE)
    assert meter.read() == {"skipped_steps": 1.0}


def test_a_name_of_a_part_of_the_interval_is_a_mean_over_that_part() -> None:
    meter = Meter()
    for step in range(4):
        losses = {"loss": torch.tensor(float(step))}
        if step < 2:
            losses["alignment"] = torch.full((3,), float(10 + step))
        meter.add(losses, torch.full((3,), 0.55), 1.0)
        meter.end_step(torch.tensor(2.0 * step), torch.tensor(False))
    assert meter.read() == {
        **{"loss": 1.5, "grad_norm": 3.0, "skipped_steps": 0.0},
        **{"alignment": 10.5, "alignment/t0.5-0.6": 10.5},
    }


def test_half_precision_is_summed_in_full() -> None:
    meter = Meter()
    values = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    values[0] = 257.0
    meter.add({"x": values}, torch.zeros(1000), 1.0)
    meter.end_step(torch.ones(()), torch.tensor(False))
    assert meter.read()["x"] == pytest.approx((float(values[0]) + 999) / 1000, rel=1e-12)


def test_nothing_but_a_reading_waits_for_the_device() -> None:
    """On the meta device there are no values, so whatever asks for one raises."""
    meter = Meter("meta")
    with torch.device("meta"):
        for _ in range(2):
            meter.add({"loss": torch.ones(()), "x": torch.ones(4)}, torch.rand(4), 0.5)
            meter.add({"loss": torch.ones(()), "x": torch.ones(4)}, torch.rand(4), 0.5)
            meter.end_step(torch.ones(()), torch.ones((), dtype=torch.bool))
    meter.load_state_dict(meter.state_dict())
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.read()


def test_names_of_buckets() -> None:
    assert bin_name("x", 0, 10) == "x/t0.0-0.1" and bin_name("x", 9, 10) == "x/t0.9-1.0"
    assert bin_name("x", 1, 4) == "x/t0.25-0.50" and bin_name("x", 0, 8) == "x/t0.000-0.125"
    assert bin_name("x", 0, 1) == "x/t0.0-1.0"
