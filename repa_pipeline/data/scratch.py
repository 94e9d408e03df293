"""A folder of limited size for unpacked tars and parquet files, shared by a machine's processes.

A file appears under its final name only when complete (rename), and stays readable to whoever
has it open after it is evicted (unlink keeps an open file). One process unpacks a given file, the
others wait for it. Least recently used ones go first; files that are being unpacked at the same
moment cannot be evicted and may exceed the limit until they are done.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from repa_pipeline.errors import DataError, MissingError, RepaError, StageError

CHUNK_BYTES = 8 * 2**20
# Files unpacked at once: all of them count beyond the limit.
UNPACK_THREADS = 4
_TAR, _PART, _LOCK = ".tar", ".part", ".lock"


def default_scratch_dir() -> str:
    """$REPA_SCRATCH, or `repa-scratch-UID` in the machine's temporary folder."""
    return os.environ.get("REPA_SCRATCH") or _own_scratch_dir()


def _own_scratch_dir() -> str:
    """Everybody may write to its parent, so `Scratch` looks whose it is."""
    return os.path.join(tempfile.gettempdir(), f"repa-scratch-{os.getuid()}")


Unpack = Callable[[BinaryIO, str], Iterator[bytes]]


class Scratch:
    """Unpacked files by key, at most `limit_bytes` of them; the folder is made at the first use."""

    def __init__(
        self, folder: str, limit_bytes: int, on_evict: Callable[[str], None] = lambda key: None
    ):
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._on_evict = on_evict

    def open_unpacked(
        self,
        key: str,
        name: str,
        open_packed: Callable[[], BinaryIO],
        unpack: Unpack | None = None,
    ) -> int:
        """A descriptor of the unpacked file `key`, which the caller closes; unpacks it if absent.

        name: for messages. open_packed: opens the packed file, may raise FileNotFoundError.
        unpack: (packed file, name) -> its content in pieces (default: gunzip).
        Raises MissingError when there is no packed file, DataError when it is damaged, StageError
        when the content is larger than the limit, or the folder cannot be written or, in the
        machine's temporary folder, belongs to another user.
        """
        try:
            self._make_folder()
            fd = self._open(key)
            if fd is not None:
                return fd
            with self._locked(key):
                fd = self._open(key)
                return self._unpack(key, name, open_packed, unpack or gunzip) if fd is None else fd
        except RepaError:
            raise
        except OSError as error:
            raise StageError(
                f"cannot unpack {name} into {self._folder}: {error.strerror or error}; "
                "free some space, lower --scratch-gb or set REPA_SCRATCH to another folder"
            ) from None

    def _make_folder(self) -> None:
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        if self._folder != _own_scratch_dir():
            return
        there = os.stat(self._folder)
        # A link in a folder of everybody's is trusted when its maker is.
        if {there.st_uid, os.lstat(self._folder).st_uid} != {os.getuid()}:
            raise StageError(
                f"the scratch folder {self._folder} belongs to another user: remove it, or give "
                "one of your own by --scratch or REPA_SCRATCH"
            )
        if there.st_mode & 0o077:
            os.chmod(self._folder, 0o700)

    def _path(self, key: str, suffix: str) -> str:
        return os.path.join(self._folder, key + suffix)

    def _open(self, key: str) -> int | None:
        try:
            fd = os.open(self._path(key, _TAR), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        os.utime(fd)
        return fd

    def _unpack(
        self, key: str, name: str, open_packed: Callable[[], BinaryIO], unpack: Unpack
    ) -> int:
        part = self._path(key, _PART)
        written = 0
        try:
            with _opened(open_packed, name) as packed, open(part, "wb") as unpacked:
                chunks = unpack(packed, name)
                for chunk in chunks:
                    written += len(chunk)
                    if written > self._limit_bytes:
                        raise self._too_large(name, written + sum(map(len, chunks)))
                    self._make_room(len(chunk))
                    unpacked.write(chunk)
            # Opened before it gets its name: from then on another process may evict it.
            fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            os.replace(part, self._path(key, _TAR))
            # Others may have been unpacked beside this one.
            self._make_room(0)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise
        return fd

    def _too_large(self, name: str, num_bytes: int) -> StageError:
        return StageError(
            f"{name} unpacks to {_gb(num_bytes)}, more than the scratch limit of "
            f"{_gb(self._limit_bytes)}: raise --scratch-gb or unpack it yourself"
        )

    def _make_room(self, num_bytes: int) -> None:
        """Evicts least recently used tars until `num_bytes` more fit."""
        with _flock(os.path.join(self._folder, _LOCK)):
            tars: list[tuple[int, int, str]] = []
            total = num_bytes
            for entry in list(os.scandir(self._folder)):
                key, suffix = os.path.splitext(entry.name)
                if suffix not in (_TAR, _PART) or (suffix == _PART and self._drop_stale(key)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    total += status.st_size
                    if suffix == _TAR:
                        tars.append((status.st_mtime_ns, status.st_size, key))
            for _, size, key in sorted(tars):
                if total <= self._limit_bytes:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path(key, _TAR))
                self._on_evict(key)
                total -= size

    def _drop_stale(self, key: str) -> bool:
        """Removes what a killed process left: nobody holds the lock of that key."""
        try:
            with _flock(self._path(key, _LOCK), wait=False):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path(key, _PART))
        except BlockingIOError:
            return False
        return True

    def _locked(self, key: str) -> contextlib.AbstractContextManager[None]:
        return _flock(self._path(key, _LOCK))


@contextlib.contextmanager
def _flock(path: str, *, wait: bool = True) -> Iterator[None]:
    """An exclusive lock between threads and processes; without `wait` raises BlockingIOError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


def _opened(open_packed: Callable[[], BinaryIO], name: str) -> BinaryIO:
    try:
        return open_packed()
    except FileNotFoundError:
        raise MissingError(f"{name} is gone: copy it again or index the source anew") from None


def gunzip(packed: BinaryIO, name: str) -> Iterator[bytes]:
    """The content of a gzip file in pieces; raises DataError when it is damaged."""
    unzipped = gzip.GzipFile(fileobj=packed)
    while True:
        try:
            chunk = unzipped.read(CHUNK_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{name} is not a whole gzip file: {error}; copy it again") from None
        if not chunk:
            return
        yield chunk


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB ({num_bytes} bytes)"
