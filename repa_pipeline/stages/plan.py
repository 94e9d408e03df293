"""`repa plan`: what a cache will cost before a machine is rented, and whether it pays.

Pure arithmetic over a `Workload` (what is to be stored), a `Shape` (the cluster) and `Rates`
(given in a file or measured, plan_rates.py). Money is computed from the user's prices alone. The
formulas are explained in docs/plan.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from repa_pipeline.data.array import ArraySpec
from repa_pipeline.data.fetch import num_ranges

# Objects that making the index writes: claim, listing, index.parquet, manifest.json; and a part
# and its record for so many images.
_INDEX_PUTS = 4
INDEX_PART_ITEMS = 512

NETWORKS = "the networks' forward passes"
DECODING = "decoding the images"
READING = "reading the source"
WRITING = "writing to the store"


@dataclasses.dataclass(frozen=True)
class Workload:
    """The images, the arrays made of them, and the training that will read them.

    networks: table name -> how many views it sees (2 with the mirrored one). teachers: those of
    `networks` that would run in every training step without a cache. source_gets: requests that
    read every image once; is_indexed: whether the index, which reads them too, stands already.
    """

    num_images: int
    arrays: tuple[ArraySpec, ...]
    networks: Mapping[str, int]
    teachers: tuple[str, ...]
    source_gets: int
    source_bytes: int
    is_indexed: bool
    train_images: int
    runs: int = 1

    @property
    def features(self) -> tuple[ArraySpec, ...]:
        """The arrays that the teachers give."""
        return tuple(array for array in self.arrays if array.name.startswith("features."))

    @property
    def latents(self) -> tuple[ArraySpec, ...]:
        """The other arrays."""
        return tuple(array for array in self.arrays if array not in self.features)

    @property
    def epochs(self) -> float:
        """How often a run sees each image."""
        return self.train_images / self.num_images


@dataclasses.dataclass(frozen=True)
class Shape:
    """The cluster: devices in all, devices a node, CPU cores a node."""

    devices: int
    devices_per_node: int
    cores_per_node: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.devices / self.devices_per_node)

    @property
    def devices_on_node(self) -> int:
        """Devices of the fullest node."""
        return min(self.devices, self.devices_per_node)

    @property
    def cores(self) -> int:
        return self.cores_per_node * self.nodes


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speeds. networks: images/s of one device, forward; train: images/s of one device whose data
    is at hand, None where unknown; decode: images/s of one core.

    read, write: bytes/s of one node from and to where source and cache lie, 0 where unknown (then
    never the bottleneck).
    """

    networks: Mapping[str, float]
    decode: float
    train: float | None
    read: float = 0.0
    write: float = 0.0


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Making the cache: device hours each network computes, hours of the whole cluster.

    held_hours: device hours for which the cluster is held while it encodes. feature_hours: the
    device hours that the teachers' arrays cost. enough_devices: as fast with no more than these.
    """

    compute_hours: Mapping[str, float]
    index_hours: float
    wall_hours: float
    bottleneck: str
    held_hours: float
    feature_hours: float
    enough_devices: int


@dataclasses.dataclass(frozen=True)
class Training:
    """One run from the cache, against the same with the teachers in every step.

    Rates are images/s of a device, hours device hours, required_read bytes/s of a node,
    online_cores the cores a node needs to decode images as fast as the run takes them.
    """

    required_read: float
    epoch_gets: int
    cached_rate: float
    online_rate: float
    cached_hours: float
    saved_hours: float
    online_cores: float
    break_even_runs: float


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The estimate; `training` is None where the rate of training is unknown."""

    num_bytes: int
    num_objects: int
    source_gets: int
    puts: int
    encoding: Encoding
    training: Training | None


def plan_cache(work: Workload, shape: Shape, rates: Rates) -> CachePlan:
    """Estimates a cache and what it saves."""
    num_shards = sum(array.num_shards for array in work.arrays)
    # Each shard has a ledger entry; each array its metadata and its seal.
    written = 2 * num_shards + 2 * len(work.arrays)
    index_puts = _INDEX_PUTS + 2 * math.ceil(work.num_images / INDEX_PART_ITEMS)
    encoding = _plan_encoding(work, shape, rates)
    return CachePlan(
        num_bytes=sum(array.num_bytes for array in work.arrays),
        num_objects=written + 2,  # index.parquet and manifest.json
        source_gets=work.source_gets * (1 if work.is_indexed else 2),
        puts=written + (0 if work.is_indexed else index_puts),
        encoding=encoding,
        training=_plan_training(work, shape, rates, encoding.feature_hours),
    )


