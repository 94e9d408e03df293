"""Sources behind URLs: few requests, right bytes from bad servers, one clear line at the end."""

from __future__ import annotations

import gzip
import http.server
import io
import random
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from repa_pipeline.data.coalesce import count_gets
from repa_pipeline.data.files import Files
from repa_pipeline.data.remote import MAX_TRIES, RangeFile, in_parallel, open_filesystem, retried
from repa_pipeline.data.source import Item, Source, open_source
from repa_pipeline.data.tarscan import scan_tar
from repa_pipeline.errors import ConfigError, DamagedError, DataError, MissingError, StoreError
from repa_pipeline.testing import faults
from repa_pipeline.testing.swift import SwiftServer


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def samples(first: int, count: int, size: int = 700) -> dict[str, bytes]:
    members = {}
    for number in range(first, first + count):
        members[f"s{number:03d}.jpg"] = random.Random(number).randbytes(size + 10 * number)
        members[f"s{number:03d}.cls"] = str(number % 3).encode()
    return members


class Server:
    """An HTTP server on loopback with byte ranges; `fault` may answer a GET in its own way."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.gets: list[tuple[str, str]] = []
        self.num_bytes = 0
        self.has_ranges = True
        self.fault: Callable[[int, http.server.BaseHTTPRequestHandler], bool] = lambda i, h: False
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                outer.head(self)

            def do_GET(self) -> None:
                outer.get(self)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def head(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        data = self.files.get(handler.path)
        handler.send_response(404 if data is None else 200)
        handler.send_header("Content-Length", str(len(data or b"")))
        handler.end_headers()

    def get(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        with self._lock:
            number = len(self.gets)
            self.gets.append((handler.path, handler.headers.get("Range", "")))
        if self.fault(number, handler):
            return
        data = self.files.get(handler.path)
        if data is None:
            handler.send_error(404)
            return
        status, body = self.part(data, handler.headers.get("Range"))
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        if handler.path.endswith("/"):
            handler.send_header("Content-Type", "text/html")
        handler.end_headers()
        handler.wfile.write(body)
        with self._lock:
            self.num_bytes += len(body)

    def part(self, data: bytes, wanted: str | None) -> tuple[int, bytes]:
        if not wanted or not self.has_ranges:
            return 200, data
        first, last = wanted.removeprefix("bytes=").split("-")
        if int(first) >= len(data):
            return 416, b""
        return 206, data[int(first) : int(last) + 1]


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPA_STORE_FIRST_DELAY_SECONDS", "0.001")


@pytest.fixture
def memory() -> Iterator[str]:
    """A root on fsspec's memory file system, emptied afterwards."""
    yield "memory://test-remote"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/test-remote"):
        filesystem.rm("/test-remote", recursive=True)


def check_groups(source: Source, items: list[Item], expected: dict[str, bytes]) -> None:
    """Random subsets, read in groups, equal the plain reads and what was packed."""
    draw = random.Random(0)
    for count in (0, 1, 3, len(items), len(items) + 5):
        subset = draw.choices(items, k=count) if count > len(items) else draw.sample(items, count)
        groups = source.groups(subset)
        assert sorted(i for group in groups for i in group) == list(range(count))
        for group in groups:
            chosen = [subset[i] for i in group]
            assert source.read_group(chosen) == [expected[item.key] for item in chosen]
    assert [source.read(item) for item in items] == [expected[item.key] for item in items]


def put(url: str, files: dict[str, bytes]) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    for name, data in files.items():
        filesystem.pipe(f"{root}/{name}", data)


def images_of(members: dict[str, bytes]) -> dict[str, bytes]:
    return {name[:-4]: data for name, data in members.items() if name.endswith(".jpg")}


