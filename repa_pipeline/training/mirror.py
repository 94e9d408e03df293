"""The second home of a run's checkpoints and log, from which another machine can go on.

URL/NAME/run.json, URL/NAME/events.jsonl, URL/NAME/wandb.json
URL/NAME/trainer.json       who trains the run, of the last one that began to write here
URL/NAME/checkpoints/step-00000400.HASH.0000.part    the checkpoint file, in pieces
URL/NAME/checkpoints/step-00000400.json              written last: size, sha256, pieces

HASH is of the whole file, so an upload that was killed, or one of another file of the same step,
never mixes with a complete one. Pieces are single PUTs: what a killed upload leaves are whole
objects that no marker names; the next upload of the run takes or removes them.

Of two trainers with one mirror the later one has it: the other stops at its next checkpoint. A lock
could not tell a machine that was taken away from one that still trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.fsstore import refuse_credentials
from repa_pipeline.data.objects import LocalStore, ObjectStore, get_json, json_bytes, open_store
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    MissingError,
    RepaError,
    StageError,
)
from repa_pipeline.training.checkpoint import (
    check_file,
    checkpoint_path,
    complete_steps,
    kept_steps,
    load_checkpoint,
    read_marker,
)
from repa_pipeline.training.runs import Run, decided_difference

# A piece is one PUT and lies in memory while it is sent, THREADS at a time.
PART_BYTES = 256 * 2**20
THREADS = 4
_FOLDER = "checkpoints"
# wandb.json: the id under which another machine goes on logging.
_LOGS = ("run.json", "events.jsonl", "wandb.json")
_CLAIM = "trainer.json"
_MARKER = re.compile(r"step-(\d{8,})\.json")
_PART = re.compile(r"step-(\d{8,})\.([0-9a-f]{16})\.\d{4}\.part")


class TakenOverError(StageError):
    """Another trainer writes to the mirror now."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trainer's word that it writes to a mirror; `id` is its own, the rest is for people."""

    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    host: str = dataclasses.field(default_factory=socket.gethostname)
    process: int = dataclasses.field(default_factory=os.getpid)


