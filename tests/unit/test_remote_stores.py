"""Remote stores: what is asked again, for how long, and what the S3 client is told.

The same on a real S3 server: tests/integration/test_s3_store.py.
"""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from repa_pipeline.config import ReportConfig, RunsConfig
from repa_pipeline.data import s3
from repa_pipeline.data.fsstore import RemoteStore, refuse_credentials
from repa_pipeline.data.objects import open_store
from repa_pipeline.data.retry import Passing, RetryPolicy, answer_of, ask, passing_answer
from repa_pipeline.data.s3 import S3Store
from repa_pipeline.data.source import open_source
from repa_pipeline.errors import ConfigError, MismatchError, StoreError
from repa_pipeline.report import write_report
from repa_pipeline.training.runs import runs_folder

_numbers = itertools.count()
QUICK = RetryPolicy(attempts=4, first_delay_seconds=0.001, longest_delay_seconds=0.002)


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """Memory whose calls raise what `trouble` holds first."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.trouble: list[BaseException] = []

    def _fail(self) -> None:
        if self.trouble:
            raise self.trouble.pop(0)

    def cat_file(self, *arguments: Any, **named: Any) -> Any:
        self._fail()
        return super().cat_file(*arguments, **named)

    def info(self, *arguments: Any, **named: Any) -> Any:
        self._fail()
        return super().info(*arguments, **named)

    def pipe_file(self, *arguments: Any, **named: Any) -> None:
        self._fail()
        super().pipe_file(*arguments, **named)

    def ls(self, *arguments: Any, **named: Any) -> Any:
        self._fail()
        return super().ls(*arguments, **named)


@pytest.fixture(autouse=True)
def _forget_memory() -> Iterator[None]:
    yield
    filesystem = fsspec.filesystem("memory")
    for path in [p for p in filesystem.store if p.startswith("/test-remote-")]:
        filesystem.rm_file(path)


def test_error_codes_are_those_of_s3fs() -> None:
    errors = pytest.importorskip("s3fs.errors")
    boto = pytest.importorskip("botocore.exceptions")

    def translated(code: str, status: int | None = None) -> Any:
        answer: dict[str, Any] = {"Error": {"Code": code, "Message": "no"}}
        if status:
            answer["ResponseMetadata"] = {"HTTPStatusCode": status}
        return errors.translate_boto_error(boto.ClientError(answer, "PutObject"))

    for code in ("PreconditionFailed", "ConditionalRequestConflict"):
        assert answer_of(translated(code)) == (None, code)
        assert passing_answer(translated(code, 412)) is None
    assert answer_of(translated("404")) == (404, "")
    for code, status in (("SlowDown", 503), ("InternalError", 500), ("BadDigest", 400)):
        assert passing_answer(translated(code, status)) == f"{status} {code}"
    for number in (429, 500, 502, 503, 504):
        assert passing_answer(translated(str(number), number)) == str(number)
    for code, status in (("AccessDenied", 403), ("NoSuchKey", 404), ("InvalidArgument", 400)):
        assert passing_answer(translated(code, status)) is None
    url = "http://h"
    for error in (
        boto.EndpointConnectionError(endpoint_url=url),
        boto.ReadTimeoutError(endpoint_url=url),
        boto.ConnectTimeoutError(endpoint_url=url),
        boto.ConnectionClosedError(endpoint_url=url),
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        fsspec.exceptions.FSTimeoutError(),
        TimeoutError(),
        ConnectionResetError(),
    ):
        assert passing_answer(error) == f"no whole answer ({type(error).__name__})"
    for error in (boto.NoCredentialsError(), PermissionError("no"), OSError("disk"), ValueError()):
        assert passing_answer(error) is None


PASSING = [TimeoutError("slow"), ConnectionResetError("reset"), BrokenPipeError("pipe")]


def test_passing_errors_are_asked_again() -> None:
    filesystem = Flaky()
    store = RemoteStore(f"memory://test-remote-{next(_numbers)}", filesystem, QUICK)
    for act, expected in (
        (lambda: store.put_new("d/k", b"12345"), True),
        (lambda: store.put_new("d/k", b"other"), False),
        (lambda: store.get("d/k"), b"12345"),
        (lambda: store.read_range("d/k", 1, 2), b"23"),
        (lambda: store.read_into("d/k", memoryview(bytearray(3))), 4),
        (lambda: store.size("d/k"), 5),
        (lambda: store.list("d"), ["k"]),
        (lambda: store.put("d/k", b"6"), None),
        (lambda: store.get("d/k"), b"6"),
    ):
        filesystem.trouble = list(PASSING)
        assert act() == expected and filesystem.trouble == []
    filesystem.trouble = [*PASSING, TimeoutError("at last")]
    with pytest.raises(StoreError, match=r"GET .*/d/k: tried 4 times in 0 s, .*\(TimeoutError\)"):
        store.get("d/k")
    assert filesystem.trouble == []
    filesystem.trouble = [PermissionError("not yours"), TimeoutError("never reached")]
    with pytest.raises(PermissionError, match="not yours"):
        store.get("d/k")
    assert len(filesystem.trouble) == 1


def test_a_lost_answer_is_no_second_upload() -> None:
    """The object stands, the answer does not come: the second attempt looks first."""

    class Losing(MemoryFileSystem):  # type: ignore[misc]
        cachable = False
        writes = 0

        def pipe_file(self, *arguments: Any, **named: Any) -> None:
            super().pipe_file(*arguments, **named)
            self.writes += 1
            raise ConnectionResetError

    filesystem = Losing()
    store = RemoteStore(f"memory://test-remote-{next(_numbers)}", filesystem, QUICK)
    assert not store.put_new("k", b"mine")
    assert store.get("k") == b"mine" and filesystem.writes == 1


def test_how_long_a_store_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RetryPolicy(attempts=9, first_delay_seconds=1.0, longest_delay_seconds=5.0)
    for attempt, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (5000, 5.0)):
        delays = [policy.delay(attempt) for _ in range(50)]
        assert longest / 2 <= min(delays) < max(delays) <= longest
    assert policy.answer_seconds(3 * 2**20) == policy.silence_seconds + 3
    attempts: list[int] = []

    def fail(number: int) -> None:
        attempts.append(number)
        raise Passing("503 SlowDown")

    late = RetryPolicy(attempts=9, deadline_seconds=0.0001)
    with pytest.raises(StoreError, match="PUT k: tried 1 times in 0 s, the last answer was: 503 S"):
        ask(late, "PUT k", fail)
    with pytest.raises(StoreError, match="PUT k: tried 4 times"):
        ask(QUICK, "PUT k", fail)
    assert attempts == [1, 1, 2, 3, 4]
    monkeypatch.setenv("REPA_STORE_ATTEMPTS", "3")
    monkeypatch.setenv("REPA_STORE_SILENCE_SECONDS", "2.5")
    assert RetryPolicy.from_environment() == RetryPolicy(attempts=3, silence_seconds=2.5)
    for wrong in ("0", "-1", "many", "1.5", "nan"):
        monkeypatch.setenv("REPA_STORE_ATTEMPTS", wrong)
        with pytest.raises(ConfigError, match=f"REPA_STORE_ATTEMPTS is '{wrong}', expected"):
            open_store("memory://x")


def test_credentials_in_a_url_are_refused_unseen() -> None:
    for url in (
        "s3://AKID:s3cr3t@bucket/p",
        "s3://AKID:s3/cr3t@bucket/p",
        "s3://AKID@bucket/p",
        "https://u:s3cr3t@host/p",
        "sftp://u:s3cr3t@host:22/p",
    ):
        with pytest.raises(ConfigError, match="user name or a password: .*_KEY_ID") as caught:
            open_store(url)
        said = str(caught.value)
        assert not [part for part in ("cr3t", "AKID", "bucket", "host") if part in said]
    for url in ("s3://bucket/data@v1/a:b", "sftp://me@host:22/p", "https://host:80/a@b", "/a:b@c"):
        refuse_credentials(url)


def test_s3_is_set_up_without_hidden_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:s3cr3t@127.0.0.1:9")
    with pytest.raises(ConfigError, match="a password") as caught:
        open_store("s3://bucket/p")
    assert "s3cr3t" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "mars-1")
    store = open_store("s3://bucket/p")
    assert isinstance(store, S3Store) and isinstance(store.child("c"), S3Store)
    for use in (store.get, store.size, store.list, store.child):
        with pytest.raises(MismatchError, match="is no key of a store"):
            use("../other")
    client = store._fs
    assert client.retries == 1 and client.config_kwargs["retries"]["total_max_attempts"] == 1
    assert client.dircache.use_listings_cache is False
    assert client.client_kwargs == {"region_name": "mars-1"}
    assert open_store("s3://other")._fs is client, "one client a process"  # type: ignore[attr-defined]
    monkeypatch.setattr(s3, "MAX_OBJECT_BYTES", 9)
    for put in (store.put, store.put_new):
        with pytest.raises(ConfigError, match="/k would have 10 .*: choose a smaller --shard-rows"):
            put("k", memoryview(bytearray(10)))


def test_a_store_opens_anew_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    store = open_store("s3://bucket/p")
    client = store._fs  # type: ignore[attr-defined]
    packed = pickle.dumps(store)
    assert b"s3cr3t" not in packed and pickle.loads(packed).url == store.url
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert store._fs is not client  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "query",
    [
        "X-Amz-Algorithm=A&X-Amz-Credential=AKID%2Fx&X-Amz-Signature=s3cr3t",
        "x-amz-security-token=s3cr3t",
        "X-Goog-Signature=s3cr3t",
        "sv=2024-01-01&se=x&sig=s3cr3t",
        "versionId=1;token=s3cr3t",
        "AWSAccessKeyId=AKID&Expires=1&Signature=s3cr3t",
        "access_token=s3cr3t",
        "Policy=s3cr3t&Key-Pair-Id=AKID",
        "a=1#token=s3cr3t",
    ],
)
def test_signed_urls_are_refused_unseen(query: str) -> None:
    for url in (
        f"https://host/train-0000.tar?{query}",
        f"simplecache::https://host/train-{{0..9}}.tar?{query}",
        f"https://host/a.tar?{query}::https://host/b.tar",
        f"s3://bucket/p?{query}",
    ):
        for use in (refuse_credentials, open_store, open_source):
            with pytest.raises(ConfigError, match="carries credentials in its query") as caught:
                use(url)
            said = str(caught.value)
            assert "\n" not in said
            assert not [p for p in ("s3cr3t", "AKID", "bucket", "host", "0000") if p in said]


def test_a_signed_workspace_is_refused_unseen_where_no_store_is_opened() -> None:
    url = "https://host/x?X-Amz-Signature=s3cr3t"
    for use in (
        lambda: runs_folder(RunsConfig(workspace=url)),
        lambda: write_report(ReportConfig(workspace=url, runs_dir="runs")),
    ):
        with pytest.raises(ConfigError, match="carries credentials in its query") as caught:
            use()
        assert "s3cr3t" not in str(caught.value)


def test_other_queries_are_not_refused() -> None:
    for url in (
        "https://host/a.tar?versionId=3&download=1",
        "s3://bucket/token=3/train-?.tar",
        "s3://bucket/x?/sig=3/*.tar",
        "local/folder?token=3",
        "memory://x/signature=1",
    ):
        refuse_credentials(url)
