"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with real images, real weights and reference vectors; skips without one."""
    folder = pathlib.Path(os.environ.get("REPA_SHARED", REPO.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference data at {folder}: set REPA_SHARED to run this test")
    return folder
