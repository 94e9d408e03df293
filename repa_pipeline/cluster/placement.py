"""What one worker asks of a node, and how many workers the nodes hold: pure arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from repa_pipeline.errors import ConfigError

# Resources of one node as Ray names them: {"CPU": 8.0, "GPU": 1.0, ...}.
Node = Mapping[str, float]
# A CPU worker has the largest number of threads that leaves at most this share of the cores unused.
MAX_UNUSED = 0.1


@dataclasses.dataclass(frozen=True)
class Wish:
    """The settings that say how large a worker is; 0 means: choose."""

    device: str = "auto"
    workers: int = 0
    worker_gpus: float = 1.0
    worker_cpus: float = 0.0
    threads: int = 0
    decode_threads: int = 0


@dataclasses.dataclass(frozen=True)
class Ask:
    """What Ray reserves for one worker, and its compute threads."""

    cpus: float
    gpus: float
    threads: int

    def __str__(self) -> str:
        cores = f"{self.cpus:g} CPU cores"
        return f"{cores} and {self.gpus:g} GPU" if self.gpus else cores


def settle_ask(wish: Wish, nodes: Sequence[Node], can_grow: bool) -> Ask:
    """Chooses what the settings leave open, from the nodes there are.

    GPU workers reserve one core for computing and the decode threads, at most their share of
    the node, so that a node always holds as many as its GPUs. CPU workers reserve their compute
    threads: decoding is a small part of a CPU pass. Where the cluster cannot grow, a given
    number of CPU workers is made to fit. Raises ConfigError for settings that cannot work.
    """
    gpus = _gpus(wish, nodes)
    if gpus:
        cpus = wish.worker_cpus or _cpus_beside_gpu(wish, gpus, nodes)
        return Ask(cpus, gpus, wish.threads or max(1, int(cpus)))
    threads = wish.threads or _threads(wish.workers, _sizes(nodes))
    total = sum(_sizes(nodes))
    if wish.worker_cpus or can_grow or not wish.workers:
        return Ask(wish.worker_cpus or float(threads), 0.0, threads)
    return Ask(min(float(threads), _floor(total / wish.workers)), 0.0, threads)


def count_places(ask: Ask, nodes: Sequence[Node]) -> int:
    """How many workers the nodes hold when nothing else runs on them."""
    return sum(_places(ask, node) for node in nodes)


def describe(nodes: Sequence[Node]) -> str:
    """The cluster in a few words."""
    shown = [f"{node.get('CPU', 0):g} CPU + {node.get('GPU', 0):g} GPU" for node in nodes]
    kinds = ", ".join(f"{shown.count(kind)} x ({kind})" for kind in sorted(set(shown)))
    return f"{len(nodes)} nodes: {kinds}" if nodes else "no nodes"


def _gpus(wish: Wish, nodes: Sequence[Node]) -> float:
    gpus = wish.worker_gpus
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"--worker-gpus {gpus:g}: above 1 it must be whole")
    if wish.device == "cpu":
        return 0.0
    if wish.device.startswith("cuda:"):
        raise ConfigError(
            f"--device {wish.device} names one device of one machine: with Ray use --device cuda"
        )
    if wish.device == "cuda" and not gpus:
        raise ConfigError("--worker-gpus 0 with --device cuda: give a share above 0")
    has_gpus = any(node.get("GPU", 0) > 0 for node in nodes)
    return gpus if wish.device == "cuda" or has_gpus else 0.0


def _cpus_beside_gpu(wish: Wish, gpus: float, nodes: Sequence[Node]) -> float:
    shares = [
        node.get("CPU", 0) * gpus / node["GPU"] for node in nodes if node.get("GPU", 0) >= gpus
    ]
    if not shares:  # none yet: ask for little, so that whatever the autoscaler adds will do
        return 1.0
    return _floor(min(1.0 + wish.decode_threads, *shares))


def _threads(workers: int, sizes: Sequence[float]) -> int:
    """All cores of a node; as many as leave room for `workers` where their number is given."""
    largest = int(max(sizes, default=0))
    downwards = range(largest, 0, -1)
    if workers:
        return next((t for t in downwards if _count(t, sizes) >= workers), 1)
    used = {t: t * _count(t, sizes) for t in downwards}
    return next((t for t in downwards if used[t] >= (1 - MAX_UNUSED) * sum(sizes)), 1)


def _count(threads: int, sizes: Sequence[float]) -> int:
    return sum(int(size) // threads for size in sizes)


def _sizes(nodes: Sequence[Node]) -> list[float]:
    return [node.get("CPU", 0.0) for node in nodes]


def _places(ask: Ask, node: Node) -> int:
    limits = [
        int(node.get(name, 0.0) / needed + 1e-6)
        for name, needed in (("CPU", ask.cpus), ("GPU", ask.gpus))
        if needed
    ]
    return min(limits, default=0)


def _floor(value: float) -> float:
    """Rounded down to Ray's precision, with room for a sum of several."""
    return int(value * 1000) / 1000