def test_groups_of_remote_tars_equal_plain_reads(memory: str, tmp_path: Path) -> None:
    members = [samples(0, 6), samples(6, 6), samples(12, 4)]
    packed = [tar_bytes(m) for m in members]
    put(memory, {"a.tar": packed[0], "b.tar": packed[1], "c.tar.gz": gzip.compress(packed[2])})
    source = open_source(memory, scratch_dir=str(tmp_path))
    items = source.items()
    expected = images_of(members[0] | members[1] | members[2])
    assert source.is_remote and len(items) == 16
    check_groups(source, items, expected)
    # Both tars fit into one request each; four rows of the local copy are alone.
    assert [len(group) for group in source.groups(items)] == [6, 6, 1, 1, 1, 1]
    assert count_gets(source, items) == 2 + 1
    assert count_gets(source, items[:12:5]) == 2 and count_gets(source, []) == 0


def test_every_header_of_a_group_is_checked(memory: str) -> None:
    put(memory, {"a.tar": tar_bytes(samples(0, 4))})
    source = open_source(f"{memory}/a.tar")
    items = source.items()
    data = bytearray(tar_bytes(samples(0, 4)))
    data[items[2].offset - 400] ^= 0xFF
    put(memory, {"a.tar": bytes(data)})
    with pytest.raises(DamagedError, match="has no member of 720 bytes"):
        source.read_group(items)
    assert source.read_group(items[:2]) == [source.read(item) for item in items[:2]]
    with pytest.raises(DamagedError, match="no tar member has its data at byte 5"):
        source.groups([Item("k", 0, "a.tar", 5, 10)])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_groups_of_remote_zips_equal_plain_reads(memory: str, method: int) -> None:
    members = {f"c{i % 2}/{i}.jpg": random.Random(i).randbytes(900 + i) for i in range(9)}
    members["c0/flat.png"] = b"x" * 5000
    put(memory, {"set.zip": zip_bytes(members, method)})
    source = open_source(f"{memory}/set.zip")
    items = source.items()
    assert source.class_names == ("c0", "c1") and len(items) == 10
    check_groups(source, items, members)
    assert count_gets(source, items) == 1


def test_groups_of_remote_folders_are_files(memory: str) -> None:
    files = {f"c{i % 2}/{i}.jpg": bytes([i]) * (i + 1) for i in range(5)} | {"c0/empty.png": b""}
    put(memory, files)
    source = open_source(memory)
    check_groups(source, source.items(), files)
    assert count_gets(source, source.items()) == 6


def fetches(data: bytes) -> tuple[RangeFile, list[int]]:
    asked: list[int] = []

    def fetch(start: int, num_bytes: int) -> bytes:
        assert 0 < num_bytes <= len(data) - start
        asked.append(num_bytes)
        return data[start : start + num_bytes]

    return RangeFile(fetch, len(data)), asked


def test_scanning_small_members_takes_few_requests() -> None:
    data = tar_bytes(samples(0, 400, size=9000))
    file, asked = fetches(data)
    assert scan_tar(file, "a.tar") == scan_tar(io.BytesIO(data), "a.tar")
    assert len(asked) <= 8 and sum(asked) <= len(data)


def test_scanning_large_members_skips_their_payload() -> None:
    data = tar_bytes(samples(0, 20, size=2**20))
    file, asked = fetches(data)
    assert scan_tar(file, "a.tar") == scan_tar(io.BytesIO(data), "a.tar")
    assert len(asked) <= 21 and sum(asked) < len(data) // 50


def test_scanning_mixed_members_gives_the_same() -> None:
    members = {}
    for number in range(60):
        size = random.Random(number).choice([0, 10, 3000, 70_000, 400_000, 1_500_000])
        members[f"s{number:02d}.jpg"], members[f"s{number:02d}.cls"] = bytes(size), b"1"
    data = tar_bytes(members)
    file, asked = fetches(data)
    assert scan_tar(file, "a.tar") == scan_tar(io.BytesIO(data), "a.tar")
    assert sum(asked) < len(data) // 2 and len(asked) < 60


