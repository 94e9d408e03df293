"""The Ray session of this process: join a running one, start one, and end only what we started."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from repa_pipeline.device import cpu_count
from repa_pipeline.errors import ConfigError, StageError
from repa_pipeline.exits import EXIT_TERMINATED

# Only settings, shards and commits pass through the object store: Ray's smallest will do.
OBJECT_STORE_BYTES = 80 * 2**20
NOT_HOSTS = (None, "", "auto", "local")
ANSWER_S = 10.0


def check_address(address: str | None) -> None:
    """Raises ConfigError for an address of a kind that shards cannot be driven through."""
    if address in NOT_HOSTS or re.fullmatch(r"[^/]+:\d+", address or ""):
        return
    raise ConfigError(
        f"--address (or RAY_ADDRESS) {address}: expected HOST:PORT of a Ray cluster's head (port "
        "6379 by default), auto or local; where all you have is a ray:// or http:// address, run "
        "this command on the cluster: `ray job submit -- repa ...`"
    )


@contextlib.contextmanager
def ray_session(address: str | None, num_gpus: int | None = None) -> Iterator[bool]:
    """Inside, Ray is connected; the value says whether it is a cluster of our own.

    A session this process has already is used and left as it is. Raises StageError when no
    cluster answers at `address`, or when the session that is there is of another one.
    """
    is_local = address in (None, "", "local")
    with _environment(is_local), _keeping_sigterm():
        import ray

        was_there = ray.is_initialized()
        if was_there:
            _check_session(ray, address)
        else:
            _connect(ray, address, is_local, num_gpus)
    try:
        yield is_local and not was_there
    finally:
        if not was_there:
            ray.shutdown()


def _check_session(ray: Any, address: str | None) -> None:
    """Raises StageError when this process is connected to another cluster than `address`."""
    joined = str(ray.get_runtime_context().gcs_address)
    if address and address not in NOT_HOSTS and _place(address) != _place(joined):
        raise StageError(
            f"--address {address}: this process is connected to the Ray cluster at {joined} "
            "already: give that address, or call ray.shutdown() first"
        )


def _connect(ray: Any, address: str | None, is_local: bool, num_gpus: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if is_local:
            ray.init(
                address="local",
                num_cpus=cpu_count(),
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            _reach(address)
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise StageError(
            f"no Ray cluster to use at --address {address or 'local'}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    _silence_errors(ray)


def _reach(address: str | None) -> None:
    """Raises OSError when nothing answers at HOST:PORT; Ray itself would try for minutes."""
    if address and address not in NOT_HOSTS:
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()


def _place(address: str) -> tuple[str, str]:
    """(IP address, port) of HOST:PORT; the host as it is where its name is not known here."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(host.strip("[]"))
    return host, port


def _silence_errors(ray: Any) -> None:
    """Ends Ray's printing of a page on standard output for every dead worker.

    The driver says it in a line. Its thread must be told to end before its subscription is closed,
    else it spins.
    """
    with contextlib.suppress(AttributeError):
        worker = ray._private.worker.global_worker
        subscriber, stopped = worker.gcs_error_subscriber, worker.threads_stopped
        stopped.set()
        subscriber.close()


@contextlib.contextmanager
def _environment(is_local: bool) -> Iterator[None]:
    """What Ray reads from the environment when it is imported and started."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if is_local:
        # A cluster of one machine listens on the loopback interface alone, and gathers no metrics
        # for a dashboard that it does not have.
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        wanted["RAY_enable_metrics_collection"] = "0"
        wanted["RAY_task_events_report_interval_ms"] = "0"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit where it would kill, so that workers are ended first."""
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    came: list[int] = []

    def unwind(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    except SystemExit:
        if came:  # within a call of Ray the status was lost
            raise SystemExit(EXIT_TERMINATED) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Inside, Ray may set its handler of SIGTERM; after, the one before is back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if _in_main_thread():
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
