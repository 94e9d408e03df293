"""Starts the ranks of a run on this machine: a process each, watched and ended together.

A rank that is killed (out of memory, say) ends the others, which would wait for it for ever; all
are started again and go on from the newest checkpoint, `max_failures` times. A rank that ends with
an error of its own ends the run with that rank's exit code. SIGTERM is handed on to the ranks,
which save and end, whenever it comes: also while they are being started.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.device import cpu_count
from repa_pipeline.errors import ConfigError, StageError
from repa_pipeline.exits import EXIT_TERMINATED
from repa_pipeline.settings import as_json, from_json

_END_S = 20.0
_POLL_S = 0.1
# Of a rank that was ended because of another one.
_ENDED = 1000


def num_ranks(config: TrainConfig) -> int:
    """How many processes to start here: --ranks, else one a visible CUDA device that may be used.

    Raises ConfigError for more ranks than CUDA devices.
    """
    devices = 0
    if config.device in ("auto", "cuda"):
        import torch

        devices = torch.cuda.device_count()
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
    with _noted(signal.SIGTERM) as asked:
        for attempt in range(1, attempts + 1):
            with tempfile.TemporaryDirectory() as folder:
                codes = _run_ranks(config, ranks, Path(folder), asked)
            killed = [rank for rank, code in enumerate(codes) if code < 0]
            if not killed:
                return next((code for code in codes if code not in (0, _ENDED)), 0)
            if asked or -signal.SIGTERM in codes:  # a rank that had not begun to listen dies of it
                return EXIT_TERMINATED
            said = f"rank {killed[0]} of {ranks} was killed by signal {-codes[killed[0]]}"
            if attempt < attempts:
                print(f"{said}; all start again from the newest checkpoint", file=sys.stderr)
    raise StageError(
        f"{said}, and so it went {attempts} times: look for what kills ranks (memory, most "
        "often); the newest checkpoint is kept"
    )


@contextlib.contextmanager
def _noted(number: signal.Signals) -> Iterator[list[int]]:
    """A list that grows by one with every such signal, which does nothing else meanwhile."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(number, before)


def read_config(path: str) -> TrainConfig:
    """The settings that `launch` wrote for its ranks."""
    config: TrainConfig = from_json(TrainConfig, json.loads(Path(path).read_text(encoding="utf-8")))
    return config


def _run_ranks(config: TrainConfig, ranks: int, folder: Path, asked: list[int]) -> list[int]:
    """Exit codes of all ranks, _ENDED of those that were ended because of another one."""
    path = folder / "config.json"
    path.write_text(json.dumps(as_json(config)), encoding="utf-8")
    command = [sys.executable, "-m", "repa_pipeline.commands_rank", str(path), str(os.getpid())]
    with contextlib.ExitStack() as files:
        # Ranks meet the same errors; rank 0 tells them as they come, another one's wait.
        streams = [files.enter_context(open(folder / f"{r}.txt", "w+")) for r in range(1, ranks)]
        processes = [
            subprocess.Popen(command, env=environment, stderr=stream)
            for environment, stream in zip(
                _environments(config, ranks), [None, *streams], strict=True
            )
        ]
        codes = _watch(processes, asked)
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


def _watch(processes: Sequence[subprocess.Popen[bytes]], asked: Sequence[int]) -> list[int]:
    """Waits for all; when one fails, the others have a little time to meet the same end.

    Hands on to all each signal that `asked` gains, the first too if it came before the last rank.
    """
    told = 0
    try:
        while any(process.poll() is None for process in processes):
            failed = [process.returncode for process in processes if process.returncode]
            if failed:
                return _end(processes, 0.0 if min(failed) < 0 else _END_S)
            for number in asked[told:]:
                _signal(processes, number)
                told += 1
            time.sleep(_POLL_S)
        return [process.wait() for process in processes]
    finally:
        _signal(processes, signal.SIGKILL)


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
