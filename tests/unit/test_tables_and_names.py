"""Parquet tables read by row group, and the names of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repa_pipeline.data import tables
from repa_pipeline.data.index import Entry, open_index, read_index, write_index
from repa_pipeline.data.names import ArrayName, check_part, parse_name
from repa_pipeline.data.objects import LocalStore, open_store
from repa_pipeline.data.tables import TableRows, table_bytes
from repa_pipeline.errors import DamagedError, MismatchError, MissingError

TYPES = {"number": "int64", "word": "string"}


def columns(num_rows: int) -> dict[str, list[object]]:
    return {"number": list(range(num_rows)), "word": [f"word {i}" for i in range(num_rows)]}


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 9), (7, 30), (0, 30), (29, 30), (16, 24)])
def test_rows_by_position(
    start: int, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", 8)
    for store in (LocalStore(str(tmp_path)), open_store("memory://tables")):
        store.put("t.parquet", table_bytes(columns(30), TYPES))
        rows = TableRows(store, "t.parquet")
        expected = [{"number": i, "word": f"word {i}"} for i in range(start, stop)]
        assert rows.rows(start, stop, ("number", "word")) == expected
        assert rows.rows(start, stop, ("word",)) == [{"word": row["word"]} for row in expected]
        numbers = [n for batch in rows.batches(("number",), stop) for n in batch["number"]]
        assert [n.as_py() for n in numbers] == list(range(stop))


def test_only_the_row_groups_asked_for_are_read(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    class Counting(LocalStore):
        def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
            asked.append((start, num_bytes))
            return super().read_range(key, start, num_bytes)

    store = Counting(str(tmp_path))
    num_rows = 40 * tables.GROUP_ROWS
    store.put("t.parquet", table_bytes(columns(num_rows), TYPES))
    rows = TableRows(store, "t.parquet")
    asked.clear()
    found = rows.rows(num_rows - 3, num_rows, ("number",))
    assert [row["number"] for row in found] == list(range(num_rows - 3, num_rows))
    assert sum(num_bytes for _, num_bytes in asked) < (store.size("t.parquet") or 0) / 4


def test_a_damaged_page_is_found(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    data = bytearray(table_bytes(columns(3000), TYPES))
    for position in range(100, 4000, 400):
        data[position] ^= 0xFF
    store.put("t.parquet", data)
    with pytest.raises(DamagedError, match="t.parquet is damaged"):
        TableRows(store, "t.parquet").rows(0, 3000, ("number", "word"))
    with pytest.raises(MissingError, match="no object .*absent"):
        TableRows(store, "absent")
    store.put("t.parquet", b"no parquet at all")
    with pytest.raises(DamagedError, match="t.parquet is damaged"):
        TableRows(store, "t.parquet")


def test_an_index_by_parts_is_the_whole_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", 8)
    entries = [Entry(f"k{i}", i % 3, f"p{i}", -1, 10 + i, 4, 5, "", f"{i:032x}") for i in range(30)]
    bad = Entry("bad", 0, "p", -1, 1, 0, 0, "", "0" * 32, "cannot be read")
    store = LocalStore(str(tmp_path))
    write_index(store, entries, [bad], {"shard_rows": 4})
    for index in (read_index(store), open_index(store)):
        assert index.entries == tuple(entries) and index.num_rows == 30
        parts = [index.rows(start, min(start + 4, 30)) for start in range(0, 30, 4)]
        assert [entry for part in parts for entry in part] == entries
    assert read_index(store) == open_index(store)
    data = bytearray(store.get("index.parquet"))
    data[-20] ^= 1
    store.put("index.parquet", data)
    with pytest.raises(DamagedError, match="is not the file that manifest.json describes"):
        read_index(store)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("latents.sd-vae-ft-ema.256", ArrayName("latents", "sd-vae-ft-ema", 256)),
        ("features.dinov2-b.512.scale", ArrayName("features", "dinov2-b", 512, scale=True)),
        ("features.my.net.64.flip", ArrayName("features", "my.net", 64, mirrored=True)),
        ("features.x.8.flip.scale", ArrayName("features", "x", 8, mirrored=True, scale=True)),
    ],
)
def test_names(text: str, name: ArrayName) -> None:
    assert parse_name(text) == name and str(name) == text
    assert str(name.main) == text.removesuffix(".scale")


@pytest.mark.parametrize(
    "text", ["latents", "latents.x", "images.x.8", "features..8", "latents.x.y"]
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(MismatchError, match="is not an array of a cache"):
        parse_name(text)


@pytest.mark.parametrize(
    "part",
    ["x/../../../EVIL", "..", ".x", "-x", "_x", "a b", "a\\b", "a/b", "a\n", "", None, ["x"]],
)
def test_names_that_are_no_part_of_a_folder_are_refused(part: Any) -> None:
    for refused in (lambda: check_part(part), lambda: ArrayName("features", part, 8)):
        with pytest.raises(MismatchError, match="no name of an encoder or autoencoder") as caught:
            refused()
        assert "\n" not in str(caught.value)
    if isinstance(part, str):
        with pytest.raises(MismatchError):
            parse_name(f"features.{part}.8")


def test_parts_of_names() -> None:
    for part in ("dinov2-b", "my.net", "7", "SigLIP_2+x"):
        assert check_part(part) == part
