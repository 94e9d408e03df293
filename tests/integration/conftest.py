"""One real S3 server and one Ray cluster for all tests of a session."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from repa_pipeline.testing.faults import FaultProxy
from repa_pipeline.testing.swift import SwiftServer

REPO = Path(__file__).resolve().parents[2]
_numbers = itertools.count()
STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="session")
def s3() -> Iterator[SwiftServer]:
    """OpenStack Swift from the virtual environment at REPA_S3_VENV (.venv-s3); skips without it."""
    venv = Path(os.environ.get("REPA_S3_VENV", REPO / ".venv-s3"))
    if not (venv / "bin" / "swift-proxy-server").is_file():
        pytest.skip(f"no S3 server in {venv}: run `make s3`, or set REPA_S3_VENV")
    with SwiftServer(venv, page_keys=50) as server:  # pages of a listing without 1,000 objects
        yield server


@pytest.fixture
def bucket(s3: SwiftServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket; the environment holds the server's AWS_* variables and no others."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    name = f"test-{next(_numbers)}"
    s3.create_bucket(name)
    return f"s3://{name}"


@pytest.fixture
def proxy(s3: SwiftServer, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the server, for stores that are opened from now on."""
    with FaultProxy(s3.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with two cores and one GPU that does not exist."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    for name, value in {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 3000}.items():
        os.environ.setdefault(f"RAY_health_check_{name}", str(value))  # a dead node is soon noticed
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": STORE_BYTES}
    made = Cluster(True, head_node_args={**node, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()
