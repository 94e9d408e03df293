"""A prefix in a bucket of any S3 service, through s3fs: one request per call, none hidden.

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, ...). Every object is one
PUT, at most 5 GiB, never a multipart upload: a writer that is killed leaves nothing, visible or
billed. There are no cached listings and no buckets made. The libraries' own retries are off.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from repa_pipeline.data.fsstore import Data, RemoteStore, refuse_credentials
from repa_pipeline.data.retry import Passing, RetryPolicy, answer_of, passing_answer
from repa_pipeline.errors import ConfigError, DamagedError, MissingError, StoreError

T = TypeVar("T")

MAX_OBJECT_BYTES = 5 * 2**30  # S3's own limit of one PUT
_MAX_CONNECTIONS = 64
_PIECE_BYTES = 2**20
_DENIED_CODES = {
    *("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken"),
    *("RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired"),
}
_REGION_CODES = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_ACCESS_ADVICE = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN with temporary ones, "
    "AWS_ENDPOINT_URL outside AWS) of someone who may list, read and write there"
)
# One client a process and set of AWS_* variables: making one takes a fifth of a second.
_clients: dict[tuple[int, int, RetryPolicy], Any] = {}


class S3Store(RemoteStore):
    """See `ObjectStore`. Raises StoreError when access is denied, the bucket is missing, or the
    service still fails after the last retry.

    `put_new` has one winner. When the winner's own answer is lost and it asks again, it is told
    False like the losers: whoever gets False must look at what stands, not at who wrote it.
    """

    def put_new(self, key: str, data: Data) -> bool:
        self._check_size(key, data)
        return super().put_new(key, data)

    def put(self, key: str, data: Data) -> None:
        self._check_size(key, data)
        super().put(key, data)

    def list(self, prefix: str) -> list[str]:
        start = self._folder(prefix)
        found = set()
        for page in self._pages(prefix, start, Delimiter="/"):
            found |= {entry["Key"] for entry in page.get("Contents", [])}
            found |= {entry["Prefix"] for entry in page.get("CommonPrefixes", [])}
        return sorted({key.removeprefix(start).rstrip("/") for key in found} - {""})

    def keys(self, prefix: str = "") -> Iterator[str]:
        root = self._folder("")
        for page in self._pages(prefix, self._folder(prefix)):
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # a marker of an empty folder
                    yield entry["Key"].removeprefix(root)

    def _connect(self) -> Any:
        identity = hash(tuple(sorted(item for item in os.environ.items() if item[0][:4] == "AWS_")))
        name = (os.getpid(), identity, self._retry)
        if name not in _clients:
            _clients[name] = _new_client(self._retry)
        return _clients[name]

    def _meaning(self, error: Exception, verb: str, key: str) -> Exception:
        what = f"{verb} {self.url}/{key}"
        answer = passing_answer(error)
        if answer is not None:
            return Passing(answer)
        status, code = answer_of(error)
        told = " ".join(str(part) for part in (status, code) if part) or type(error).__name__
        if code == "NoSuchBucket" or (status == 404 and verb not in ("GET", "HEAD")):
            return StoreError(
                f"{what}: there is no such bucket: buckets are never made here; make it first, or "
                "check the URL and AWS_ENDPOINT_URL"
            )
        if status == 404 or isinstance(error, FileNotFoundError):
            return MissingError(f"no object {self.url}/{key}")
        if status in (401, 403) or code in _DENIED_CODES or "Credential" in type(error).__name__:
            return StoreError(f"{what}: access denied ({told}): {_ACCESS_ADVICE}")
        if status in (301, 307) or code in _REGION_CODES:
            return StoreError(f"{what}: the bucket is in another region: set AWS_REGION")
        if status is not None:
            return StoreError(f"{what}: refused ({told}): check the URL")
        if "BotoCoreError" in {kind.__name__ for kind in type(error).__mro__}:
            return StoreError(f"{what}: not asked ({told}): check the URL and the AWS_ variables")
        return error

    def _check_size(self, key: str, data: Data) -> None:
        num_bytes = memoryview(data).nbytes
        if num_bytes > MAX_OBJECT_BYTES:
            raise ConfigError(
                f"{self.url}/{key} would have {num_bytes} bytes, one upload takes at most "
                f"{MAX_OBJECT_BYTES}: choose a smaller --shard-rows"
            )

    def _place(self, key: str) -> dict[str, str]:
        bucket, name, _ = self._fs.split_path(self._path(key))
        return {"Bucket": bucket, "Key": name}

    def _folder(self, prefix: str) -> str:
        name = self._place(prefix)["Key"].strip("/")
        return f"{name}/" if name else ""

    def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of a coroutine that runs on the client's own thread."""
        from fsspec.asyn import sync

        result: T = sync(self._fs.loop, work)
        return result

    def _call(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        limit = self._retry.answer_seconds(len(arguments.get("Body", b"")))

        async def work() -> dict[str, Any]:
            async with asyncio.timeout(limit):
                answer: dict[str, Any] = await self._fs._call_s3(method, **arguments)
                return answer

        return self._run(work)

    def _pages(self, prefix: str, start: str, **arguments: str) -> Iterator[dict[str, Any]]:
        bucket = self._place(prefix)["Bucket"]
        more: dict[str, str] = {}
        while True:
            given = {"Bucket": bucket, "Prefix": start, **arguments, **more}
            page = self._ask("LIST", prefix, partial(self._page, given))
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, given: Mapping[str, str], attempt: int) -> dict[str, Any]:
        return self._call("list_objects_v2", given)

    def _get(self, key: str, take: Callable[[Any, int], Awaitable[T]], **arguments: str) -> T:
        """One GET: `take(body, length)` reads the body, within the time its length allows."""
        place = self._place(key)

        async def work() -> T:
            async with asyncio.timeout(self._retry.answer_seconds(0)) as limit:
                answer = await self._fs._call_s3("get_object", **place, **arguments)
                length = int(answer["ContentLength"])
                now = asyncio.get_running_loop().time()
                limit.reschedule(now + self._retry.answer_seconds(length))
                try:
                    return await take(answer["Body"], length)
                finally:
                    answer["Body"].close()

        return self._run(work)

    def _read(self, key: str) -> bytes:
        return self._get(key, _whole)

    def _read_into(self, key: str, buffer: memoryview) -> int:
        return self._get(key, partial(_fill, buffer))

    def _read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        data = self._get_range(key, start, num_bytes, _whole)
        if data is None:
            return b""
        if len(data) > num_bytes:
            raise self._not_a_range(key)
        return data

    def _read_range_into(self, key: str, start: int, buffer: memoryview) -> int:
        count = self._get_range(key, start, len(buffer), partial(_fill, buffer))
        if count is None:
            return 0
        if count > len(buffer):
            raise self._not_a_range(key)
        return count

    def _get_range(
        self, key: str, start: int, num_bytes: int, take: Callable[[Any, int], Awaitable[T]]
    ) -> T | None:
        """One GET of a range; None where the object ends before it."""
        try:
            return self._get(key, take, Range=f"bytes={start}-{start + num_bytes - 1}")
        except OSError as error:
            if answer_of(error)[0] != 416:
                raise
            return None

    def _not_a_range(self, key: str) -> DamagedError:
        return DamagedError(f"{self.url}/{key}: the server gives whole objects, not ranges")

    def _size(self, key: str) -> int:
        return int(self._call("head_object", self._place(key))["ContentLength"])

    def _write(self, key: str, body: bytes, exclusive: bool) -> None:
        condition = {"IfNoneMatch": "*"} if exclusive else {}
        self._call("put_object", {**self._place(key), "Body": body, **condition})

    def _remove(self, key: str) -> None:
        self._call("delete_object", self._place(key))


