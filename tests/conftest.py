"""Fixtures shared by all tests: reference data, and one real S3 server for a session."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator

import pytest

from repa_pipeline.testing.faults import FaultProxy
from repa_pipeline.testing.swift import SwiftServer

REPO = pathlib.Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For two processes at once: files whole, and all that share the Ray cluster in one of them."""
    files = {item.path for item in items if "cluster" in getattr(item, "fixturenames", ())}
    for item in items:
        group = "ray" if item.path in files else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path not in files)  # the longest group first


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with real images, real weights and reference vectors; skips without one."""
    folder = pathlib.Path(os.environ.get("REPA_SHARED", REPO.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference data at {folder}: set REPA_SHARED to run this test")
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[SwiftServer]:
    """OpenStack Swift from the virtual environment at REPA_S3_VENV (.venv-s3); skips without it."""
    venv = pathlib.Path(os.environ.get("REPA_S3_VENV", REPO / ".venv-s3"))
    if not (venv / "bin" / "swift-proxy-server").is_file():
        pytest.skip(f"no S3 server in {venv}: run `make s3`, or set REPA_S3_VENV")
    with SwiftServer(venv, page_keys=50) as server:  # pages of a listing without 1,000 objects
        yield server


@pytest.fixture
def bucket(s3: SwiftServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket; the environment holds the server's AWS_* variables and no others.

    Its name is the test's own: faults by chance are of names, and are to be the same in any order.
    """
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    name = f"test-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"
    s3.create_bucket(name)
    return f"s3://{name}"


@pytest.fixture
def proxy(s3: SwiftServer, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the server, for stores that are opened from now on."""
    with FaultProxy(s3.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running
