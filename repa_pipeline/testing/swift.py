"""A real S3 server on this machine: OpenStack Swift with its s3api, without root.

    with SwiftServer(venv=".venv-s3") as server:
        server.create_bucket("tests")
        os.environ.update(server.environment())

`make s3` makes the virtual environment (swift from PyPI, constraints-s3.txt). One device, one
replica, four processes on free loopback ports: account, container, object and proxy server. They
check signatures and checksums, keep multipart uploads and survive a restart. They end with this
process, however it ends: a shell that owns them waits on a pipe from it.

Swift itself looks for an object when a conditional PUT begins, not when it ends, so that of 16
racers two may be told that they created it. S3 promises one, the first that ends. A filter in front
gives that: it takes the whole body first, then lets conditional PUTs of a key in one by one.
`SwiftServer(..., exclusive=False)` is Swift as it comes. `page_keys` is how many keys a page of a
listing has, 1000 at AWS.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from repa_pipeline.errors import MissingError, StageError
from repa_pipeline.testing.swift_settings import RINGS, SERVERS, Settings, write_settings

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_ATTEMPTS = 3

# A file system in memory is taken with this much room: a test writes thousands of small files.
_MEMORY_FOLDER, _MEMORY_BYTES = "/dev/shm", 4 * 2**30

# The shell outlives a SIGKILL of its parent: its `read` ends then, and it ends the servers by pid,
# and removes the folder unless told to keep it (by a word, or because it is the user's).
_SUPERVISOR = """
for s in account container object proxy; do
    "$1/python" "$1/swift-$s-server" "$2/$s.conf" &
    pids="$pids $!"
done
read keep
kill $pids
wait
[ "$keep$3" ] || rm -rf "$2"
"""


class SwiftServer:
    """Starts on `with` (or `start`), and stops at its end; `start` after `stop` keeps the data.

    `folder` holds data, settings and log, and is kept; without one a temporary folder on a file
    system with user extended attributes is taken and removed in the end.
    Raises MissingError without the virtual environment, StageError when no server comes up or no
    file system will do.
    """

    def __init__(
        self,
        venv: str | Path,
        folder: str | Path | None = None,
        *,
        exclusive: bool = True,
        page_keys: int = 1000,
    ):
        self.venv = Path(venv).absolute()
        self._bin = self.venv / "bin"
        if not (self._bin / "swift-proxy-server").is_file():
            raise MissingError(f"no OpenStack Swift in {venv}: run `make s3`, which installs it")
        self._exclusive = exclusive
        self._page_keys = page_keys
        self._given = None if folder is None else Path(folder).absolute()
        self._folder = self._given or Path()
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self.access_key = "test:tester"
        self.secret_key = secrets.token_hex(16)
        self.region = "us-east-1"

    @property
    def folder(self) -> Path:
        """Where data, settings and server.log are; known once it has started."""
        return self._folder

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['proxy']}"

    def environment(self) -> dict[str, str]:
        """The variables with which any S3 client finds this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> SwiftServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(keep=False)

    def start(self) -> None:
        """Starts the four processes and waits until each answers."""
        given = "" if self._given is None else "keep"
        for attempt in range(_ATTEMPTS):
            if not self._ports:
                self._write_settings()
            log = self._folder / "server.log"
            with open(log, "wb") as output:
                self._supervisor = subprocess.Popen(
                    ["sh", "-c", _SUPERVISOR, "swift", str(self._bin), str(self._folder), given],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=self._server_environment(),
                )
            if all(self._answers(port) for port in self._ports.values()):
                return
            self.stop()
            tail = " ".join(log.read_text(errors="replace").split()[-40:])
            if "Could not bind" not in tail or attempt == _ATTEMPTS - 1:
                break
            self._ports = {}  # another process took a port between our look and the bind
        raise StageError(f"the S3 server does not start, its log {log} ends with: {tail}")

    def stop(self, *, keep: bool = True) -> None:
        """Ends the four processes; without `keep` a temporary folder goes too."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None or supervisor.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.write(b"keep\n" if keep else b"\n")
            supervisor.stdin.close()
        try:
            supervisor.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            supervisor.kill()
            raise StageError(f"the S3 server in {self._folder} does not stop") from error

    def create_bucket(self, name: str) -> None:
        self._call("create_bucket", Bucket=name)

    def multipart_uploads(self, bucket: str) -> list[str]:
        """Keys of uploads that were started and neither completed nor aborted."""
        answer = self._call("list_multipart_uploads", Bucket=bucket)
        return [upload["Key"] for upload in answer.get("Uploads", [])]

    def objects(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Bytes of every object by key, read page by page from the server."""
        found: dict[str, int] = {}
        more: dict[str, str] = {}
        while True:
            answer = self._call("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            found.update({entry["Key"]: entry["Size"] for entry in answer.get("Contents", [])})
            if not answer.get("IsTruncated"):
                return found
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        import s3fs

        client = s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": self.region},
            config_kwargs={"s3": {"addressing_style": "path"}},
            use_listings_cache=False,
        )
        answer: dict[str, Any] = client.call_s3(method, **arguments)
        return answer

    def _write_settings(self) -> None:
        self._folder = _folder_with_attributes(self._given)
        self._ports = dict(zip(SERVERS, _free_ports(len(SERVERS)), strict=True))
        settings = Settings(
            self._ports,
            self.access_key,
            self.secret_key,
            self.region,
            self._page_keys,
            self._exclusive,
        )
        write_settings(self._folder, settings)
        made = subprocess.run(
            [str(self._bin / "python"), "-c", RINGS, str(self._folder), json.dumps(self._ports)],
            capture_output=True,
            text=True,
            env=self._server_environment(),
        )
        if made.returncode:
            raise StageError(f"no rings for the S3 server: {made.stderr[-500:]}")

    def _server_environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self._folder),
            "PYTHONWARNINGS": "ignore",
            "EVENTLET_NO_GREENDNS": "yes",  # its import takes as long as all the rest
        }

    def _answers(self, port: int) -> bool:
        """Waits for any HTTP answer; False when the server or its shell has gone instead."""
        deadline = time.monotonic() + _START_SECONDS
        assert self._supervisor is not None
        while time.monotonic() < deadline and self._supervisor.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_START_SECONDS)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/")
                connection.getresponse().read()
                return True
            connection.close()
            if "Could not bind" in (self._folder / "server.log").read_text(errors="replace"):
                return False
            time.sleep(0.02)
        return False


def _folder_with_attributes(given: Path | None) -> Path:
    """The given folder, or a new temporary one, where files may carry user attributes."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        parents = [str(given)]
    else:
        parents = [tempfile.gettempdir(), "/var/tmp", os.getcwd()]
        with contextlib.suppress(OSError):
            if shutil.disk_usage(_MEMORY_FOLDER).free >= _MEMORY_BYTES:
                parents = [_MEMORY_FOLDER, *parents]
    for parent in parents:
        if _takes_attributes(parent):
            return given or Path(tempfile.mkdtemp(prefix="repa-swift-", dir=parent))
    raise StageError(
        f"no file system with user extended attributes at {', '.join(parents)}: give the S3 server "
        "a folder on ext4, xfs or btrfs"
    )


def _takes_attributes(folder: str) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            os.setxattr(probe.name, "user.repa.probe", b"1")
    except OSError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    """Loopback ports that are free now: bound all at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
