"""Named blobs under a URL: the only way the package touches a workspace, local or remote.

`open_store("dir")` and `open_store("s3://bucket/prefix")` give the same few operations. A write is
never half visible: a local object is linked into place after an fsync, a remote one is a
single conditional PUT.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any, Protocol

from repa_pipeline.errors import DamagedError, MissingError, StageError

_EXISTS_CODES = {"PreconditionFailed", "ConditionalRequestConflict"}
_TEMPORARY = ".tmp-"
_ABSENT = (FileNotFoundError, NotADirectoryError)


class ObjectStore(Protocol):
    """Blobs by key; keys use '/' and are relative to `url`."""

    url: str

    def get(self, key: str) -> bytes:
        """The whole object; raises MissingError when there is none."""
        ...

    def read_into(self, key: str, buffer: memoryview) -> int:
        """Fills `buffer` from the object's start; returns the object's bytes (at most len+1)."""
        ...

    def size(self, key: str) -> int | None:
        """The object's bytes, None when there is no object."""
        ...

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Creates the object; False, and nothing written, when one stands there already."""
        ...

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Creates or replaces the object in one step."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Sorted names directly below `prefix`."""
        ...

    def delete(self, key: str) -> None: ...

    def child(self, name: str) -> ObjectStore: ...


def open_store(url: str) -> ObjectStore:
    """Opens a folder (plain path, file:// or local://) or any URL fsspec knows.

    Raises StageError when the protocol's library is not installed.
    """
    for protocol in ("file://", "local://"):
        url = url.removeprefix(protocol)
    return RemoteStore(url) if "://" in url else LocalStore(url)


class LocalStore:
    """A folder of this machine."""

    _counter = itertools.count()

    def __init__(self, url: str):
        self.url = str(url)
        self.root = Path(url)

    def get(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except _ABSENT as error:
            raise MissingError(f"no object {self.root / key}") from error

    def read_into(self, key: str, buffer: memoryview) -> int:
        try:
            with open(self.root / key, "rb", buffering=0) as file:
                return _read_all(file, buffer)
        except _ABSENT as error:
            raise MissingError(f"no object {self.root / key}") from error

    def size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        final = self.root / key
        if final.exists():
            _remove_orphans(final.parent)  # a writer killed between link and unlink leaves one
            return False
        temporary = self._write_temporary(final, data)
        try:
            os.link(temporary, final)
        except FileExistsError:
            return False
        except OSError as error:
            # No hard links here (exFAT, some FUSE mounts): a rename, whole but not exclusive.
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(final.parent)
        return True

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        final = self.root / key
        os.replace(self._write_temporary(final, data), final)
        _sync_folder(final.parent)

    def list(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        if not folder.is_dir():
            return []
        return sorted(n for n in os.listdir(folder) if not n.startswith(_TEMPORARY))

    def delete(self, key: str) -> None:
        with contextlib.suppress(*_ABSENT):
            (self.root / key).unlink()

    def child(self, name: str) -> ObjectStore:
        return LocalStore(os.path.join(self.url, name))

    def _write_temporary(self, final: Path, data: bytes | bytearray | memoryview) -> Path:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(final.parent)
        owner = f"{socket.gethostname()}-{os.getpid()}-{next(self._counter)}"
        temporary = final.parent / f"{_TEMPORARY}{owner}"
        try:
            with open(temporary, "wb", buffering=0) as file:
                view = memoryview(data).cast("B")
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StageError(
                    f"no space left for {final}: free some and run the same command again, it "
                    "goes on where it stopped"
                ) from error
            raise
        return temporary


class RemoteStore:
    """A prefix on any fsspec file system; s3 credentials come from the environment only.

    `put_new` has one winner, and nothing is ever half visible, where the file system creates
    conditionally (S3, GCS, Azure). Elsewhere two writers at once may both win; what they write of
    a shard is equal, and a torn object fails its checksums.
    """

    def __init__(self, url: str, filesystem: Any = None):
        import fsspec

        self.url = url.rstrip("/")
        options = {"use_listings_cache": False} if url.startswith(("s3://", "s3a://")) else {}
        try:
            self._fs = filesystem or fsspec.filesystem(url.split("://", 1)[0], **options)
        except (ImportError, ValueError) as error:
            raise StageError(f"cannot open {url}: {error}") from error
        self._root = self._fs._strip_protocol(self.url)

    def get(self, key: str) -> bytes:
        try:
            data: bytes = self._fs.cat_file(f"{self._root}/{key}")
        except _ABSENT as error:
            raise MissingError(f"no object {self.url}/{key}") from error
        return data

    def read_into(self, key: str, buffer: memoryview) -> int:
        data = self.get(key)
        count = min(len(data), len(buffer))
        buffer[:count] = data[:count]
        return min(len(data), len(buffer) + 1)

    def size(self, key: str) -> int | None:
        try:
            info = self._fs.info(f"{self._root}/{key}")
        except _ABSENT:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        path = f"{self._root}/{key}"
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        try:
            self._fs.pipe_file(path, bytes(data), mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # A conflict (409) also answers a writer whose rival then failed: no object, no loser.
            if _error_code(error) in _EXISTS_CODES and self.size(key) is not None:
                return False
            raise
        return True

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        path = f"{self._root}/{key}"
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(path, bytes(data))

    def list(self, prefix: str) -> list[str]:
        folder = f"{self._root}/{prefix}".rstrip("/")
        try:
            entries = [str(entry).rstrip("/") for entry in self._fs.ls(folder, detail=False)]
        except _ABSENT:
            return []
        # Listing an object, and some stores listing a folder, name the thing itself.
        return sorted(entry.rsplit("/", 1)[-1] for entry in entries if entry != folder)

    def delete(self, key: str) -> None:
        with contextlib.suppress(*_ABSENT):
            self._fs.rm_file(f"{self._root}/{key}")

    def child(self, name: str) -> ObjectStore:
        return RemoteStore(f"{self.url}/{name}", self._fs)


def get_json(store: ObjectStore, key: str) -> dict[str, Any]:
    """Reads a JSON object; raises MissingError without one, DamagedError when it is not JSON."""
    try:
        value = json.loads(store.get(key))
    except ValueError as error:
        raise DamagedError(f"{store.url}/{key} is not JSON: remove it and run again") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{store.url}/{key} holds no JSON object: remove it and run again")
    return value


def json_bytes(value: Any) -> bytes:
    """The one way JSON is written: sorted keys, so equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _read_all(file: Any, buffer: memoryview) -> int:
    count = 0
    while count < len(buffer):
        got = file.readinto(buffer[count:])
        if not got:
            return count
        count += got
    return count + len(file.read(1))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_orphans(folder: Path) -> None:
    """Removes temporary files of processes of this host that are gone (killed while writing)."""
    for name in os.listdir(folder):
        # Host names may hold dashes: the two numbers are counted from the end.
        host, *numbers = name.removeprefix(_TEMPORARY).rsplit("-", 2)
        if not name.startswith(_TEMPORARY) or host != socket.gethostname() or len(numbers) != 2:
            continue
        if not Path(f"/proc/{numbers[0]}").exists() and Path("/proc/self").exists():
            (folder / name).unlink(missing_ok=True)


def _error_code(error: BaseException) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
