"""Checkpoints: written in one step, verified before use, loadable with weights_only=True.

step-00000400.pt     tensors and plain values only
step-00000400.json   size and sha256; written after the file, so its presence says "complete"
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from repa_pipeline.data.objects import LocalStore, get_json, json_bytes
from repa_pipeline.errors import DamagedError, MissingError, RepaError, StageError

FORMAT_VERSION = 1
_MARKER = re.compile(r"step-(\d+)\.json")


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after `step` optimiser steps."""
    return folder / f"step-{step:08d}.pt"


def save_checkpoint(folder: Path, step: int, content: Mapping[str, Any]) -> Path:
    """Writes a checkpoint so that it is there completely or not at all.

    Raises StageError when the disk does not take it; older checkpoints stay.
    """
    final = checkpoint_path(folder, step)
    temporary = final.with_suffix(".pt.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    for orphan in folder.glob("step-*.pt.tmp"):  # of a run killed while writing; one writer a run
        orphan.unlink(missing_ok=True)
    hashing: Any = None
    try:
        with open(temporary, "wb") as file:
            hashing = _HashingFile(file)
            torch.save({"format_version": FORMAT_VERSION, "step": step, **content}, hashing)
            file.flush()
            os.fsync(file.fileno())
        # Without the marker of an earlier file of this step, a kill between the two leaves none.
        final.with_suffix(".json").unlink(missing_ok=True)
        os.replace(temporary, final)
        marker = {"sha256": hashing.sha256.hexdigest(), "num_bytes": final.stat().st_size}
        LocalStore(str(folder)).put(final.with_suffix(".json").name, json_bytes(marker))
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch tells that its file is short, the file itself knows why.
        reason = (hashing and hashing.error) or error
        raise StageError(
            f"cannot write checkpoint {final}: {reason}; free some space and run the same command "
            "again, it goes on from the last complete checkpoint"
        ) from error
    return final


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    if not folder.is_dir():
        return []
    markers = [_MARKER.fullmatch(name) for name in os.listdir(folder)]
    return sorted(int(marker[1]) for marker in markers if marker)


def load_checkpoint(path: Path, device: str = "cpu", *, mapped: bool = False) -> dict[str, Any]:
    """Loads a checkpoint file; never unpickles code.

    mapped: tensors are read from the file when they are used; what is not used costs nothing.
    Raises MissingError when absent, DamagedError when it is torn, altered or not ours.
    """
    if not path.is_file():
        raise MissingError(f"no checkpoint {path}: check --run or --checkpoint")
    check_file(path)
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
        version = dict(content)["format_version"]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises many kinds for a file it cannot read
        raise DamagedError(
            f"{path} is not a checkpoint of this package ({type(error).__name__}): use another one"
        ) from error
    if version != FORMAT_VERSION:
        raise DamagedError(
            f"{path} has format version {version}, this package reads {FORMAT_VERSION}: use the "
            "package version that wrote it"
        )
    loaded: dict[str, Any] = content
    return loaded


def load_newest(folder: Path, device: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest sound checkpoint (None without any) and what was wrong with newer ones.

    Raises DamagedError when there are checkpoints and none is sound.
    """
    faults: list[str] = []
    for step in reversed(complete_steps(folder)):
        try:
            return load_checkpoint(checkpoint_path(folder, step), device), faults
        except RepaError as error:
            faults.append(str(error))
    if faults:
        raise DamagedError(
            f"no sound checkpoint in {folder}: {faults[0]}; restore one, or remove the run's "
            "folder to start over"
        )
    return None, []


def kept_steps(steps: Iterable[int], keep: int, keep_every: int = 0) -> set[int]:
    """Those of `steps` that stay: the newest `keep`, and multiples of `keep_every` (0: none)."""
    ascending = sorted(steps)
    multiples = (step for step in ascending if keep_every and step % keep_every == 0)
    return {*ascending[-keep:], *multiples}


def prune(
    folder: Path, keep: int, protect: set[int], keep_every: int = 0, newest: int | None = None
) -> None:
    """Removes the checkpoints that neither `kept_steps` nor `protect` holds.

    Those after `newest` go too and do not count: a run that went back to an older checkpoint has
    found them damaged.
    """
    steps = complete_steps(folder)
    sound = [step for step in steps if newest is None or step <= newest]
    for step in sorted(set(steps) - kept_steps(sound, keep, keep_every) - protect):
        path = checkpoint_path(folder, step)
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_marker(path: Path) -> dict[str, Any]:
    """What the marker of a checkpoint file says; raises MissingError without one."""
    return get_json(LocalStore(str(path.parent)), path.with_suffix(".json").name)


def check_file(path: Path) -> None:
    """Raises DamagedError unless the file is what its marker says; one without a marker passes."""
    if not path.with_suffix(".json").is_file():
        return
    marker = read_marker(path)
    size, expected = path.stat().st_size, marker.get("num_bytes")
    if size != expected:
        raise DamagedError(
            f"checkpoint {path} is torn: got {size} bytes, expected {expected}; use another one"
        )
    if file_digest(path) != marker.get("sha256"):
        raise DamagedError(
            f"checkpoint {path} is damaged: its sha256 is not the recorded one; use another one"
        )


class _HashingFile:
    """Hashes what passes on its way into a file."""

    def __init__(self, file: Any):
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            written: int = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        return written

    def flush(self) -> None:
        self._file.flush()
