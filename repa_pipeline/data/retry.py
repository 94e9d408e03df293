"""When a store is asked again: exponential backoff with jitter, attempts and time limited.

Answers that may pass (500, 502, 503, 504, 429, SlowDown, timeouts, resets, truncated bodies) become
`Passing` and are asked again; everything else ends at once. Errors are told apart by HTTP status,
code and class name, so that no client library is imported here.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from repa_pipeline.errors import ConfigError, StoreError

ATTEMPTS = 10
DEADLINE_SECONDS = 300.0
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 20.0
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
READING_SILENCE_SECONDS = 10.0
# One answer takes at most SILENCE_SECONDS and a second for each of these.
SLOWEST_BYTES_PER_SECOND = 2**20

_QUIET_ATTEMPTS = 2
_PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504}
# Those that S3 answers with 400 speak of a body that was damaged or stopped on its way.
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
# Classes of builtins, aiohttp, botocore and fsspec, by the names in an error's ancestry.
_PASSING_CLASSES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
    "TimeoutError",
}
_SYSTEM_RANDOM = random.SystemRandom()  # training's own random numbers are not touched
_log = logging.getLogger(__name__)


class Passing(Exception):
    """An answer that may be another one next time; `str()` says what it was."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a store is asked; seconds.

    `RetryPolicy.from_environment()` takes REPA_STORE_ATTEMPTS, REPA_STORE_DEADLINE_SECONDS,
    REPA_STORE_SILENCE_SECONDS and so on: one variable a field.
    """

    attempts: int = ATTEMPTS
    deadline_seconds: float = DEADLINE_SECONDS  # no new attempt begins after it
    first_delay_seconds: float = FIRST_DELAY_SECONDS
    longest_delay_seconds: float = LONGEST_DELAY_SECONDS
    connect_seconds: float = CONNECT_SECONDS
    silence_seconds: float = SILENCE_SECONDS  # without a byte from the server

    @classmethod
    def from_environment(cls, **defaults: float) -> RetryPolicy:
        """The defaults, changed by REPA_STORE_*; raises ConfigError for what is no number > 0."""
        given: dict[str, Any] = dict(defaults)
        for field in fields(cls):
            name = f"REPA_STORE_{field.name.upper()}"
            text = os.environ.get(name)
            if text is None:
                continue
            try:
                value = int(text) if field.name == "attempts" else float(text)
            except ValueError:
                value = 0
            if not value > 0:
                raise ConfigError(f"{name} is {text!r}, expected a number above 0")
            given[field.name] = value
        return cls(**given)

    @classmethod
    def for_training(cls) -> RetryPolicy:
        """A range that says nothing for READING_SILENCE_SECONDS is asked for anew: steps wait."""
        return cls.from_environment(silence_seconds=READING_SILENCE_SECONDS)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after attempt 1, 2, ...: half to all of a doubling, limited step."""
        step = self.first_delay_seconds * 2.0 ** min(attempt - 1, 60)
        return min(step, self.longest_delay_seconds) * _SYSTEM_RANDOM.uniform(0.5, 1.0)

    def answer_seconds(self, num_bytes: int) -> float:
        """Seconds that one whole answer or upload of `num_bytes` may take."""
        return self.silence_seconds + num_bytes / SLOWEST_BYTES_PER_SECOND


T = TypeVar("T")


def ask(policy: RetryPolicy, what: str, attempt: Callable[[int], T]) -> T:
    """`attempt(1)`, and after each `Passing` it raises `attempt(2)`, ... until one returns.

    `what` names the request in messages ("GET s3://bucket/key"). Raises StoreError when attempts
    or time end.
    """
    start = time.monotonic()
    number = 0
    while True:
        number += 1
        try:
            return attempt(number)
        except Passing as passing:
            last = passing
        delay = policy.delay(number)
        spent = time.monotonic() - start
        if number >= policy.attempts or spent + delay > policy.deadline_seconds:
            raise StoreError(
                f"{what}: tried {number} times in {spent:.0f} s, the last answer was: {last}; "
                "check the store and the network (for S3, AWS_ENDPOINT_URL too), then run the "
                "same command again: what is done is kept"
            ) from last
        level = logging.INFO if number <= _QUIET_ATTEMPTS else logging.WARNING
        _log.log(level, "%s: %s; attempt %d follows in %.1f s", what, last, number + 1, delay)
        time.sleep(delay)


def passing_answer(error: BaseException) -> str | None:
    """What a passing error is, in words without anything secret; None for every other error."""
    status, code = answer_of(error)
    if status in _PASSING_STATUSES or code in _PASSING_CODES:
        return " ".join(str(part) for part in (status, code) if part)
    if status is not None:
        return None
    if {kind.__name__ for kind in type(error).__mro__} & _PASSING_CLASSES:
        return f"no whole answer ({type(error).__name__})"
    return None


def answer_of(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and error code of the server's answer behind an error; (None, "") without one."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            if code.isdigit():  # an answer to HEAD has no body that could name an error
                status, code = status or int(code), ""
            return status, code
    status = getattr(error, "status", None)
    return (status if isinstance(status, int) else None), ""
