"""Reading files below a root, local or on any file system fsspec knows.

Local bytes go through plain os calls (a tenth of fsspec's cost per read); everything else through
fsspec with retries (remote.py), opened in the process that reads (s3fs hangs in a forked child).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from fsspec.implementations.local import LocalFileSystem

from repa_pipeline.data.remote import RangeFile, is_behind_end, is_http, retried
from repa_pipeline.errors import DamagedError, StoreError

UNKNOWN_SIZE = -1
_TOUCH_EVERY_S = 5.0
_VERSION_FIELDS = ("ETag", "LastModified", "Last-Modified", "mtime", "blob_id")


class Entry(NamedTuple):
    """A file or folder directly below another; some servers do not say the bytes of a file."""

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
        Raises FileNotFoundError, NotADirectoryError or StoreError.
        """
        found = self._scan(folder, sizes) if self.is_local else self._list(folder)
        return sorted(entry for entry in found if entry.name and not entry.name.startswith("."))

    def is_file(self, name: str) -> bool:
        """Whether there is such a file; raises StoreError when the server does not say."""
        if self.is_local:
            return os.path.isfile(self.path(name))
        return self._kind(name) == "file"

    def is_folder(self, name: str = "") -> bool:
        """Whether there is such a folder; over http every path is taken for a file."""
        if self.is_local:
            return os.path.isdir(self.path(name))
        return not is_http(self.path(name)) and self._kind(name) == "directory"

    def size(self, name: str) -> int:
        """A file's bytes now; raises FileNotFoundError, StoreError when nobody knows."""
        path = self.path(name)
        if self.is_local:
            return os.stat(path).st_size
        num_bytes = self._info(name).get("size")
        if num_bytes is None:
            raise StoreError(f"the server does not say the size of {path}: copy it to a disk")
        return int(num_bytes)

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading; raises FileNotFoundError or StoreError."""
        if self.is_local:
            return open(self.path(name), "rb")
        fetch = functools.partial(self.read_range, name)
        return cast(BinaryIO, RangeFile(fetch, self.size(name)))

    def read(self, name: str, num_bytes: int) -> bytes:
        """A whole file of `num_bytes` (UNKNOWN_SIZE: whatever comes).

        Raises DamagedError when it is gone or of another length, StoreError.
        """
        with _gone_is_damage(name):
            if self.is_local:
                with open(self.path(name), "rb", buffering=0) as file:
                    data = file.readall()
            elif num_bytes > 0:
                # A range with one byte more: the length is checked without asking for it first.
                data = self.read_range(name, 0, num_bytes + 1, to_end=True)
            else:
                data = self._whole(name)
        if num_bytes != UNKNOWN_SIZE:
            check_length(name, data, num_bytes)
        return data

    def read_range(self, name: str, start: int, num_bytes: int, *, to_end: bool = False) -> bytes:
        """A byte range of a remote file; with `to_end` it may reach behind the file's end.

        Raises DamagedError when the file is gone or short, StoreError. A short answer about a
        file that is long enough is asked for again.
        """
        path = self.path(name)

        def fetch() -> bytes:
            try:
                data = bytes(self.filesystem.cat_file(path, start=start, end=start + num_bytes))
            except Exception as error:
                if not is_behind_end(error):
                    raise
                data = b""
            if len(data) < num_bytes:
                there = max(0, min(num_bytes, self.size(name) - start))
                if len(data) != there:
                    raise ConnectionError(f"{len(data)} bytes, expected {there}")
            return data

        with _gone_is_damage(name):
            data = retried(f"reading {num_bytes} bytes at {start} of {path}", fetch)
        if len(data) > num_bytes:
            raise StoreError(
                f"the server of {path} does not answer byte ranges: got {len(data)} bytes, "
                f"expected {num_bytes}; copy the file to a disk or a store that does"
            )
        if not to_end:
            check_length(name, data, num_bytes)
        return data

    def version(self, name: str) -> str:
        """A hash of path, size and modification time (or ETag).

        Raises FileNotFoundError or StoreError.
        """
        path = self.path(name)
        if self.is_local:
            status = os.stat(path)
            facts = [path, status.st_size, status.st_mtime_ns]
        else:
            info = self._info(name)
            stamp = next((info[k] for k in _VERSION_FIELDS if k in info), None)
            created = info.get("created") if stamp is None else None
            url = self.filesystem.unstrip_protocol(path)
            facts = [url, info.get("size"), str(stamp), str(created)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _whole(self, name: str) -> bytes:
        path = self.path(name)
        return bytes(retried(f"reading {path}", lambda: self.filesystem.cat_file(path)))

    def _info(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        found = retried(f"asking for the size of {path}", lambda: self.filesystem.info(path))
        return cast(dict[str, Any], found)

    def _kind(self, name: str) -> str | None:
        try:
            return str(self._info(name)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _scan(self, folder: str, sizes: bool) -> Iterator[Entry]:
        with os.scandir(self.path(folder)) as found:
            for entry in found:
                is_folder = entry.is_dir()
                # A dead link is listed with 0 bytes and fails when it is read.
                has_size = sizes and not is_folder and entry.is_file()
                yield Entry(entry.name, is_folder, entry.stat().st_size if has_size else 0)

    def _list(self, folder: str) -> Iterator[Entry]:
        path = self.path(folder).rstrip("/")
        # An http server answers a folder's name without the slash by a redirect, if at all.
        asked = f"{path}/" if is_http(path) else path
        found = retried(f"listing {path}", lambda: self.filesystem.ls(asked, detail=True))
        for info in found:
            full = info["name"].rstrip("/")
            parent, _, name = full.rpartition("/")
            # Object stores list the folder's own marker object among its contents; a page of
            # links has others too.
            if full == path or (is_http(path) and (parent != path or name[:1] in "?#")):
                continue
            size = info.get("size")
            yield Entry(
                name, info["type"] == "directory", UNKNOWN_SIZE if size is None else int(size)
            )


@contextlib.contextmanager
def _gone_is_damage(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise changed(f"{name} is gone") from None


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
        self,
        name: str,
        open_fd: Callable[[], int],
        start: int,
        num_bytes: int,
        *,
        touch: bool = False,
        to_end: bool = False,
    ) -> bytes:
        """Bytes of a local file, opened with `open_fd` if it is not open.

        `touch` renews the file's modification time now and then (the scratch folder's LRU).
        Raises DamagedError when the bytes are short and not allowed to be (`to_end`).
        """
        descriptor = self._get(name, open_fd)
        if touch and time.monotonic() - descriptor.touched_at > _TOUCH_EVERY_S:
            descriptor.touched_at = time.monotonic()
            os.utime(descriptor.fd)
        data = _pread_all(descriptor.fd, start, num_bytes)
        if not to_end:
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
