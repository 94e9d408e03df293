"""Imports go one way, and only cluster/ imports ray: the rooms of CONTRIBUTING.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "repa_pipeline"

# A room may import from rooms of a lower or the same level.
LEVELS = {
    "errors": 0,
    "exits": 0,
    "tables": 1,
    "text": 1,
    "ranges": 1,
    "settings": 1,
    "config": 1,
    "config_plan": 2,
    "config_care": 2,
    "config_exchange": 2,
    "config_train": 2,
    "config_sample": 2,
    "config_evaluate": 2,
    "config_pictures": 2,
    "command_table": 3,
    "resolve": 4,
    "device": 2,
    "weights": 2,
    "quantised": 2,
    "encoders": 3,
    "autoencoders": 3,
    "models": 3,
    "diffusion": 3,
    "metrics": 4,
    "data": 4,
    "methods": 4,
    "engine": 5,
    "registry": 5,
    "pictures": 5,
    "observe": 6,
    "training": 7,
    "stages": 8,
    "report": 9,
    "report_charts": 9,
    "report_pictures": 9,
    "report_html": 9,
    "report_results": 9,
    "report_settings": 9,
    "report_training": 9,
    "report_twins": 9,
    "testing": 9,
    "pipeline": 9,
    "cluster": 9,
    "demo": 10,
    "commands": 10,
    "commands_plan": 10,
    "commands_sample": 10,
    "commands_evaluate": 10,
    "commands_pictures": 10,
    "commands_rank": 11,
    "commands_care": 10,
    "commands_exchange": 10,
    "cli": 11,
    "__main__": 12,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """'repa_pipeline.data.order' -> 'data'."""
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    """Modules a file imports, inside functions too; those for type checking alone count as well."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    for module in imports(path):
        if module.startswith("repa_pipeline."):
            assert LEVELS[room(module)] <= LEVELS[own], f"{own} must not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_is_imported_in_cluster_alone(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] != "cluster":
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


def test_training_process_never_names_timm_or_diffusers() -> None:
    for folder in ("models", "diffusion", "methods", "training", "data"):
        for path in (PACKAGE / folder).rglob("*.py"):
            names = {name.split(".")[0] for name in imports(path)}
            assert not names & {"timm", "diffusers", "zarr"}, path
