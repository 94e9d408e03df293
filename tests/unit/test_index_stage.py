"""The index: one seeded order of rows, odd images said, bad ones counted, the source watched."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.config import IndexConfig
from repa_pipeline.data.index import (
    Index,
    content_digest,
    read_index,
    read_labels,
    read_manifest,
    rows_digest,
)
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.engine.contracts import Commit
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import DamagedError, DataError, MismatchError
from repa_pipeline.observe import Silent
from repa_pipeline.stages import index as index_module
from repa_pipeline.stages.index import (
    IndexStage,
    cache_store,
    default_shard_rows,
    ensure_index,
    planned_index,
)

NUM_IMAGES = 40


def pixels(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    side = 16 + number % 5
    generator = np.random.default_rng(number)
    return generator.integers(0, 256, (side, side + number % 3, 3), np.uint8)


def save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def make_images(folder: Path) -> Path:
    """40 images in 3 classes, file number i in class i % 3."""
    for number in range(NUM_IMAGES):
        name = f"{'abc'[number % 3]}/{number:03d}.png"
        save(Image.fromarray(pixels(number)), folder / name)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def config(folder: Path, **changes: Any) -> IndexConfig:
    return IndexConfig(source=str(folder), workspace=str(folder.parent / "work"), **changes)


def build(settings: IndexConfig) -> Index:
    return ensure_index(settings, LocalExecutor(), Silent())


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_rows_are_the_images_in_a_seeded_order(source: Path) -> None:
    index = build(config(source))
    listed = sorted(str(path.relative_to(source)) for path in source.rglob("*.png"))
    order = np.random.default_rng(0).permutation(NUM_IMAGES)
    assert [entry.key for entry in index.entries] == [listed[i] for i in order]
    for entry in index.entries:
        data = (source / entry.path).read_bytes()
        image = pixels(int(Path(entry.path).stem))
        assert entry.label == "abc".index(entry.key[0])
        assert (entry.offset, entry.num_bytes) == (-1, len(data))
        assert (entry.height, entry.width) == image.shape[:2]
        assert entry.digest == hashlib.blake2b(data, digest_size=16).hexdigest()
        assert (entry.notes, entry.excluded) == ("", None)
    manifest = index.manifest
    assert (manifest["num_rows"], manifest["num_classes"], manifest["shard_rows"]) == (40, 3, 16)
    assert manifest["class_names"] == ["a", "b", "c"]
    assert manifest["rows_digest"] == rows_digest(list(index.entries))
    assert manifest["num_excluded"] == manifest["num_duplicates"] == 0
    labels = read_labels(cache_store(config(source)))
    assert labels.dtype == np.int64
    assert labels.tolist() == [entry.label for entry in index.entries]


def test_the_seed_decides_the_order_and_nothing_else(source: Path, tmp_path: Path) -> None:
    first = build(config(source))
    again = build(dataclasses.replace(config(source), workspace=str(tmp_path / "again")))
    other = config(source, permutation_seed=1)
    second = build(dataclasses.replace(other, workspace=str(tmp_path / "other")))
    assert files(tmp_path / "again/cache") == files(tmp_path / "work/cache")
    assert again == first
    assert set(second.entries) == set(first.entries) and second.entries != first.entries
    assert second.manifest["listing"] == first.manifest["listing"]
    assert second.manifest["rows_digest"] != first.manifest["rows_digest"]
    with pytest.raises(MismatchError, match="permutation_seed is 0 there, 1 now; set it back"):
        build(config(source, permutation_seed=1))
    with pytest.raises(MismatchError, match="exif is 'upright' there, 'raw' now"):
        build(config(source, exif="raw"))
    with pytest.raises(MismatchError, match="shard_rows is 16 there, 32 now"):
        build(config(source, shard_rows=32))
    assert build(config(source, shard_rows=16, decode_threads=1, retries=0)) == first


def test_an_added_image_is_noticed_when_asked(source: Path) -> None:
    first = build(config(source))
    picture = next(source.rglob("*.png"))
    (picture.parent / "added.png").write_bytes(picture.read_bytes())
    assert ensure_index(config(source), LocalExecutor(), Silent()) == first
    with pytest.raises(MismatchError, match="lists other images than the index"):
        ensure_index(config(source), LocalExecutor(), Silent(), relist=True)


def test_a_mended_image_is_looked_at_again(source: Path) -> None:
    picture = next(source.rglob("*.png"))
    sound = picture.read_bytes()
    picture.write_bytes(bytes(len(sound)))
    with pytest.raises(DataError, match="1 of .* images cannot be used"):
        build(config(source))
    picture.write_bytes(sound)
    assert build(config(source)).manifest["num_excluded"] == 0


def test_parts_leave_no_trace(source: Path, tmp_path: Path) -> None:
    build(config(source))
    assert sorted(files(tmp_path / "work")) == ["cache/index.parquet", "cache/manifest.json"]


def test_many_parts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(config(source))
    monkeypatch.setattr(index_module, "_PART_ITEMS", 7)
    parted = dataclasses.replace(config(source), workspace=str(tmp_path / "parted"))
    assert len(IndexStage(parted).plan().shards) == 6
    assert build(parted) == whole


def test_odd_images_are_noted(source: Path) -> None:
    grey = Image.fromarray(pixels(1)).convert("L")
    save(grey, source / "a/grey.png")
    save(grey, source / "b/grey.jpg")
    save(Image.fromarray(pixels(2)).convert("RGBA"), source / "a/alpha.png")
    save(Image.fromarray(pixels(3)).convert("P"), source / "c/palette.gif")
    turned = Image.fromarray(pixels(4))
    exif = turned.getexif()
    exif[274] = 6
    save(turned, source / "c/turned.jpg", exif=exif)
    index = build(config(source))
    assert index.manifest["notes"] == {"alpha": 1, "exif 6": 1, "grayscale": 2, "palette": 1}
    notes = {entry.key: entry.notes for entry in index.entries if entry.notes}
    assert notes["c/turned.jpg"] == "exif 6" and notes["b/grey.jpg"] == "grayscale"
    turned_entry = next(entry for entry in index.entries if entry.key == "c/turned.jpg")
    assert (turned_entry.height, turned_entry.width) == pixels(4).shape[:2]


def test_duplicates_are_counted(source: Path) -> None:
    for name in ("a/copy.png", "b/copy.png", "c/other.png"):
        shutil.copy(source / "a/000.png", source / name)
    shutil.copy(source / "b/001.png", source / "c/copy.png")
    index = build(config(source))
    assert (index.num_rows, index.manifest["num_duplicates"]) == (44, 4)


def spoil(source: Path) -> None:
    """Three files that are no images, each in its own way."""
    (source / "a/empty.png").write_bytes(b"")
    (source / "b/text.jpg").write_bytes(b"<html>not found</html>")
    whole = io.BytesIO()
    Image.fromarray(np.tile(pixels(7), (8, 8, 1))).save(whole, "JPEG")
    (source / "c/cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])


def test_bad_images_fail_after_the_rest_is_done(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(source)
    monkeypatch.setattr(index_module, "_PART_ITEMS", 10)
    with pytest.raises(DataError) as caught:
        build(config(source, max_bad=2))
    text = str(caught.value)
    assert text.startswith("3 of 43 images cannot be used, --max-bad allows 2; the first is a/empt")
    assert "empty file (0 bytes); mend them or accept them with --max-bad 3" in text
    store = cache_store(config(source))
    assert store.size("manifest.json") is None
    assert len([n for n in store.list("index.parts") if n.endswith(".json")]) == 5
    examined = []
    plain = index_module._examine
    monkeypatch.setattr(index_module, "_examine", lambda *a: examined.append(a) or plain(*a))
    index = build(config(source, max_bad=3))
    # The first run's work was kept but for the parts with an unusable image: it may be mended.
    again = [item.key for *_, items in examined for item in items]
    assert set(again) >= {"a/empty.png", "b/text.jpg", "c/cut.jpg"}
    assert len(again) < 43 and len(again) % 10 in (0, 3)
    assert index.num_rows == len(index.entries) == 40
    assert index.manifest["num_excluded"] == 3
    reasons = index.manifest["excluded_reasons"]
    assert sum(reasons.values()) == 3 and reasons["empty file (0 bytes)"] == 1
    assert len(read_labels(store)) == 40
    assert build(config(source)) == index  # accepted once is accepted


def test_excluded_rows_are_in_the_index_with_the_reason(source: Path) -> None:
    import pyarrow.parquet

    spoil(source)
    build(config(source, max_bad=9))
    path = source.parent / "work/cache/index.parquet"
    table = pyarrow.parquet.read_table(path).to_pylist()
    assert [line["row"] for line in table] == [*range(40), -1, -1, -1]
    excluded = {line["key"]: line["excluded"] for line in table if line["row"] < 0}
    assert list(excluded) == ["a/empty.png", "b/text.jpg", "c/cut.jpg"]
    assert excluded["a/empty.png"] == "empty file (0 bytes)"
    assert "not an image" in excluded["b/text.jpg"] and "truncated" in excluded["c/cut.jpg"]
    assert all(line["excluded"] is None for line in table[:40])


def test_mended_images_are_indexed_in_the_same_process(source: Path) -> None:
    spoil(source)
    with pytest.raises(DataError, match="3 of 43 images"):
        build(config(source))
    for name in ("a/empty.png", "b/text.jpg", "c/cut.jpg"):
        save(Image.fromarray(pixels(9)), source / name, format="PNG")
    assert build(config(source)).num_rows == 43


def test_no_usable_image(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/x.png").write_bytes(b"")
    with pytest.raises(DataError, match="holds no usable image: check --source"):
        build(config(tmp_path / "images", max_bad=5))


def test_a_damaged_part_is_found(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_PART_ITEMS", 10)
    spoil(source)
    with pytest.raises(DataError):
        build(config(source))
    path = min((source.parent / "work/cache/index.parts").glob("*.part"))
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b'"width": 8', b'"width": 9').replace(b'"offset": -', b'"offset":--')
    )
    assert len(path.read_bytes()) == len(data) and path.read_bytes() != data
    with pytest.raises(DamagedError, match=f"{path.name} is damaged.* remove it and run `repa ind"):
        build(config(source, max_bad=3))
    path.unlink()
    assert build(config(source, max_bad=3)).num_rows == 40


def test_another_command_finished_first(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands on a fresh workspace: the second takes the first one's index."""
    expected = build(dataclasses.replace(config(source), workspace=str(source.parent / "x")))
    plain = IndexStage.seal

    def seal(self: IndexStage, commits: list[Commit]) -> None:
        monkeypatch.setattr(IndexStage, "seal", plain)
        assert build(config(source)) == expected
        self.seal(commits)

    monkeypatch.setattr(IndexStage, "seal", seal)
    assert build(config(source)) == expected


