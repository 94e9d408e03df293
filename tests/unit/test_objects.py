"""Stores: one conformance suite for all of them, killed and failing writers, error codes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from repa_pipeline.data import objects
from repa_pipeline.data.fsstore import RemoteStore
from repa_pipeline.data.objects import LocalStore, ObjectStore, get_json, json_bytes, open_store
from repa_pipeline.data.retry import RetryPolicy
from repa_pipeline.errors import (
    DamagedError,
    MismatchError,
    MissingError,
    StageError,
    StoreError,
)
from repa_pipeline.testing.stores import ATOMIC_CHECKS, CHECKS, Check

_numbers = itertools.count()
QUICK = RetryPolicy(attempts=4, first_delay_seconds=0.001, longest_delay_seconds=0.002)


class ServerError(Exception):
    """What botocore raises: the answer of the server in `response`."""

    def __init__(self, code: str):
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


class ObjectStorage(MemoryFileSystem):  # type: ignore[misc]
    """Memory with the conditional create of an object store, refused as s3fs reports it."""

    cachable = False
    code = "PreconditionFailed"
    lock = threading.Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        with self.lock:
            if mode == "create" and (self.exists(path) or self.code != "PreconditionFailed"):
                raise OSError(errno.EINVAL, "refused") from ServerError(self.code)
            super().pipe_file(path, value)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError("an object store has no folders, and this may make a bucket")


def local(folder: Path) -> ObjectStore:
    return LocalStore(str(folder / "store"))


def local_url(folder: Path) -> ObjectStore:
    return open_store(f"file://{folder}/store")


def memory(folder: Path) -> ObjectStore:
    return open_store(f"memory://test-objects-{os.getpid()}-{next(_numbers)}")


def object_storage(folder: Path) -> ObjectStore:
    url = f"memory://test-objects-{os.getpid()}-{next(_numbers)}"
    return RemoteStore(url, ObjectStorage())


def files_through_fsspec(folder: Path) -> ObjectStore:
    return RemoteStore(f"file://{folder}/store", LocalFileSystem())


@pytest.fixture(autouse=True)
def _forget_memory() -> Iterator[None]:
    yield
    filesystem = fsspec.filesystem("memory")
    for path in [p for p in filesystem.store if p.startswith("/test-objects-")]:
        filesystem.rm_file(path)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("make", [local, local_url, memory, object_storage, files_through_fsspec])
def test_conformance(make: Callable[[Path], ObjectStore], check: Check, tmp_path: Path) -> None:
    check(make(tmp_path))


@pytest.mark.parametrize("check", ATOMIC_CHECKS.values(), ids=ATOMIC_CHECKS)
@pytest.mark.parametrize("make", [local, local_url, object_storage])
def test_writers_race(make: Callable[[Path], ObjectStore], check: Check, tmp_path: Path) -> None:
    check(make(tmp_path))


def test_a_check_fails_on_a_wrong_store(tmp_path: Path) -> None:
    class Overwriting(LocalStore):
        def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
            self.put(key, data)
            return True

    with pytest.raises(AssertionError, match="second put_new: got True, expected False"):
        CHECKS["put_new_keeps_what_stands"](Overwriting(str(tmp_path / "a")))
    with pytest.raises(AssertionError, match="winners: got 16, expected 1"):
        ATOMIC_CHECKS["one_writer_creates"](Overwriting(str(tmp_path / "b")))


def test_open_store(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        store = open_store(url)
        assert isinstance(store, LocalStore) and store.root == tmp_path
    assert isinstance(open_store("memory://x"), RemoteStore)
    with pytest.raises(StageError, match="cannot open nosuch://x: Protocol not known"):
        open_store("nosuch://x")


def test_equal_values_are_equal_bytes(tmp_path: Path) -> None:
    assert json_bytes({"b": 1, "a": [1, 2.5]}) == json_bytes({"a": (1, 2.5), "b": 1})
    store = LocalStore(str(tmp_path))
    store.put("k", json_bytes({"a": 1}))
    assert get_json(store, "k") == {"a": 1}
    for torn in (b'{"a": ', b"\xff\xfe", b"[1]", b""):
        store.put("k", torn)
        with pytest.raises(DamagedError, match="/k .* remove it and run again"):
            get_json(store, "k")
    with pytest.raises(MissingError, match="no object .*/other"):
        get_json(store, "other")


# A writer that reaches the moment before its object is linked into place, and waits there; and one
# that the kernel ends in the middle of a write.
STOPPED_BEFORE_LINK = """
import os, sys, time
from repa_pipeline.data.objects import LocalStore
def wait(descriptor):
    print("written", flush=True)
    time.sleep(60)
