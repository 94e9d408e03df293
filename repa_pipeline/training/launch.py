"""Starts the ranks of a run on this machine: a process each, watched and ended together.

A rank that is killed (out of memory, say) ends the others, which would wait for it for ever; all
are started again and go on from the newest checkpoint, `max_failures` times. A rank that ends with
an error of its own ends the run with that rank's exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.device import cpu_count
from repa_pipeline.errors import ConfigError, StageError
from repa_pipeline.settings import as_json, from_json
from repa_pipeline.training.world import EXIT_TERMINATED

_END_S = 20.0
_POLL_S = 0.1
# Of a rank that was ended because of another one.
_ENDED = 1000


def num_ranks(config: TrainConfig) -> int:
    """How many processes to start here: --ranks, else one a visible CUDA device that may be used.

    Raises ConfigError for more ranks than CUDA devices.
    """
    import torch

    wants_cuda = config.device in ("auto", "cuda")
    devices = torch.cuda.device_count() if wants_cuda else 0
    if config.ranks > 1 and config.device.startswith("cuda") and config.ranks > devices:
        raise ConfigError(
            f"--ranks {config.ranks} on {config.device}: this machine has {devices} CUDA devices; "
            "use --device cuda and as many ranks at most, or --device cpu"
        )
    return config.ranks or max(1, devices)


def launch(config: TrainConfig, ranks: int) -> int:
    """Runs `ranks` processes of `repa train` with `config`; returns their exit code.

    0: finished; 2: an error, told; 143: stopped by SIGTERM after saving. Raises StageError when
    ranks keep being killed.
    """
    attempts = config.max_failures + 1 if config.max_failures >= 0 else sys.maxsize
    for attempt in range(1, attempts + 1):
        with tempfile.TemporaryDirectory() as folder:
            codes = _run_ranks(config, ranks, Path(folder))
        if -signal.SIGTERM in codes:  # asked to end before it could note that: not to be restarted
            return EXIT_TERMINATED
        killed = [rank for rank, code in enumerate(codes) if code < 0]
        if not killed:
            return next((code for code in codes if code not in (0, _ENDED)), 0)
        said = f"rank {killed[0]} of {ranks} was killed by signal {-codes[killed[0]]}"
        if attempt < attempts:
            print(f"{said}; all start again from the newest checkpoint", file=sys.stderr)
    raise StageError(
        f"{said}, and so it went {attempts} times: look for what kills ranks (memory, most "
        "often); the newest checkpoint is kept"
    )


def read_config(path: str) -> TrainConfig:
    """The settings that `launch` wrote for its ranks."""
    config: TrainConfig = from_json(TrainConfig, json.loads(Path(path).read_text(encoding="utf-8")))
    return config


def _run_ranks(config: TrainConfig, ranks: int, folder: Path) -> list[int]:
    """Exit codes of all ranks, _ENDED of those that were ended because of another one."""
    path = folder / "config.json"
    path.write_text(json.dumps(as_json(config)), encoding="utf-8")
    command = [sys.executable, "-m", "repa_pipeline.commands_rank", str(path)]
    with contextlib.ExitStack() as files:
        # Ranks meet the same errors; rank 0 tells them as they come, another one's wait.
        streams = [files.enter_context(open(folder / f"{r}.txt", "w+")) for r in range(1, ranks)]
        processes = [
            subprocess.Popen(command, env=environment, stderr=stream)
            for environment, stream in zip(
                _environments(config, ranks), [None, *streams], strict=True
            )
        ]
        codes = _watch(processes)
        if codes[0] in (_ENDED, 0):
            for code, stream in zip(codes[1:], streams, strict=True):
                if code not in (_ENDED, 0):
                    stream.seek(0)
                    sys.stderr.write(stream.read())
                    break
    return codes


def _environments(config: TrainConfig, ranks: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = config.threads or int(os.environ.get("OMP_NUM_THREADS", 0))
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(threads or max(1, cpu_count() // ranks)),
    }
    return [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Waits for all; when one fails, the others have a little time to meet the same end."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        _signal(processes, number)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, hand_on) if in_main else None
    try:
        while any(process.poll() is None for process in processes):
            failed = [process.returncode for process in processes if process.returncode]
            if failed:
                return _end(processes, 0.0 if min(failed) < 0 else _END_S)
            time.sleep(_POLL_S)
        return [process.wait() for process in processes]
    finally:
        _signal(processes, signal.SIGKILL)
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _end(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> list[int]:
    """Exit codes, _ENDED for those that had to be killed."""
    deadline = time.monotonic() + patience_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    ended = [process for process in processes if process.poll() is None]
    _signal(ended, signal.SIGKILL)
    return [
        _ENDED if process in ended and process.wait() else process.wait() for process in processes
    ]


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
