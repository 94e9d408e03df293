"""Parquet files with image bytes: the Hugging Face layout and what people make of it."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from repa_pipeline.data.files import Files
from repa_pipeline.data.parquet import ParquetSource, image_records
from repa_pipeline.data.scratch import CHUNK_BYTES
from repa_pipeline.data.source import Item, num_classes, open_source
from repa_pipeline.errors import DamagedError, DataError, MissingError, StageError, StoreError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
CLASSES = ["cat", "dog", "owl"]


def image(number: int, size: int = 300) -> bytes:
    return random.Random(number).randbytes(size + number)


def hub_table(numbers: range, label: str = "label", column: str = "image") -> Any:
    """As the `datasets` library writes images and classes."""
    features = {
        column: {"_type": "Image"},
        label: {"_type": "ClassLabel", "names": CLASSES},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema([(column, STRUCT), (label, pyarrow.int64())], metadata=metadata)
    rows = [{"bytes": image(n), "path": "same.jpg"} for n in numbers]
    return pyarrow.table({column: rows, label: [n % 3 for n in numbers]}, schema=schema)


def write(path: Path, table: Any, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)


def hub_set(folder: Path, count: int = 3) -> dict[str, bytes]:
    """Files of 7 rows in row groups of 2; every image by key."""
    images = {}
    for i in range(count):
        name = f"train-{i:05d}-of-{count:05d}.parquet"
        numbers = range(7 * i, 7 * i + 7)
        compression = ("snappy", "zstd", "none")[i % 3]
        write(folder / name, hub_table(numbers), row_group_size=2, compression=compression)
        images |= {f"{name}/{row}": image(n) for row, n in enumerate(numbers)}
    return images


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., ParquetSource]:
    def open_it(url: str, **options: Any) -> ParquetSource:
        source = open_source(url, scratch_dir=str(tmp_path / "scratch"), **options)
        assert isinstance(source, ParquetSource)
        return source

    return open_it


def test_hub_layout(tmp_path: Path, opened: Callable[..., ParquetSource]) -> None:
    images = hub_set(tmp_path / "set" / "data")
    (tmp_path / "set" / "README.md").write_text("of the hub")
    first = "train-00000-of-00003.parquet"
    urls = ("data", "data/train-*.parquet", "data/train-{00000..00002}-of-00003.parquet", "")
    for url in urls:
        source = opened(f"{tmp_path}/set/{url}")
        items = source.items()
        assert {item.key: source.read(item) for item in items} == images
        assert source.class_names == tuple(CLASSES) and source.remarks == ()
        assert [item.label for item in items] == [n % 3 for n in range(21)]
        assert [item.key for item in items[:3]] == [f"{first}/{row}" for row in range(3)]
        assert items == sorted(items, key=lambda item: (item.path, item.offset))
        assert source.read_group(items[3:6]) == [source.read(item) for item in items[3:6]]
        assert source.groups(items[:2]) == [[0], [1]] and not source.is_remote
    assert len(opened(f"{tmp_path}/set/data/{first}").items()) == 7
    fresh = opened(f"{tmp_path}/set/data")  # a worker that has listed nothing
    listed = opened(f"{tmp_path}/set/data").items()
    assert [fresh.read(item) for item in listed] == list(images.values())
    assert num_classes(items, source.class_names) == 3


def test_urls_equal_local_paths(tmp_path: Path, opened: Callable[..., ParquetSource]) -> None:
    hub_set(tmp_path / "set" / "data")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/test-parquet", recursive=True)
    try:
        local = opened(str(tmp_path / "set"))
        remote = opened("memory://test-parquet")
        assert remote.items() == local.items() and remote.is_remote
        assert remote.groups(remote.items()) == [[i] for i in range(21)]
        assert all(remote.read(item) == local.read(item) for item in local.items())
    finally:
        memory.rm("/test-parquet", recursive=True)


def test_splits_in_one_folder_are_refused(tmp_path: Path) -> None:
    hub_set(tmp_path)
    write(tmp_path / "validation-00000-of-00001.parquet", hub_table(range(2)))
    with pytest.raises(DataError, match=r"several splits \('train-0.*'validation-0") as caught:
        open_source(str(tmp_path))
    assert f"('{tmp_path}/train-*.parquet')" in str(caught.value)
    chosen = open_source(f"{tmp_path}/validation-*.parquet", scratch_dir=str(tmp_path / "scratch"))
    assert len(chosen.items()) == 2
    (tmp_path / "class").mkdir()
    with pytest.raises(DataError, match="holds parquet files .* beside images or folders"):
        open_source(str(tmp_path))


def test_metadata_beside_images_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(b"one")
    write(tmp_path / "metadata.parquet", pyarrow.table({"file_name": ["cat/1.jpg"]}))
    assert [item.key for item in open_source(str(tmp_path)).items()] == ["cat/1.jpg"]


@pytest.mark.parametrize(
    ("columns", "remarks"),
    [
        ({"jpg": [b"a", b"bb"], "cls": [1, 0]}, ("labels from column 'cls'",)),
        ({"png": [b"a", b"bb"], "labels": [1, 0]}, ("labels from column 'labels'",)),
        ({"image": pyarrow.array([b"a", b"bb"], pyarrow.large_binary()), "label": [1, 0]}, ()),
        ({"webp": pyarrow.array([b"a", b"bb"]), "label": pyarrow.array([1, 0], "uint8")}, ()),
    ],
)
def test_other_columns(
    tmp_path: Path,
    opened: Callable[..., ParquetSource],
    columns: dict[str, Any],
    remarks: tuple[str, ...],
) -> None:
    table = pyarrow.table(columns | {"text": ["x", "y"]})
    write(tmp_path / "a.parquet", table)
    source = opened(str(tmp_path / "a.parquet"))
    items = source.items()
    assert [source.read(item) for item in items] == [b"a", b"bb"]
    assert [item.label for item in items] == [1, 0]
    assert source.class_names is None and source.remarks == remarks


def test_columns_that_the_metadata_name(
    tmp_path: Path, opened: Callable[..., ParquetSource]
) -> None:
    write(tmp_path / "a.parquet", hub_table(range(3), label="species", column="photo"))
    source = opened(str(tmp_path / "a.parquet"))
    assert [source.read(item) for item in source.items()] == [image(n) for n in range(3)]
    assert source.class_names == tuple(CLASSES)
    assert source.remarks == ("labels from column 'species'",)


def test_missing_labels(tmp_path: Path, opened: Callable[..., ParquetSource]) -> None:
    for labels, expected in (([-1, -1], [0, 0]), ([None, None], [0, 0]), (None, [0, 0])):
        columns = {"image": [b"a", b"b"]} | ({} if labels is None else {"label": labels})
        schema = pyarrow.schema(
            [("image", pyarrow.binary()), ("label", pyarrow.int32())][: len(columns)]
        )
        write(tmp_path / "a.parquet", pyarrow.table(columns, schema=schema))
        assert [item.label for item in opened(f"{tmp_path}/a.parquet").items()] == expected
    write(tmp_path / "a.parquet", pyarrow.table({"image": [b"a", b"b"], "label": [3, None]}))
    with pytest.raises(DataError, match="1 of 2 samples have no label, first 'a.parquet/1'"):
        opened(f"{tmp_path}/a.parquet").items()


def test_rows_without_bytes_are_items_of_no_bytes(
    tmp_path: Path, opened: Callable[..., ParquetSource]
) -> None:
    rows = [{"bytes": b"a", "path": "1.jpg"}, None, {"bytes": None, "path": "3.jpg"}]
    rows += [{"bytes": b"", "path": None}, {"bytes": b"e", "path": None}]
    table = pyarrow.table(
        {"image": rows, "label": [0] * 5},
        schema=pyarrow.schema([("image", STRUCT), ("label", pyarrow.int8())]),
    )
    write(tmp_path / "a.parquet", table)
    source = opened(f"{tmp_path}/a.parquet")
    items = source.items()
    assert [source.read(item) for item in items] == [b"a", b"", b"", b"", b"e"]
    assert [item.key for item in items] == [f"a.parquet/{row}" for row in range(5)]
    write(tmp_path / "a.parquet", table.slice(1, 2))
    with pytest.raises(DataError, match="'image.bytes' .* holds no bytes in any of 2 rows"):
        opened(f"{tmp_path}/a.parquet").items()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.jpg"], "label": [0]}, "no column of image bytes: found image, label"),
        ({"image": [{"path": "a"}]}, "no column of image bytes: found image"),
        ({"image": [b"a"], "label": ["cat"]}, "column 'label' of a.parquet holds string: expect"),
        ({"image": [b"a"], "label": [1.0]}, "holds double: expected integer labels"),
    ],
)
def test_unusable_tables_say_why(
    tmp_path: Path,
    opened: Callable[..., ParquetSource],
    columns: dict[str, Any],
    message: str,
) -> None:
    write(tmp_path / "a.parquet", pyarrow.table(columns))
    with pytest.raises(DataError, match=message):
        opened(f"{tmp_path}/a.parquet").items()


def test_negative_labels_and_empty_files(
    tmp_path: Path, opened: Callable[..., ParquetSource]
) -> None:
    write(tmp_path / "a.parquet", pyarrow.table({"image": [b"a"], "label": [-2]}))
    source = opened(f"{tmp_path}/a.parquet")
    with pytest.raises(DataError, match="label -2 of 'a.parquet/0' is negative"):
        num_classes(source.items(), source.class_names)
    empty = pyarrow.schema([("image", pyarrow.binary()), ("label", pyarrow.int64())]).empty_table()
    write(tmp_path / "a.parquet", empty)
    with pytest.raises(MissingError, match="no rows in the 1 parquet files"):
        opened(f"{tmp_path}/a.parquet").items()


def test_files_that_disagree_are_refused(
    tmp_path: Path, opened: Callable[..., ParquetSource]
) -> None:
    write(tmp_path / "a.parquet", hub_table(range(2)))
    write(tmp_path / "b.parquet", pyarrow.table({"image": [b"a"], "label": [0]}))
    with pytest.raises(DataError, match="b.parquet and a.parquet have different class names"):
        opened(str(tmp_path)).items()
    write(tmp_path / "sub" / "a.parquet", hub_table(range(2)))
    with pytest.raises(DataError, match="key 'a.parquet/0' occurs twice, in a.parquet at byte 8"):
        opened(f"{tmp_path}/{{,sub/}}a.parquet").items()


def test_damaged_files_are_refused(tmp_path: Path, opened: Callable[..., ParquetSource]) -> None:
    hub_set(tmp_path, count=1)
    (path,) = tmp_path.glob("*.parquet")
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:-50], whole[: len(whole) // 2], whole[:-4] + b"XXXX"):
        path.write_bytes(data)
        with pytest.raises(DataError, match="of-00001.parquet is not a whole parquet file"):
            opened(str(path)).items()
    path.write_bytes(whole[:4] + bytes(400) + whole[404:])  # the footer is whole, the pages not
    with pytest.raises(DataError, match="is not a whole parquet file"):
        opened(str(path)).items()
    scratch = tmp_path / "scratch"
    assert not [name for name in os.listdir(scratch) if name.endswith((".tar", ".part"))]


def test_bombs_are_refused(tmp_path: Path, opened: Callable[..., ParquetSource]) -> None:
    table = pyarrow.table({"image": [bytes(3_000_000)], "label": [0]})
    write(tmp_path / "a.parquet", table, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match="more than 1000 times as much"):
        opened(f"{tmp_path}/a.parquet").items()
    # Repeated values are small as a dictionary: the scratch folder's limit holds them.
    table = pyarrow.table({"image": [image(0, 5000)] * 300, "label": [0] * 300})
    write(tmp_path / "a.parquet", table)
    with pytest.raises(StageError, match="unpacks to .*1502400 bytes.*limit"):
        opened(f"{tmp_path}/a.parquet", scratch_limit_bytes=100_000).items()


def test_file_that_changed_is_damage(tmp_path: Path, opened: Callable[..., ParquetSource]) -> None:
    path = tmp_path / "a.parquet"
    write(path, hub_table(range(4)))
    items = opened(str(path)).items()
    write(path, hub_table(range(9, 13)))
    with pytest.raises(DamagedError, match="a.parquet has no image of 301 bytes at"):
        opened(str(path)).read(items[1])
    path.unlink()
    with pytest.raises(MissingError, match="no parquet at"):
        opened(str(path))
    write(path, hub_table(range(4)))
    gone = opened(str(path))
    path.unlink()
    with pytest.raises(DamagedError, match="a.parquet is gone"):
        gone.read(Item("a.parquet/0", 0, "a.parquet", 8, 300))
    with pytest.raises(DamagedError, match="no image at byte 3"):
        gone.read(Item("a.parquet/0", 0, "a.parquet", 3, 300))


def test_scratch_limit_holds(tmp_path: Path, opened: Callable[..., ParquetSource]) -> None:
    images = hub_set(tmp_path / "set", count=4)
    source = opened(str(tmp_path / "set"), scratch_limit_bytes=5000)
    items = source.items()
    for item in [*items, *items[::-3]]:
        assert source.read(item) == images[item.key]
        sizes = [entry.stat().st_size for entry in os.scandir(tmp_path / "scratch")]
        assert sum(sizes) <= 5000


def test_records_come_in_pieces_and_are_the_rows(tmp_path: Path) -> None:
    images = [image(n, 900_000) for n in range(30)]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": images}), buffer, compression="none")
    pieces = list(image_records(io.BytesIO(buffer.getvalue()), "a.parquet"))
    expected = b"".join(len(i).to_bytes(8, "little") + i for i in images)
    assert b"".join(pieces) == expected
    assert len(pieces) > 2 and max(map(len, pieces)) < CHUNK_BYTES + 1_000_000


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """One row group of 60 MB in pages of a few: what pyarrow holds stays far below it."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"image": [image(n, 300_000) for n in range(200)]})
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}
    parquet.write_table(table, path, **options)
    assert parquet.ParquetFile(path).num_row_groups == 1
    del table
    before = pyarrow.total_allocated_bytes()
    highest = 0
    with open(path, "rb") as file:
        for _ in image_records(file, "a.parquet"):
            highest = max(highest, pyarrow.total_allocated_bytes() - before)
    assert highest < 25_000_000


def test_errors_of_a_store_pass_through_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow hands on what the file below it raises."""
    write(tmp_path / "a.parquet", hub_table(range(300)), row_group_size=10)
    data = (tmp_path / "a.parquet").read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe("/test-parquet/a.parquet", data)
    monkeypatch.setenv("REPA_STORE_FIRST_DELAY_SECONDS", "0.001")

    def refuse(*args: Any, **kwargs: Any) -> bytes:
        raise ConnectionResetError("reset by peer")

    try:
        files = Files(memory, "/test-parquet")
        file = files.open("a.parquet")
        records = image_records(file, "a.parquet")
        monkeypatch.setattr(memory, "cat_file", refuse)
        with pytest.raises(StoreError, match="tried 5 times .*reset by peer"):
            list(records)
    finally:
        monkeypatch.undo()
        memory.rm("/test-parquet", recursive=True)
