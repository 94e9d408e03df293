"""Sources of images: folders, tars, compressed tars, patterns, URLs, the embedded digits."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from repa_pipeline.data.coalesce import (
    MAX_GAP_BYTES,
    MAX_REQUEST_BYTES,
    Extent,
    coalesce,
    count_gets,
    read_extents,
)
from repa_pipeline.data.files import Descriptors
from repa_pipeline.data.items import finish_items
from repa_pipeline.data.patterns import archive_kind, expand_braces, is_unpacked, split_list
from repa_pipeline.data.scratch import Scratch, default_scratch_dir
from repa_pipeline.data.source import Item, num_classes, open_source
from repa_pipeline.data.tars import TarSource
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    DataError,
    MissingError,
    StageError,
    UnknownNameError,
)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def tar_bytes(members: dict[str, bytes], fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sample_members(first: int, count: int, size: int = 700) -> dict[str, bytes]:
    members = {}
    for number in range(first, first + count):
        members[f"s{number:03d}.jpg"] = bytes([number]) * (size + number)
        members[f"s{number:03d}.cls"] = str(number % 3).encode()
    return members


@pytest.fixture
def scratch(tmp_path: Path) -> str:
    return str(tmp_path / "scratch")


@pytest.fixture
def memory() -> Iterator[str]:
    """A root on fsspec's memory file system, emptied afterwards."""
    root = "memory://test-source"
    yield root
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/test-source"):
        filesystem.rm("/test-source", recursive=True)


def image_folder(root: Path) -> None:
    write(root / "b cat" / "2.JPEG", b"two")
    write(root / "b cat" / "deep" / "1.png", b"one")
    write(root / "b cat" / "notes.txt", b"ignored")
    write(root / "b cat" / ".hidden.jpg", b"ignored")
    write(root / "a dog" / "x.webp", b"dog")
    write(root / ".cache" / "y.jpg", b"ignored")
    write(root / "README", b"ignored")


EXPECTED_FOLDER = [
    Item("a dog/x.webp", 0, "a dog/x.webp", -1, 3),
    Item("b cat/2.JPEG", 1, "b cat/2.JPEG", -1, 3),
    Item("b cat/deep/1.png", 1, "b cat/deep/1.png", -1, 3),
]


def test_folder_of_classes(tmp_path: Path) -> None:
    image_folder(tmp_path)
    for url in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"):
        source = open_source(url)
        assert source.url == url and source.class_names == ("a dog", "b cat")
        assert source.items() == EXPECTED_FOLDER and source.remarks == ()
        assert [source.read(item) for item in source.items()] == [b"dog", b"two", b"one"]
    assert num_classes(source.items(), source.class_names) == 2


def test_folder_behind_a_url_is_the_same(tmp_path: Path, memory: str) -> None:
    image_folder(tmp_path)
    fsspec.filesystem("memory").put(str(tmp_path), "/test-source", recursive=True)
    source = open_source(memory)
    assert source.class_names == ("a dog", "b cat") and source.items() == EXPECTED_FOLDER
    assert [source.read(item) for item in source.items()] == [b"dog", b"two", b"one"]
    fsspec.filesystem("memory").rm("/test-source/a dog/x.webp")
    with pytest.raises(DamagedError, match="a dog/x.webp is gone"):
        source.read(EXPECTED_FOLDER[0])


def test_empty_class_is_kept_and_said(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "aa").mkdir()
    source = open_source(str(tmp_path))
    labels = [item.label for item in source.items()]
    assert labels == [0, 2, 2] and source.class_names == ("a dog", "aa", "b cat")
    assert source.remarks == ("class folder 'aa' has no images: kept as class 1 without images",)
    assert num_classes(source.items(), source.class_names) == 3


def test_folder_one_level_too_high_is_said(tmp_path: Path) -> None:
    image_folder(tmp_path / "train")
    source = open_source(str(tmp_path))
    source.items()
    assert source.remarks == (
        "no image lies directly in a class folder ('train'): one level too high?",
    )