def test_range_file_is_a_file() -> None:
    data = random.Random(0).randbytes(300_000)
    file, asked = fetches(data)
    plain = io.BytesIO(data)
    draw = random.Random(1)
    for _ in range(300):
        offset, whence = draw.choice([(draw.randrange(310_000), 0), (-draw.randrange(999), 2)])
        assert file.seek(offset, whence) == plain.seek(offset, whence) == file.tell()
        count = draw.choice([0, 1, 512, 100_000])
        assert file.read(count) == plain.read(count)
    assert file.seek(0) == 0 and file.read() == data
    with pytest.raises(OSError, match="cannot seek"):
        file.seek(-1)
    # A footer is read backwards: the end comes by one request.
    file, asked = fetches(data)
    for offset in (-22, -42, -1000, -60_000):
        file.seek(offset, io.SEEK_END)
        file.read(20)
    assert asked == [65_536]


def test_tars_over_http(server: Server) -> None:
    members = [samples(0, 5), samples(5, 5)]
    server.files = {f"/set/t-{i}.tar": tar_bytes(m) for i, m in enumerate(members)}
    source = open_source(f"{server.url}/set/t-{{0..1}}.tar")
    items = source.items()
    check_groups(source, items, images_of(members[0] | members[1]))
    assert [item.path for item in items] == ["t-0.tar"] * 5 + ["t-1.tar"] * 5
    server.gets.clear()
    assert sum(len(source.read_group([items[i] for i in g])) for g in source.groups(items)) == 10
    assert len(server.gets) == 2 == count_gets(source, items)
    with pytest.raises(MissingError, match="no tar at 'http.*t-7.tar'"):
        open_source(f"{server.url}/set/t-7.tar")


def test_zip_and_gz_and_parquet_over_http(server: Server, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    members = samples(0, 5)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"jpg": [b"one", b"two"], "cls": [1, 0]}), buffer)
    server.files = {
        "/a.tar.gz": gzip.compress(tar_bytes(members)),
        "/a.zip": zip_bytes({"x/1.jpg": b"one", "y/2.jpg": b"two"}),
        "/a.parquet": buffer.getvalue(),
    }
    packed = open_source(f"{server.url}/a.tar.gz", scratch_dir=str(tmp_path))
    check_groups(packed, packed.items(), images_of(members))
    assert count_gets(packed, packed.items()) == 1
    zipped = open_source(f"{server.url}/a.zip")
    check_groups(zipped, zipped.items(), {"x/1.jpg": b"one", "y/2.jpg": b"two"})
    server.gets.clear()
    fresh = open_source(f"{server.url}/a.zip")  # a worker that has listed nothing
    assert fresh.read(zipped.items()[1]) == b"two" and len(server.gets) == 1
    rows = open_source(f"{server.url}/a.parquet", scratch_dir=str(tmp_path))
    check_groups(rows, rows.items(), {"a.parquet/0": b"one", "a.parquet/1": b"two"})


def test_folder_over_http_where_it_lists(server: Server) -> None:
    def page(*names: str) -> bytes:
        return b"".join(f'<a href="{name}">{name}</a>'.encode() for name in names)

    server.files = {
        "/set/": page("?C=N;O=D", "../", "cat/", "dog/"),
        "/set/cat/": page("../", "1.jpg"),
        "/set/dog/": page("2.jpg", "/elsewhere/3.jpg"),
        "/set/cat/1.jpg": b"one",
        "/set/dog/2.jpg": b"two",
    }
    source = open_source(f"{server.url}/set")
    items = source.items()
    assert [(i.key, i.label, i.num_bytes) for i in items] == [
        ("cat/1.jpg", 0, -1),
        ("dog/2.jpg", 1, -1),
    ]
    check_groups(source, items, {"cat/1.jpg": b"one", "dog/2.jpg": b"two"})


def busy(times: int, status: int = 503) -> Callable[..., bool]:
    def fault(number: int, handler: http.server.BaseHTTPRequestHandler) -> bool:
        if number < times:
            handler.send_error(status)
        return number < times

    return fault


def cut_with_length(number: int, handler: http.server.BaseHTTPRequestHandler) -> bool:
    """Every other answer promises more bytes than it sends."""
    if number % 2 == 0:
        handler.send_response(206)
        handler.send_header("Content-Length", "700")
        handler.end_headers()
        handler.wfile.write(b"\0" * 100)
    return number % 2 == 0


