"""One Ray cluster for all tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

STORE_BYTES = 80 * 2**20


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
