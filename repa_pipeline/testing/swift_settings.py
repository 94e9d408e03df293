"""The files with which Swift's four servers start: see swift.py."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SERVERS = ("account", "container", "object", "proxy")

RINGS = """
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


@dataclass(frozen=True)
class Settings:
    """What differs from server to server; ports by the names in SERVERS."""

    ports: Mapping[str, int]
    access_key: str  # ACCOUNT:USER
    secret_key: str
    region: str
    page_keys: int
    exclusive: bool


def write_settings(folder: Path, settings: Settings) -> None:
    """Writes everything but the rings, which need Swift's own code (RINGS)."""
    (folder / "d1").mkdir(exist_ok=True)
    (folder / "swift.conf").write_text(_HASHES)
    (folder / "sitecustomize.py").write_text(_SITE_CODE)
    (folder / "repa_filters.py").write_text(_FILTER_CODE)
    user = pwd.getpwuid(os.geteuid()).pw_name
    for name, port in settings.ports.items():
        common = _COMMON.format(port=port, user=user, folder=folder)
        rest = _proxy(settings) if name == "proxy" else _STORAGE.format(name=name)
        path = folder / f"{name}.conf"
        path.touch(mode=0o600)
        path.write_text(common + rest)


def _proxy(settings: Settings) -> str:
    account, user = settings.access_key.split(":")
    own = {
        "s3api": f"location = {settings.region}\nmax_bucket_listing = {settings.page_keys}\n",
        "tempauth": f"user_{account}_{user} = {settings.secret_key} .admin\n",
    }
    text = _PROXY.format(filters=" ".join(_FILTERS), once="once" if settings.exclusive else "")
    for name in _FILTERS:
        text += f"[filter:{name}]\nuse = egg:swift#{name}\n{own.get(name, '')}"
    return text
