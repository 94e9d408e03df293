"""Runs: folders under WORKSPACE/runs, each with its settings, checkpoints and logs.

NAME/run.json       settings and data digests, written when the run starts
NAME/checkpoints/   NAME/events.jsonl   NAME/tensorboard/   NAME/previews/
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from repa_pipeline.config import CommonConfig, as_json, decisions
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.array import first_difference
from repa_pipeline.data.fsstore import refuse_credentials
from repa_pipeline.data.objects import LocalStore, get_json, json_bytes
from repa_pipeline.errors import ConfigError, MismatchError, MissingError, StageError
from repa_pipeline.models import ModelSpec
from repa_pipeline.training.checkpoint import checkpoint_path, complete_steps

# The key of a record whose run was not trained here.
IMPORTED = "imported"
NAME_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# A rank that was just ended may hold the lock a little longer, one on a dead machine by NFS most.
LOCK_PATIENCE_S = 120.0
_LOCK_POLL_S = 0.2


def runs_folder(config: CommonConfig) -> Path:
    """The local folder of runs; raises ConfigError for a remote workspace without --runs-dir."""
    if config.runs_dir:
        return Path(config.runs_dir)
    if "://" in config.workspace:
        refuse_credentials(config.workspace)
        raise ConfigError(
            f"runs are written to a local folder, the workspace is {config.workspace}: give "
            "--runs-dir FOLDER (checkpoints are kept in the workspace too)"
        )
    return Path(config.workspace) / "runs"


def default_name(config: TrainConfig, teachers: tuple[str, ...], method: str) -> str:
    """The name of a run that was given none: model, then teachers or the method's name."""
    model = config.model.lower().replace("/", "-")
    what = "+".join(teachers) if teachers else ("vanilla" if method in ("sit", "dit") else method)
    return f"{model}.{what}" + (f".seed{config.seed}" if config.seed else "")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run on disk."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def last_step(self) -> int:
        """Steps of the newest complete checkpoint, 0 without one."""
        steps = complete_steps(self.checkpoints)
        return steps[-1] if steps else 0

    def has_checkpoint(self) -> bool:
        """Whether a complete one is there, be it of step 0 (of an import that tells no step)."""
        return bool(complete_steps(self.checkpoints))

    def newest_checkpoint(self) -> Path:
        """The newest complete checkpoint; raises MissingError when there is none."""
        steps = complete_steps(self.checkpoints)
        if not steps:
            raise MissingError(f"run {self.name} has no checkpoint yet: run `repa train` first")
        return checkpoint_path(self.checkpoints, steps[-1])

    def record(self) -> dict[str, Any]:
        """What run.json says; raises MissingError without such a run, DamagedError for no JSON."""
        path = self.folder / "run.json"
        if not path.is_file():
            raise MissingError(f"no run at {self.folder}: `repa runs` lists them")
        return get_json(LocalStore(str(self.folder)), path.name)


def list_runs(config: CommonConfig) -> list[Run]:
    """All runs of the workspace, by name."""
    folder = runs_folder(config)
    return [Run(path.parent) for path in sorted(folder.glob("*/run.json"))]


def find_run(config: CommonConfig, name: str | None) -> Run:
    """The run called `name`, or the only one; raises rather than guess between several."""
    runs = list_runs(config)
    if name is not None:
        run = Run(runs_folder(config) / name)
        if not (run.folder / "run.json").is_file():
            known = ", ".join(run.name for run in runs) or "none"
            raise MissingError(f"no run '{name}' in {runs_folder(config)}: known are {known}")
        return run
    if not runs:
        raise MissingError(f"no runs in {runs_folder(config)}: run `repa train` first")
    if len(runs) > 1:
        raise ConfigError(
            f"{len(runs)} runs in {runs_folder(config)} ({', '.join(r.name for r in runs)}): "
            "choose with --run NAME"
        )
    return runs[0]


def open_run(config: TrainConfig, name: str, decided: Mapping[str, Any]) -> Run:
    """Starts a run, or goes on with the one that stands there.

    `decided` holds the settings and data digests that decide its curve. Raises MismatchError
    when the standing run was started with others, ConfigError for a bad name or --no-resume.
    """
    if not NAME_RULE.fullmatch(name):
        raise ConfigError(f"run name '{name}': expected letters, digits, '.', '_', '-', '+' only")
    run = Run(runs_folder(config) / name)
    wanted = json.loads(json.dumps({"settings": decisions(config), **decided}))
    record = {"decided": wanted, "config": as_json(config)}
    if LocalStore(str(run.folder)).put_new("run.json", json_bytes(record)):
        return run
    if not config.resume:
        raise ConfigError(f"run '{name}' exists and --no-resume was given: choose another name")
    standing = run.record()
    if IMPORTED in standing:
        raise ConfigError(
            f"run '{name}' was imported from {standing[IMPORTED]}, which does not hold what an "
            "exact continuation needs: sample from it, and train under another name"
        )
    difference = decided_difference(standing.get("decided", {}), wanted)
    if difference:
        key, there, here = difference
        raise MismatchError(
            f"run '{name}' was started with other settings: {key} is {there!r} there, {here!r} "
            "now; set it back or choose another name"
        )
    return run


def decided_difference(there: Any, here: Any) -> tuple[str, Any, Any] | None:
    """The first difference of what decides two runs: (dotted name, there, here), or None.

    A setting that one of them does not have, as it was begun before there was one, counts as its
    default, which is what the run was made with.
    """
    for part, cls in (("settings", TrainConfig), ("model", ModelSpec)):
        ours, theirs = _part(here, part), _part(there, part)
        defaults = {k: v for k, v in _defaults(cls).items() if k in {*ours, *theirs}}
        if ours and theirs:
            here = {**here, part: {**defaults, **ours}}
            there = {**there, part: {**defaults, **theirs}}
    return first_difference(there, here)


def _part(decided: Any, name: str) -> dict[str, Any]:
    found = decided.get(name) if isinstance(decided, dict) else None
    return found if isinstance(found, dict) else {}


def _defaults(cls: type[Any]) -> dict[str, Any]:
    """Field -> default as JSON."""
    fields = [f for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
    found: dict[str, Any] = json.loads(json.dumps({field.name: field.default for field in fields}))
    return found


def note_settings(run: Run, config: TrainConfig) -> None:
    """Records the settings that the run now goes on with (an extended run has other `steps`)."""
    record = run.record()
    if record["config"] != as_json(config):
        LocalStore(str(run.folder)).put(
            "run.json", json_bytes({**record, "config": as_json(config)})
        )


@contextlib.contextmanager
def locked(run: Run, patience_s: float = 0.0) -> Iterator[None]:
    """Holds the run's lock; raises StageError when another process trains it.

    patience_s: how long to wait for one that may be about to end.
    """
    with open(run.folder / "lock", "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience_s
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "?"
                raise StageError(
                    f"run '{run.name}' is being trained by process {holder}: wait for it or stop it"
                )
            time.sleep(_LOCK_POLL_S)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
