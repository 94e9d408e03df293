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
import pwd
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

_SERVERS = ("account", "container", "object", "proxy")
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
_RINGS = """
import json, sys
from swift.common.ring import RingBuilder
folder, ports = sys.argv[1], json.loads(sys.argv[2])
for name in ("account", "container", "object"):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": ports[name],
        "device": "d1", "weight": 1.0, "meta": "", "replication_ip": "127.0.0.1",
        "replication_port": ports[name]})
    builder.rebalance(seed="1")
    builder.get_ring().save(f"{folder}/{name}.ring.gz")
"""
# Data must outlive a killed process, not a power cut: each fsync would cost some 10 ms.
_SITE_CODE = """
import os
os.fsync = os.fdatasync = lambda descriptor: None
"""
# What the proxy server loads beside Swift's own filters: see above; and a cache in its memory, for
# without one it asks account and container servers each time, three times the work of a request.
_FILTER_CODE = """
import json, tempfile, time, weakref
from eventlet.semaphore import Semaphore

class Once:
    def __init__(self, app):
        self.app, self.locks = app, weakref.WeakValueDictionary()

    def __call__(self, env, start_response):
        if env["REQUEST_METHOD"] != "PUT" or env.get("HTTP_IF_NONE_MATCH") != "*":
            return self.app(env, start_response)
        left = int(env.get("CONTENT_LENGTH") or 0)
        body = tempfile.SpooledTemporaryFile(16 * 2**20)
        while left:
            piece = env["wsgi.input"].read(min(left, 2**20))
            if not piece:
                start_response("400 Bad Request", [("Content-Length", "0")])
                return [b""]
            body.write(piece)
            left -= len(piece)
        body.seek(0)
        env["wsgi.input"] = body
        env.pop("HTTP_EXPECT", None)
        lock = self.locks.setdefault(env["PATH_INFO"], Semaphore(1))
        with lock, body:
            return [b"".join(self.app(env, start_response))]

class Cache:
    def __init__(self, app):
        self.app, self.values = app, {}

    def __call__(self, env, start_response):
        env["swift.cache"] = self
        return self.app(env, start_response)

    def get(self, key, raise_on_error=False):
        text, end = self.values.get(key, ("null", 0))
        return json.loads(text) if time.time() < end else None

    def set(self, key, value, serialize=True, time=0, min_compress_len=0, raise_on_error=False):
        self.values[key] = json.dumps(value), now() + (time or 3600)

    def incr(self, key, delta=1, time=0):
        self.set(key, max(0, (self.get(key) or 0) + delta), time=time)
        return self.get(key)

    def decr(self, key, delta=1, time=0):
        return self.incr(key, -delta, time)

    def delete(self, key, server_key=None):
        self.values.pop(key, None)

now = time.time

def once(global_conf, **local_conf):
    return Once

def cache(global_conf, **local_conf):
    return Cache
"""
_HASHES = """[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests
"""
_COMMON = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
bind_timeout = 1
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}
mount_check = false
fallocate_reserve = 0
log_level = ERROR
"""
_STORAGE = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
disk_chunk_size = 1048576
network_chunk_size = 1048576
"""
_FILTERS = "listing_formats s3api tempauth copy symlink bulk slo dlo versioned_writes".split()
_PROXY = """
[pipeline:main]
pipeline = catch_errors cache {once} {filters} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
object_chunk_size = 1048576
client_chunk_size = 1048576
error_suppression_limit = 1000000
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
paste.filter_factory = repa_filters:cache
[filter:once]
paste.filter_factory = repa_filters:once
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
                    env={
                        **os.environ,
                        "PYTHONWARNINGS": "ignore",
                        "PYTHONPATH": str(self._folder),
                    },
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
        self._ports = dict(zip(_SERVERS, _free_ports(len(_SERVERS)), strict=True))
        (self._folder / "d1").mkdir(exist_ok=True)
        (self._folder / "swift.conf").write_text(_HASHES)
        (self._folder / "sitecustomize.py").write_text(_SITE_CODE)
        (self._folder / "repa_filters.py").write_text(_FILTER_CODE)
        user = pwd.getpwuid(os.geteuid()).pw_name
        for name, port in self._ports.items():
            common = _COMMON.format(port=port, user=user, folder=self._folder)
            rest = self._proxy_settings() if name == "proxy" else _STORAGE.format(name=name)
            path = self._folder / f"{name}.conf"
            path.touch(mode=0o600)
            path.write_text(common + rest)
        self._make_rings()

    def _proxy_settings(self) -> str:
        text = _PROXY.format(filters=" ".join(_FILTERS), once="once" if self._exclusive else "")
        text += "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in _FILTERS)
        account, user = self.access_key.split(":")
        s3api = f"location = {self.region}\nmax_bucket_listing = {self._page_keys}\n"
        text = text.replace("egg:swift#s3api\n", f"egg:swift#s3api\n{s3api}")
        login = f"user_{account}_{user} = {self.secret_key} .admin\n"
        return text.replace("egg:swift#tempauth\n", f"egg:swift#tempauth\n{login}")

    def _make_rings(self) -> None:
        ports = json.dumps(self._ports)
        command = [str(self._bin / "python"), "-c", _RINGS, str(self._folder), ports]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise StageError(f"no rings for the S3 server: {made.stderr[-500:]}")

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
