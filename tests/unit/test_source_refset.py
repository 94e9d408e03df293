"""The reference's preprocessed folder or zip, and plain zips."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from repa_pipeline.data.refset import RefSet, open_refset
from repa_pipeline.data.source import Item, open_source
from repa_pipeline.errors import DamagedError, DataError, MissingError

NAMES = [f"{i // 3:05d}/img{i:08d}" for i in range(7)]
LABELS = [5, 0, 2, 2, 1, 9, 0]


def latent_name(name: str) -> str:
    return name.replace("/img", "/img-mean-std-") + ".npy"


def npy(number: int) -> bytes:
    buffer = io.BytesIO()
    moments = np.random.default_rng(number).standard_normal((8, 2, 2)).astype(np.float32)
    np.save(buffer, moments, allow_pickle=False)
    return buffer.getvalue()


def labels_json(names: list[str], labels: list[Any] | None = LABELS) -> bytes:
    pairs = None if labels is None else [list(p) for p in zip(names, labels, strict=True)]
    return json.dumps({"labels": pairs}).encode()


def reference_files() -> dict[str, bytes]:
    """As the reference's tools write them, both dataset.json included."""
    images = {f"images/{name}.png": f"png {name}".encode() for name in NAMES}
    latents = {f"vae-sd/{latent_name(name)}": npy(i) for i, name in enumerate(NAMES)}
    return (
        images
        | latents
        | {
            "images/dataset.json": labels_json([f"{name}.png" for name in NAMES]),
            "vae-sd/dataset.json": labels_json([latent_name(name) for name in NAMES]),
        }
    )


def write(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in sorted(files.items(), key=lambda pair: random.Random(pair[0]).random()):
            archive.writestr(name, data)
    return str(path)


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in names}


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://test-refset"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/test-refset"):
        filesystem.rm("/test-refset", recursive=True)


def every_place(tmp_path: Path, files: dict[str, bytes]) -> list[str]:
    """The same files as a folder, zips, a wrapped zip, and each behind a URL."""
    folder = write(tmp_path / "set", files)
    memory = fsspec.filesystem("memory")
    memory.put(folder, "/test-refset/set", recursive=True)
    urls = [folder, "memory://test-refset/set"]
    wrapped = {f"imagenet/{name}": data for name, data in files.items()}
    for name, content, method in (
        ("stored.zip", files, zipfile.ZIP_STORED),
        ("deflated.zip", files, zipfile.ZIP_DEFLATED),
        ("wrapped.zip", wrapped, zipfile.ZIP_STORED),
    ):
        path = write_zip(tmp_path / name, content, method)
        memory.put(path, f"/test-refset/{name}")
        urls += [path, f"memory://test-refset/{name}"]
    return urls


def test_images_with_labels_wherever_it_lies(tmp_path: Path, memory: str) -> None:
    for url in every_place(tmp_path, reference_files()):
        source = open_source(url)
        items = source.items()
        got = {item.key: (item.label, source.read(item)) for item in items}
        assert got == {
            f"{name}.png": (label, f"png {name}".encode())
            for name, label in zip(NAMES, LABELS, strict=True)
        }
        assert source.class_names is None
        assert source.remarks == ("labels from images/dataset.json",)
        groups = source.groups(items)
        assert sorted(i for group in groups for i in group) == list(range(7))
        for group in groups:
            chosen = [items[i] for i in group]
            assert source.read_group(chosen) == [source.read(item) for item in chosen]
        fresh = open_source(url)  # a worker that has listed nothing
        assert [fresh.read(item) for item in items] == [source.read(item) for item in items]


def test_latents_and_pairs_wherever_they_lie(tmp_path: Path, memory: str) -> None:
    for url in every_place(tmp_path, reference_files()):
        refset = open_refset(url)
        latents = refset.latent_items()
        assert [item.key for item in latents] == [latent_name(name) for name in NAMES]
        assert [refset.read(item) for item in latents] == [npy(i) for i in range(7)]
        assert [item.label for item in latents] == LABELS
        assert [item.key for item in refset.image_items()] == [f"{name}.png" for name in NAMES]
        pairs = refset.pairs()
        assert [(i.key, z.key) for i, z in pairs] == [
            (f"{name}.png", latent_name(name)) for name in NAMES
        ]
        images = {f"{name}.png": label for name, label in zip(NAMES, LABELS, strict=True)}
        moments = {latent_name(name): label for name, label in zip(NAMES, LABELS, strict=True)}
        assert refset.labels == images | moments


