"""Where the trainer reads a shard: a file of this machine, or an object of a store."""

from __future__ import annotations

import os
import threading
from typing import Protocol

from repa_pipeline.data.array import SealedArray
from repa_pipeline.data.local_copy import LocalCopy, Writing
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.data.scatter import Wanted
from repa_pipeline.errors import DamagedError, MissingError


class Source(Protocol):
    """Where one shard is read, by ranges of records and from any number of threads."""

    def read(self, memory: threading.local, start: int, stop: int) -> int:
        """Reads and checks records start..stop; returns the bytes read.

        memory: the thread's own, kept from call to call. Raises DamagedError or StoreError.
        """
        ...

    def close(self, is_complete: bool) -> None:
        """Ends it. When every record was read, checks the shard as a whole: DamagedError."""
        ...


class FileSource:
    """A file of the cache itself, or of its local copy; owns the descriptor."""

    def __init__(self, wanted: Wanted, fd: int, copy: LocalCopy | None = None):
        self._wanted = wanted
        self._fd = fd
        self._copy = copy
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, memory: threading.local, start: int, stop: int) -> int:
        try:
            return self._wanted.from_file(self._fd, start, stop)
        except OSError as error:
            raise self._unreadable(error) from error

    def close(self, is_complete: bool) -> None:
        try:
            if is_complete:
                self._check()
        except OSError as error:
            raise self._unreadable(error) from error
        finally:
            os.close(self._fd)

    def drop(self, error: BaseException | None) -> bool:
        """Whether `error` is that of a local copy, which is then removed."""
        if self._copy is None or not isinstance(error, DamagedError):
            return False
        self._copy.drop(self._wanted.array, self._wanted.shard)
        return True

    def _check(self) -> None:
        array, shard = self._wanted.array, self._wanted.shard
        size, expected = os.fstat(self._fd).st_size, array.shard_bytes(shard)
        if size != expected:
            raise array.truncated(shard, size)
        start = self._wanted.num_rows * array.spec.layout.stride
        self._wanted.check_end(os.pread(self._fd, expected - start, start))

    def _unreadable(self, error: OSError) -> DamagedError:
        array, shard = self._wanted.array, self._wanted.shard
        return DamagedError(
            f"{array.where_of(shard)} cannot be read: {error.strerror}; {array.spec.advice}"
        )


class StoreSource:
    """An object of a store, one GET a range; what comes with `writing` becomes its local copy."""

    def __init__(self, wanted: Wanted, writing: Writing | None = None):
        self._wanted = wanted
        self._writing = writing
        self._end = b""

    def read(self, memory: threading.local, start: int, stop: int) -> int:
        layout = self._wanted.array.spec.layout
        num_bytes = (stop - start) * layout.stride
        end_bytes = len(layout.end(stop)) if stop == self._wanted.num_rows else 0
        buffer = _buffer(memory, num_bytes + end_bytes)
        offset = start * layout.stride
        self._get(buffer, offset)
        try:
            self._wanted.from_memory(buffer[:num_bytes], start, stop)
        except DamagedError:
            # It may have been damaged on its way.
            self._get(buffer, offset)
            self._wanted.from_memory(buffer[:num_bytes], start, stop)
        if end_bytes:
            self._end = bytes(buffer[num_bytes:])
        if self._writing:
            self._writing.write(buffer, offset)
        return len(buffer)

    def close(self, is_complete: bool) -> None:
        is_sound = False
        try:
            if is_complete:
                self._wanted.check_end(self._end)
                is_sound = True
        finally:
            if self._writing:
                self._writing.end(is_sound)

    def _get(self, buffer: memoryview, offset: int) -> None:
        array, shard = self._wanted.array, self._wanted.shard
        try:
            array.store.read_range_into(array.spec.shard_key(shard), offset, buffer)
        except MissingError as error:
            raise array.missing(shard) from error
        except DamagedError as error:
            raise DamagedError(
                f"{array.where_of(shard)} is truncated or foreign: {error}"
            ) from error


def open_file(store: LocalStore, array: SealedArray, shard: int) -> int:
    """A descriptor of a shard on a local disk. Raises DamagedError when it is missing or of
    another length."""
    try:
        fd = os.open(store.root / array.spec.shard_key(shard), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise array.missing(shard) from error
    size = os.fstat(fd).st_size
    if size != array.shard_bytes(shard):
        os.close(fd)
        raise array.truncated(shard, size)
    return fd


def _buffer(memory: threading.local, num_bytes: int) -> memoryview:
    """The thread's memory, which grows to what its largest range needs: fresh pages cost time."""
    held: bytearray = getattr(memory, "held", bytearray())
    if len(held) < num_bytes:
        held = memory.held = bytearray(num_bytes)
    return memoryview(held)[:num_bytes]
