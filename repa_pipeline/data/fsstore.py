"""A prefix on any file system that fsspec opens, asked again while its answers may pass.

The S3 client is in s3.py; this one serves the rest (gs, az, hf, sftp, memory, ...).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from repa_pipeline.data.retry import Passing, RetryPolicy, answer_of, ask, passing_answer
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    MissingError,
    RepaError,
    StageError,
)

Data = bytes | bytearray | memoryview
T = TypeVar("T")

ABSENT = (FileNotFoundError, NotADirectoryError)
_EXISTS_CODES = {"PreconditionFailed", "ConditionalRequestConflict"}
# An upload of at least this many bytes first asks whether the object stands already.
_LARGE_BYTES = 2**20
# Keys need no folders there, and making one could make a bucket out of a mistyped URL.
_OBJECT_STORES = {
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "obs", "oci", "r2", "tos"),
    *("memory", "hf"),
}
# A name in a query or fragment, in front of its '='.
_QUERY_NAME = re.compile(r"(?<=[?&;#])[\w-]+(?==)")
# Names of what signs a request to S3, GCS, Azure or CloudFront, or stands for a user.
_SECRETS = {
    *("x-amz-signature", "x-amz-credential", "x-amz-security-token", "awsaccesskeyid"),
    *("x-goog-signature", "x-goog-credential", "googleaccessid", "key-pair-id"),
    *("signature", "sig", "token", "access_token", "auth", "api_key", "apikey", "password"),
}


class RemoteStore:
    """See `ObjectStore`; what a library's own credentials rules say holds, never the URL.

    `put_new` has one winner, and nothing is ever half visible, where the file system creates
    conditionally (GCS, Azure). Elsewhere two writers at once may both win; what they write of
    a shard is equal, and a torn object fails its checksums.

    Connections belong to a process: after a fork, and after unpickling, the store opens anew.
    """

    def __init__(self, url: str, filesystem: Any = None, retry: RetryPolicy | None = None):
        refuse_credentials(url)
        self.url = url.rstrip("/")
        self._protocol = url.split("://", 1)[0]
        self._retry = retry or RetryPolicy.from_environment()
        self._given = filesystem
        self._opened: tuple[int, Any] = (0, None)
        try:
            self._root = self._fs._strip_protocol(self.url)
        except RepaError:
            raise
        except (ImportError, ValueError) as error:
            raise StageError(f"cannot open {url}: {error}") from error

    def get(self, key: str) -> bytes:
        return self._ask("GET", key, lambda _: self._read(key))

    def read_into(self, key: str, buffer: memoryview) -> int:
        return self._ask("GET", key, lambda _: self._read_into(key, buffer))

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        if not num_bytes:
            return self._nothing(key)
        data = self._ask("GET", key, lambda _: self._read_range(key, start, num_bytes))
        check_whole(len(data), f"{self.url}/{key}", start, num_bytes)
        return data

    def read_range_into(self, key: str, start: int, buffer: memoryview) -> None:
        if not len(buffer):
            self._nothing(key)
            return
        count = self._ask("GET", key, lambda _: self._read_range_into(key, start, buffer))
        check_whole(count, f"{self.url}/{key}", start, len(buffer))

    def size(self, key: str) -> int | None:
        try:
            return self._ask("HEAD", key, lambda _: self._size(key))
        except MissingError:
            return None

    def put_new(self, key: str, data: Data) -> bool:
        body = data if isinstance(data, bytes) else bytes(data)

        def attempt(number: int) -> bool:
            # After an answer that was lost, and before a long upload, a look is cheaper.
            if (number > 1 or len(body) >= _LARGE_BYTES) and self._stands(key):
                return False
            try:
                self._write(key, body, exclusive=True)
            except FileExistsError:
                return False
            except OSError as error:
                status, code = answer_of(error)
                if code not in _EXISTS_CODES:
                    raise
                if not self._stands(key):  # a conflict with a rival that failed: nobody won
                    raise Passing(f"{status or ''} {code}".strip()) from error
                return False
            return True

        return self._ask("PUT", key, attempt)

    def put(self, key: str, data: Data) -> None:
        body = data if isinstance(data, bytes) else bytes(data)
        self._ask("PUT", key, lambda _: self._write(key, body, exclusive=False))

    def list(self, prefix: str) -> list[str]:
        try:
            return self._ask("LIST", prefix, lambda _: sorted(self._names(prefix)))
        except MissingError:
            return []

    def keys(self, prefix: str = "") -> Iterator[str]:
        folder = self._path(prefix).rstrip("/")
        try:
            found = self._ask("LIST", prefix, lambda _: self._fs.find(folder))
        except MissingError:
            return
        for path in found:
            if path != folder:  # finding below an object names the object
                yield path.removeprefix(self._root).lstrip("/")

    def delete(self, key: str) -> None:
        with contextlib.suppress(MissingError):
            self._ask("DELETE", key, lambda _: self._remove(key))

    def child(self, name: str) -> RemoteStore:
        return type(self)(f"{self.url}/{check_key(name)}", self._given, self._retry)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (0, None)}

    @property
    def _fs(self) -> Any:
        """The file system of this process."""
        if self._given is not None:
            return self._given
        if self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._connect())
        return self._opened[1]

    def _connect(self) -> Any:
        import fsspec

        return fsspec.filesystem(self._protocol)

    def _ask(self, verb: str, key: str, attempt: Callable[[int], T]) -> T:
        def once(number: int) -> T:
            try:
                return attempt(number)
            except (RepaError, Passing):
                raise
            except Exception as error:
                meaning = self._meaning(error, verb, key)
                if meaning is error:
                    raise
                raise meaning from error

        return ask(self._retry, f"{verb} {self.url}/{key}", once)

    def _meaning(self, error: Exception, verb: str, key: str) -> Exception:
        """What an error of the library is to our callers; itself when it is nothing of ours."""
        if isinstance(error, ABSENT):
            return MissingError(f"no object {self.url}/{key}")
        answer = passing_answer(error)
        return error if answer is None else Passing(answer)

    def _stands(self, key: str) -> bool:
        try:
            self._size(key)
        except ABSENT:
            return False
        return True

    def _nothing(self, key: str) -> bytes:
        """No bytes of an object, which must be there."""
        if self.size(key) is None:
            raise MissingError(f"no object {self.url}/{key}")
        return b""

    # One request each; errors are the library's own, a missing object is one of ABSENT.

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _read(self, key: str) -> bytes:
        data: bytes = self._fs.cat_file(self._path(key))
        return data

    def _read_into(self, key: str, buffer: memoryview) -> int:
        data = self._read(key)
        count = min(len(data), len(buffer))
        buffer[:count] = data[:count]
        return min(len(data), len(buffer) + 1)

    def _read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path(key), start=start, end=start + num_bytes)
        return data

    def _read_range_into(self, key: str, start: int, buffer: memoryview) -> int:
        data = self._read_range(key, start, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _size(self, key: str) -> int:
        info = self._fs.info(self._path(key))
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return int(info["size"])

    def _write(self, key: str, body: bytes, exclusive: bool) -> None:
        path = self._path(key)
        if self._protocol not in _OBJECT_STORES:
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(path, body, **({"mode": "create"} if exclusive else {}))

    def _names(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix).rstrip("/")
        for entry in self._fs.ls(folder, detail=False):
            name = str(entry).rstrip("/")
            if name != folder:  # listing an object, and at some stores a folder, names itself
                yield name.rsplit("/", 1)[-1]

    def _remove(self, key: str) -> None:
        self._fs.rm_file(self._path(key))


def check_whole(count: int, name: str, start: int, num_bytes: int) -> None:
    """Raises DamagedError when the object ended before a range did."""
    if count != num_bytes:
        raise DamagedError(
            f"{name} ends at byte {start + count}, expected {num_bytes} bytes from {start} on: "
            "it was cut short; run `repa repair` if it is a shard of a cache"
        )


def check_key(key: str) -> str:
    """`key` itself; raises MismatchError for one that could name something outside its store."""
    if key.startswith("/") or ".." in key.split("/"):
        raise MismatchError(
            f"{key!r} is no key of a store: expected a path below its URL, without '..'"
        )
    return key


def refuse_credentials(url: str) -> None:
    """Raises ConfigError, without a word of the URL, when one carries a password or a key.

    Signed URLs do: what opens them stands in the query.
    """
    if "://" in url and any(name.lower() in _SECRETS for name in _QUERY_NAME.findall(url)):
        raise ConfigError(
            "a URL carries credentials in its query (a signed one does): they would end up in "
            "manifests and messages; give the URL without a query, and the credentials in the "
            "environment, or copy the files to a disk"
        )
    place = urlsplit(url).netloc
    user, at, _ = place.rpartition("@")
    is_s3 = url.startswith(("s3://", "s3a://"))
    # A password may itself hold a slash; what is all digits there is a port.
    cut = not at and "@" in url and ":" in place
    if ":" in user or (at and is_s3) or (cut and not place.rpartition(":")[2].isdigit()):
        raise ConfigError(
            "the URL of a store carries a user name or a password: take them out, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what the store's library reads) in "
            "the environment"
        )