@pytest.mark.parametrize("place", ["", "images/", "vae-sd/"])
def test_labels_from_any_of_the_three_files(tmp_path: Path, place: str) -> None:
    plain = without(reference_files(), "images/dataset.json", "vae-sd/dataset.json")
    forms = {
        "npy": [latent_name(name) for name in NAMES],
        "png": [f"{name}.png" for name in NAMES],
        "from the root": [f"images/{name}.png" for name in NAMES],
        "windows": [f"{name}.png".replace("/", "\\") for name in NAMES],
    }
    for form, names in forms.items():
        files = plain | {f"{place}dataset.json": labels_json(names)}
        source = open_source(write(tmp_path / form, files))
        assert [item.label for item in source.items()] == LABELS
        assert source.remarks == (f"labels from {place}dataset.json",)
    mapping = dict(zip(forms["png"], LABELS, strict=True))
    files = plain | {f"{place}dataset.json": json.dumps({"labels": mapping}).encode()}
    assert [item.label for item in open_source(write(tmp_path / "m", files)).items()] == LABELS


def test_no_labels_is_one_class(tmp_path: Path) -> None:
    files = without(reference_files(), "images/dataset.json", "vae-sd/dataset.json")
    null = {"dataset.json": labels_json([], None)}
    source = open_source(write(tmp_path / "null", files | null))
    assert [item.label for item in source.items()] == [0] * 7
    assert source.remarks == ("no labels in dataset.json",)
    source = open_source(write(tmp_path / "absent", files))
    assert [item.label for item in source.items()] == [0] * 7
    assert source.remarks == ("no dataset.json: one class",)
    assert open_refset(str(tmp_path / "absent")).labels is None
    # The first file with labels counts.
    later = null | {"vae-sd/dataset.json": labels_json([latent_name(name) for name in NAMES])}
    assert [i.label for i in open_source(write(tmp_path / "l", files | later)).items()] == LABELS


def test_images_folder_alone_with_its_labels(tmp_path: Path) -> None:
    """`dataset_tools.py convert --dest=.../images` or `--dest=images.zip`, given as it is."""
    files = {
        name.removeprefix("images/"): data
        for name, data in reference_files().items()
        if name.startswith("images/")
    }
    folder, packed = write(tmp_path / "images", files), write_zip(tmp_path / "images.zip", files)
    for url in (folder, packed, write(tmp_path / "up" / "images", files)[: -len("/images")]):
        source = open_source(url)
        got = {item.key: (item.label, source.read(item)) for item in source.items()}
        assert got[f"{NAMES[0]}.png"] == (5, f"png {NAMES[0]}".encode()) and len(got) == 7
        assert [item.key for item in open_refset(url).image_items()] == sorted(got)
        assert open_refset(url).latent_items() == []