def test_images_directly_in_the_folder_are_one_class(tmp_path: Path) -> None:
    write(tmp_path / "b.png", b"bb")
    write(tmp_path / "a.jpg", b"a")
    source = open_source(str(tmp_path))
    assert source.class_names is None
    assert source.items() == [Item("a.jpg", 0, "a.jpg", -1, 1), Item("b.png", 0, "b.png", -1, 2)]
    assert num_classes(source.items(), None) == 1
    write(tmp_path / "class" / "c.jpg", b"c")
    with pytest.raises(DataError, match="directly and in sub-folders .'class/c.jpg'."):
        open_source(str(tmp_path)).items()


def test_folder_that_changed_is_damage(tmp_path: Path) -> None:
    image_folder(tmp_path)
    source = open_source(str(tmp_path))
    first, second, _ = source.items()
    write(tmp_path / "a dog" / "x.webp", b"longer")
    with pytest.raises(DamagedError, match="source changed since it was indexed: got 6 bytes of"):
        source.read(first)
    (tmp_path / "b cat" / "2.JPEG").unlink()
    with pytest.raises(DamagedError, match="2.JPEG is gone"):
        source.read(second)


def test_link_to_a_folder_above_is_refused(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "b cat" / "loop").symlink_to(tmp_path / "b cat")
    with pytest.raises(DataError, match="link to a folder above"):
        open_source(str(tmp_path)).items()


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_byte_ranges_equal_what_tarfile_extracts(tmp_path: Path, fmt: int) -> None:
    members = sample_members(0, 4)
    members["long/" + "n" * 180 + ".png"] = b"long name"
    members["long/" + "n" * 180 + ".cls"] = b"7\n"
    members["umlaut/ä.jpg"], members["umlaut/ä.cls"] = b"umlaut", b"0"
    (tmp_path / "a.tar").write_bytes(tar_bytes(members, fmt))
    source = open_source(str(tmp_path / "a.tar"))
    items = source.items()
    with tarfile.open(tmp_path / "a.tar") as tar:
        extracted = {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith(".cls")}
    raw = (tmp_path / "a.tar").read_bytes()
    assert len(items) == len(extracted) == 6
    for item in items:
        name = item.key + (".png" if item.key.startswith("long") else ".jpg")
        assert source.read(item) == extracted[name]
        assert raw[item.offset : item.offset + item.num_bytes] == extracted[name]
    assert [item.label for item in items] == [0, 1, 2, 0, 7, 0]
    assert num_classes(items, source.class_names) == 8


def test_members_are_grouped_by_the_webdataset_rule(tmp_path: Path) -> None:
    members = {
        "./d.x/k1.cls": b" 4\n",
        "./d.x/k1.seg.png": b"ignored",
        "./d.x/k1.JPG": b"image one",
        "./d.x/k1.txt": b"ignored",
        "k2.json": b'{"label": 2, "caption": "x"}',
        "k3.webp": b"image three",
        ".hidden.jpg": b"ignored",
        "LICENSE": b"ignored",
        "k3.json": b'{"cls": 0}',
        "k2.png": b"image two",
        "k4.jpeg": b"image four",
        "k4.cls": b"1",
        "k4.json": b'{"label": 1}',
    }
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    source = open_source(str(tmp_path / "a.tar"))
    got = {item.key: (item.label, source.read(item)) for item in source.items()}
    assert got == {
        "d.x/k1": (4, b"image one"),
        "k2": (2, b"image two"),
        "k3": (0, b"image three"),
        "k4": (1, b"image four"),
    }


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"k.cls": b"1", "k.txt": b""}, "sample 'k' in a.tar has no image: found k.cls, k.txt"),
        ({"k.jpg": b"1", "k.png": b"2"}, "key 'k' occurs twice, as k.jpg at byte 512 and as k.png"),
        ({"k.jpg": b"1", "k.cls": b"cat"}, "label of k.cls in a.tar is 'cat': expected an integer"),
        ({"k.jpg": b"1", "k.cls": b"-1"}, "label of k.cls in a.tar is -1"),
        ({"k.jpg": b"1", "k.json": b'{"label": 1.5}'}, "label of k.json in a.tar is 1.5"),
        ({"k.jpg": b"1", "k.json": b'{"label": true}'}, "is True"),
        ({"k.jpg": b"1", "k.json": b"{"}, "label of k.json in a.tar is '{'"),
        ({"k.jpg": b"1", "k.cls": b"1", "k.json": b'{"cls": 2}'}, "two labels in a.tar"),
        (
            {"k.jpg": b"1", "k.cls": b"1", "u.jpg": b"2"},
            "1 of 2 samples have no label, first 'u' in a.tar at byte 2560",
        ),
    ],
)
def test_unusable_samples_say_why(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "a.tar")).items()
    assert message in str(caught.value)


