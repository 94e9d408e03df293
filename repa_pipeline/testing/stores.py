"""What every `ObjectStore` must do, as checks that need no test framework.

    @pytest.mark.parametrize("check", {**CHECKS, **ATOMIC_CHECKS}.values())
    def test_my_store(check, tmp_path): check(MyStore(tmp_path))

Each check gets an empty store and raises AssertionError. ATOMIC_CHECKS are for stores on which
writers race: every local folder, every object store with a conditional create.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.errors import DamagedError, MissingError

Check = Callable[[ObjectStore], None]
NUM_RACERS = 16


def absent_objects(store: ObjectStore) -> None:
    """An absent key is None, an empty list or MissingError; deleting it is nothing."""
    store.put_new("object", b"1")
    for key in ("a", "a/b/c", "object/below"):
        _expect("size", store.size(key), None)
        _expect("list", store.list(key), [])
        store.delete(key)
        _expect_missing(store.get, key)
        _expect_missing(store.read_into, key, memoryview(bytearray(4)))


def what_is_put_comes_back(store: ObjectStore) -> None:
    """Objects of any bytes-like type and size, an empty one too."""
    big = bytes(range(256)) * 4096
    values: Mapping[str, bytes | bytearray | memoryview] = {
        "bytes": big,
        "deep/er/array": bytearray(big),
        "view": memoryview(big),
        "empty": b"",
    }
    for key, value in values.items():
        _expect("put_new", store.put_new(key, value), True)
        _expect("get", store.get(key), bytes(value))
        _expect("size", store.size(key), len(value))
    _expect("size of a folder", store.size("deep"), None)


def put_new_keeps_what_stands(store: ObjectStore) -> None:
    """`put_new` onto an object is False and changes nothing; `put` replaces it as a whole."""
    store.put_new("k", b"the first one")
    _expect("second put_new", store.put_new("k", b"another"), False)
    _expect("get", store.get("k"), b"the first one")
    store.put("k", b"short")
    _expect("get after put", store.get("k"), b"short")
    store.put("new/one", b"x")
    _expect("get after put", store.get("new/one"), b"x")
    store.delete("k")
    _expect("size after delete", store.size("k"), None)
    _expect("put_new after delete", store.put_new("k", b"again"), True)


def read_into_fills_a_buffer(store: ObjectStore) -> None:
    """`read_into` tells a short, an exact and a too long object apart."""
    store.put_new("k", b"0123456789")
    for room, expected in ((12, 10), (10, 10), (7, 8)):
        buffer = bytearray(room)
        _expect("read_into", store.read_into("k", memoryview(buffer)), expected)
        _expect("buffer", bytes(buffer[:10]), b"0123456789"[:room])
        _expect("rest of the buffer", bytes(buffer[10:]), bytes(max(0, room - 10)))


def ranges_are_exact(store: ObjectStore) -> None:
    """`read_range` and `read_range_into` give exactly those bytes, and refuse a shorter object."""
    store.put_new("k", b"0123456789")
    for start, count in ((0, 10), (3, 4), (9, 1), (4, 0)):
        _expect("read_range", store.read_range("k", start, count), b"0123456789"[start:][:count])
        buffer = bytearray(b"-" * count)
        store.read_range_into("k", start, memoryview(buffer))
        _expect("read_range_into", bytes(buffer), b"0123456789"[start:][:count])
    for start, count in ((0, 11), (9, 2), (10, 1), (50, 5)):
        _expect_short(store.read_range, "k", start, count)
        _expect_short(store.read_range_into, "k", start, memoryview(bytearray(count)))
    _expect_missing(store.read_range_into, "other", 0, memoryview(bytearray(3)))


def listing_is_one_level(store: ObjectStore) -> None:
    """`list` gives sorted names of objects and folders directly below, and nothing else."""
    for key in ("b.json", "a.json", "deep/er/x", "deep/y", "de"):
        store.put_new(key, key.encode())
    _expect("list", store.list(""), ["a.json", "b.json", "de", "deep"])
    _expect("list", store.list("deep"), ["er", "y"])
    _expect("list of an object", store.list("a.json"), [])
    store.put("b.json", b"replaced")
    store.put_new("b.json", b"refused")
    _expect("list after replacing", store.list(""), ["a.json", "b.json", "de", "deep"])


def child_is_a_prefix(store: ObjectStore) -> None:
    """`child` sees what lies below its name, under shorter keys."""
    child = store.child("sub")
    child.put_new("x/y", b"1")
    _expect("get", store.get("sub/x/y"), b"1")
    store.put("sub/z", b"2")
    _expect("list", child.list(""), ["x", "z"])
    _expect("url", child.url, store.url.rstrip("/") + "/sub")


def one_writer_creates(store: ObjectStore) -> None:
    """Of many `put_new` at once exactly one is True, and its bytes are what stands."""
    for attempt in range(8):
        key, start = f"race/{attempt}", threading.Barrier(NUM_RACERS)

        def write(i: int, key: str = key, start: threading.Barrier = start) -> bool:
            start.wait()
            return store.put_new(key, bytes([i]) * 50_000)

        with ThreadPoolExecutor(NUM_RACERS) as pool:
            won = list(pool.map(write, range(NUM_RACERS)))
        _expect("winners", sum(won), 1)
        _expect("what stands", store.get(key), bytes([won.index(True)]) * 50_000)
    _expect("list", store.list("race"), [str(attempt) for attempt in range(8)])


def replacing_is_atomic(store: ObjectStore) -> None:
    """While two writers replace an object, a reader sees one whole value or the other."""
    values = [bytes([i]) * (100_000 + i) for i in (1, 2)]
    store.put("k", values[0])
    done = threading.Event()

    def read() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(store.get("k"))
        return seen

    def write(value: bytes) -> None:
        for _ in range(30):
            store.put("k", value)

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            list(pool.map(write, values))
        finally:
            done.set()
        for reader in readers:
            _expect("torn values", [len(v) for v in reader.result() if v not in values], [])


def _expect(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise AssertionError(f"{what}: got {got!r:.200}, expected {expected!r:.200}")


def _expect_missing(read: Callable[..., Any], *arguments: Any) -> None:
    try:
        read(*arguments)
    except MissingError:
        return
    raise AssertionError("reading an absent object: expected MissingError")


def _expect_short(read: Callable[..., Any], *arguments: Any) -> None:
    try:
        read(*arguments)
    except DamagedError:
        return
    raise AssertionError("reading behind an object's end: expected DamagedError")


def _by_name(*checks: Check) -> Mapping[str, Check]:
    return {check.__name__: check for check in checks}


CHECKS = _by_name(
    absent_objects,
    what_is_put_comes_back,
    put_new_keeps_what_stands,
    read_into_fills_a_buffer,
    ranges_are_exact,
    listing_is_one_level,
    child_is_a_prefix,
)
ATOMIC_CHECKS = _by_name(one_writer_creates, replacing_is_atomic)
