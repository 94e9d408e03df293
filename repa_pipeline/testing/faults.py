"""An HTTP proxy on loopback that does to requests what bad days do: for S3 servers under test.

    with FaultProxy(server.endpoint) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        proxy.script = Script(Rule(slow_down(), method="GET", times=3))
        ...
        assert proxy.exchanges[0].fault == "503 SlowDown"

It hands the Host header on, so that signatures stay valid. A script is asked once a request, in the
order in which requests come; `Chance` decides by (seed, method, path, how often asked) instead, so
that a run with threads meets the same faults each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from repa_pipeline.data.retry import RetryPolicy

# For stores behind the proxy: asked again at once.
QUICK = RetryPolicy(
    attempts=6, first_delay_seconds=0.01, longest_delay_seconds=0.05, silence_seconds=30.0
)
_PIECE_BYTES = 64 * 1024
_PIECES_PER_SECOND = 20
# A receive window of less than a few segments of the loopback interface (64 KiB) stalls: the sender
# then waits for timers of 200 ms and more.
_RECEIVE_BYTES = 4 * _PIECE_BYTES
_HOP_HEADERS = {"connection", "expect", "transfer-encoding", "content-length", "keep-alive"}
_ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'


@dataclass(frozen=True)
class Fault:
    """What happens to one request; made by the functions below."""

    name: str
    status: int = 0  # answered without asking the server
    code: str = ""
    seconds: float = 0.0  # waited before the request is handed on
    bytes_per_second: float = 0.0
    share: float = 1.0  # of the answer's body that is sent before the connection ends
    is_reset: bool = False  # the connection ends by RST, not FIN
    reaches_server: bool = True


def server_error(status: int = 500, code: str = "InternalError") -> Fault:
    return Fault(f"{status} {code}", status=status, code=code, reaches_server=False)


def slow_down() -> Fault:
    return server_error(503, "SlowDown")


def delay(seconds: float) -> Fault:
    return Fault("delay", seconds=seconds)


def throttle(bytes_per_second: float) -> Fault:
    """Bodies pass at this rate, up and down."""
    return Fault("throttle", bytes_per_second=bytes_per_second)


def truncate(share: float = 0.5) -> Fault:
    """The answer names its full length and ends early."""
    return Fault("truncate", share=share)


def reset() -> Fault:
    """The connection is reset before the server hears of the request."""
    return Fault("reset", is_reset=True, reaches_server=False)


def lost_answer() -> Fault:
    """The server does what is asked, and the connection is reset in place of its answer."""
    return Fault("lost answer", is_reset=True, share=0.0)


@dataclass
class Exchange:
    """One request as the proxy saw it; `status` 0 when no answer was given."""

    method: str
    path: str
    fault: str
    status: int = 0
    body_bytes: int = 0  # of the request, so far


@dataclass
class Rule:
    """`fault` for `times` requests of `method` (any by default) whose path holds `path`.

    The first `after` of them pass; `times` None means all that follow.
    """

    fault: Fault
    method: str = ""
    path: str = ""
    times: int | None = 1
    after: int = 0
    _seen: int = field(default=0, repr=False)

    def take(self, method: str, path: str) -> bool:
        if (self.method and method != self.method) or self.path not in path:
            return False
        self._seen += 1
        number = self._seen - self.after
        return number > 0 and (self.times is None or number <= self.times)


class Script:
    """The fault of the first rule that takes the request; none when no rule does."""

    def __init__(self, *rules: Rule):
        self._rules = rules

    def __call__(self, method: str, path: str) -> Fault | None:
        return next((rule.fault for rule in self._rules if rule.take(method, path)), None)


class Chance:
    """Each request meets, with probability `share`, one of `faults`; equal seeds, equal fates.

    A request that was asked `limit` times passes, so that retries have an end.
    """

    def __init__(self, seed: int, share: float, faults: Sequence[Fault], limit: int = 4):
        self._seed, self._share, self._faults, self._limit = seed, share, faults, limit
        self._asked: Counter[tuple[str, str]] = Counter()

    def __call__(self, method: str, path: str) -> Fault | None:
        self._asked[method, path] += 1
        number = self._asked[method, path]
        if number > self._limit:
            return None
        text = f"{self._seed} {method} {path} {number}"
        digest = hashlib.sha256(text.encode()).digest()
        if int.from_bytes(digest[:8], "little") / 2**64 >= self._share:
            return None
        return self._faults[int.from_bytes(digest[8:16], "little") % len(self._faults)]


class FaultProxy:
    """Runs on `with`; `endpoint` stands for the server's. `script` may be set at any time."""

    def __init__(
        self, endpoint: str, script: Callable[[str, str], Fault | None] | None = None
    ) -> None:
        parts = urlsplit(endpoint)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.script = script or Script()
        self.exchanges: list[Exchange] = []
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all connections; the endpoint refuses new ones from now on."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.end_connections()

    def begin(self, method: str, path: str) -> tuple[Exchange, Fault]:
        """Notes a request and decides its fate."""
        with self._lock:
            fault = self.script(method, path)
            exchange = Exchange(method, path, fault.name if fault else "")
            self.exchanges.append(exchange)
        return exchange, fault or Fault("")

    def faults(self) -> Counter[str]:
        """How often each fault was met so far."""
        with self._lock:
            return Counter(exchange.fault for exchange in self.exchanges if exchange.fault)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy):
        self.proxy = proxy
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        # What the kernel would take of an upload before we slow it down stays small.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        self.server_bind()
        self.server_activate()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().close_request(request)

    def end_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _exchange(self) -> None:
        exchange, fault = self.server.proxy.begin(self.command, self.path)
        self.server.proxy.stopping.wait(fault.seconds)
        if not fault.reaches_server:
            if fault.is_reset:
                return self._end(fault)
            for _ in self._request_body(exchange, fault):
                pass
            exchange.status = fault.status
            return self._answer(fault.status, [], _ERROR.format(code=fault.code).encode(), fault)
        with contextlib.closing(self._forward(exchange, fault)) as upstream:
            response = upstream.getresponse()
            body = response.read()
            if fault.is_reset:
                return self._end(fault)
            exchange.status = response.status
            headers = [h for h in response.getheaders() if h[0].lower() not in _HOP_HEADERS]
            if self.command == "HEAD" and response.getheader("Content-Length"):
                headers.append(("Content-Length", response.getheader("Content-Length", "")))
            self._answer(response.status, headers, body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _exchange

    def _request_body(self, exchange: Exchange, fault: Fault) -> Any:
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, _piece_bytes(fault)))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            exchange.body_bytes += len(piece)
            _pace(len(piece), fault)
            yield piece

    def _forward(self, exchange: Exchange, fault: Fault) -> http.client.HTTPConnection:
        """Sends the request on as it came; an early answer may end the sending."""
        upstream = http.client.HTTPConnection(*self.server.proxy.upstream)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_HEADERS or name.lower() == "content-length":
                    upstream.putheader(name, value)
            upstream.endheaders()
            is_sending = True
            for piece in self._request_body(exchange, fault):
                if is_sending:
                    try:
                        upstream.send(piece)
                    except ConnectionError:
                        is_sending = False  # it has answered without the rest
        except BaseException:
            upstream.close()
            raise
        return upstream

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command == "HEAD" or status in (204, 304):
            body = b""
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        view = memoryview(body)[: int(len(body) * fault.share)]
        for start in range(0, len(view), _piece_bytes(fault)):
            piece = view[start : start + _piece_bytes(fault)]
            _pace(len(piece), fault)
            self.wfile.write(piece)
        if fault.share < 1.0:
            self._end(fault)

    def _end(self, fault: Fault) -> None:
        """Ends the connection; without waiting for what is under way, so that RST is sent."""
        self.close_connection = True
        if fault.is_reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            # The rest of the library would end the connection politely first.
            self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed: see `FaultProxy.exchanges`."""


def _piece_bytes(fault: Fault) -> int:
    if not fault.bytes_per_second:
        return _PIECE_BYTES
    return max(1, min(_PIECE_BYTES, int(fault.bytes_per_second / _PIECES_PER_SECOND)))


def _pace(num_bytes: int, fault: Fault) -> None:
    if fault.bytes_per_second:
        time.sleep(num_bytes / fault.bytes_per_second)
