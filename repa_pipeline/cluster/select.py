"""Settings -> executor: where shards run. Ray is imported only once it is chosen and used."""

from __future__ import annotations

import os

from repa_pipeline.cluster.executor import RayExecutor
from repa_pipeline.cluster.placement import Wish
from repa_pipeline.cluster.scheduler import Policy
from repa_pipeline.config import ClusterConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.engine.contracts import Executor
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import ConfigError

# Made by the drivers of NVIDIA, of AMD, and of Windows' Linux.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def choose_executor(config: ClusterConfig, written: str | None = None) -> Executor:
    """This process, or Ray; `written` is where shards go, the workspace without it.

    `auto` is Ray where an address is configured (--address, RAY_ADDRESS) or the machine has
    several CUDA devices to use, else this process. Raises ConfigError for an address of a kind
    that cannot be used.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    if config.executor == "auto":
        wants_ray = bool(address) or _num_devices(config.device) > 1
    else:
        wants_ray = config.executor == "ray"
    if not wants_ray:
        return LocalExecutor(config.retries)
    shared = _shared(written or config.workspace)
    return RayExecutor(_wish(config), _policy(config), address, config.plugins, shared)


def ray_address(config: TrainConfig) -> str | None:
    """Where ranks of a run are started by Ray: an address, "local", or None for not by Ray.

    `auto` is Ray where an address is configured; several devices of one machine need none. Raises
    ConfigError for a number of ranks that is said in the other way's words.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    if config.executor == "local" or (config.executor == "auto" and address is None):
        if config.workers:
            raise ConfigError(
                "--workers are Ray's: give --executor ray or an --address, or use --ranks for "
                "processes on this machine"
            )
        return None
    if config.ranks:
        raise ConfigError("--ranks are processes on this machine: with Ray give --workers")
    return address or "local"


def _wish(config: ClusterConfig) -> Wish:
    return Wish(
        device=config.device,
        workers=config.workers,
        worker_gpus=config.worker_gpus,
        worker_cpus=config.worker_cpus,
        threads=config.threads or int(os.environ.get("OMP_NUM_THREADS", 0)),
        decode_threads=getattr(config, "decode_threads", 0),
    )


def _policy(config: ClusterConfig) -> Policy:
    return Policy(
        retries=config.retries,
        straggler_factor=config.straggler_factor,
        shard_timeout_s=config.shard_timeout_s,
    )


def _shared(url: str) -> str | None:
    """Where shards are written if it is a folder, which workers on other machines must see."""
    for protocol in ("file://", "local://"):
        if url.startswith(protocol):
            return url.removeprefix(protocol)
    return None if "://" in url else url


def _num_devices(device: str) -> int:
    """CUDA devices that `device` may use on this machine."""
    has_driver = any(os.path.exists(path) for path in _DRIVERS)
    if device not in ("auto", "cuda") or not has_driver:
        return 1
    import torch  # seconds, for commands that need nothing else of it

    return int(torch.cuda.device_count())
