"""What is sampled from: a checkpoint of ours or of others, here or at a URL, read and verified.

A URL's file is downloaded once a machine, to DOWNLOADS/DIGEST, where nothing is ever removed.
Others' files are read by what `repa import` reads them with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from repa_pipeline.config_exchange import ImportConfig
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.data.fsstore import refuse_credentials
from repa_pipeline.data.objects import ObjectStore, get_json, open_store
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    MissingError,
    RepaError,
    StageError,
)
from repa_pipeline.models.reference import read_plain
from repa_pipeline.registry import load_plugins
from repa_pipeline.stages.import_run import read_model, trusted
from repa_pipeline.training.checkpoint import load_checkpoint, read_marker
from repa_pipeline.training.runs import find_run
from repa_pipeline.weights import file_sha256

ASSUMED_AUTOENCODER = "sd-vae-ft-ema"
DOWNLOADS = ".cache/repa-pipeline/checkpoints"
_PIECE_BYTES = 64 * 2**20
_PIECES_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's parts, the tensors read when used; `notes` is what people should know."""

    where: str
    content: Mapping[str, Any]
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def about(self) -> Mapping[str, Any]:
        about: Mapping[str, Any] = self.content["about"]
        return about

    @property
    def step(self) -> int:
        return int(self.content["step"])


def find_checkpoint(config: SampleConfig) -> str:
    """The path or URL that --checkpoint or --run names; refuses to guess between runs."""
    if config.checkpoint and config.run:
        raise ConfigError("--run and --checkpoint were both given: give one of them")
    if config.checkpoint:
        return config.checkpoint
    return str(find_run(config, config.run).newest_checkpoint())


def read_checkpoint(config: SampleConfig, where: str, sha256: str | None = None) -> Checkpoint:
    """Reads the checkpoint at a path or URL; nothing in it is executed.

    sha256: of the file that the plan was made with; MismatchError for another one. Raises
    MissingError without a file, DamagedError for one that is torn, DataError, MismatchError or
    ConfigError for what cannot be sampled, or names plugins at a URL that are not of `config`.
    """
    path = fetch(where, sha256, config.downloads) if "://" in where else Path(where)
    if not path.exists():
        raise MissingError(f"no checkpoint {path}: check --run or --checkpoint")
    if not _is_ours(path):
        found = _read_of_others(config, path)
    else:
        found = _read_ours(path)
        if "://" in where:
            load_plugins(config.plugins)
            about = trusted(found.about, config.plugins, where)
            found = dataclasses.replace(found, content={**found.content, "about": about})
    if sha256 not in (None, found.sha256):
        raise MismatchError(
            f"the checkpoint {where} on {socket.gethostname()} has sha256 {found.sha256[:12]}, "
            f"expected {str(sha256)[:12]}: give every machine the same file"
        )
    return dataclasses.replace(found, where=where)


def weights_of(checkpoint: Checkpoint, use_ema: bool, ema_decay: float) -> Mapping[str, Tensor]:
    """The state that --use-ema and --ema-decay name; raises ConfigError for no such average."""
    if not use_ema and ema_decay:
        raise ConfigError("--ema-decay chooses an average, --no-use-ema none: give one of them")
    if is_main_average(checkpoint, ema_decay):
        state: Mapping[str, Tensor] = checkpoint.content["ema" if use_ema else "model"]
        return state
    more = checkpoint.content.get("more_emas") or {}
    if str(ema_decay) not in more:
        decays = ", ".join([str(_main_decay(checkpoint)), *more])
        raise ConfigError(
            f"ema_decay {ema_decay:g}: checkpoint {checkpoint.where} has averages of decay "
            f"{decays}: choose one of them, or train with --ema-extra {ema_decay:g}"
        )
    chosen: Mapping[str, Tensor] = more[str(ema_decay)]
    return chosen


def is_main_average(checkpoint: Checkpoint, ema_decay: float) -> bool:
    """Whether this decay is of the average that is sampled by default; 0 stands for it."""
    return ema_decay in (0.0, _main_decay(checkpoint))


def _main_decay(checkpoint: Checkpoint) -> float:
    return float(checkpoint.about["config"]["ema_decay"])