def test_no_labels_is_one_class(tmp_path: Path) -> None:
    members = {"a.jpg": b"1", "b.jpg": b"2", "b.json": b'{"caption": "no label here"}'}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    source = open_source(str(tmp_path / "a.tar"))
    assert [item.label for item in source.items()] == [0, 0] and source.class_names is None


def test_same_key_in_two_tars_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"x.jpg": b"1", "k.jpg": b"1"}))
    (tmp_path / "b.tar").write_bytes(tar_bytes({"k.jpg": b"2"}))
    with pytest.raises(DataError, match="key 'k' occurs twice, in a.tar at byte 1536 and in b.tar"):
        open_source(str(tmp_path)).items()


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    whole = tar_bytes(sample_members(0, 3))
    with_bad_header = bytearray(whole)
    with_bad_header[2560 + 150] ^= 0xFF  # the header of the second sample
    for data in (
        b"",
        b"text",
        bytes(with_bad_header),
        whole[: 512 + 100],
        whole[:2048],
        whole[:2560],
        whole[: 2560 + 99],
        gzip.compress(whole),
    ):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match="a.tar is not a whole tar"):
            open_source(str(tmp_path / "a.tar")).items()


def test_tar_that_changed_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(sample_members(0, 3)))
    items = open_source(str(path)).items()
    path.write_bytes(tar_bytes(sample_members(5, 3, size=900)))
    with pytest.raises(DamagedError, match="a.tar has no member of 701 bytes at"):
        open_source(str(path)).read(items[1])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedError, match="expected 1214"):
        open_source(str(path)).read(items[2])
    path.write_bytes(tar_bytes(sample_members(0, 3)))
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(DamagedError, match="a.tar is gone"):
        source.read(items[0])