def test_class_folders_that_look_alike_are_class_folders(tmp_path: Path) -> None:
    files = {"images/1.png": b"1", "other/2.png": b"2"}
    source = open_source(write(tmp_path / "a", files))
    assert source.class_names == ("images", "other")
    files |= {"dataset.json": b'{"name": "not labels"}'}
    assert open_source(write(tmp_path / "b", files)).class_names == ("images", "other")
    with pytest.raises(DataError, match="is no reference set: expected images/ with vae-sd/"):
        open_refset(str(tmp_path / "b"))
    with pytest.raises(MissingError, match="no reference set at"):
        open_refset(str(tmp_path / "nothing"))
    with pytest.raises(MissingError, match="no zip at"):
        open_refset(str(tmp_path / "nothing.zip"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images/dataset.json": b"{"}, "images/dataset.json of .* is not JSON"),
        (
            {"images/dataset.json": labels_json([f"{n}.png" for n in NAMES[:6]], LABELS[:6])},
            "1 of 7 files have no label in images/dataset.json .*, first '00002/img00000006'",
        ),
        (
            {
                "images/dataset.json": labels_json(
                    [f"{n}.png" for n in [*NAMES, "00009/img00000009"]], [*LABELS, 1]
                )
            },
            "8 labels for 7 files, first extra '00009/img00000009'",
        ),
        ({"images/dataset.json": b'{"labels": [["a.png"]]}'}, "has the entry .'a.png'.: expected"),
        ({"images/dataset.json": b'{"labels": [["a.png", [0, 1]]]}'}, "a.png the label .0, 1.: "),
        ({"images/dataset.json": b'{"labels": [["a.png", true]]}'}, "label True: expected an int"),
        ({"images/dataset.json": b'{"labels": [["a.png", -1]]}'}, "label -1"),
        ({"images/dataset.json": b'{"labels": [["a.png", 1], ["a.png", 2]]}'}, "two labels"),
        ({"images/00000/img00000000.jpg": b"twin"}, "8 files|one name but for the extension"),
    ],
)
def test_unusable_labels_say_why(tmp_path: Path, change: dict[str, bytes], message: str) -> None:
    source = open_source(write(tmp_path, reference_files() | change))
    with pytest.raises(DataError, match=message) as caught:
        source.items()
    assert "\n" not in str(caught.value)


def test_pairs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    files = without(reference_files(), "images/dataset.json", "vae-sd/dataset.json")
    lost = without(files, f"vae-sd/{latent_name(NAMES[2])}")
    with pytest.raises(DataError, match="7 images and 6 latents: expected as many"):
        open_refset(write(tmp_path / "lost", lost)).pairs()
    shifted = lost | {"vae-sd/00009/img-mean-std-00000009.npy": npy(9)}
    with pytest.raises(DataError, match="5 of 7 images .* do not meet their latent, first 00000/"):
        open_refset(write(tmp_path / "shifted", shifted)).pairs()
    # Names that have nothing in common are paired by position, as the reference does.
    images = {name: data for name, data in files.items() if name.startswith("images/")}
    other = images | {f"vae-sd/{i}.npy": npy(i) for i in range(7)}
    pairs = open_refset(write(tmp_path / "other", other)).pairs()
    assert [z.key for _, z in pairs] == [f"{i}.npy" for i in range(7)]
    with pytest.raises(MissingError, match="no images in images/ of"):
        only = {name: data for name, data in files.items() if name.startswith("vae-sd/")}
        open_source(write(tmp_path / "only", only)).items()
    assert len(open_refset(str(tmp_path / "only")).latent_items()) == 7


def test_latents_are_plain_arrays(tmp_path: Path) -> None:
    refset = open_refset(write(tmp_path, reference_files()))
    loaded = np.load(io.BytesIO(refset.read(refset.latent_items()[3])), allow_pickle=False)
    expected = np.random.default_rng(3).standard_normal((8, 2, 2)).astype(np.float32)
    assert loaded.dtype == np.float32 and np.array_equal(loaded, expected)
    assert isinstance(open_source(str(tmp_path)), RefSet)


CLASSES = {"cat/1.jpg": b"one", "cat/deep/2.png": b"two", "dog/3.jpg": b"x" * 3000}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_of_class_folders(tmp_path: Path, method: int) -> None:
    noise = {"cat/notes.txt": b"", "__MACOSX/cat/._1.jpg": b"", ".hidden/4.jpg": b"", "README": b""}
    source = open_source(write_zip(tmp_path / "a.zip", CLASSES | noise, method))
    items = source.items()
    assert source.class_names == ("cat", "dog") and source.remarks == ()
    assert {item.key: (item.label, source.read(item)) for item in items} == {
        "cat/1.jpg": (0, b"one"),
        "cat/deep/2.png": (0, b"two"),
        "dog/3.jpg": (1, b"x" * 3000),
    }
    assert items == sorted(items, key=lambda item: (item.path, item.offset))
    assert {item.path for item in items} == {"a.zip"}


def test_zips_of_other_shapes(tmp_path: Path) -> None:
    wrapped = {f"train/{name}": data for name, data in CLASSES.items()}
    source = open_source(write_zip(tmp_path / "w.zip", wrapped))
    assert source.class_names == ("cat", "dog")
    assert {item.key for item in source.items()} == set(CLASSES)
    source = open_source(write_zip(tmp_path / "flat.zip", {"b.png": b"b", "a.jpg": b"a"}))
    assert source.class_names is None and {i.key: i.label for i in source.items()} == {
        "a.jpg": 0,
        "b.png": 0,
    }
    write_zip(tmp_path / "p-0.zip", {"cat/1.jpg": b"one"})
    write_zip(tmp_path / "p-1.zip", {"cat/2.jpg": b"two", "dog/3.jpg": b"three"})
    for url in (f"{tmp_path}/p-{{0..1}}.zip", f"{tmp_path}/p-*.zip"):
        source = open_source(url)
        got = [(i.key, i.label, i.path, source.read(i)) for i in source.items()]
        assert sorted(got) == [
            ("cat/1.jpg", 0, "p-0.zip", b"one"),
            ("cat/2.jpg", 0, "p-1.zip", b"two"),
            ("dog/3.jpg", 1, "p-1.zip", b"three"),
        ]
    write_zip(tmp_path / "p-2.zip", {"cat/1.jpg": b"again"})
    with pytest.raises(DataError, match="key 'cat/1.jpg' occurs twice, in p-0.zip at byte 0 and"):
        open_source(f"{tmp_path}/p-*.zip").items()
    with pytest.raises(MissingError, match="no images in"):
        open_source(write_zip(tmp_path / "none.zip", {"a.txt": b""})).items()


def streamed_zip(files: dict[str, bytes], method: int) -> bytes:
    """Written without seeking: sizes and crc32 come behind each member."""

    class Pipe(io.RawIOBase):
        data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += data
            return len(data)

    pipe = Pipe()
    pipe.data = bytearray()
    with zipfile.ZipFile(pipe, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return bytes(pipe.data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_streamed_zips_and_long_extra_fields(tmp_path: Path, method: int) -> None:
    files = {f"c/{i}.jpg": random.Random(i).randbytes(2000 * i) for i in range(5)}
    (tmp_path / "s.zip").write_bytes(streamed_zip(files, method))
    assert (tmp_path / "s.zip").read_bytes()[6] & 8
    source = open_source(str(tmp_path / "s.zip"))
    assert {item.key: source.read(item) for item in source.items()} == files
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.extra = struct.pack("<HH", 0xCAFE, 900) + bytes(900)
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(data)
    source = open_source(str(tmp_path / "x.zip"))
    assert {item.key: source.read(item) for item in source.items()} == files


def test_names_are_never_paths(tmp_path: Path) -> None:
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    names = ["../../evil.png", "/etc/evil.png", "c/../../evil2.png"]
    source = open_source(write_zip(inside / "a.zip", {name: b"x" for name in names}))
    with pytest.raises(DataError, match="directly and in sub-folders"):
        source.items()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_members_are_never_returned(tmp_path: Path, method: int) -> None:
    path = tmp_path / "a.zip"
    files = {f"c/{i}.jpg": random.Random(i).randbytes(3000) for i in range(3)}
    write_zip(path, files, method)
    items = open_source(str(path)).items()
    whole = path.read_bytes()
    for place in (0, 8, 14, 22, 26, 1000):
        data = bytearray(whole)
        data[items[1].offset + place] ^= 0x15
        path.write_bytes(bytes(data))
        with pytest.raises(DamagedError, match="source changed since it was indexed"):
            open_source(str(path)).read(items[1])
    path.write_bytes(whole[: items[2].offset + 1000])
    with pytest.raises(DamagedError, match="is not 3000 bytes long"):
        open_source(str(path)).read(items[2])
    with pytest.raises(DataError, match="a.zip is not a whole zip: .*copy it again"):
        open_source(str(path)).items()
    reader = open_source(str(path))
    path.unlink()
    with pytest.raises(DamagedError, match="a.zip is gone"):
        reader.read(items[0])
    with pytest.raises(MissingError, match="no zip at"):
        open_source(str(path))


def test_bombs_and_locked_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write_zip(path, {"c/1.png": bytes(5_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="unpacks to 5000000 bytes from .* more than 1000 times"):
        open_source(str(path)).items()
    data = bytearray(streamed_zip({"c/1.png": b"x" * 100}, zipfile.ZIP_STORED))
    at = data.index(b"PK\x01\x02")
    for change, message in (
        ((24, struct.pack("<I", 2**31 + 1)), "c/1.png in a.zip unpacks to 2147483649 bytes"),
        ((8, b"\x09\x00"), "c/1.png in a.zip is encrypted"),
        ((10, b"\x0c\x00"), "c/1.png in a.zip is packed by method 12"),
    ):
        changed = bytearray(data)
        changed[at + change[0] : at + change[0] + len(change[1])] = change[1]
        path.write_bytes(bytes(changed))
        with pytest.raises(DataError, match=message):
            open_source(str(path)).items()
    # A member that unpacks to more than its directory says ends at the listed size.
    write_zip(path, {"c/1.png": b"x" * 9000}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedError, match="has 9000 bytes, not 100"):
        open_source(str(path)).read(Item("c/1.png", 0, "a.zip", 0, 100))
    (tmp_path / "s.zip").write_bytes(streamed_zip({"c/1.png": b"x" * 9000}, zipfile.ZIP_DEFLATED))
    with pytest.raises(DamagedError, match="is not 100 bytes long"):
        open_source(f"{tmp_path}/s.zip").read(Item("c/1.png", 0, "s.zip", 0, 100))
