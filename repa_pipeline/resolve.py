"""How settings are settled, and where each came from.

Precedence: flag > environment (REPA_*) > repa.toml > preset > default. A key at the top of
repa.toml (or REPA_KEY) goes to every command that has it; a key in [train] (or REPA_TRAIN_KEY)
to that command alone, and wins over the general one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa_pipeline.command_table import COMMANDS
from repa_pipeline.config import EMBEDDED, PRESETS, WORKSPACE
from repa_pipeline.errors import ConfigError, MissingError


@dataclasses.dataclass(frozen=True)
class Project:
    """A repa.toml: its folder and content; an absent file is an empty project."""

    folder: Path
    path: Path | None
    content: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A command's settings and, for each, where its value came from."""

    config: Any
    origins: Mapping[str, str]


_PATHS = (
    *("adm", "adm_npz", "adm_reference", "adm_samples", "plain", "guided", "trained", "features"),
    *("source", "workspace", "runs_dir", "scratch", "checkpoint", "samples", "reference"),
    *("weights", "decoder_weights", "network_weights", "output", "rates"),
    *("origin", "target", "destination", "checkpoints", "guide_checkpoint", "from_latents"),
    "downloads",
)
_ENTRY_TABLES = ("encoders", "autoencoders", "models", "methods", "networks")


def load_project(path: str | None = None) -> Project:
    """Reads repa.toml (or the given file); raises ConfigError when it does not parse."""
    given = path or os.environ.get("REPA_CONFIG")
    file = Path(given or "repa.toml")
    if file.is_dir() or not file.exists():
        if given:
            raise MissingError(f"no configuration file {file}: check --config (or REPA_CONFIG)")
        return Project(Path("."), None, {})
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    _check_project(file, content)
    return Project(file.parent, file, content)


def resolve(
    command: str,
    flags: Mapping[str, Any] | None = None,
    project: Project | None = None,
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """Settles every setting of `command`; raises ConfigError for one that cannot be."""
    cls = COMMANDS[command]
    project = project or Project(Path("."), None, {})
    environment = os.environ if environment is None else environment
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    fields = [field for field in dataclasses.fields(cls) if not field.metadata["hidden"]]
    layers = [
        (_flag_layer(given)),
        (_environment_layer(command, fields, environment)),
        (_project_layer(command, project)),
    ]
    for field in fields:
        for layer in layers:
            if field.name in layer:
                raw, origin = layer[field.name]
                values[field.name] = _parse(field, hints[field.name], raw, origin)
                origins[field.name] = origin
                break
    cached = _cached_source(values.get("workspace", WORKSPACE))
    if "source" not in values and cached:
        # A cache knows what it was made of; the defaults must be those of that source.
        values["source"], origins["source"] = cached, "the workspace's cache"
    preset = _preset_name(values)
    for field in fields:
        for section in (command, ""):
            if field.name not in values and field.name in PRESETS[preset].get(section, {}):
                values[field.name] = PRESETS[preset][section][field.name]
                origins[field.name] = f"preset {preset}"
        origins.setdefault(field.name, "default")
    values["preset"] = preset
    values["overrides"] = _overrides(project)
    values["settings_file"] = str(project.path) if project.path else None
    return Resolved(cls(**values), origins)


def _cached_source(workspace: str) -> str | None:
    """The source that a local workspace's finished index is of, None without one.

    A remote workspace is not asked: settling settings must not need a network.
    """
    try:
        manifest = json.loads((Path(workspace) / "cache/manifest.json").read_bytes())
        return str(manifest["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _flag_layer(given: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    return {
        name: (value, "flag --" + name.rstrip("_").replace("_", "-"))
        for name, value in given.items()
    }


def _environment_layer(
    command: str, fields: list[dataclasses.Field[Any]], environment: Mapping[str, str]
) -> dict[str, tuple[Any, str]]:
    layer = {}
    own = "REPA_" + command.upper().replace("-", "_") + "_"
    for field in fields:
        for variable in ("REPA_" + field.name.upper(), own + field.name.upper()):
            if variable in environment:
                layer[field.name] = (environment[variable], f"environment {variable}")
    return layer


def _project_layer(command: str, project: Project) -> dict[str, tuple[Any, str]]:
    layer = {}
    own = project.content.get(command, {})
    general = {k: v for k, v in project.content.items() if not isinstance(v, dict)}
    for section, values in ((None, general), (command, own)):
        for key, value in values.items():
            origin = f"{project.path}" + (f" [{section}]" if section else "")
            if key.replace("-", "_") in _PATHS:
                value = _relative_to(project.folder, value)
            layer[key.replace("-", "_")] = (value, origin)
    return layer


def _relative_to(folder: Path, value: Any) -> Any:
    """Paths in repa.toml are relative to its folder; URLs, embedded: and asset: are not paths."""
    if not isinstance(value, str) or "://" in value or value.startswith(("embedded:", "asset:")):
        return value
    return "::".join(os.path.join(folder, os.path.expanduser(part)) for part in value.split("::"))


def _overrides(project: Project) -> dict[str, dict[str, Any]]:
    found = {}
    for table in _ENTRY_TABLES:
        for name, changes in project.content.get(table, {}).items():
            found[f"{table}.{name}"] = {
                key: _relative_to(project.folder, value) if key == "weights" else value
                for key, value in changes.items()
            }
    return found


def _preset_name(values: Mapping[str, Any]) -> str:
    name = values.get("preset", "auto")
    foreign = "source" not in values and any(values.get(key) for key in ("reference", "adm"))
    if foreign and name == "auto":
        return "imagenet"  # a reference file says nothing of the embedded digits
    if name == "auto":
        # A checkpoint somewhere else says nothing of the embedded digits.
        source = values.get("source", "" if values.get("checkpoint") else EMBEDDED)
        return "digits" if str(source).startswith("embedded:") else "imagenet"
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}': known are auto, {', '.join(PRESETS)}")
    return str(name)


def _check_project(path: Path, content: Mapping[str, Any]) -> None:
    names = {name for cls in COMMANDS.values() for name in _settable(cls)}
    for key, value in content.items():
        if isinstance(value, dict):
            if key in _ENTRY_TABLES:
                _check_entries(path, key, value)
                continue
            _known(path, key, set(COMMANDS) | set(_ENTRY_TABLES), "section")
            for inner in value:
                own = _settable(COMMANDS[key])
                _known(path, inner.replace("-", "_"), own, f"setting in [{key}]")
        else:
            _known(path, key.replace("-", "_"), names, "setting")


def _settable(cls: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls) if not field.metadata["hidden"]}