@pytest.mark.parametrize("moment", ["plan", "begin", "open", "_examine"])
def test_another_command_finishes_and_tidies_up_meanwhile(
    moment: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the slower of two commands is about to do, it takes the index that stands."""
    monkeypatch.setattr(index_module, "_PART_ITEMS", 7)
    where: Any = index_module if moment == "_examine" else IndexStage
    plain = getattr(where, moment)
    first: list[Index] = []

    def act(*given: Any) -> Any:
        monkeypatch.setattr(where, moment, plain)
        first.append(build(config(source)))
        return plain(*given)

    monkeypatch.setattr(where, moment, act)
    assert [build(config(source))] == first
    assert cache_store(config(source)).list("index.parts") == []


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1, 16), (40, 16), (511, 16), (512, 32), (1438, 64), (4095, 128), (8191, 256), (8192, 512)],
)
def test_default_shard_rows(num_rows: int, expected: int) -> None:
    assert default_shard_rows(num_rows) == expected
    assert default_shard_rows(1_281_167) == 512


def test_shard_rows_of_the_user(source: Path) -> None:
    assert build(config(source, shard_rows=7)).manifest["shard_rows"] == 7


def test_the_plan_is_an_upper_bound(source: Path) -> None:
    spoil(source)
    planned, num_bytes = planned_index(config(source))
    total = sum(path.stat().st_size for path in source.rglob("*.*"))
    assert (planned.num_rows, planned.manifest["shard_rows"], num_bytes) == (43, 16, total)
    assert not (source.parent / "work").exists()


def test_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    build(config(source))
    moved = source.rename(tmp_path / "elsewhere")
    assert build(config(moved)).num_rows == 40
    assert build(config(source)).num_rows == 40  # gone, but nothing is to be read
    save(Image.fromarray(pixels(50)), moved / "a/050.png")
    with pytest.raises(MismatchError, match=r"source is '.*images' there, '.*elsewhere' now; set"):
        build(config(moved))
    with pytest.raises(MismatchError, match="source is"):
        build(config(tmp_path / "nowhere"))


def test_a_damaged_index(source: Path) -> None:
    build(config(source))
    cache = source.parent / "work/cache"
    whole = (cache / "index.parquet").read_bytes()
    (cache / "index.parquet").write_bytes(whole[:-1])
    with pytest.raises(DamagedError, match="index.parquet is not the file that manifest.json desc"):
        build(config(source))
    (cache / "index.parquet").write_bytes(whole)
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "format_version": 7}))
    with pytest.raises(DamagedError, match="format version 7, this package reads 1"):
        read_manifest(LocalStore(str(cache)))
    (cache / "manifest.json").write_text("{")
    with pytest.raises(DamagedError, match="manifest.json is not JSON"):
        read_index(LocalStore(str(cache)))


def test_content_digest_is_blake2b_128() -> None:
    assert content_digest(b"abc") == "cf4ab791c62b8d2b2109c90275287816"


def test_of_two_commands_with_other_settings_one_goes_on(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first is at work: it is refused, and the first finishes."""
    expected = build(dataclasses.replace(config(source), workspace=str(source.parent / "x")))
    plain = IndexStage.open
    refused: list[str] = []

    def open_(self: IndexStage, wanted: object) -> object:
        monkeypatch.setattr(IndexStage, "open", plain)
        for changes in ({"permutation_seed": 5}, {"shard_rows": 8}):
            with pytest.raises(MismatchError) as caught:
                build(dataclasses.replace(config(source), **changes))
            refused.append(str(caught.value))
        return self.open({})

    monkeypatch.setattr(IndexStage, "open", open_)
    assert build(config(source)) == expected
    assert "permutation_seed is 0 there, 5 now; set it back, or remove" in refused[0]
    assert "shard_rows is 0 there, 8 now" in refused[1]
    assert cache_store(config(source)).list("index.parts") == []


def test_a_damaged_manifest_is_found(source: Path) -> None:
    build(config(source))
    path = source.parent / "work/cache/manifest.json"
    data = path.read_bytes()
    digest = read_manifest(cache_store(config(source)))["rows_digest"]
    path.write_bytes(data.replace(digest.encode(), digest[::-1].encode()))
    with pytest.raises(DamagedError, match="manifest.json is damaged, its checksum"):
        read_manifest(cache_store(config(source)))


def test_the_source_is_listed_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the recorded listing is that of the rows, whatever is added meanwhile."""
    from repa_pipeline.data.folder import FolderSource

    listed: list[int] = []
    plain = FolderSource._list
    monkeypatch.setattr(FolderSource, "_list", lambda self: listed.append(1) or plain(self))
    build(config(source))
    assert listed == [1]