def split_set(folder: Path) -> dict[str, bytes]:
    """Four tars, two of them compressed; returns every image by key."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for number, suffix in enumerate((".tar", ".tar.gz", ".tgz", ".tar")):
        members = sample_members(10 * number, 3)
        data = tar_bytes(members)
        packed = data if suffix == ".tar" else gzip.compress(data)
        (folder / f"t-{number:02d}{suffix}").write_bytes(packed)
        images |= {name[:-4]: body for name, body in members.items() if name.endswith(".jpg")}
    return images


def test_directory_of_tars(tmp_path: Path, scratch: str) -> None:
    images = split_set(tmp_path / "set")
    write(tmp_path / "set" / "classes.json", b"{}")
    source = open_source(str(tmp_path / "set"), scratch_dir=scratch)
    items = source.items()
    assert {item.key: source.read(item) for item in items} == images
    assert [item.path for item in items[::3]] == ["t-00.tar", "t-01.tar.gz", "t-02.tgz", "t-03.tar"]
    assert items == sorted(items, key=lambda item: (item.path, item.offset))
    assert items == open_source(str(tmp_path / "set"), scratch_dir=scratch).items()
    write(tmp_path / "set" / "photo.jpg", b"")
    with pytest.raises(DataError, match="holds tars .'t-00.tar'. beside images"):
        open_source(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("pattern", "keys", "first_path"),
    [
        ("t-00.tar", 3, "t-00.tar"),
        ("t-{00,03}.{tar,tar}", 6, "t-00.tar"),
        ("t-0{0.tar,2.tgz}", 6, "t-00.tar"),
        ("t-{00..01}.{tar,tar.gz}", None, None),
        ("t-00*", 3, "t-00.tar"),
        ("t-*.tar", 6, "t-00.tar"),
        ("t-0[0-2].t*gz", 6, "t-01.tar.gz"),
        ("t-02.tgz::{root}/t-00.tar", 6, "t-00.tar"),
        ("t-0{0,3}.tar::{root}/t-*.tar.gz", 9, "t-00.tar"),
        ("../se*/t-00.tar", 3, "set/t-00.tar"),
    ],
)
def test_patterns(
    tmp_path: Path, scratch: str, pattern: str, keys: int | None, first_path: str | None
) -> None:
    root = tmp_path / "set"
    images = split_set(root)
    url = f"{root}/{pattern}".replace("{root}", str(root))
    if keys is None:
        with pytest.raises(MissingError, match="no tar at '.*t-0.*'"):
            open_source(url, scratch_dir=scratch)
        return
    source = open_source(url, scratch_dir=scratch)
    items = source.items()
    assert len(items) == keys and items[0].path == first_path
    fresh = open_source(url, scratch_dir=scratch)  # a worker that has listed nothing
    assert all(fresh.read(item) == images[item.key] for item in items)


def test_braces() -> None:
    assert expand_braces("t-{0008..0011}.tar") == [f"t-{i:04d}.tar" for i in (8, 9, 10, 11)]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    assert expand_braces("{a,b{0..1}}/{c,d}") == [
        f"{x}/{y}" for x in ("a", "b0", "b1") for y in "cd"
    ]
    assert expand_braces("plain{}{x}") == ["plain{}{x}"]
    assert split_list("a.tar::s3://b/{0..1}.tgz") == ["a.tar", "s3://b/{0..1}.tgz"]
    assert split_list("simplecache::s3://b/c.tar") == ["simplecache::s3://b/c.tar"]


def test_kinds_by_name() -> None:
    assert archive_kind("A.TAR") == archive_kind("a.tgz") == archive_kind("t-*.tar.gz") == "tar"
    assert archive_kind("x.parquet") == "parquet" and archive_kind("x.Zip") == "zip"
    assert archive_kind("tar") is None and archive_kind("a.tar.bz2") is None
    assert [n for n in ("a.tar.gz", "a.tgz", "a.parquet", "a.tar", "a.zip") if is_unpacked(n)] == [
        *("a.tar.gz", "a.tgz", "a.parquet")
    ]


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", b"")
    write(tmp_path / "b.parquet", b"")
    for url in (str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/a.tar::{tmp_path}/b.parquet"):
        with pytest.raises(DataError, match="holds several kinds of archives .'.*a.tar', '.*b.p"):
            open_source(url)


def test_tars_named_twice_or_spread_are_refused(tmp_path: Path, memory: str) -> None:
    split_set(tmp_path)
    with pytest.raises(DataError, match="t-00.tar is named twice"):
        open_source(f"{tmp_path}/t-*.tar::{tmp_path}/t-00.tar")
    with pytest.raises(ConfigError, match="different file systems"):
        open_source(f"{tmp_path}/t-00.tar::{memory}/t-01.tar")


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "file.txt", b"")
    write(tmp_path / "file.zip", b"")
    for url, error, message in (
        ("missing", MissingError, "no image source at"),
        ("missing/a.tar", MissingError, "no tar at"),
        ("missing/*.tar", MissingError, "no tar at"),
        ("missing-{0..1}", MissingError, "a pattern must end in .tar"),
        ("missing/*.parquet", MissingError, "no parquet at"),
        ("missing.zip", MissingError, "no zip at"),
        ("missing/*", MissingError, "no tar, parquet file or zip at"),
        ("file.txt", DataError, "is a file"),
        ("file.zip", DataError, "file.zip is not a whole zip"),
        ("empty", MissingError, "no images in"),
    ):
        with pytest.raises(error) as caught:
            open_source(f"{tmp_path}/{url}").items()
        assert message in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "run[1].tar").mkdir()
    write(tmp_path / "run[1].tar" / "a.jpg", b"folders may be called anything")
    assert len(open_source(f"{tmp_path}/run[1].tar").items()) == 1
    with pytest.raises(ConfigError, match="Protocol not known"):
        open_source("nosuch://x/y")
    with pytest.raises(MissingError):
        open_source("memory://test-source-nothing")


def test_urls_equal_local_paths(tmp_path: Path, memory: str, scratch: str) -> None:
    split_set(tmp_path / "set")
    fsspec.filesystem("memory").put(str(tmp_path / "set"), "/test-source", recursive=True)
    local = open_source(str(tmp_path / "set"), scratch_dir=scratch)
    listed = f"{memory}/t-*.tar::{memory}/t-*.tar.gz::{memory}/t-*.tgz"
    for url in (memory, f"{memory}/t-*.t*", listed, f"file://{tmp_path}/set"):
        source = open_source(url, scratch_dir=f"{scratch}-2")
        assert source.items() == local.items()
        assert [source.read(i) for i in source.items()] == [local.read(i) for i in local.items()]
    gone = open_source(memory, scratch_dir=scratch)
    fsspec.filesystem("memory").rm("/test-source/t-00.tar")
    with pytest.raises(DamagedError, match="t-00.tar is gone"):
        gone.read(local.items()[0])
    fsspec.filesystem("memory").pipe("/test-source/t-00.tar", b"short")
    with pytest.raises(DamagedError, match="expected 1212"):
        gone.read(local.items()[0])


def scratch_files(folder: str, suffix: str = ".tar") -> set[str]:
    return {name for name in os.listdir(folder) if name.endswith(suffix)}


def compressed_set(folder: Path, count: int) -> TarSource:
    """Tars of 10,240 bytes each when unpacked, two of which fit into the scratch folder."""
    folder.mkdir()
    for number in range(count):
        data = tar_bytes(sample_members(10 * number, 2, size=2000))
        assert len(data) == 10_240
        (folder / f"{number}.tar.gz").write_bytes(gzip.compress(data))
    scratch = str(folder.parent / "scratch")
    source = open_source(str(folder), scratch_dir=scratch, scratch_limit_bytes=25_000)
    assert isinstance(source, TarSource)
    return source


def expected_image(item: Item) -> bytes:
    number = int(item.key[1:])
    return bytes([number]) * (2000 + number)


def test_scratch_keeps_the_most_recently_used(tmp_path: Path, scratch: str) -> None:
    source = compressed_set(tmp_path / "set", 3)
    items = source.items()
    assert len(items) == 6
    assert len(scratch_files(scratch)) == 2 and not scratch_files(scratch, ".part")
    for item in [*items, *reversed(items)]:
        assert source.read(item) == expected_image(item)
        assert len(scratch_files(scratch)) <= 2

    def age(number: int) -> str:
        return source._files.version(f"{number}.tar.gz") + ".tar"

    fresh = open_source(str(tmp_path / "set"), scratch_dir=scratch, scratch_limit_bytes=25_000)
    for number in (0, 1):
        fresh.read(items[2 * number])
    for number in (0, 1):
        os.utime(os.path.join(scratch, age(number)), (100 - number, 100 - number))
    fresh.read(items[4])  # tar 1 is now the least recently used
    assert scratch_files(scratch) == {age(0), age(2)}


def test_reading_goes_on_after_another_process_evicts(tmp_path: Path, scratch: str) -> None:
    source = compressed_set(tmp_path / "set", 1)
    item = source.items()[0]
    assert source.read(item) == expected_image(item)
    for name in scratch_files(scratch):
        os.unlink(os.path.join(scratch, name))
    assert source.read(item) == expected_image(item)
    source._descriptors.forget("0.tar.gz")
    assert source.read(item) == expected_image(item)
    assert len(scratch_files(scratch)) == 1


def test_own_descriptors_are_dropped_with_the_tar(tmp_path: Path) -> None:
    source = compressed_set(tmp_path / "set", 3)
    for item in source.items():
        source.read(item)
        assert len(source._descriptors._by_name) <= 2


def test_tar_larger_than_the_limit(tmp_path: Path, scratch: str) -> None:
    compressed_set(tmp_path / "set", 1)
    small = open_source(str(tmp_path / "set"), scratch_dir=scratch, scratch_limit_bytes=9_000)
    with pytest.raises(StageError) as caught:
        small.items()
    assert "10240 bytes" in str(caught.value) and "9000 bytes" in str(caught.value)
    assert "--scratch-gb" in str(caught.value) and "0.tar.gz" in str(caught.value)
    assert not scratch_files(scratch) and not scratch_files(scratch, ".part")


def test_damaged_gzip_leaves_nothing(tmp_path: Path, scratch: str) -> None:
    source = compressed_set(tmp_path / "set", 1)
    path = tmp_path / "set" / "0.tar.gz"
    whole = path.read_bytes()
    flipped = whole[:-6] + bytes([whole[-6] ^ 0xFF]) + whole[-5:]
    for data in (whole[:-20], b"not gzip", flipped):
        path.write_bytes(data)
        with pytest.raises(DataError, match="0.tar.gz is not a whole gzip file"):
            source.items()
        assert not scratch_files(scratch) and not scratch_files(scratch, ".part")


def test_new_content_is_unpacked_anew(tmp_path: Path) -> None:
    source = compressed_set(tmp_path / "set", 1)
    item = source.items()[0]
    path = tmp_path / "set" / "0.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes({"other.jpg": b"x" * 5000})))
    fresh = open_source(str(tmp_path / "set"), scratch_dir=str(tmp_path / "scratch"))
    with pytest.raises(DamagedError, match="no member of 2000 bytes"):
        fresh.read(item)
    gone = open_source(str(tmp_path / "set"), scratch_dir=str(tmp_path / "scratch"))
    path.unlink()
    with pytest.raises(DamagedError, match="0.tar.gz is gone"):
        gone.read(item)


def test_unfinished_part_is_never_used_and_removed(tmp_path: Path, scratch: str) -> None:
    source = compressed_set(tmp_path / "set", 1)
    os.makedirs(scratch)
    key = source._files.version("0.tar.gz")
    for name in (key, "of-a-killed-process"):
        write(Path(scratch) / f"{name}.part", b"half")
    assert [source.read(item) for item in source.items()] == list(
        map(expected_image, source.items())
    )
    assert not scratch_files(scratch, ".part")


def test_one_thread_unpacks_and_the_others_wait(tmp_path: Path) -> None:
    packed = gzip.compress(b"x" * 100_000)
    openings = []

    def open_packed() -> io.BytesIO:
        openings.append(1)
        return io.BytesIO(packed)

    def work(_: int) -> bytes:
        # One Scratch each, as processes have.
        scratch = Scratch(str(tmp_path), 200_000)
        with os.fdopen(scratch.open_unpacked("key", "a.tar.gz", open_packed), "rb") as file:
            return file.read()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(16))) == {b"x" * 100_000}
    assert len(openings) == 1


def test_reads_from_many_threads(tmp_path: Path) -> None:
    source = compressed_set(tmp_path / "set", 4)
    source._descriptors._capacity = 1
    items = source.items() * 6
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, items)) == list(map(expected_image, items))


def test_scratch_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path / "x.tar.gz", gzip.compress(tar_bytes(sample_members(0, 1))))
    good = open_source(str(tmp_path / "x.tar.gz"), scratch_dir=str(tmp_path / "scratch"))
    for folder in ("/proc/no-such-place", str(tmp_path / "x.tar.gz")):
        source = open_source(str(tmp_path / "x.tar.gz"), scratch_dir=folder)
        for use in (source.items, lambda source=source: source.read(good.items()[0])):
            with pytest.raises(StageError, match="cannot unpack x.tar.gz into .*REPA_SCRATCH"):
                use()


def test_default_scratch_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPA_SCRATCH", "/fast/disk")
    assert default_scratch_dir() == "/fast/disk"
    monkeypatch.delenv("REPA_SCRATCH")
    assert os.path.basename(default_scratch_dir()) == f"repa-scratch-{os.getuid()}"


def test_the_default_scratch_folder_is_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REPA_SCRATCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    write(tmp_path / "x.tar.gz", gzip.compress(tar_bytes(sample_members(0, 1))))

    def read() -> bytes:
        source = open_source(str(tmp_path / "x.tar.gz"))
        return source.read(source.items()[0])

    folder = Path(default_scratch_dir())
    assert read() == read()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    read()
    assert folder.stat().st_mode & 0o777 == 0o700
    # Somebody else's, who put there what would be read: named for another user, made by this one.
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    folder.rename(default_scratch_dir())
    with pytest.raises(StageError, match="belongs to another user.*REPA_SCRATCH") as caught:
        read()
    assert "\n" not in str(caught.value)
    Path(default_scratch_dir()).rename(tmp_path / "elsewhere")
    Path(default_scratch_dir()).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StageError, match="belongs to another user"):
        read()
    # A folder that was given may be shared.
    monkeypatch.setenv("REPA_SCRATCH", str(tmp_path / "elsewhere"))
    read()


def test_descriptors_close_when_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    opened: list[int] = []

    def open_fd() -> int:
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    descriptors = Descriptors(capacity=1)
    assert descriptors.read_range("f", open_fd, 2, 3, touch=False) == b"234"
    assert descriptors.read_range("f", open_fd, 8, 2, touch=False) == b"89"
    assert len(opened) == 1
    descriptors.forget("f")
    with pytest.raises(OSError):
        os.fstat(opened[0])


@pytest.mark.parametrize(("part", "count"), [("digits", 1438), ("digits-heldout", 359)])
def test_embedded_digits(part: str, count: int) -> None:
    pytest.importorskip("sklearn")
    from repa_pipeline.data import digits

    source = open_source(f"embedded:{part}")
    items = source.items()
    assert len(items) == count and source.class_names == tuple("0123456789")
    assert num_classes(items, source.class_names) == 10
    number = int(items[5].key.removeprefix("digit-"))
    assert items[5].label == digits.labels()[number]
    assert items[5].offset == -1 and items[5].num_bytes == len(source.read(items[5]))
    assert source.read(items[5]) == digits.digit_png(number)
    with pytest.raises(UnknownNameError, match="known are embedded:digits, embedded:digits-held"):
        open_source("embedded:letters")


def test_num_classes_refusals() -> None:
    def items(*labels: int | None) -> list[Item]:
        return [Item(f"k{i}", label, "a", i, 1) for i, label in enumerate(labels)]

    assert num_classes(items(0, 4), None) == 5
    for bad, names, message in (
        (items(0, -2), None, "label -2 of 'k1' is negative"),
        (items(0, 2), ("a", "b"), "label 2, but there are only 2 class names"),
        (items(0, None), None, "1 of 2 items have a label"),
        ([], None, "0 of 0 items"),
    ):
        with pytest.raises(DataError, match=message):
            num_classes(bad, names)


def test_coalesced_ranges() -> None:
    gap, most = MAX_GAP_BYTES, MAX_REQUEST_BYTES
    extents = [
        Extent("b", 0, 10),  # another file
        Extent("a", 100, 200),
        None,
        Extent("a", 0, 50),  # before its neighbour
        Extent("a", 200 + gap, 300 + gap),  # the gap is just small enough
        Extent("a", 301 + 2 * gap, 302 + 2 * gap),  # one byte too far
        Extent("a", 100, 200),  # twice
        Extent("c", 0, 2 * most),  # larger than a request
        Extent("c", 5, 6),
        Extent("d", 0, most - 1),
        Extent("d", most - 1, most),
        Extent("d", most, most + 1),
    ]
    assert coalesce(extents) == [[0], [3, 1, 6, 4], [2], [5], [7], [8], [9, 10], [11]]
    assert coalesce([]) == [] and coalesce([None, None]) == [[0], [1]]
    data = bytes(range(100))
    asked = []

    def fetch(start: int, num_bytes: int) -> bytes:
        asked.append((start, num_bytes))
        return data[start : start + num_bytes]

    pieces = read_extents(fetch, [Extent("a", 7, 9), Extent("a", 2, 5), Extent("a", 95, 120)])
    assert asked == [(2, 118)] and pieces == [data[7:9], data[2:5], data[95:]]


def test_local_sources_ask_nobody(tmp_path: Path, scratch: str) -> None:
    images = split_set(tmp_path / "set")
    image_folder(tmp_path / "folder")
    for url in (f"{tmp_path}/set", f"{tmp_path}/folder", "embedded:digits"):
        source = open_source(url, scratch_dir=scratch)
        items = source.items()[:12]
        assert not source.is_remote and count_gets(source, items) == 0
        assert source.groups(items) == [[i] for i in range(len(items))]
        assert source.read_group(items) == [source.read(item) for item in items]
    source = open_source(f"{tmp_path}/set", scratch_dir=scratch)
    assert source.read_group(source.items()) == [images[item.key] for item in source.items()]


def test_many_items_are_finished_in_one_pass() -> None:
    items = [Item(f"k{i}", i % 7, f"{i % 7}/{i}.jpg", -1, 1) for i in range(50_000)]
    finished = finish_items(items[::-1])
    assert [item.path for item in finished] == sorted(item.path for item in items)
    assert finish_items(finished) == finished
