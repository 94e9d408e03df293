"""Tables of named parts (encoders, autoencoders, models, methods): data first, code on demand.

An entry is a frozen dataclass that imports without torch. Where an entry needs code it names it as
"module:function"; `resolve` imports it in the process that uses it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from repa_pipeline.errors import ConfigError, MissingError, UnknownNameError


class Named(Protocol):
    """What a table can hold."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


class Table(Mapping[str, T], Generic[T]):
    """A mapping from name to entry that answers an unknown name with the known ones."""

    def __init__(self, kind: str, entries: list[T], aliases: Mapping[str, str] | None = None):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._aliases = dict(aliases or {})
        for entry in entries:
            self.add(entry)
        # The entries of this package, as they are without plugins.
        self.packaged: Mapping[str, T] = dict(self._entries)

    def __getitem__(self, name: str) -> T:
        name = self._aliases.get(name, name)
        if name in self._entries:
            return self._entries[name]
        raise UnknownNameError(f"unknown {self.kind} '{name}': {self._hint(name)}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: T) -> None:
        """Adds an entry; raises ConfigError when the name is taken."""
        if entry.name in self:
            raise ConfigError(f"{self.kind} '{entry.name}' is defined twice: rename one of them")
        self._entries[entry.name] = entry

    def _hint(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._entries, n=1, cutoff=0.5)
        known = ", ".join(sorted(self._entries))
        return (f"did you mean '{near[0]}'? " if near else "") + f"known are {known}"


def resolve(path: str) -> Callable[..., Any]:
    """Imports the function that an entry names as "module:function".

    Raises MissingError naming the package when one that the module needs is not installed.
    """
    module, _, function = path.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise MissingError(
            f"{path} needs the package '{error.name}', which is not installed: pip install it"
        ) from error
    return found
