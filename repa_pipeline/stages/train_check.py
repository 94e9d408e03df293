"""What `repa train --dry-run` finds out: whether the cache can be read as fast as the model trains.

A few seconds each of real reading, through the run's own reader and settings, and of real
training steps (forward and backward, without the optimiser) on a batch that was read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from typing import TYPE_CHECKING

from repa_pipeline.data.objects import LocalStore
from repa_pipeline.data.reader import Reader, Records
from repa_pipeline.device import prepare_compute
from repa_pipeline.stages.probe import Measured, measure
from repa_pipeline.text import count, number, size
from repa_pipeline.training.batches import BatchMaker, Micro, mirrored_views
from repa_pipeline.training.inputs import read_options
from repa_pipeline.training.launch import num_ranks
from repa_pipeline.training.parallel import prepare_blocks
from repa_pipeline.training.world import World

if TYPE_CHECKING:
    from repa_pipeline.stages.online import OnlineTeachers
    from repa_pipeline.stages.train import TrainPlan

READ_S = 3.0
_TRAIN_BUDGET_S = 4.0


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was read: bytes a second, of these for an image that was trained on, and memory."""

    bytes_per_s: float
    image_bytes: int
    seconds: float
    buffer_bytes: int
    first: Records


def check_training(plan: TrainPlan) -> list[str]:
    """Lines for people: rate of the model, bytes a second it takes and those there are, and which
    of the two limits the run. Raises what reading the cache raises."""
    devices = num_ranks(plan.config)
    reading = measure_reading(plan)
    trained = measure_training(plan, reading.first, devices)
    needed = trained.rate * devices * reading.image_bytes
    config = plan.config
    through = f", through {config.local_copy}" if config.local_copy else ""
    return [
        f"training: {number(trained.rate)} images/s a device ({trained.how})",
        f"required: {_speed(needed)} ({count(devices, 'device')}, {size(reading.image_bytes)} an "
        "image)",
        f"measured: {_speed(reading.bytes_per_s)} from {plan.inputs.latents.store.url}{through} "
        f"({count(config.read_threads, 'thread')}, {reading.seconds:.1f} s, every record checked; "
        f"{size(reading.buffer_bytes)} of memory a rank)",
        f"limited by: {bottleneck(needed, reading.bytes_per_s)}",
        *_advice_of_lanes(plan, devices),
    ]


def _advice_of_lanes(plan: TrainPlan, devices: int) -> list[str]:
    """A rank reads the shards of its lanes; where ranks share a lane, each reads all of it."""
    config = plan.config
    is_far = not isinstance(plan.inputs.latents.store, LocalStore) and not config.local_copy
    if not is_far or devices == 1 or config.lanes % devices == 0:
        return []
    return [
        f"note: {devices} ranks share {count(config.lanes, 'lane')}, so shards are sent to several "
        f"of them: use --lanes {devices} (or a multiple of all ranks) or --local-copy"
    ]


def bottleneck(needed: float, found: float) -> str:
    """Which of two rates, in bytes a second, limits a run, and what to do."""
    if found >= needed:
        return f"the model (reading could feed {number(found / needed)} times as many images)"
    return (
        f"reading, to {100 * found / needed:.0f}% of what the model could train on: read a copy "
        "on a local disk (--local-copy), use more --read-threads, or a smaller codec"
    )


def measure_reading(plan: TrainPlan, seconds: float = READ_S) -> Reading:
    """Reads batches from the run's beginning as fast as they come, for about `seconds`."""
    config, inputs = plan.config, plan.inputs
    first: Records | None = None
    with Reader(
        inputs.arrays,
        plan.order,
        first_step=0,
        last_step=config.steps,
        mirrored=inputs.mirrored,
        views=functools.partial(mirrored_views, config),
        **{**read_options(config, plan.device), "pin": False},
    ) as reader:
        began = time.perf_counter()
        for records in reader:
            first = first or records.copy()
            spent = time.perf_counter() - began
            if spent >= seconds:
                break
        num_bytes = reader.num_bytes
    assert first is not None  # a run has steps
    return Reading(num_bytes / spent, _image_bytes(plan), spent, reader.buffer_bytes, first)


def measure_training(plan: TrainPlan, records: Records, devices: int) -> Measured:
    """Images a second of forward and backward passes on one device, of one of `devices`."""
    import torch

    config, device = plan.config, plan.device
    prepare_compute(config.threads, config.tf32)
    model = plan.method.build().to(device)
    prepare_blocks(config, model, plan.compile)
    online = plan.online(range(records.step, records.step + 1), World(0, devices))
    micro = _first_micro(plan, records, World(0, devices), online)
    side = plan.inputs.latents.spec.manifest["resolution"]
    pixels = torch.zeros(len(micro.t), 3, side, side, dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, plan.dtype == "bf16")

    def seconds(num_images: int) -> float:
        part = slice(0, num_images)
        batch = dataclasses.replace(
            micro.batch,
            latents=micro.batch.latents[part],
            features=tuple(tokens[part] for tokens in micro.batch.features),
            cond=micro.batch.cond[part],
            class_tokens=tuple(t if t is None else t[part] for t in micro.batch.class_tokens),
        )
        began = time.perf_counter()
        if online:
            online.tokens(pixels[part])
        with autocast:
            losses = plan.method.loss(
                model, model, batch, micro.t[part], tuple(e[part] for e in micro.noise)
            )
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    is_slow = device == "cpu" and not plan.compile
    found = measure(seconds, len(micro.t), _TRAIN_BUDGET_S if is_slow else None)
    model_name = plan.model.name + (" with its teachers inside" if online else "")
    what = f"forward and backward of {model_name}, {plan.dtype} on {device}, {found.how}"
    return Measured(found.rate, what)


def _first_micro(
    plan: TrainPlan, records: Records, world: World, online: OnlineTeachers | None
) -> Micro:
    """The first micro-batch of a rank's part of the batch `records`."""
    with online or contextlib.nullcontext():
        batches = BatchMaker(plan.config, plan.inputs, plan.method, plan.device, world, online)
        own = dataclasses.replace(
            records,
            rows=records.rows[batches.local],
            arrays=tuple(array[batches.local] for array in records.arrays),
        )
        return next(batches.micro_batches(own))


def _image_bytes(plan: TrainPlan) -> int:
    """Bytes read for an image. Shards of a store are read whole: those of both views are."""
    arrays = plan.inputs.arrays
    is_whole = plan.config.local_copy or not isinstance(plan.inputs.latents.store, LocalStore)
    views = 2 if plan.inputs.mirrored and is_whole else 1
    return views * sum(array.spec.layout.stride for array in arrays)


def _speed(bytes_per_s: float) -> str:
    return f"{number(bytes_per_s / 1e9)} GB/s"