def cut_silently(number: int, handler: http.server.BaseHTTPRequestHandler) -> bool:
    """Every other answer ends early without saying so."""
    if number % 2 == 0:
        handler.send_response(206)
        handler.end_headers()
        handler.wfile.write(b"\0" * 100)
    return number % 2 == 0


def reset(number: int, handler: http.server.BaseHTTPRequestHandler) -> bool:
    if number % 3 == 0:
        handler.connection.close()
    return number % 3 == 0


@pytest.mark.parametrize(
    "fault", [busy(2), busy(3, 429), busy(4, 500), cut_with_length, cut_silently, reset]
)
def test_bad_moments_pass(server: Server, fault: Callable[..., bool]) -> None:
    members = samples(0, 5)
    server.files = {"/a.tar": tar_bytes(members)}
    server.fault = fault
    source = open_source(f"{server.url}/a.tar")
    items = source.items()
    server.gets.clear()
    check_groups(source, items, images_of(members))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (busy(10**9), "tried 5 times .* 503"),
        (lambda n, h: cut_silently(0, h), "tried 5 times .* 100 bytes, expected 1212"),
    ],
)
def test_a_server_that_stays_bad_is_one_line(
    server: Server, fault: Callable[..., bool], said: str
) -> None:
    server.files = {"/a.tar": tar_bytes(samples(0, 2))}
    source = open_source(f"{server.url}/a.tar")
    items = source.items()
    server.gets.clear()
    server.fault = fault
    with pytest.raises(StoreError, match=said) as caught:
        source.read(items[0])
    assert "\n" not in str(caught.value) and "a.tar" in str(caught.value)
    assert len(server.gets) == MAX_TRIES
    for use in (source.read_group, lambda chosen: open_source(f"{server.url}/a.tar").items()):
        with pytest.raises(StoreError):
            use(items)


def test_refusals_are_not_repeated(server: Server) -> None:
    server.files = {"/a.tar": tar_bytes(samples(0, 2))}
    source = open_source(f"{server.url}/a.tar")
    items = source.items()
    server.gets.clear()
    server.fault = busy(10**9, 403)
    with pytest.raises(StoreError, match="was refused: .*403.*credentials"):
        source.read(items[0])
    assert len(server.gets) == 1


def test_what_changed_on_the_server_is_damage(server: Server) -> None:
    server.files = {"/a.tar": tar_bytes(samples(0, 3))}
    source = open_source(f"{server.url}/a.tar")
    items = source.items()
    server.files["/a.tar"] = server.files["/a.tar"][:1000]
    with pytest.raises(DamagedError, match="got 1000 bytes of a.tar, expected 1212"):
        source.read(items[0])
    with pytest.raises(DamagedError, match="got 0 bytes of a.tar"):
        source.read(items[1])
    del server.files["/a.tar"]
    with pytest.raises(DamagedError, match="a.tar is gone"):
        source.read_group(items)


def test_a_server_without_ranges_is_said(server: Server) -> None:
    server.files = {"/a.tar": tar_bytes(samples(0, 3))}
    source = open_source(f"{server.url}/a.tar")
    items = source.items()
    server.has_ranges = False
    with pytest.raises(StoreError, match="does not answer byte ranges: got 10240 bytes"):
        source.read(items[0])


def test_nobody_answers() -> None:
    lone = Server()
    lone.close()
    with pytest.raises(StoreError, match="tried 5 times") as caught:
        open_source(f"{lone.url}/a.tar")
    assert "\n" not in str(caught.value)


class CountingFiles(Files):
    """Counts listings; a failing one fails once."""

    def __init__(self, url: str):
        super().__init__(*open_filesystem(url))
        self.listed: list[str] = []

    def entries(self, folder: str = "", *, sizes: bool = True) -> list:  # type: ignore[type-arg]
        self.listed.append(folder)
        return super().entries(folder, sizes=sizes)


