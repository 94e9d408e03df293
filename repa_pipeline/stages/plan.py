"""`repa plan`: what a cache will cost before a machine is rented, and whether it pays.

Pure arithmetic over a `Workload` (what is to be stored), a `Shape` (the cluster) and `Rates`
(given in a file or probed, probe.py). Money is computed from the user's prices alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from repa_pipeline.data.array import ArraySpec

RANGE_BYTES = 16 * 2**20  # what the trainer reads with one GET
# A pass reads its images once; the index, which comes first, reads them once more.
NUM_SOURCE_READS = 2


@dataclasses.dataclass(frozen=True)
class Workload:
    """The images, the arrays made of them, and the training that will read them.

    networks: table name -> how many views it sees (2 with the mirrored one). teachers: those of
    `networks` that would run online without a cache. source_gets: requests that read the source
    once.
    """

    num_images: int
    arrays: tuple[ArraySpec, ...]
    networks: Mapping[str, int]
    teachers: tuple[str, ...]
    source_gets: int
    source_bytes: int
    train_images: int
    runs: int = 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """The cluster: devices in all, devices a node, CPU cores a node."""

    devices: int
    devices_per_node: int
    cores_per_node: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.devices / self.devices_per_node)


@dataclasses.dataclass(frozen=True)
class Prices:
    """The user's own; what is not given costs nothing and is not printed."""

    currency: str = ""
    device_hour: float = 0.0
    gb_month: float = 0.0
    get_1000: float = 0.0
    put_1000: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speeds. networks: images/s of one device, forward; train: images/s of one device, cached.

    decode: images/s of one core. read, write: bytes/s of one node to and from the store, 0 where
    unknown (then never the bottleneck).
    """

    networks: Mapping[str, float]
    decode: float
    train: float
    read: float = 0.0
    write: float = 0.0


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The estimate. Hours are of one device, wall hours of the whole cluster."""

    num_bytes: int
    num_objects: int
    source_gets: int
    puts: int
    epoch_gets: int
    device_hours: Mapping[str, float]
    wall_hours: float
    bottleneck: str
    required_read: float
    cached_rate: float
    online_rate: float
    saved_hours_per_run: float
    teacher_hours: float
    break_even_runs: float

    @property
    def total_device_hours(self) -> float:
        return sum(self.device_hours.values())


def plan_cache(work: Workload, shape: Shape, rates: Rates) -> CachePlan:
    """Estimates a cache and what it saves.

    Without a cache every training image goes through the teachers once more: it costs
    1 / train + sum over teachers of 1 / network seconds of a device. With one it costs 1 / train,
    or what the store delivers if that is slower. The latents are needed either way.
    """
    num_bytes = sum(array.num_bytes for array in work.arrays)
    num_objects = sum(array.num_shards for array in work.arrays)
    seconds = {
        name: work.num_images * num_views / rates.networks[name]
        for name, num_views in work.networks.items()
    }
    teacher_s = sum(seconds[name] for name in work.teachers)
    limits = {
        "the networks' forward passes": sum(seconds.values()) / shape.devices,
        "decoding images": work.num_images / (rates.decode * shape.cores_per_node * shape.nodes),
        "writing to the store": num_bytes / (rates.write * shape.nodes) if rates.write else 0.0,
    }
    bottleneck = max(limits, key=lambda name: limits[name])
    online = 1 / (1 / rates.train + sum(1 / rates.networks[name] for name in work.teachers))
    record_bytes = train_record_bytes(work.arrays)
    delivered = math.inf
    if rates.read:
        delivered = rates.read / shape.devices_per_node / record_bytes
    cached = min(rates.train, delivered)
    saved_s = work.train_images * (1 / online - 1 / cached)
    return CachePlan(
        num_bytes=num_bytes,
        num_objects=num_objects,
        source_gets=NUM_SOURCE_READS * work.source_gets,
        # Each shard has a ledger entry; each array its metadata and its seal.
        puts=2 * num_objects + 2 * len(work.arrays),
        epoch_gets=sum(_gets(array) for array in work.arrays if _is_read(array)),
        device_hours={name: value / 3600 for name, value in seconds.items()},
        wall_hours=limits[bottleneck] / 3600,
        bottleneck=bottleneck,
        required_read=rates.train * shape.devices_per_node * record_bytes,
        cached_rate=cached,
        online_rate=online,
        saved_hours_per_run=saved_s / 3600,
        teacher_hours=teacher_s / 3600,
        break_even_runs=teacher_s / saved_s if saved_s > 0 else math.inf,
    )


def train_record_bytes(arrays: tuple[ArraySpec, ...]) -> int:
    """Bytes that one training image reads: one view, tokens without their scales."""
    return sum(array.layout.record_bytes for array in arrays if _is_read(array))


def verdict(plan: CachePlan, runs: int) -> tuple[bool, str]:
    """Whether to cache for `runs` runs, and one line that says why."""
    if not plan.teacher_hours:
        return True, "cache: there is no teacher, and latents are needed by every run"
    if plan.saved_hours_per_run <= 0:
        return False, (
            f"do not cache: the store delivers {plan.cached_rate:,.0f} images/s a device, the "
            f"teacher online allows {plan.online_rate:,.0f}; use a smaller codec or a local copy"
        )
    if plan.break_even_runs > runs:
        return False, (
            f"do not cache: it costs {plan.teacher_hours:,.3g} device hours and saves "
            f"{plan.saved_hours_per_run:,.3g} a run; it pays from {_count(plan.break_even_runs)} "
            f"runs on, {runs} planned"
        )
    return True, (
        f"cache: it costs {plan.teacher_hours:,.3g} device hours and saves "
        f"{plan.saved_hours_per_run:,.3g} a run; it pays after {plan.break_even_runs:.2g} of a run"
    )


def money(plan: CachePlan, prices: Prices) -> dict[str, float]:
    """Costs in the user's currency, by what they are for; empty without prices."""
    costs = {
        "devices, once": plan.total_device_hours * prices.device_hour,
        "requests, once": (plan.source_gets * prices.get_1000 + plan.puts * prices.put_1000) / 1000,
        "requests, an epoch": plan.epoch_gets * prices.get_1000 / 1000,
        "storage, a month": plan.num_bytes / 1e9 * prices.gb_month,
        "devices, saved a run": plan.saved_hours_per_run * prices.device_hour,
    }
    return {name: cost for name, cost in costs.items() if cost}


def _is_read(array: ArraySpec) -> bool:
    """Whether the usual run reads it each step: the plain view of records, not their scales."""
    return not array.name.endswith((".scale", ".flip"))


def _gets(array: ArraySpec) -> int:
    rows = (array.layout.rows_of(k, array.num_rows) for k in range(array.num_shards))
    return sum(math.ceil(array.layout.shard_bytes(n) / RANGE_BYTES) for n in rows)


def _count(value: float) -> str:
    return f"{math.ceil(value):,}"
