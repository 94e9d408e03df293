"""What a setting is: a dataclass field with a help line, a check, and whether it decides bytes."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    decides: bool = False,
    choices: tuple[str, ...] = (),
    check: Callable[[Any], str | None] | None = None,
    hidden: bool = False,
) -> Any:
    """A field: default, help line, whether it decides bytes, and what values it takes.

    `check` returns what is expected when the value is wrong, None when it is right.
    """
    metadata = {
        "help": help,
        "decides": decides,
        "choices": choices,
        "check": check,
        "hidden": hidden,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_positive(value: float) -> str | None:
    """Above 0."""
    return None if value > 0 else "a number above 0"


def check_not_negative(value: float) -> str | None:
    """0 or above."""
    return None if value >= 0 else "0 or more"


def check_fraction(value: float) -> str | None:
    """In [0, 1]."""
    return None if 0 <= value <= 1 else "a number in [0, 1]"


def check_local(value: str) -> str | None:
    """A path of this machine, which a URL would be taken for."""
    return "a local path" if "://" in value else None


def check_interval(value: tuple[float, float]) -> str | None:
    """An interval of [0, 1]."""
    low, high = value
    return None if 0 <= low <= high <= 1 else "LOW,HIGH with 0 <= LOW <= HIGH <= 1"


def decisions(config: Any) -> dict[str, Any]:
    """The settings that decide bytes, as JSON values."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.metadata.get("decides")
    }


def as_json(config: Any) -> dict[str, Any]:
    """All settings, as JSON values."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_json(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """The inverse of `as_json`; settings this version does not know are left out."""
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(
        **{
            name: tuple(value) if typing.get_origin(hints[name]) is tuple else value
            for name, value in values.items()
            if name in known
        }
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
