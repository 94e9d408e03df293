"""Looks up table entries as a command sees them: with the user's plugins and overrides."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from repa_pipeline.autoencoders import AUTOENCODERS, AutoencoderSpec
from repa_pipeline.config import CommonConfig
from repa_pipeline.encoders import ENCODERS, EncoderSpec
from repa_pipeline.errors import ConfigError
from repa_pipeline.methods import METHODS, MethodSpec
from repa_pipeline.methods.parts import OBJECTIVES, PROJECTORS, TARGETS
from repa_pipeline.metrics.networks import NETWORKS, NetworkSpec
from repa_pipeline.models import MODELS, ModelSpec
from repa_pipeline.resolve import convert, type_name
from repa_pipeline.tables import Named, Table

TABLES: dict[str, Table[Any]] = {
    "encoders": ENCODERS,
    "autoencoders": AUTOENCODERS,
    "models": MODELS,
    "methods": METHODS,
    "networks": NETWORKS,
    "projectors": PROJECTORS,
    "targets": TARGETS,
    "objectives": OBJECTIVES,
}
_loaded: set[str] = set()
T = TypeVar("T", bound=Named)


def load_plugins(names: tuple[str, ...]) -> None:
    """Imports the user's modules and merges their ENCODERS, AUTOENCODERS, MODELS, METHODS,
    NETWORKS, PROJECTORS, TARGETS, OBJECTIVES (lists of entries). The current folder is importable.
    Doing it again is harmless.

    Raises ConfigError when a module cannot be imported or an entry's name is taken.
    """
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        if name in _loaded:
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"plugin '{name}' cannot be imported ({error}): check `plugins` in repa.toml"
            ) from error
        for kind, table in TABLES.items():
            for entry in getattr(module, kind.upper(), ()):
                table.add(entry)
        _loaded.add(name)


def encoder_spec(config: CommonConfig, name: str) -> EncoderSpec:
    """The teacher `name`, with plugins and overrides applied."""
    return _entry(config, "encoders", ENCODERS, name)


def autoencoder_spec(config: CommonConfig, name: str) -> AutoencoderSpec:
    """The autoencoder `name`, with plugins and overrides applied."""
    return _entry(config, "autoencoders", AUTOENCODERS, name)


def model_spec(config: CommonConfig, name: str) -> ModelSpec:
    """The model `name`, with plugins and overrides applied."""
    return _entry(config, "models", MODELS, name)


def method_spec(config: CommonConfig, name: str) -> MethodSpec:
    """The method `name`, with plugins and overrides applied."""
    return _entry(config, "methods", METHODS, name)


def network_spec(config: CommonConfig, name: str) -> NetworkSpec:
    """The feature network `name`, with plugins and overrides applied."""
    return _entry(config, "networks", NETWORKS, name)


def _entry(config: CommonConfig, kind: str, table: Table[T], name: str) -> T:
    load_plugins(config.plugins)
    _check_overridden_names(config)
    entry: Any = table[name]
    changes = config.overrides.get(f"{kind}.{entry.name}") or config.overrides.get(f"{kind}.{name}")
    if not changes:
        found: T = entry
        return found
    hints = typing.get_type_hints(type(entry))
    typed = {key: _typed(f"[{kind}.{name}]", key, value, hints) for key, value in changes.items()}
    changed: T = dataclasses.replace(entry, **typed)
    return changed


def _check_overridden_names(config: CommonConfig) -> None:
    """Raises UnknownNameError for a section of repa.toml whose entry is in no table."""
    for section in config.overrides:
        kind, _, name = section.partition(".")
        _ = TABLES[kind][name]


def _typed(section: str, key: str, value: Any, hints: dict[str, Any]) -> Any:
    """An override's value as the entry's own type; raises ConfigError."""
    if key not in hints or key == "name":
        known = ", ".join(sorted(hints.keys() - {"name"}))
        raise ConfigError(f"{section} has no setting '{key}': known are {known}")
    if isinstance(value, dict) and typing.get_origin(hints[key]) is Mapping:
        return value
    try:
        return convert(hints[key], value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key} ({section}): got {value!r}, expected {type_name(hints[key])}"
        ) from error