@dataclasses.dataclass
class Mirror:
    """A run's folder, and the store that follows it."""

    run: Run
    store: ObjectStore
    part_bytes: int
    claim: Claim = dataclasses.field(default_factory=Claim)
    _is_claimed: bool = dataclasses.field(default=False, init=False)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints there, ascending."""
        return sorted(self._listed()[0])

    def check(self) -> None:
        """Raises MismatchError when what stands there belongs to another run of this name."""
        try:
            there = get_json(self.store, "run.json")
        except MissingError:
            return
        here = self.run.record()
        difference = decided_difference(there.get("decided"), here.get("decided"))
        if difference:
            name, got, expected = difference
            raise MismatchError(
                f"{self.store.url} holds another run: {name} is {got!r} there, {expected!r} now; "
                "choose another run name, or other --checkpoints"
            )

    def sync(self, keep: int, keep_every: int, newest: int | None = None) -> None:
        """Brings there what the policy keeps, the newest first, with the logs; then tidies.

        Checkpoints after `newest` do not count and are removed there, as in `prune`. Raises
        MismatchError when another run stands there, TakenOverError when another trainer has
        written there since the first `sync`, StoreError or OSError when the store does not take
        it: doing it again goes on.
        """
        self.check()
        self._hold()
        local = set(complete_steps(self.run.checkpoints))
        kept = _kept(local | set(self.steps()), keep, keep_every, newest)
        for step in sorted(local & kept, reverse=True):
            # A file that is gone meanwhile is one that the policy no longer keeps; one that was
            # cut short must not keep the others from their place.
            with contextlib.suppress(FileNotFoundError, DamagedError):
                self._upload(step)
        self._put_logs()
        self._tidy(keep, keep_every, newest)

    def _hold(self) -> None:
        """Takes the mirror over, the first time; later raises TakenOverError when it is lost."""
        if not self._is_claimed:
            self.store.put(_CLAIM, json_bytes(dataclasses.asdict(self.claim)))
            self._is_claimed = True
            return
        try:
            there = get_json(self.store, _CLAIM)
        except MissingError:
            there = {}
        if there.get("id") != self.claim.id:
            raise TakenOverError(
                f"run '{self.run.name}' is trained by another process too, which has "
                f"{self.store.url} now (process {there.get('process', '?')} on "
                f"{there.get('host', '?')}): let one of them train, or give this one another name; "
                f"its checkpoints are in {self.run.checkpoints}"
            )

    def has(self, step: int) -> bool:
        """Whether the checkpoint of `step` of this machine is complete there."""
        here = read_marker(checkpoint_path(self.run.checkpoints, step))
        try:
            there = get_json(self.store, f"{_FOLDER}/{_marker_name(step)}")
        except MissingError:
            return False
        return bool(there.get("sha256") == here["sha256"])

    def fetch(self, step: int) -> Path:
        """The checkpoint of `step` as a verified local file, downloaded unless it is sound here.

        Several processes may ask at once: one downloads. The events come along. Raises
        MissingError or DamagedError for what is not whole there, StageError for a full disk.
        """
        path = checkpoint_path(self.run.checkpoints, step)
        self.run.checkpoints.mkdir(parents=True, exist_ok=True)
        with open(self.run.checkpoints / ".fetch.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_sound(path):
                try:
                    self._download(path, get_json(self.store, f"{_FOLDER}/{_marker_name(step)}"))
                    self._take_events()
                except OSError as error:
                    if isinstance(error, RepaError):
                        raise
                    raise StageError(
                        f"cannot write checkpoint {path}: {error}; free some space and run the "
                        "same command again"
                    ) from error
        return path

    def _listed(self) -> tuple[set[int], list[str]]:
        """Steps with a marker, and the names of all pieces."""
        names = self.store.list(_FOLDER)
        markers = [match for name in names if (match := _MARKER.fullmatch(name))]
        return {int(m[1]) for m in markers}, [name for name in names if _PART.fullmatch(name)]

    def _upload(self, step: int) -> None:
        path = checkpoint_path(self.run.checkpoints, step)
        marker = read_marker(path)
        if self.has(step):
            return
        num_bytes = int(marker["num_bytes"])
        starts = range(0, num_bytes, self.part_bytes)
        with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
            stem = f"{path.stem}.{marker['sha256'][:16]}"
            names = [f"{stem}.{number:04d}.part" for number in range(len(starts))]
            put = partial(self._put_part, file.fileno(), num_bytes)
            try:
                parts = list(pool.map(put, names, starts))
            finally:
                pool.shutdown(cancel_futures=True)
        # The log before the marker: whoever finds the checkpoint finds its events.
        self._put_logs()
        marked = json_bytes({**marker, "parts": parts})
        self.store.put(f"{_FOLDER}/{_marker_name(step)}", marked)

    def _put_part(self, fd: int, num_bytes: int, name: str, start: int) -> dict[str, Any]:
        data = _read_at(fd, min(self.part_bytes, num_bytes - start), start)
        key = f"{_FOLDER}/{name}"
        if self.store.size(key) != len(data):  # of an upload that was killed
            self.store.put(key, data)
        return {"name": name, "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _put_logs(self) -> None:
        for name in _LOGS:
            with contextlib.suppress(FileNotFoundError):
                data = (self.run.folder / name).read_bytes()
                self.store.put(name, data[: data.rfind(b"\n") + 1])

    def _tidy(self, keep: int, keep_every: int, newest: int | None) -> None:
        """Removes checkpoints that the policy does not keep, markers first, and stray pieces."""
        steps, parts = self._listed()
        kept = _kept(steps, keep, keep_every, newest)
        for step in sorted(steps - kept):
            self.store.delete(f"{_FOLDER}/{_marker_name(step)}")
        named = {part["name"] for step in kept for part in self._parts_of(step)}
        for name in parts:
            if name not in named:
                self.store.delete(f"{_FOLDER}/{name}")

    def _parts_of(self, step: int) -> list[Mapping[str, Any]]:
        return list(get_json(self.store, f"{_FOLDER}/{_marker_name(step)}").get("parts", ()))

    def _download(self, path: Path, marker: Mapping[str, Any]) -> None:
        for orphan in path.parent.glob("*.fetch"):  # of a process that was killed; we hold the lock
            orphan.unlink()
        temporary = path.with_suffix(".pt.fetch")
        try:
            with open(temporary, "wb", buffering=0) as file:
                for part in marker["parts"]:
                    _write_all(file, self._part(part))
                os.fsync(file.fileno())
            path.with_suffix(".json").unlink(missing_ok=True)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        facts = {name: marker[name] for name in ("num_bytes", "sha256")}
        LocalStore(str(path.parent)).put(path.with_suffix(".json").name, json_bytes(facts))
        check_file(path)

    def _part(self, part: Mapping[str, Any]) -> bytes:
        data = self.store.get(f"{_FOLDER}/{part['name']}")
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise DamagedError(
                f"{self.store.url}/{_FOLDER}/{part['name']} is damaged: its sha256 is not the "
                "recorded one"
            )
        return data

    def _take_events(self) -> None:
        for name in _LOGS[1:]:
            with contextlib.suppress(MissingError):
                LocalStore(str(self.run.folder)).put(name, self.store.get(name))


def mirror_of(run: Run, config: TrainConfig) -> Mirror | None:
    """The mirror that --checkpoints names, or a remote workspace has by itself; None without one.

    It is the folder NAME below that URL. Raises ConfigError when it is the run's own folder.
    """
    url = config.checkpoints
    if url is None and "://" in config.workspace:
        url = f"{config.workspace.rstrip('/')}/runs"
    if url is None:
        return None
    refuse_credentials(url)
    store = open_store(f"{url.rstrip('/')}/{run.name}")
    if isinstance(store, LocalStore) and store.root.resolve() == run.folder.resolve():
        raise ConfigError(
            f"--checkpoints {url} is where the runs are: give another folder or a URL, or leave it "
            "out"
        )
    return Mirror(run, store, PART_BYTES)


def load_newest(
    run: Run, config: TrainConfig, *, step: int | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest sound checkpoint of this machine and the mirror, and what was wrong with others.

    None where there is no checkpoint at all. What the mirror alone has is downloaded first, so a
    new machine with an empty disk goes on where the old one stopped. With `step` that one or
    none: how the machines of a group make sure that they load the same. Raises DamagedError when
    there are checkpoints and none is sound, MismatchError when the mirror holds another run,
    StoreError when it cannot be reached: it may know of later steps.
    """
    mirror = mirror_of(run, config)
    local, remote = set(complete_steps(run.checkpoints)), set[int]()
    if mirror is not None:
        mirror.check()
        remote = set(mirror.steps())
    faults: list[str] = []
    for wanted in sorted(local | remote, reverse=True):
        if step not in (None, wanted):
            continue
        for path in _places(run, mirror, wanted, local, remote, faults):
            try:
                return load_checkpoint(path, "cpu"), faults
            except RepaError as error:
                faults.append(str(error))
    if faults:
        also = "" if mirror is None else f" and {mirror.store.url}"
        raise DamagedError(
            f"no sound checkpoint in {run.checkpoints}{also}: {faults[0]}; restore one, or remove "
            "the run to start over"
        )
    return None, []


