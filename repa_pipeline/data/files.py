"""Reading files below a root, local or on any file system fsspec knows.

Local bytes go through plain os calls (a tenth of fsspec's cost per read); everything else through
fsspec, which must be opened in the process that reads (s3fs hangs in a forked child).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from repa_pipeline.errors import ConfigError, DamagedError

_TOUCH_EVERY_S = 5.0


class Entry(NamedTuple):
    """A file or folder directly below another."""

    name: str
    is_folder: bool
    num_bytes: int


class Files:
    """Files below `root` on one file system; names are relative to it and use '/'."""

    def __init__(self, filesystem: Any, root: str):
        self.filesystem = filesystem
        self.root = root
        self.is_local = isinstance(filesystem, LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of a name as the file system spells it."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def name(self, path: str) -> str:
        """The name, relative to the root, of a path of this file system."""
        return path.removeprefix(self.root.rstrip("/") + "/")

    def entries(self, folder: str = "", *, sizes: bool = True) -> list[Entry]:
        """What lies directly in a folder, sorted by name, hidden names left out.

        Without `sizes` a local listing saves one call a file and says 0 bytes.
        Raises FileNotFoundError or NotADirectoryError.
        """
        found = self._scan(folder, sizes) if self.is_local else self._list(folder)
        return sorted(entry for entry in found if entry.name and not entry.name.startswith("."))

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading; raises FileNotFoundError."""
        if self.is_local:
            return open(self.path(name), "rb")
        return cast(BinaryIO, self.filesystem.open(self.path(name), "rb"))

    def read(self, name: str, num_bytes: int) -> bytes:
        """A whole file; raises DamagedError when it is gone or not `num_bytes` long."""
        with _gone_is_damage(name):
            if self.is_local:
                with open(self.path(name), "rb", buffering=0) as file:
                    data = file.readall()
            else:
                data = bytes(self.filesystem.cat_file(self.path(name)))
        check_length(name, data, num_bytes)
        return data

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """A byte range through fsspec; raises DamagedError when gone or short."""
        with _gone_is_damage(name):
            data = self.filesystem.cat_file(self.path(name), start=start, end=start + num_bytes)
        check_length(name, data, num_bytes)
        return bytes(data)

    def version(self, name: str) -> str:
        """A hash of path, size and modification time (or ETag); raises FileNotFoundError."""
        path = self.path(name)
        if self.is_local:
            status = os.stat(path)
            facts = [path, status.st_size, status.st_mtime_ns]
        else:
            info = self.filesystem.info(path)
            stamp = next((info[k] for k in ("ETag", "LastModified", "mtime") if k in info), None)
            created = info.get("created") if stamp is None else None
            url = self.filesystem.unstrip_protocol(path)
            facts = [url, info.get("size"), str(stamp), str(created)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _scan(self, folder: str, sizes: bool) -> Iterator[Entry]:
        with os.scandir(self.path(folder)) as found:
            for entry in found:
                is_folder = entry.is_dir()
                # A dead link is listed with 0 bytes and fails when it is read.
                has_size = sizes and not is_folder and entry.is_file()
                yield Entry(entry.name, is_folder, entry.stat().st_size if has_size else 0)

    def _list(self, folder: str) -> Iterator[Entry]:
        path = self.path(folder)
        for info in self.filesystem.ls(path, detail=True):
            full = info["name"].rstrip("/")
            # Object stores list the folder's own marker object among its contents.
            if full != path.rstrip("/"):
                is_folder = info["type"] == "directory"
                yield Entry(full.rpartition("/")[2], is_folder, int(info.get("size") or 0))


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL or local path, and the path on it.

    Raises ConfigError when no installed library speaks the protocol.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open '{url}': {error}: check the URL's protocol") from None
    return filesystem, str(path)


@contextlib.contextmanager
def _gone_is_damage(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise changed(f"{name} is gone") from None
    except OSError as error:
        # s3fs answers a range behind the end of an object with EINVAL.
        if error.errno != errno.EINVAL:
            raise
        raise changed(f"{name} is shorter than it was") from None


def changed(what: str) -> DamagedError:
    """The error of a source that is not what the index describes."""
    return DamagedError(f"source changed since it was indexed: {what}; index it again")


def check_length(name: str, data: bytes, num_bytes: int) -> None:
    """Raises DamagedError unless the data has the length that was listed."""
    if len(data) != num_bytes:
        raise changed(f"got {len(data)} bytes of {name}, expected {num_bytes}")


class _Descriptor:
    """An open file that closes when its last user lets go, so that no thread loses it mid-read."""

    def __init__(self, fd: int):
        self.fd = fd
        self.touched_at = time.monotonic()

    def __del__(self) -> None:
        os.close(self.fd)


class Descriptors:
    """The most recently used open files; reads are positioned and safe from several threads."""

    def __init__(self, capacity: int = 32):
        self._capacity = capacity
        self._lock = threading.Lock()
        self._by_name: OrderedDict[str, _Descriptor] = OrderedDict()

    def read_range(
        self, name: str, open_fd: Callable[[], int], start: int, num_bytes: int, *, touch: bool
    ) -> bytes:
        """Bytes of a local file, opened with `open_fd` if it is not open.

        `touch` renews the file's modification time now and then (the scratch folder's LRU).
        Raises DamagedError when the bytes are short.
        """
        descriptor = self._get(name, open_fd)
        if touch and time.monotonic() - descriptor.touched_at > _TOUCH_EVERY_S:
            descriptor.touched_at = time.monotonic()
            os.utime(descriptor.fd)
        data = _pread_all(descriptor.fd, start, num_bytes)
        check_length(name, data, num_bytes)
        return data

    def forget(self, name: str) -> None:
        """Lets go of a file, so that its disk space is free once no read is under way."""
        with self._lock:
            self._by_name.pop(name, None)

    def _get(self, name: str, open_fd: Callable[[], int]) -> _Descriptor:
        with self._lock:
            if name in self._by_name:
                self._by_name.move_to_end(name)
                return self._by_name[name]
        # Opening may unpack gigabytes: never under the lock.
        with _gone_is_damage(name):
            opened = _Descriptor(open_fd())
        with self._lock:
            descriptor = self._by_name.setdefault(name, opened)
            while len(self._by_name) > self._capacity:
                self._by_name.popitem(last=False)
        return descriptor


def _pread_all(fd: int, start: int, num_bytes: int) -> bytes:
    """os.pread until complete or at the end: one call returns at most 2 GiB."""
    data = os.pread(fd, num_bytes, start)
    while len(data) < num_bytes:
        more = os.pread(fd, num_bytes - len(data), start + len(data))
        if not more:
            break
        data += more
    return data
