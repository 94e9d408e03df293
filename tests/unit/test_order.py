"""The order of the data: a pure function, every row at most once, well mixed, free of ranks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repa_pipeline.data import order as order_module
from repa_pipeline.data.order import Order, rank_slice
from repa_pipeline.errors import ConfigError


def make_order(**changes: int) -> Order:
    values = {"num_rows": 1003, "shard_rows": 16, "batch_size": 24, "seed": 7}
    return Order(**{**values, "window": 4, **changes})


def test_a_pure_function_of_seed_epoch_step() -> None:
    order = make_order(lanes=2)
    first = [order.rows(step).tolist() for step in range(90)]
    order_module._epoch_order.cache_clear()
    backwards = [make_order(lanes=2).rows(step).tolist() for step in reversed(range(90))]
    assert backwards[::-1] == first
    for change in ({"seed": 8}, {"window": 5}, {"lanes": 3}, {"shard_rows": 32}):
        assert make_order(**{"lanes": 2, **change}).rows(0).tolist() != first[0]


def test_the_order_is_pinned() -> None:
    """A change of these numbers changes every run that is resumed across versions."""
    order = Order(num_rows=10, shard_rows=3, batch_size=4, seed=1, lanes=2, window=2)
    assert order.epoch(0).tolist() == [[2, 4, 5, 7], [0, 1, 6, 9]]
    assert order.epoch(1).tolist() == [[0, 7, 4, 3], [1, 8, 9, 2]]


def plain_epoch(order: Order, epoch: int) -> list[list[int]]:
    """The module's docstring, one row at a time."""
    num_shards = math.ceil(order.num_rows / order.shard_rows)
    sequence: list[int] = []
    for shard in np.random.default_rng([order.seed, epoch, 0]).permutation(num_shards):
        start = int(shard) * order.shard_rows
        sequence += range(start, min(start + order.shard_rows, order.num_rows))
    batches: list[list[int]] = [[] for _ in range(order.num_rows // order.batch_size)]
    share = order.batch_size // order.lanes
    for lane in range(order.lanes):
        first = lane * order.num_rows // order.lanes
        rows = sequence[first : (lane + 1) * order.num_rows // order.lanes]
        generator = np.random.default_rng([order.seed, epoch, 1, lane])
        mixed: list[int] = []
        while len(mixed) < len(rows):
            window = rows[len(mixed) :][: order.window * order.shard_rows]
            mixed += generator.permutation(window).tolist()
        for step, batch in enumerate(batches):
            batch += mixed[step * share : (step + 1) * share]
    return batches


@pytest.mark.parametrize(("lanes", "window"), [(1, 4), (2, 1), (3, 7), (4, 100)])
def test_equals_the_plain_loop(lanes: int, window: int) -> None:
    order = make_order(lanes=lanes, window=window)
    for epoch in (0, 3):
        assert order.epoch(epoch).tolist() == plain_epoch(order, epoch)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 400),
    shard_rows=st.integers(1, 40),
    share=st.integers(1, 9),
    lanes=st.integers(1, 5),
    window=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_every_row_at_most_once_an_epoch(
    num_rows: int, shard_rows: int, share: int, lanes: int, window: int, seed: int
) -> None:
    batch_size = share * lanes
    if batch_size > num_rows:
        return
    order = Order(num_rows, shard_rows, batch_size, seed, lanes, window)
    assert order.steps_per_epoch == num_rows // batch_size
    for epoch in (0, 1):
        rows = order.epoch(epoch)
        assert rows.shape == (order.steps_per_epoch, batch_size) and rows.dtype == np.int64
        flat = rows.reshape(-1)
        assert len(np.unique(flat)) == len(flat)
        assert flat.min() >= 0 and flat.max() < num_rows
        step = (epoch + 1) * order.steps_per_epoch - 1
        assert order.rows(step).tolist() == rows[-1].tolist()


def test_epochs_differ_and_leave_out_other_rows() -> None:
    order = make_order()
    left_out = []
    for epoch in range(3):
        rows = order.epoch(epoch)
        left_out.append(set(range(1003)) - set(rows.reshape(-1).tolist()))
        assert len(left_out[-1]) == 1003 - 41 * 24
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert not left_out[0] & left_out[1] & left_out[2]


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_lanes_and_windows(lanes: int) -> None:
    """A lane's part of the batches holds its window's rows, a window at a time."""
    order = Order(num_rows=40 * 16, shard_rows=16, batch_size=16, seed=3, lanes=lanes, window=5)
    rows = order.epoch(2)
    share, window_rows = 16 // lanes, 5 * 16
    shards_of_lanes = []
    for lane in range(lanes):
        sequence = rows[:, lane * share : (lane + 1) * share].reshape(-1)
        shards_of_lanes.append(set((sequence // 16).tolist()))
        for start in range(0, len(sequence), window_rows):
            shards = np.unique(sequence[start : start + window_rows] // 16)
            assert len(shards) == 5
            mixed = sequence[start : start + window_rows]
            assert len(np.unique(mixed[:16] // 16)) > 1
    assert sum(len(shards) for shards in shards_of_lanes) == 40
    assert len(set.union(*shards_of_lanes)) == 40


def distinct_classes(order: Order, labels: npt.NDArray[np.int64], num_steps: int) -> float:
    return float(np.mean([len(np.unique(labels[rows])) for rows in order.epoch(0)[:num_steps]]))


def test_batches_mix_the_classes() -> None:
    """ImageNet's size in shards of 512: a window of 16 is as good as a uniform draw, if the rows
    are permuted when they are stored; rows sorted by class are an example of what is not."""
    num_rows = 1_281_167
    sorted_labels = np.arange(num_rows) * 1000 // num_rows
    order = Order(num_rows=num_rows, shard_rows=512, batch_size=256, seed=0)
    permuted = sorted_labels[np.random.default_rng(0).permutation(num_rows)]
    uniform = 1000 * (1 - (1 - 1 / 1000) ** 256)
    assert uniform == pytest.approx(226.0, abs=0.1)
    assert distinct_classes(order, permuted, 400) == pytest.approx(225.8, abs=1.0)
    assert distinct_classes(order, sorted_labels, 400) == pytest.approx(21.8, abs=1.5)


@pytest.mark.parametrize("batch_size", [1, 24, 25, 256])
def test_slices_of_ranks_are_the_global_batch(batch_size: int) -> None:
    rows = np.arange(batch_size)
    for world_size in (1, 2, 3, 4, 7):
        parts = [rows[rank_slice(batch_size, rank, world_size)] for rank in range(world_size)]
        assert np.concatenate(parts).tolist() == rows.tolist()
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 1004 is larger than the data set of 1003"):
        make_order(batch_size=1004)
    with pytest.raises(ConfigError, match="batch_size 24 is not a multiple of lanes 5"):
        make_order(lanes=5)
    assert dataclasses.replace(make_order(), batch_size=1003).steps_per_epoch == 1
