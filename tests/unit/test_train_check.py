"""`repa train --dry-run`: the model's need against what the cache gives, and the bottleneck."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from repa_pipeline.data.array import open_sealed
from repa_pipeline.data.objects import LocalStore, RemoteStore
from repa_pipeline.errors import DamagedError
from repa_pipeline.stages import train_check
from repa_pipeline.stages.train import TrainPlan, plan_training
from repa_pipeline.stages.train_check import (
    bottleneck,
    check_training,
    measure_reading,
    measure_training,
)
from repa_pipeline.testing.caches import ToyTeacher, toy_train_config, write_toy_cache

LOSSY = ToyTeacher("toy-lossy", width=24, codec="int8")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_check, "READ_S", 0.1)
    monkeypatch.setattr(train_check, "_TRAIN_BUDGET_S", 0.05)


def of_store(plan: TrainPlan, store: RemoteStore) -> TrainPlan:
    """The plan with its arrays in another store."""
    latents = open_sealed(store, plan.inputs.latents.spec.name, "x")
    teachers = tuple(
        dataclasses.replace(teacher, tokens=open_sealed(store, teacher.tokens.spec.name, "x"))
        for teacher in plan.inputs.teachers
    )
    inputs = dataclasses.replace(plan.inputs, latents=latents, teachers=teachers)
    return dataclasses.replace(plan, inputs=inputs)


class Slow(RemoteStore):
    def read_range_into(self, key: str, start: int, buffer: memoryview) -> None:
        time.sleep(0.05)
        super().read_range_into(key, start, buffer)


def test_the_lines_add_up(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, teachers=(LOSSY,))
    plan = plan_training(toy_train_config(tmp_path, steps=10**6))
    lines = check_training(plan)
    assert [line.split(":")[0] for line in lines] == [
        "training",
        "required",
        "measured",
        "limited by",
    ]
    image_bytes = 2 * 4 * 8 * 8 * 2 + 4 + 16 * 24 + 4
    found = re.fullmatch(r"training: ([\d.,]+) images/s a device \((.*)\)", lines[0])
    assert found and "forward and backward of SiT-XS/2, float32 on cpu, batch" in found[2]
    rate = float(found[1].replace(",", ""))
    required = re.match(r"required: ([\d.]+) GB/s \(1 device, 1.416 KB an image\)", lines[1])
    assert required and image_bytes == 1416
    assert float(required[1]) == pytest.approx(rate * image_bytes / 1e9, rel=0.01)
    assert f" from {tmp_path}/cache (8 threads" in lines[2]
    measured = re.match(r"measured: ([\d.]+) GB/s", lines[2])
    assert measured
    is_model = float(measured[1]) >= float(required[1])
    assert lines[3].startswith("limited by: the model" if is_model else "limited by: reading")


def test_a_slow_store_is_the_bottleneck(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, teachers=(LOSSY,))
    plan = plan_training(toy_train_config(tmp_path, steps=10**6, read_threads=1))
    slow = of_store(plan, Slow(f"file://{tmp_path}/cache", LocalFileSystem()))
    # At most a shard of 8 rows each 50 ms: 160 images/s of 1,028 + 388 bytes.
    reading = measure_reading(slow, 0.5)
    assert 0 < reading.bytes_per_s < 20 * 8 * 1500
    trained = measure_training(slow, reading.first, 1)
    verdict = check_training(slow)[-1]
    if trained.rate > 1000:
        assert re.match(r"limited by: reading, to \d+% of .* --local-copy", verdict)


@pytest.mark.parametrize(
    ("needed", "found", "said"),
    [
        (1e8, 3.1e8, "the model (reading could feed 3.10 times as many images)"),
        (1e8, 1e8, "the model (reading could feed 1.00 times as many images)"),
        (2e9, 5e8, "reading, to 25% of what the model could train on: read a copy on a local"),
    ],
)
def test_the_bottleneck(needed: float, found: float, said: str) -> None:
    assert bottleneck(needed, found).startswith(said)


def test_what_is_read_for_an_image(tmp_path: Path) -> None:
    write_toy_cache(tmp_path, teachers=(LOSSY,), flip=True)
    plain = plan_training(toy_train_config(tmp_path))
    flipped = plan_training(toy_train_config(tmp_path, flip=True))
    copied = plan_training(toy_train_config(tmp_path, flip=True, local_copy=str(tmp_path / "copy")))
    assert [train_check._image_bytes(plan) for plan in (plain, flipped, copied)] == [
        1416,
        1416,
        2832,
    ]
    reading = measure_reading(copied)
    assert reading.first.step == 0
    assert reading.first.rows.tolist() == plain.order.rows(0).tolist()
    assert list((tmp_path / "copy").glob("*.shard"))


def test_a_rank_trains_its_part_of_the_batch(tmp_path: Path) -> None:
    cache = write_toy_cache(tmp_path)
    plan = plan_training(toy_train_config(tmp_path, steps=2))
    first = measure_reading(plan).first
    assert np.array_equal(first.arrays[0], cache.latents[first.rows])
    found = measure_training(plan, first, 4)
    assert found.rate > 0 and re.search(r"batch [12],", found.how)


def test_damage_is_said(tmp_path: Path) -> None:
    write_toy_cache(tmp_path)
    plan = plan_training(toy_train_config(tmp_path))
    store = LocalStore(str(tmp_path / "cache"))
    for path in (store.root / plan.inputs.latents.spec.name / "c").glob("*/0/0/0"):
        path.unlink()
    with pytest.raises(DamagedError, match="is missing; run `repa repair`"):
        check_training(plan)