def _places(
    run: Run, mirror: Mirror | None, step: int, local: set[int], remote: set[int], faults: list[str]
) -> Iterator[Path]:
    """Where the checkpoint of `step` may be loaded from: here, then the mirror."""
    if step in local:
        yield checkpoint_path(run.checkpoints, step)
    if mirror is not None and step in remote:
        try:
            path = mirror.fetch(step)
        except (MissingError, DamagedError) as error:
            faults.append(str(error))
        else:
            yield path


def _is_sound(path: Path) -> bool:
    if not path.with_suffix(".json").is_file() or not path.is_file():
        return False
    try:
        check_file(path)
    except RepaError:
        return False
    return True


def _kept(steps: set[int], keep: int, keep_every: int, newest: int | None) -> set[int]:
    return kept_steps({s for s in steps if newest is None or s <= newest}, keep, keep_every)


def _marker_name(step: int) -> str:
    return f"step-{step:08d}.json"


def _read_at(fd: int, num_bytes: int, start: int) -> bytes:
    """Exactly those bytes of a file; raises DamagedError when it is shorter."""
    parts, position = [], start
    while position < start + num_bytes:
        part = os.pread(fd, start + num_bytes - position, position)
        if not part:
            raise DamagedError(f"a checkpoint file ends at byte {position}: it was cut short")
        parts.append(part)
        position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
