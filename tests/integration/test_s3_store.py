"""The object store on a real S3 server, whole and through a proxy that injects faults."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.data.retry import RetryPolicy
from repa_pipeline.errors import DamagedError, MissingError, StoreError
from repa_pipeline.testing.faults import (
    QUICK,
    Chance,
    Fault,
    FaultProxy,
    Rule,
    Script,
    delay,
    lost_answer,
    reset,
    server_error,
    slow_down,
    throttle,
    truncate,
)
from repa_pipeline.testing.stores import ATOMIC_CHECKS, CHECKS, Check
from repa_pipeline.testing.swift import SwiftServer

pytestmark = pytest.mark.slow

FEW = dataclasses.replace(QUICK, attempts=3)
DATA = bytes(range(256)) * 1200  # 300 KB


def name_of(bucket: str) -> str:
    return bucket.removeprefix("s3://")


@pytest.mark.parametrize("check", [*CHECKS.values(), *ATOMIC_CHECKS.values()])
def test_conformance(check: Check, bucket: str) -> None:
    check(open_store(f"{bucket}/some/prefix"))


def test_listings_of_more_than_a_page(bucket: str, proxy: FaultProxy) -> None:
    store = open_store(f"{bucket}/many", retry=QUICK)
    names = [f"d/{i:04d}" for i in range(120)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, b"x"), names))
    proxy.exchanges.clear()
    proxy.script = Script(Rule(slow_down(), path="continuation-token", times=2))
    assert store.list("d") == [name[2:] for name in names]
    assert list(store.keys("d")) == names
    assert [e.status for e in proxy.exchanges] == [200, 503, 503, 200, 200] + [200] * 3
    proxy.exchanges.clear()
    assert store.list("") == ["d"] and open_store(bucket).list("") == ["many"]
    assert open_store(bucket).size("many/d/0007") == 1
    assert len(proxy.exchanges) == 3, "many objects in a folder are one entry"


def test_ranges(bucket: str) -> None:
    store = open_store(f"{bucket}/p")
    store.put("k", DATA)
    for start, count in ((0, 1), (0, 300_000), (1000, 77), (299_999, 1), (5, 0)):
        assert store.read_range("k", start, count) == DATA[start : start + count]
    for start, count in ((0, len(DATA) + 1), (len(DATA) - 1, 2), (len(DATA), 1), (10**9, 5)):
        with pytest.raises(DamagedError, match=f"/p/k ends at .* {count} bytes from {start} on"):
            store.read_range("k", start, count)
    for count in (0, 3):
        with pytest.raises(MissingError, match="no object s3://.*/p/other"):
            store.read_range("other", 0, count)


def do_everything(store: ObjectStore) -> None:
    """Every operation once, each checked for its value."""
    store.put_new("d/new", DATA)  # False when the answer to our own first attempt was lost
    assert store.get("d/new") == DATA
    assert not store.put_new("d/new", b"another")
    store.put("d/put", DATA[::-1])
    buffer = bytearray(len(DATA))
    assert store.read_into("d/put", memoryview(buffer)) == len(DATA) and buffer == DATA[::-1]
    assert store.read_into("d/put", memoryview(buffer)[:1000]) == 1001
    assert store.read_range("d/new", 1234, 99_999) == DATA[1234:101_233]
    assert store.size("d/new") == len(DATA) and store.size("d/none") is None
    assert store.list("d") == ["new", "put"] and sorted(store.keys()) == ["d/new", "d/put"]
    store.delete("d/put")
    assert store.list("d") == ["new"]


@pytest.mark.parametrize(
    "fault",
    [server_error(), server_error(502, "BadGateway"), slow_down(), reset(), lost_answer()],
    ids=lambda fault: fault.name,
)
def test_work_finishes_when_every_request_fails_twice(
    fault: Fault, bucket: str, proxy: FaultProxy
) -> None:
    proxy.script = Chance(0, 1.0, [fault], limit=2)
    do_everything(open_store(f"{bucket}/p", retry=QUICK))
    assert proxy.faults()[fault.name] >= 18


@pytest.mark.parametrize("share", [0.0, 0.999])
def test_truncated_answers(share: float, bucket: str, proxy: FaultProxy) -> None:
    proxy.script = Chance(0, 1.0, [truncate(share)], limit=1)
    do_everything(open_store(f"{bucket}/p", retry=QUICK))
    proxy.script = Script(Rule(truncate(share), times=None))
    store, buffer = open_store(f"{bucket}/p", retry=FEW), bytearray(len(DATA))
    for read in (
        lambda: store.get("d/new"),
        lambda: store.read_into("d/new", memoryview(buffer)),
        lambda: store.read_range("d/new", 0, 1000),
    ):
        with pytest.raises(StoreError, match="GET s3://.*/p/d/new: tried 3 times in"):
            read()


def test_any_mixture_by_chance(bucket: str, proxy: FaultProxy) -> None:
    """Eight writers and readers at once; no hole, no zero byte that was not written."""
    faults = [server_error(), slow_down(), reset(), lost_answer(), truncate(0.3), delay(0.05)]
    proxy.script = Chance(7, 0.4, faults)
    store = open_store(f"{bucket}/p", retry=QUICK)

    def work(i: int) -> bytes:
        store.put_new(f"{i}", bytes([i]) * (1000 + i))
        return store.get(f"{i}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(40))) == [bytes([i]) * (1000 + i) for i in range(40)]
    assert set(proxy.faults()) == {fault.name for fault in faults}


def test_a_slow_server(bucket: str, proxy: FaultProxy) -> None:
    open_store(f"{bucket}/p").put("k", DATA)
    impatient = dataclasses.replace(QUICK, silence_seconds=0.5)
    proxy.script = Script(Rule(delay(1.0), method="GET", times=1))
    assert open_store(f"{bucket}/p", retry=impatient).get("k") == DATA
    assert proxy.faults() == {"delay": 1}
    store = open_store(f"{bucket}/p", retry=dataclasses.replace(impatient, attempts=2))
    for fault in (throttle(1e5), delay(1.0)):
        proxy.script = Script(Rule(fault, times=None))
        with pytest.raises(StoreError, match="tried 2 times in .* no whole answer"):
            store.get("k")
    # Longer in all than the server may be silent, and never silent: an upload takes its time.
    # (The kernel takes the last 4 MB at once; they must pass within the limit.)
    patient = dataclasses.replace(QUICK, attempts=1, silence_seconds=3.0)
    proxy.script = Script(Rule(throttle(3.5e6), times=1))
    open_store(f"{bucket}/p", retry=patient).put("big", DATA * 40)
    assert proxy.exchanges[-1].fault == "throttle" and proxy.exchanges[-1].status == 200


@pytest.mark.parametrize("fault", [slow_down(), reset()], ids=lambda fault: fault.name)
def test_an_error_when_retries_end(
    fault: Fault, s3: SwiftServer, bucket: str, proxy: FaultProxy
) -> None:
    proxy.script = Script(Rule(fault, times=None))
    store = open_store(f"{bucket}/p", retry=FEW)
    said = "503 SlowDown" if fault == slow_down() else "no whole answer"
    for verb, act in operations(store):
        tail = f"tried 3 times in \\d s, the last answer was: ({said}|503);? .*same command again"
        with pytest.raises(StoreError, match=f"{verb} {bucket}/p/k?: {tail}"):
            act()
    assert s3.objects(name_of(bucket)) == {}
    if fault == slow_down():
        assert len(proxy.exchanges) == 3 * len(operations(store)), "nobody else asks again"


def operations(store: ObjectStore) -> list[tuple[str, Callable[[], Any]]]:
    return [
        ("GET", lambda: store.get("k")),
        ("GET", lambda: store.read_into("k", memoryview(bytearray(3)))),
        ("GET", lambda: store.read_range("k", 0, 3)),
        ("HEAD", lambda: store.size("k")),
        ("PUT", lambda: store.put("k", b"1")),
        ("LIST", lambda: store.list("")),
        ("LIST", lambda: list(store.keys())),
        ("DELETE", lambda: store.delete("k")),
    ]


def test_a_server_that_comes_back(s3: SwiftServer, bucket: str) -> None:
    store = open_store(f"{bucket}/p", retry=RetryPolicy(first_delay_seconds=0.1))
    store.put("k", DATA)
    s3.stop()
    starter = threading.Timer(0.3, s3.start)
    starter.start()
    try:
        assert store.get("k") == DATA
    finally:
        starter.join()


def test_what_cannot_pass_is_said_at_once(
    bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = open_store("s3://no-such-bucket/p")
    for verb, act in operations(gone):
        if verb != "HEAD":  # its answer has no body that could tell
            message = f"{verb} s3://no-such-bucket/p/k?: there is no such bucket"
            with pytest.raises(StoreError, match=message):
                act()
    with pytest.raises(StoreError, match="PUT .*no such bucket: buckets are never made here"):
        gone.put_new("k", b"1")
    assert gone.size("k") is None
    with pytest.raises(StoreError, match="PUT s3://X/k: refused .*400 InvalidBucketName.*URL"):
        open_store("s3://X").put("k", b"1")
    with pytest.raises(StoreError, match="not asked .ParamValidationError.: check the URL"):
        open_store("s3://b b").put("k", b"1")
    assert len(proxy.exchanges) == 10

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    proxy.exchanges.clear()
    denied = open_store(f"{bucket}/p")
    for verb, act in operations(denied):
        with pytest.raises(StoreError, match=f"{verb} {bucket}/p/k?: access denied .403.*AWS_S"):
            act()
    assert len(proxy.exchanges) == len(operations(denied)), "each was asked once"
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StoreError, match=r"access denied \(NoCredentialsError\): set AWS_ACCESS_"):
        open_store(f"{bucket}/p").get("k")


def test_credentials_are_never_told(
    s3: SwiftServer,
    bucket: str,
    proxy: FaultProxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every logger at DEBUG, through faults, and in every message."""
    caplog.set_level(logging.DEBUG)
    said = []
    proxy.script = Chance(0, 1.0, [slow_down(), reset()], limit=1)
    store = open_store(f"{bucket}/p", retry=FEW)
    do_everything(store)
    proxy.script = Script(Rule(server_error(), times=None))
    for _, act in operations(store):
        with pytest.raises(StoreError) as caught:
            act()
        said.append(str(caught.value))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-" + s3.secret_key)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-token-value")
    proxy.script = Script()
    for _, act in operations(open_store(f"{bucket}/p", retry=FEW)):
        with pytest.raises(StoreError) as caught:
            act()
        said.append(str(caught.value))
    text = "\n".join([caplog.text, repr(vars(store)), *said])
    assert "attempt 2 follows" in text and "access denied" in text
    for secret in (s3.access_key, s3.secret_key, "session-token-value"):
        assert secret not in text