async def _fill(buffer: memoryview, body: Any, length: int) -> int:
    """Fills `buffer` from a body of `length` bytes; returns them, at most len(buffer) + 1."""
    room, count = min(length, len(buffer)), 0
    while count < room:
        piece = await body.read(min(room - count, _PIECE_BYTES))
        if not piece:
            raise Passing(f"{count} bytes of {length}")
        buffer[count : count + len(piece)] = piece
        count += len(piece)
    return min(length, len(buffer) + 1)


async def _whole(body: Any, length: int) -> bytes:
    data: bytes = await body.read()
    if len(data) != length:
        raise Passing(f"{len(data)} bytes of {length}")
    return data


def _new_client(retry: RetryPolicy) -> Any:
    import s3fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        refuse_credentials(endpoint)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # At DEBUG these print headers, and a session token is one of them.
    for library in ("botocore", "aiobotocore"):
        logger = logging.getLogger(library)
        logger.setLevel(max(logger.level, logging.INFO))
    client = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": retry.connect_seconds,
            "read_timeout": retry.silence_seconds,
            "max_pool_connections": _MAX_CONNECTIONS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Few services outside AWS give each bucket a host name.
            **({"s3": {"addressing_style": "path"}} if endpoint else {}),
        },
    )
    client.retries = 1
    return client