def test_one_listing_a_folder(memory: str) -> None:
    from repa_pipeline.data.folder import FolderSource
    from repa_pipeline.data.tree import FolderTree

    names = {
        f"c{i:02d}/{sub}{j}.jpg": b"x" for i in range(20) for j in range(3) for sub in ("", "d/")
    }
    put(memory, names)
    files = CountingFiles(memory)
    source = FolderSource(memory, FolderTree(files))
    assert [item.key for item in source.items()] == sorted(names)
    assert len(files.listed) == len(set(files.listed)) == 1 + 20 + 20
    assert [item.label for item in source.items()][::6] == list(range(20))


def test_parallel_listing_keeps_the_order_and_the_first_error() -> None:
    assert in_parallel(lambda n: n * n, range(100)) == [n * n for n in range(100)]

    def fail(number: int) -> int:
        if number % 10 == 7:
            raise DataError(f"number {number}")
        return number

    with pytest.raises(DataError, match="number 7"):
        in_parallel(fail, range(100))


def test_own_bugs_are_not_repeated() -> None:
    calls = []

    def bug() -> None:
        calls.append(1)
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        retried("anything", bug)
    assert len(calls) == 1


def test_hub_urls_reach_the_hub_library(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    lone = Server()
    lone.close()
    filesystem, path = open_filesystem("hf://datasets/someone/something/data/train-*.parquet")
    assert isinstance(filesystem, hub.HfFileSystem)
    assert path == "datasets/someone/something/data/train-*.parquet"
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": lone.url})
    for name in ("datasets/someone/something", "datasets/someone/something/data/a.parquet"):
        with pytest.raises(StoreError, match="tried 5 times") as caught:
            open_source(f"hf://{name}").items()
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_s3_options_and_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    filesystem, path = open_filesystem("s3://bucket/train-{0..1}.tar")
    assert path == "bucket/train-{0..1}.tar" and not filesystem.dircache.use_listings_cache
    assert filesystem.config_kwargs["s3"] == {"addressing_style": "path"}
    assert filesystem.endpoint_url == "http://127.0.0.1:9" and filesystem.key is None
    for url in ("s3://key:secret@bucket/a.tar", "https://user:secret@host/a.tar"):
        with pytest.raises(ConfigError) as caught:
            open_source(url)
        assert "secret" not in str(caught.value).replace("AWS_SECRET", "").lower()


@pytest.mark.slow
def test_sources_on_a_real_s3_server(
    s3: SwiftServer, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Folder, tars, zip and gz in a bucket, behind a proxy that fails a third of all requests."""
    pytest.importorskip("s3fs")
    folder = {f"c{i % 3}/{i}.jpg": random.Random(i).randbytes(500 + i) for i in range(12)}
    members = [samples(0, 8, 5000), samples(8, 8, 600_000)]
    with faults.FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.create_bucket("sources")  # faults depend on the name
        put("s3://sources/folder", folder)
        put("s3://sources/tars", {f"{i}.tar": tar_bytes(m) for i, m in enumerate(members)})
        put("s3://sources", {"a.zip": zip_bytes(folder, zipfile.ZIP_DEFLATED)})
        put("s3://sources", {"a.tar.gz": gzip.compress(tar_bytes(members[0]))})
        bad = [faults.slow_down(), faults.server_error(), faults.truncate(), faults.reset()]
        proxy.script = faults.Chance(seed=0, share=0.3, faults=bad)
        for name, expected in (
            ("folder", folder),
            ("tars", images_of(members[0] | members[1])),
            ("tars/{0..1}.tar", images_of(members[0] | members[1])),
            ("tars/*", images_of(members[0] | members[1])),
            ("a.zip", folder),
            ("a.tar.gz", images_of(members[0])),
        ):
            source = open_source(f"s3://sources/{name}", scratch_dir=str(tmp_path))
            check_groups(source, source.items(), expected)
        assert len(proxy.faults()) == 4
        with pytest.raises(MissingError, match="no image source at"):
            open_source("s3://sources/nothing")
        with pytest.raises(MissingError, match="no tar at"):
            open_source("s3://sources/tars/7.tar")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(StoreError, match="was refused: PermissionError") as caught:
            open_source("s3://sources/folder").items()
        assert "\n" not in str(caught.value) and "wrong" not in str(caught.value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