WRITER = """
import sys
from repa_pipeline.data.objects import open_store
store = open_store(sys.argv[1])
getattr(store, sys.argv[2])("big", bytes(110_000_000))
"""


@pytest.mark.parametrize("method", ["put", "put_new"])
def test_a_writer_killed_in_the_middle_leaves_nothing(
    method: str, s3: SwiftServer, bucket: str, proxy: FaultProxy
) -> None:
    proxy.script = Script(Rule(throttle(50e6), method="PUT"))
    with subprocess.Popen([sys.executable, "-c", WRITER, f"{bucket}/p", method]) as writer:
        puts = []
        while writer.poll() is None and not (puts and puts[0].body_bytes > 10e6):
            puts = [e for e in proxy.exchanges if e.method == "PUT"]
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    time.sleep(0.5)
    assert len(puts) == 1 and puts[0].status == 0 and puts[0].body_bytes < 110_000_000
    assert s3.objects(name_of(bucket)) == {} and s3.multipart_uploads(name_of(bucket)) == []
    store = open_store(f"{bucket}/p")
    assert store.size("big") is None and store.put_new("big", b"second try")
    assert store.get("big") == b"second try"


def test_a_big_object_is_one_put(s3: SwiftServer, bucket: str, proxy: FaultProxy) -> None:
    """Above 100 MiB the library would start a multipart upload; ours is one request."""
    data = os.urandom(1_100_000) * 100
    store = open_store(f"{bucket}/p")
    assert store.put_new("big", data) and not store.put_new("big", data)
    buffer = bytearray(len(data))
    assert store.read_into("big", memoryview(buffer)) == len(data) and buffer == data
    asked = [(e.method, e.path) for e in proxy.exchanges]
    path = f"/{name_of(bucket)}/p/big"
    assert asked == [("HEAD", path), ("PUT", path), ("HEAD", path), ("GET", path)]
    assert s3.multipart_uploads(name_of(bucket)) == []