def _check_entries(path: Path, table: str, entries: Mapping[str, Any]) -> None:
    for name, changes in entries.items():
        if not isinstance(changes, dict):
            raise ConfigError(
                f"{path}: [{table}] {name} must be a section of its own: [{table}.{name}]"
            )


def _known(path: Path, key: str, names: set[str], what: str) -> None:
    if key not in names:
        near = difflib.get_close_matches(key, sorted(names), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(names))}"
        raise ConfigError(f"{path}: unknown {what} '{key}': {hint}")


def _parse(field: dataclasses.Field[Any], hint: Any, raw: Any, origin: str) -> Any:
    try:
        value = convert(hint, raw)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{field.name} ({origin}): got {raw!r}, expected {type_name(hint)}"
        ) from error
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(
            f"{field.name} ({origin}): got {value!r}, expected one of {', '.join(choices)}"
        )
    check = field.metadata["check"]
    expected = check(value) if check and value is not None else None
    if expected:
        raise ConfigError(f"{field.name} ({origin}): got {raw!r}, expected {expected}")
    return value


def convert(hint: Any, raw: Any) -> Any:
    """`raw` (a flag's text or a TOML value) as type `hint`; raises TypeError or ValueError."""
    if isinstance(hint, types.UnionType):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if raw is None else convert(inner, raw)
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(typing.get_args(hint), raw)
    if hint is bool:
        return _convert_bool(raw)
    if isinstance(raw, bool) or isinstance(raw, (list, tuple, dict)):
        raise ValueError(raw)
    if hint is int:
        if isinstance(raw, float) and not raw.is_integer():
            raise ValueError(raw)
        return int(raw)
    if hint is float and not math.isfinite(float(raw)):
        raise ValueError(raw)
    return hint(raw)


def _convert_bool(raw: Any) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    text = str(raw).lower()
    if text not in known:
        raise ValueError(raw)
    return known[text]


def _convert_tuple(args: tuple[Any, ...], raw: Any) -> tuple[Any, ...]:
    parts = [raw] if isinstance(raw, str) else list(raw)
    flat = [
        piece.strip() if isinstance(piece, str) else piece
        for part in parts
        for piece in (part.split(",") if isinstance(part, str) else [part])
    ]
    if args[-1] is Ellipsis:
        return tuple(convert(args[0], piece) for piece in flat if piece != "")
    if len(flat) != len(args):
        raise ValueError(raw)
    return tuple(convert(arg, piece) for arg, piece in zip(args, flat, strict=True))


def type_name(hint: Any) -> str:
    """What a user calls the type `hint`."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(hint, types.UnionType):
        return type_name(next(a for a in typing.get_args(hint) if a is not type(None)))
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        count = "" if args[-1] is Ellipsis else f"{len(args)} of: "
        return f"a comma-separated list ({count}{type_name(args[0])})"
    return names.get(hint, str(hint))