def _plan_encoding(work: Workload, shape: Shape, rates: Rates) -> Encoding:
    compute = {
        name: work.num_images * num_views / rates.networks[name]
        for name, num_views in work.networks.items()
    }
    limits = _limits(work, shape, rates, compute, work.arrays)
    bottleneck = max(limits, key=lambda name: limits[name])
    held = limits[bottleneck] * shape.devices
    teachers_s = sum(compute[name] for name in work.teachers)
    # Without a cache the latents are made all the same, in a pass that may be as long.
    others = {name: value for name, value in compute.items() if name not in work.teachers}
    without = max(_limits(work, shape, rates, others, work.latents).values())
    slowest_other = max(value for name, value in limits.items() if name != NETWORKS)
    needed = sum(compute.values()) / slowest_other
    return Encoding(
        compute_hours={name: value / 3600 for name, value in compute.items()},
        index_hours=0.0 if work.is_indexed else max(limits[DECODING], limits[READING]) / 3600,
        wall_hours=limits[bottleneck] / 3600,
        bottleneck=bottleneck,
        held_hours=held / 3600,
        feature_hours=max(teachers_s, held - without * shape.devices) / 3600,
        enough_devices=min(shape.devices, math.ceil(needed)),
    )


def _limits(
    work: Workload,
    shape: Shape,
    rates: Rates,
    compute: Mapping[str, float],
    arrays: tuple[ArraySpec, ...],
) -> dict[str, float]:
    """Seconds that each part of the pass keeps the whole cluster busy; the parts overlap."""
    num_bytes = sum(array.num_bytes for array in arrays)
    return {
        NETWORKS: sum(compute.values()) / shape.devices,
        DECODING: work.num_images / (rates.decode * shape.cores),
        READING: work.source_bytes / (rates.read * shape.nodes) if rates.read else 0.0,
        WRITING: num_bytes / (rates.write * shape.nodes) if rates.write else 0.0,
    }


def _plan_training(
    work: Workload, shape: Shape, rates: Rates, feature_hours: float
) -> Training | None:
    """Without a cache every training image costs 1 / train + the sum of 1 / network seconds of a
    device, and its file and latents are read; with one it costs 1 / train, and its records are.
    """
    if rates.train is None:
        return None
    teachers_s = sum(1 / rates.networks[name] for name in work.teachers)
    file_bytes = work.source_bytes / work.num_images if work.teachers else 0.0
    online = _delivered(
        1 / (1 / rates.train + teachers_s), _read_bytes(work.latents) + file_bytes, shape, rates
    )
    cached = _delivered(rates.train, _read_bytes(work.arrays), shape, rates)
    saved_hours = work.train_images * (1 / online - 1 / cached) / 3600
    return Training(
        required_read=rates.train * shape.devices_on_node * _read_bytes(work.arrays),
        epoch_gets=epoch_gets(work.arrays),
        cached_rate=cached,
        online_rate=online,
        cached_hours=work.train_images / cached / 3600,
        saved_hours=saved_hours,
        online_cores=online * shape.devices_on_node / rates.decode,
        break_even_runs=feature_hours / saved_hours if saved_hours > 0 else math.inf,
    )


def _delivered(rate: float, image_bytes: float, shape: Shape, rates: Rates) -> float:
    """`rate` of a device, or what its node's share of the store allows."""
    if not rates.read:
        return rate
    return min(rate, rates.read / shape.devices_on_node / image_bytes)


def _read_bytes(arrays: tuple[ArraySpec, ...]) -> int:
    """Bytes read for a training image. Shards are read whole: with --flip both views' are."""
    return sum(array.layout.stride for array in arrays)


def epoch_gets(arrays: tuple[ArraySpec, ...]) -> int:
    """Requests of the trainer that read every shard once."""
    return sum(
        num_ranges(array.layout, array.layout.rows_of(k, array.num_rows))
        for array in arrays
        for k in range(array.num_shards)
    )