os.fsync = wait
LocalStore(sys.argv[1]).put_new("big", bytes(8_000_000))
"""
STOPPED_MID_WRITE = """
import resource, signal, sys
from repa_pipeline.data.objects import LocalStore
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
LocalStore(sys.argv[1]).put_new("big", bytes(8_000_000))
"""


@pytest.mark.parametrize(
    ("script", "size"), [(STOPPED_BEFORE_LINK, 8_000_000), (STOPPED_MID_WRITE, 1_000_000)]
)
def test_a_killed_writer_leaves_no_object(script: str, size: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        if writer.stdout.readline():
            (temporary,) = os.listdir(tmp_path)
            LocalStore(str(tmp_path)).put("other", b"while the writer lives")
            assert temporary in os.listdir(tmp_path)
            writer.send_signal(signal.SIGKILL)
    assert writer.returncode in (-signal.SIGKILL, -signal.SIGXFSZ)
    store = LocalStore(str(tmp_path))
    left = [name for name in os.listdir(tmp_path) if name != "other"]
    assert [os.stat(tmp_path / name).st_size for name in left] == [size]
    assert store.size("big") is None and "big" not in store.list("")
    assert store.put_new("big", b"second try")
    assert store.get("big") == b"second try"
    assert set(os.listdir(tmp_path)) - {"other"} == {"big"}


def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_only_orphans_of_this_host_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node")
    dead = dead_pid()
    orphans = {f".tmp-node-{dead}-0", f".tmp-node-{dead}-17"}
    others = {
        f".tmp-node-{os.getpid()}-99999",
        f".tmp-node-b-{dead}-0",
        f".tmp-node-7-{dead}-0",
        f".tmp-elsewhere-{dead}-0",
        f"node-{dead}-0",
        ".tmp-by-hand",
    }
    for name in orphans | others:
        (tmp_path / name).write_bytes(b"half")
    store = LocalStore(str(tmp_path))
    store.put("k", b"1")
    assert set(os.listdir(tmp_path)) == others | {"k"}
    os.link(tmp_path / "k", tmp_path / f".tmp-node-{dead}-3")  # killed between link and unlink
    assert not store.put_new("k", b"2")
    assert set(os.listdir(tmp_path)) == others | {"k"}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = LocalStore(str(tmp_path))
    store.put("k", b"old")
    monkeypatch.setattr(objects.os, "fsync", fail)
    for write in (store.put, store.put_new):
        with pytest.raises(StageError, match="no space left for .*: free some and run"):
            write("k" if write == store.put else "new", b"new")
    assert os.listdir(tmp_path) == ["k"] and store.get("k") == b"old"


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(objects.os, "link", refuse)
    store = LocalStore(str(tmp_path))
    assert store.put_new("k", b"first") and not store.put_new("k", b"second")
    assert os.listdir(tmp_path) == ["k"] and store.get("k") == b"first"


def test_create_refused_by_the_server() -> None:
    filesystem = ObjectStorage()
    url = f"memory://test-objects-{next(_numbers)}"
    store = RemoteStore(url, filesystem, QUICK)
    assert store.put_new("k", b"1") and not store.put_new("k", b"2")
    filesystem.code = "ConditionalRequestConflict"
    assert not store.put_new("k", b"2")
    with pytest.raises(StoreError, match="PUT .*/other: tried 4 times in 0 s, the last answer was"):
        store.put_new("other", b"2")  # no object stands: the rival failed too
    filesystem.code = "AccessDenied"
    with pytest.raises(OSError, match="refused"):
        store.put_new("k", b"2")


@pytest.mark.parametrize("make", [local, local_url, memory, object_storage, files_through_fsspec])
def test_ranges(make: Callable[[Path], ObjectStore], tmp_path: Path) -> None:
    store = make(tmp_path)
    data = bytes(range(200))
    store.put("deep/k", data)
    for start, count in ((0, 200), (0, 1), (7, 50), (199, 1), (3, 0)):
        assert store.read_range("deep/k", start, count) == data[start : start + count]
    for start, count in ((0, 201), (150, 51), (200, 1), (500, 3)):
        with pytest.raises(DamagedError, match=f"deep/k ends at .* {count} bytes from {start} on"):
            store.read_range("deep/k", start, count)
    for count in (0, 5):
        with pytest.raises(MissingError, match="no object .*/other"):
            store.read_range("other", 0, count)


@pytest.mark.parametrize("make", [local, local_url, memory, object_storage, files_through_fsspec])
def test_keys(make: Callable[[Path], ObjectStore], tmp_path: Path) -> None:
    store = make(tmp_path)
    assert list(store.keys()) == [] and list(store.keys("a")) == []
    names = ["a/1", "a/b/c/2", "a/b/3", "ab/4", "5"]
    for name in names:
        store.put(name, b"x")
    assert sorted(store.keys()) == sorted(names)
    assert sorted(store.keys("a")) == ["a/1", "a/b/3", "a/b/c/2"]
    assert sorted(store.child("a").keys("b")) == ["b/3", "b/c/2"]
    assert list(store.keys("none")) == [] and list(store.keys("5")) == []


def test_json_is_one_document(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("k", json_bytes({"z": None, "a": "\u00e9"}))
    assert store.get("k").endswith(b"}\n")
    assert json.loads(store.get("k")) == {"a": "\u00e9", "z": None}


@pytest.mark.parametrize("key", ["../x", "a/../../x", "a/..", "..", "/etc/x"])
def test_keys_lead_nowhere_else(tmp_path: Path, key: str) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    remote = RemoteStore("memory://keys", MemoryFileSystem(), QUICK)
    for store in (LocalStore(str(tmp_path / "store")), remote):
        uses: list[Callable[[], Any]] = [
            lambda store=store: store.get(key),
            lambda store=store: store.read_into(key, memoryview(bytearray(4))),
            lambda store=store: store.read_range(key, 0, 1),
            lambda store=store: store.size(key),
            lambda store=store: store.put(key, b"y"),
            lambda store=store: store.put_new(key, b"y"),
            lambda store=store: store.list(key),
            lambda store=store: list(store.keys(key)),
            lambda store=store: store.delete(key),
            lambda store=store: store.child(key),
        ]
        for use in uses:
            with pytest.raises(MismatchError, match=r"is no key of a store: .*'\.\.'"):
                use()
    assert (tmp_path / "x").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x"]
    LocalStore(str(tmp_path)).put("a..b/..c/c..", b"z")