# The store is used before the fork: what the children inherit of it must not hang or be shared.
RACE = """
import os, sys, time
from repa_pipeline.data.objects import open_store
store = open_store(sys.argv[1])
store.put("warm", b"parent")
start = time.time() + 2.0
children = []
for i in range(8):
    pid = os.fork()
    if not pid:
        try:
            assert store.get("warm") == b"parent"
            time.sleep(max(0.0, start - time.time()))
            won = store.put_new("race", bytes([i]) * 50_000)
            os._exit(int(won))
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(99)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
assert store.get("warm") == b"parent"
print(*codes)
"""


def test_forked_processes_race_and_one_wins(bucket: str) -> None:
    command = [sys.executable, "-c", RACE, f"{bucket}/p"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    codes = [int(code) for code in done.stdout.split()]
    assert sorted(codes) == [0] * 7 + [1], done.stderr
    assert open_store(f"{bucket}/p").get("race") == bytes([codes.index(1)]) * 50_000


OWNER = """
import sys, time
from repa_pipeline.testing.swift import SwiftServer
with SwiftServer(sys.argv[1]) as server:
    print(server.endpoint, server.folder, flush=True)
    time.sleep(600)
"""


def test_a_server_ends_with_its_owner(s3: SwiftServer) -> None:
    command = [sys.executable, "-c", OWNER, str(s3.venv)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        endpoint, folder = owner.stdout.readline().split()
        assert os.path.isdir(folder)
        owner.send_signal(signal.SIGKILL)
    for _ in range(1000):
        if not os.path.isdir(folder):
            break
        time.sleep(0.01)
    assert not os.path.exists(folder)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), 1.0)
