"""File systems behind the URLs of sources: how they are opened, and requests asked again.

A request that fails for a reason that may pass (5xx, timeout, reset, a cut answer) is repeated
with a growing wait (retry.py); one that cannot pass, or never does, ends in one clear StoreError.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from repa_pipeline.data.fsstore import refuse_credentials
from repa_pipeline.data.retry import Passing, RetryPolicy, answer_of, ask, passing_answer
from repa_pipeline.errors import ConfigError, RepaError, StoreError

MAX_TRIES = 5
LISTING_THREADS = 16

_S3_PROTOCOLS = ("s3", "s3a")
_HTTP_PROTOCOLS = ("http", "https")
_MAX_CONNECTIONS = 64
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_ABSENT_STATUS = (404, 410)
_BEHIND_END_STATUS = 416

T = TypeVar("T")
A = TypeVar("A")


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL or local path, and the path on it.

    s3 credentials, region and endpoint come from the environment. Raises ConfigError when no
    installed library speaks the protocol, or when the URL carries a password.
    """
    if "://" in url:
        refuse_credentials(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open '{url}': {error}: check the URL's protocol") from None
    if _protocol(url) in _S3_PROTOCOLS:
        filesystem.retries = 1
    return filesystem, str(path)


def is_http(url: str) -> bool:
    """Whether a URL is plain http, where every path is a file and listing may be impossible."""
    return _protocol(url) in _HTTP_PROTOCOLS


def retried(what: str, call: Callable[[], T]) -> T:
    """`call()`, tried up to MAX_TRIES times; `what` ("reading X") is for messages.

    Raises FileNotFoundError (or its kin) as the file system does, StoreError when the request is
    refused or still fails at the last try. Errors that are no network's pass as they are.
    """

    def attempt(_: int) -> T:
        try:
            return call()
        except Exception as error:
            cause = _real_cause(error)
            status = _status(cause)
            if isinstance(cause, _ABSENT) or not _is_network_error(cause):
                raise
            if status in _ABSENT_STATUS:
                raise FileNotFoundError(what) from error
            if passing_answer(cause) is None and _is_refusal(cause, status):
                raise StoreError(
                    f"{what} was refused: {_said(cause)}; check the URL and the credentials in "
                    "the environment"
                ) from error
            raise Passing(_said(cause)) from error

    policy = RetryPolicy.from_environment()
    return ask(dataclasses.replace(policy, attempts=min(policy.attempts, MAX_TRIES)), what, attempt)


def is_behind_end(error: BaseException) -> bool:
    """Whether an error answers a byte range that starts behind the end of the file."""
    # s3fs says EINVAL, an http server 416.
    is_invalid = isinstance(error, OSError) and error.errno == errno.EINVAL
    return is_invalid or _status(error) == _BEHIND_END_STATUS


def in_parallel(
    function: Callable[[A], T], arguments: Iterable[A], threads: int = LISTING_THREADS
) -> list[T]:
    """[function(a) for a in arguments] by threads; the first error in that order is raised."""
    todo = list(arguments)
    if len(todo) < 2:
        return [function(argument) for argument in todo]
    pool = ThreadPoolExecutor(min(threads, len(todo)))
    try:
        return list(pool.map(function, todo))
    finally:
        pool.shutdown(cancel_futures=True)


class RangeFile(io.RawIOBase):
    """A remote file for libraries that want a file; reads ahead in a window of its own measure.

    fetch(start, num_bytes) is one request. The window doubles while the reader goes on in steps
    of at most READ_THROUGH, and falls to its least where the reader skips more: the payload of
    small members is read through, as a request costs about as much as 1 MiB of transfer, that of
    large ones never. Not safe for several threads.
    """

    READ_THROUGH = 256 * 2**10
    LEAST_WINDOW, FIRST_WINDOW, LARGEST_WINDOW = 8 * 2**10, 64 * 2**10, 16 * 2**20

    def __init__(self, fetch: Callable[[int, int], bytes], num_bytes: int):
        super().__init__()
        self._fetch = fetch
        self._num_bytes = num_bytes
        self._position = 0
        self._window = 0
        self._start = 0
        self._data = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer unless the file ends; raises what `fetch` raises."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._num_bytes - self._position))
        filled = 0
        while filled < wanted:
            inside = self._position - self._start
            if not 0 <= inside < len(self._data):
                self._load(wanted - filled)
                inside = self._position - self._start
            piece = memoryview(self._data)[inside : inside + wanted - filled]
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._position += len(piece)
        return filled

    def _load(self, needed: int) -> None:
        start = self._position
        step = start - self._start - len(self._data)
        if not self._window:
            self._window = self.FIRST_WINDOW
            # Footers and directories lie at the end, and are read backwards.
            if self._num_bytes - start < self._window:
                start = max(0, self._num_bytes - self._window)
        elif 0 <= step <= self.READ_THROUGH:
            self._window = min(2 * self._window, self.LARGEST_WINDOW)
        else:
            self._window = self.LEAST_WINDOW
        length = min(max(self._window, needed), self.LARGEST_WINDOW, self._num_bytes - start)
        self._data = self._fetch(start, length)
        self._start = start


def _options(url: str) -> dict[str, Any]:
    if _protocol(url) in _S3_PROTOCOLS:
        return _s3_options()
    return _http_options() if is_http(url) else {}


def _protocol(url: str) -> str:
    """Of a URL that is no chain of fsspec's: that of `simplecache::s3://...` is neither."""
    return url.partition("://")[0]


def _s3_options() -> dict[str, Any]:
    """As the store of results is asked: fresh listings, one try a request (ours are counted)."""
    policy = RetryPolicy.from_environment()
    config: dict[str, Any] = {
        "connect_timeout": policy.connect_seconds,
        "read_timeout": policy.silence_seconds,
        "max_pool_connections": _MAX_CONNECTIONS,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
    }
    options: dict[str, Any] = {"use_listings_cache": False, "config_kwargs": config}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["client_kwargs"] = {"region_name": region}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        refuse_credentials(endpoint)
        options["endpoint_url"] = endpoint
        # Few services outside AWS give each bucket a host name.
        config["s3"] = {"addressing_style": "path"}
    return options


def _http_options() -> dict[str, Any]:
    """Bytes as they are stored, and a silent server is given up instead of waited for."""
    try:
        import aiohttp
    except ImportError:
        return {}
    policy = RetryPolicy.from_environment()
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=policy.connect_seconds, sock_read=policy.silence_seconds
    )
    return {
        "headers": {"Accept-Encoding": "identity"},
        "client_kwargs": {"timeout": timeout, "auto_decompress": False},
    }


def _real_cause(error: Exception) -> BaseException:
    """fsspec's http says FileNotFoundError to whatever kept it from asking for a size."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and _is_network_error(cause):
        return error if _status(cause) in _ABSENT_STATUS else cause
    return error


def _is_network_error(error: BaseException) -> bool:
    """An OSError, or any error of a network library (they share no base)."""
    if isinstance(error, RepaError):
        return False
    return isinstance(error, OSError) or type(error).__module__ != "builtins"


def _is_refusal(error: BaseException, status: int | None) -> bool:
    if status is not None:
        return 400 <= status < 500
    is_denied = isinstance(error, PermissionError) or "NoCredentials" in type(error).__name__
    return is_denied or is_behind_end(error)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, httpx, requests or botocore carries."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else answer_of(error)[0]


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
