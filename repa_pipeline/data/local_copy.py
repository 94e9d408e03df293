"""A folder on a local disk with copies of a remote cache's shards, shared by a machine's processes.

A copy gets its name when it is complete and verified, and is verified whenever it is read. One
process writes a given copy, the others wait for it. What a killed process leaves has another name
and no lock: the next one that makes room removes it. Room is made before a copy is begun, for all
of it, so the folder never grows above its limit; the longest unused copies go first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator

from repa_pipeline.data.array import SealedArray, stored_digest
from repa_pipeline.errors import StageError

_COPY, _PART, _LOCK = ".shard", ".part", ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


class Busy(Exception):
    """Somebody else writes that copy just now."""


class LocalCopy:
    """Copies of shards in `folder`, at most `limit_bytes` of them.

    Raises StageError when the folder cannot be made or written.
    """

    def __init__(self, folder: str, limit_bytes: int):
        self._folder = folder
        self._limit_bytes = limit_bytes
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            with self.locked():
                pass
        except OSError as error:
            raise StageError(
                f"cannot write the local copy at {folder}: {error.strerror}; give another folder "
                "by --local-copy"
            ) from None

    def open(self, array: SealedArray, shard: int) -> int | None:
        """A descriptor of the copy, which the caller closes; None without one. It is now the
        last that would go."""
        try:
            fd = os.open(self._path(array, shard, _COPY), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        os.utime(fd)
        return fd

    def begin(self, array: SealedArray, shard: int) -> Writing | None:
        """Room for a new copy; None when there is none. Raises Busy."""
        part, final = self._path(array, shard, _PART), self._path(array, shard, _COPY)
        num_bytes = array.shard_bytes(shard)
        with self.locked():
            if os.path.exists(final):  # finished since the caller looked
                raise Busy
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._make_room(num_bytes, part):
                    os.ftruncate(fd, num_bytes)
                    return Writing(self, fd, part, final)
            except BlockingIOError:
                os.close(fd)
                raise Busy from None
            except OSError as error:
                if error.errno not in _FULL:
                    raise
            os.unlink(part)
            os.close(fd)
        return None

    def drop(self, array: SealedArray, shard: int) -> None:
        """Removes a copy, a damaged one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(array, shard, _COPY))

    def _path(self, array: SealedArray, shard: int, suffix: str) -> str:
        """Named by what the shard is, so that equal caches share, and others never meet."""
        what = (array.spec.fingerprint, str(shard), stored_digest(array.shards[shard]))
        name = hashlib.sha256("/".join(what).encode()).hexdigest()[:32]
        return os.path.join(self._folder, name + suffix)

    def _make_room(self, num_bytes: int, own: str) -> bool:
        """Removes what is stale, and the longest unused copies until `num_bytes` more fit."""
        copies: list[tuple[int, int, str]] = []
        total = num_bytes
        for entry in list(os.scandir(self._folder)):
            suffix = os.path.splitext(entry.name)[1]
            if suffix == _PART and (entry.path == own or _drop_stale(entry.path)):
                continue
            if suffix in (_COPY, _PART):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    total += status.st_size
                    if suffix == _COPY:
                        copies.append((status.st_mtime_ns, status.st_size, entry.path))
        # Nothing goes for a copy that would not fit even then.
        if total - sum(size for _, size, _ in copies) > self._limit_bytes:
            return False
        for _, size, path in sorted(copies):
            if total <= self._limit_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one thread of one process at a time is inside; it is never for long."""
        fd = os.open(
            os.path.join(self._folder, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


class Writing:
    """A copy that is being written, by any number of threads; ends by `end`."""

    def __init__(self, copy: LocalCopy, fd: int, part: str, final: str):
        self._copy = copy
        self._fd = fd
        self._part = part
        self._final = final
        self._is_full = False

    def write(self, data: memoryview, offset: int) -> None:
        """A full disk ends the copy, not the training."""
        try:
            while data and not self._is_full:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._is_full = True
            _log.warning("the disk of the local copy is full: %s is not kept", self._final)

    def end(self, is_sound: bool) -> None:
        """Gives a complete, verified copy its name, or removes what there is of it."""
        # Under the lock, so that whoever counts the folder's bytes counts these once.
        with self._copy.locked():
            if is_sound and not self._is_full:
                os.replace(self._part, self._final)
            else:
                os.unlink(self._part)
            os.close(self._fd)


def _drop_stale(part: str) -> bool:
    """Removes what a killed process left: nobody holds its lock."""
    try:
        fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(part)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
