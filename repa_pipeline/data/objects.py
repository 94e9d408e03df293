"""Named blobs under a URL: the only way the package touches a workspace, local or remote.

`open_store("dir")` and `open_store("s3://bucket/prefix")` give the same few operations. A write is
never half visible: a local object is linked into place after an fsync, a remote one is a
single conditional PUT. Remote stores are in fsstore.py and s3.py, their retries in retry.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from repa_pipeline.data.fsstore import ABSENT, RemoteStore, check_key, check_whole
from repa_pipeline.data.retry import RetryPolicy
from repa_pipeline.data.s3 import S3Store
from repa_pipeline.errors import DamagedError, MissingError, StageError

_TEMPORARY = ".tmp-"


class ObjectStore(Protocol):
    """Blobs by key; keys use '/' and are relative to `url`.

    A key that could lead out of `url` is refused by every method with MismatchError.
    """

    url: str

    def get(self, key: str) -> bytes:
        """The whole object; raises MissingError when there is none."""
        ...

    def read_into(self, key: str, buffer: memoryview) -> int:
        """Fills `buffer` from the object's start; returns the object's bytes (at most len+1)."""
        ...

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """Exactly those bytes; raises MissingError, and DamagedError when the object is shorter."""
        ...

    def read_range_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As `read_range`, into a buffer whose length says how many bytes."""
        ...

    def size(self, key: str) -> int | None:
        """The object's bytes, None when there is no object."""
        ...

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Creates the object; False, and nothing written, when one stands there already.

        On a remote store False can be said of one's own object, when the answer to the first
        attempt was lost: look at what stands.
        """
        ...

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Creates or replaces the object in one step."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Sorted names directly below `prefix`."""
        ...

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Every key below `prefix`, at any depth, in no set order: for copying and verifying."""
        ...

    def delete(self, key: str) -> None: ...

    def child(self, name: str) -> ObjectStore: ...


def open_store(url: str, *, retry: RetryPolicy | None = None) -> ObjectStore:
    """Opens a folder (plain path, file:// or local://), a bucket (s3://), or any URL fsspec knows.

    `retry`: how a remote store is asked again, without one as REPA_STORE_* say. Raises StageError
    when the protocol's library is not installed, ConfigError for a URL with a password in it.
    """
    for protocol in ("file://", "local://"):
        url = url.removeprefix(protocol)
    if "://" not in url:
        return LocalStore(url)
    kind = S3Store if url.startswith(("s3://", "s3a://")) else RemoteStore
    return kind(url, retry=retry)


class LocalStore:
    """A folder of this machine."""

    _counter = itertools.count()

    def __init__(self, url: str):
        self.url = str(url)
        self.root = Path(url)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except ABSENT as error:
            raise MissingError(f"no object {self._path(key)}") from error

    def read_into(self, key: str, buffer: memoryview) -> int:
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                return _read_all(file, buffer)
        except ABSENT as error:
            raise MissingError(f"no object {self._path(key)}") from error

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        try:
            with open(self._path(key), "rb") as file:
                file.seek(start)
                data = file.read(num_bytes)
        except ABSENT as error:
            raise MissingError(f"no object {self._path(key)}") from error
        check_whole(len(data), str(self._path(key)), start, num_bytes)
        return data

    def read_range_into(self, key: str, start: int, buffer: memoryview) -> None:
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                file.seek(start)
                count = min(_read_all(file, buffer), len(buffer))
        except ABSENT as error:
            raise MissingError(f"no object {self._path(key)}") from error
        check_whole(count, str(self._path(key)), start, len(buffer))

    def size(self, key: str) -> int | None:
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        final = self._path(key)
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
        final = self._path(key)
        os.replace(self._write_temporary(final, data), final)
        _sync_folder(final.parent)

    def list(self, prefix: str) -> list[str]:
        folder = self._path(prefix)
        if not folder.is_dir():
            return []
        return sorted(n for n in os.listdir(folder) if not n.startswith(_TEMPORARY))

    def keys(self, prefix: str = "") -> Iterator[str]:
        for folder, _, names in os.walk(self._path(prefix)):
            for name in names:
                if not name.startswith(_TEMPORARY):
                    yield (Path(folder) / name).relative_to(self.root).as_posix()

    def delete(self, key: str) -> None:
        with contextlib.suppress(*ABSENT):
            self._path(key).unlink()

    def child(self, name: str) -> ObjectStore:
        return LocalStore(os.path.join(self.url, check_key(name)))

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

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
