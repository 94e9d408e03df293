"""The user's own modules on machines that lack them: plugin sources travel with the job.

`collect` finds the files of the plugins in the driver's folders: each module itself, the modules
beside it that it imports or names as "module:function", and all of a package; nothing else of the
folder. `install` makes them importable in a worker, from memory, before what its disk may hold.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from repa_pipeline.errors import ConfigError

MAX_BYTES = 16 * 2**20
_LOADER = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")


class Source(NamedTuple):
    """One module: where the driver has it, and its text."""

    path: str
    text: bytes
    is_package: bool


def collect(plugins: Sequence[str]) -> dict[str, Source]:
    """The sources of `plugins` by module name; those of installed packages stay behind.

    Raises ConfigError when they are together above 16 MiB.
    """
    found: dict[str, Source] = {}
    todo = [name.partition(".")[0] for name in plugins]
    folders = ["", *sys.path]
    while todo:
        top = todo.pop()
        spec = importlib.machinery.PathFinder.find_spec(top, folders)
        if top in found or spec is None or not spec.origin or _is_installed(spec.origin):
            continue
        added = dict(_modules(top, Path(spec.origin).resolve()))
        found |= added
        todo += [name for source in added.values() for name in _named(source.text)]
    size = sum(len(source.text) for source in found.values())
    if size > MAX_BYTES:
        raise ConfigError(
            f"plugins: modules {', '.join(sorted(found)[:5])}... have {size / 2**20:.0f} MiB, at "
            f"most {MAX_BYTES // 2**20} travel to workers: install them there as a package"
        )
    return found


def install(sources: Mapping[str, Source]) -> None:
    """Makes the modules importable in this process."""
    if sources:
        sys.meta_path.insert(0, _FromMemory(sources))


class _FromMemory(importlib.abc.SourceLoader):
    """Finds and loads modules whose sources it was given."""

    def __init__(self, sources: Mapping[str, Source]):
        self._sources = sources

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        source = self._sources.get(fullname)
        if source is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname,
            source.path,
            loader=self,
            submodule_search_locations=[str(Path(source.path).parent)]
            if source.is_package
            else None,
        )

    def get_filename(self, fullname: str) -> str:
        return self._sources[fullname].path

    def get_data(self, path: str | bytes) -> bytes:
        for source in self._sources.values():
            if source.path == path:
                return source.text
        raise FileNotFoundError(path)


def _modules(top: str, origin: Path) -> Iterator[tuple[str, Source]]:
    """A module's file, or all Python files of a package."""
    if origin.name != "__init__.py":
        if origin.suffix == ".py":
            yield top, Source(str(origin), origin.read_bytes(), False)
        return
    for path in sorted(origin.parent.rglob("*.py")):
        parts = path.relative_to(origin.parent).with_suffix("").parts
        if any(part.startswith(".") for part in parts):
            continue
        is_package = parts[-1] == "__init__"
        name = ".".join([top, *(parts[:-1] if is_package else parts)])
        yield name, Source(str(path), path.read_bytes(), is_package)


def _named(text: bytes) -> Iterator[str]:
    """Top-level names of the modules a file imports, or names as "module:function"."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = _LOADER.fullmatch(node.value)
            if match:
                yield match[1].partition(".")[0]


def _is_installed(origin: str) -> bool:
    """Whether a module belongs to the environment, which every node has, and not to the user."""
    if origin in ("built-in", "frozen"):
        return True
    path = Path(origin).resolve()
    homes = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    package = Path(__file__).resolve().parents[1]
    return package in path.parents or any(Path(home).resolve() in path.parents for home in homes)