def _is_ours(path: Path) -> bool:
    """Whether this is a checkpoint of this package, be it a damaged one."""
    if path.is_dir():
        return False
    with contextlib.suppress(MissingError, DamagedError):
        if {"sha256", "num_bytes"} <= read_marker(path).keys():
            return True
    return "format_version" in read_plain(path)


def _read_ours(path: Path) -> Checkpoint:
    content = load_checkpoint(path, mapped=True)
    marked = path.with_suffix(".json").is_file()
    return Checkpoint(
        str(path), content, read_marker(path)["sha256"] if marked else file_sha256(path)
    )


def _read_of_others(config: SampleConfig, path: Path) -> Checkpoint:
    """Through `repa import`, without a run."""
    imported = read_model(
        ImportConfig(
            source=str(path),
            from_="checkpoint",
            autoencoder=config.decoder or ASSUMED_AUTOENCODER,
            num_heads=config.num_heads,
            resolution=config.resolution,
            plugins=config.plugins,
            overrides=config.overrides,
        )
    )
    notes: tuple[str, ...] = ()
    if path.is_file() and not config.decoder:
        notes = (
            f"{path.name} does not say which autoencoder its latents are of: "
            f"{ASSUMED_AUTOENCODER} is assumed, --decoder names another",
        )
    content = {**imported.content, "step": imported.step}
    return Checkpoint(str(path), content, imported.digest, notes)


def fetch(url: str, sha256: str | None = None, downloads: str | None = None) -> Path:
    """The file at a URL as a local one, downloaded unless a file of its digest is in `downloads`.

    sha256: what it must have; without one, what the marker beside it says. A checkpoint that a
    run keeps in pieces (--checkpoints) is put together. Several processes may ask at once: one
    downloads. Raises MissingError without a file, DamagedError for one of another digest,
    StageError for a full disk.
    """
    refuse_credentials(url)
    base, _, name = url.rstrip("/").rpartition("/")
    store = open_store(base)
    marker = _remote_marker(store, name)
    wanted = sha256 or marker.get("sha256")
    folder = Path(downloads) if downloads else Path.home() / DOWNLOADS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = folder / str(wanted) / name
            if wanted and path.is_file() and file_sha256(path) == wanted:
                return path
            return _download(store, name, marker, wanted, folder)
    except OSError as error:
        if isinstance(error, RepaError):
            raise
        raise StageError(
            f"cannot keep {url} in {folder}: {error}; free some space or give --downloads"
        ) from error


def _remote_marker(store: ObjectStore, name: str) -> dict[str, Any]:
    try:
        return get_json(store, str(Path(name).with_suffix(".json")))
    except (MissingError, DamagedError):
        return {}


def _download(
    store: ObjectStore, name: str, marker: Mapping[str, Any], wanted: str | None, folder: Path
) -> Path:
    temporary, hashing = folder / ".download", hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for piece in _pieces(store, name, marker):
                hashing.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        digest = hashing.hexdigest()
        if wanted not in (None, digest):
            raise DamagedError(
                f"{store.url}/{name} has sha256 {digest[:12]}, expected {str(wanted)[:12]}: it was "
                "changed or cut short; upload it again"
            )
        path = folder / digest / name
        path.parent.mkdir(exist_ok=True)
        os.replace(temporary, path)
        return path
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(store: ObjectStore, name: str, marker: Mapping[str, Any]) -> Iterator[bytes]:
    """The file's bytes in order: of one object, or of the pieces that its marker names."""
    size = store.size(name)
    with ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
        if size is not None:
            starts = range(0, size, _PIECE_BYTES)
            for group in _groups(list(starts)):
                yield from pool.map(
                    lambda start: store.read_range(name, start, min(_PIECE_BYTES, size - start)),
                    group,
                )
            return
        if not marker.get("parts"):
            raise MissingError(f"no checkpoint {store.url}/{name}: check --checkpoint")
        for group in _groups([part["name"] for part in marker["parts"]]):
            yield from pool.map(store.get, group)


def _groups(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _PIECES_AT_ONCE):
        yield items[start : start + _PIECES_AT_ONCE]
