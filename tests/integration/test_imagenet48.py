"""Every real odd file decodes to what its record says."""

from __future__ import annotations

import io
import json
import pathlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.data.source import Item, Source, num_classes, open_source

NOTE_OF_MODE = {"RGB": (), "L": ("grayscale",), "CMYK": ("cmyk",), "P": ("palette",)}


@pytest.fixture(scope="module")
def records(shared: pathlib.Path) -> dict[str, Any]:
    text = (shared / "data" / "imagenet48" / "imagenet48.json").read_text()
    return {record["key"]: record for record in json.loads(text)}


@pytest.fixture(scope="module")
def source(shared: pathlib.Path) -> Source:
    return open_source(str(shared / "data" / "imagenet48" / "imagenet48.tar"))


def orientation_note(record: dict[str, Any]) -> tuple[str, ...]:
    orientation = record["exif_orientation"] or 1
    return (f"exif {orientation}",) if orientation > 1 else ()


def test_listing_equals_the_records(source: Source, records: dict[str, Any]) -> None:
    items = source.items()
    assert len(items) == len(records) == 51
    assert {item.key: item.label for item in items} == {
        key: record["imagenet1k"] for key, record in records.items()
    }
    assert {item.key: item.num_bytes for item in items} == {
        key: record["bytes"] for key, record in records.items()
    }
    assert num_classes(items, source.class_names) == 979


def test_every_file_decodes_as_recorded(source: Source, records: dict[str, Any]) -> None:
    notes: Counter[str] = Counter()
    for item in source.items():
        record, data = records[item.key], source.read(item)
        decoded = decode_image(data)
        assert Image.open(io.BytesIO(data)).format == record["format"]
        assert decoded.notes == NOTE_OF_MODE[record["mode"]] + orientation_note(record), item.key
        assert [decoded.width, decoded.height] == record["size"]
        is_turned = (record["exif_orientation"] or 1) > 4
        assert list(decoded.image.size) == (record["size"][::-1] if is_turned else record["size"])
        assert decoded.image.mode == "RGB"
        crop = adm_center_crop(decoded.image, 64)
        assert crop.shape == (64, 64, 3) and crop.std() > 5
        notes.update(decoded.notes)
    assert notes == {"grayscale": 6, "cmyk": 1, "palette": 1, "exif 6": 1, "exif 8": 1}


@pytest.mark.parametrize(
    ("odd", "original", "tolerance"),
    [
        ("synthetic_cmyk_n07753592", "n07753592_banana", 12),
        ("synthetic_png_n07747607", "n07747607_orange", 12),
        ("synthetic_progressive_orient8_n02504458", "n02504458_African_elephant", 12),
    ],
)
def test_synthetic_files_look_like_their_originals(
    source: Source, odd: str, original: str, tolerance: float
) -> None:
    items: dict[str, Item] = {item.key: item for item in source.items()}
    made = decode_image(source.read(items[odd]), upright=False).image
    true = decode_image(source.read(items[original])).image.resize(made.size)
    difference = np.asarray(made).astype(float) - np.asarray(true).astype(float)
    assert np.abs(difference).mean() < tolerance
