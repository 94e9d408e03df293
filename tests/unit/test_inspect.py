"""`repa inspect`: states from manifests and ledgers alone, and what the pictures show."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from repa_pipeline import commands_exchange
from repa_pipeline.config import FeaturesConfig, LatentsConfig
from repa_pipeline.config_exchange import InspectConfig
from repa_pipeline.data.array import SealedArray, open_sealed
from repa_pipeline.data.index import open_index
from repa_pipeline.data.objects import open_store
from repa_pipeline.data.shards import as_rows
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import DamagedError, MissingError
from repa_pipeline.observe import Silent
from repa_pipeline.registry import TABLES
from repa_pipeline.stages.cached_rows import read_rows, spread_rows
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import ImagePass, load_images, run_pass
from repa_pipeline.stages.index import ensure_index, open_config_source
from repa_pipeline.stages.inspect import ArrayState, look
from repa_pipeline.stages.inspect_pictures import draw_pictures, fit_components, token_pictures
from repa_pipeline.stages.inspect_sheet import Cell, contact_sheet, tile_side
from repa_pipeline.stages.latents import latents_product
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights

SIDE, NUM_IMAGES = 32, 20
LATENTS, FEATURES = "latents.tiny-kl.32", "features.tiny-teacher.32"
# Where the first row of tiles begins, and from one tile to the next.
TOP, LEFT, TILE, GAP = 16 + 26 + 2 * 19, 16, 128, 4
Images = npt.NDArray[np.uint8]


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """A cache with latents and int8 tokens of both views, of 20 images in 2 classes."""
    autoencoder = tiny_autoencoder(weights=f"{tmp_path}/kl.safetensors")
    encoder = tiny_encoder(weights=f"{tmp_path}/teacher.safetensors", patch_size=8)
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
    with isolated_tables():
        for kind, spec in (("autoencoders", autoencoder), ("encoders", encoder)):
            write_weights(spec)
            TABLES[kind].add(spec)
        encode(tmp_path)
        yield tmp_path / "work"


def encode(folder: Path, **changes: Any) -> None:
    common: dict[str, Any] = {
        "source": str(folder / "photos"), "workspace": str(folder / "work"), "resolution": SIDE,
        "batch_size": 4, "device": "cpu", "threads": 1, "shard_rows": 8, "flip": True, **changes,
    }  # fmt: skip
    features = FeaturesConfig(encoder=("tiny-teacher",), codec="int8", **common)
    index = ensure_index(features, LocalExecutor(), Silent())
    latents = latents_product(LatentsConfig(autoencoder="tiny-kl", **common), index)
    stage = ImagePass(features, (latents, *features_products(features, index)))
    run_pass(stage, index, LocalExecutor(), Silent())


def config(workspace: Path, **changes: Any) -> InspectConfig:
    return InspectConfig(**{"workspace": str(workspace), "device": "cpu", "threads": 1, **changes})


def by_name(workspace: Path) -> dict[str, ArrayState]:
    return {array.name: array for array in look(config(workspace)).arrays}


def sealed(workspace: Path, name: str) -> SealedArray:
    return open_sealed(open_store(str(workspace)).child("cache"), name, "encode")


def originals(workspace: Path, rows: list[int]) -> Images:
    index = open_index(open_store(str(workspace)).child("cache"))
    source = FeaturesConfig(source=index.manifest["source"], resolution=SIDE)
    entries = [index.rows(row, row + 1)[0] for row in rows]
    return load_images(open_config_source(source), entries, source)[0]


def tile(sheet: Images, place: int) -> Images:
    left = LEFT + place * (TILE + GAP)
    return sheet[TOP : TOP + TILE, left : left + TILE]


def enlarged(image: Images) -> Images:
    factor = TILE // len(image)
    return image.repeat(factor, 0).repeat(factor, 1)


def read_picture(path: str) -> Images:
    return np.asarray(Image.open(path))


def test_states_of_a_finished_cache(workspace: Path) -> None:
    state = look(config(workspace))
    assert (state.index["num_rows"], state.index["num_classes"]) == (20, 2)
    found = by_name(workspace)
    both = [f"{name}{view}" for name in (LATENTS, FEATURES) for view in ("", ".flip")]
    scales = [f"{FEATURES}.scale", f"{FEATURES}.flip.scale"]
    assert found.keys() == {*both, *scales}
    assert {array.progress for array in found.values()} == {"sealed"}
    latents, features = found[LATENTS], found[f"{FEATURES}.flip"]
    assert (latents.shape, latents.dtype, latents.codec) == ((20, 8, 4, 4), "float16", "fp16 v1")
    assert (features.shape, features.dtype, features.view) == ((20, 16, 16), "int8", "mirrored")
    assert (features.codec, features.shards, features.zero_tokens) == ("int8 v1", 3, 0)
    files = (workspace / "cache" / LATENTS / "c").rglob("*")
    assert latents.num_bytes == sum(path.stat().st_size for path in files if path.is_file())
    assert latents.settings["autoencoder"] == "tiny-kl"
    assert len(latents.weights_sha256) == 64


def test_states_of_what_is_unfinished_or_damaged(workspace: Path) -> None:
    cache = workspace / "cache"
    (cache / LATENTS / "seal.json").unlink()
    (cache / "ledger" / LATENTS / "000001.json").unlink()
    seal = cache / FEATURES / "seal.json"
    seal.write_text(seal.read_text().replace('"num_rows": 20', '"num_rows": 21'))
    (cache / f"{FEATURES}.flip" / "zarr.json").write_text("{")
    found = by_name(workspace)
    assert found[LATENTS].progress == "2 of 3 shards"
    assert (found[FEATURES].state, found[f"{FEATURES}.flip"].state) == ("unreadable", "unreadable")
    assert "damaged" in found[FEATURES].problem
    assert "not JSON" in found[f"{FEATURES}.flip"].problem


def test_zero_tokens_of_all_shards_are_counted(workspace: Path) -> None:
    encode_zeros(workspace.parent)
    found = by_name(workspace.parent / "zeros")
    assert found[FEATURES].zero_tokens == 4 * 16


def encode_zeros(folder: Path) -> None:
    """A cache ZEROS of 4 images, by a teacher that gives zeros."""
    import safetensors.numpy

    weights = folder / "teacher.safetensors"
    state = safetensors.numpy.load(weights.read_bytes())
    state["embed.weight"][:] = 0
    weights.write_bytes(safetensors.numpy.save(state))
    for path in sorted((folder / "photos").rglob("*.png"))[4:]:
        path.unlink()
    common: dict[str, Any] = {
        "source": str(folder / "photos"), "workspace": str(folder / "zeros"), "resolution": SIDE,
        "batch_size": 4, "device": "cpu", "threads": 1,
    }  # fmt: skip
    features = FeaturesConfig(encoder=("tiny-teacher",), codec="int8", **common)
    index = ensure_index(features, LocalExecutor(), Silent())
    stage = ImagePass(features, tuple(features_products(features, index)))
    run_pass(stage, index, LocalExecutor(), Silent())


def test_table_json_and_notes_are_printed(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands_exchange.inspect(config(workspace, pictures=False))
    lines = capsys.readouterr().out.splitlines()
    assert "index: 20 rows in 2 classes, 0 excluded" in lines[1]
    (row,) = [line.split() for line in lines if line.startswith(f"{LATENTS} ")]
    assert row[1:7] == ["sealed", "fp16", "v1", "float16", "20x8x4x4", "3"]
    commands_exchange.inspect(config(workspace, pictures=False, json=True))
    found = json.loads(capsys.readouterr().out)
    assert {array["name"] for array in found["arrays"]} == by_name(workspace).keys()
    assert found["index"]["rows_digest"]
    commands_exchange.inspect(config(workspace, array=(LATENTS,), rows=2))
    said = capsys.readouterr().out
    assert f"picture: {workspace}/inspect/{LATENTS}.png" in said
    assert FEATURES not in said


def test_absent_caches_and_arrays_are_said_so(tmp_path: Path, workspace: Path) -> None:
    with pytest.raises(MissingError, match="no cache"):
        look(config(tmp_path / "none"))
    with pytest.raises(MissingError, match=r"no array 'features\.x\.32'.*it holds features"):
        look(config(workspace, array=("features.x.32",)))


def test_rows_are_spread_evenly_and_seeded() -> None:
    rows = spread_rows(1000, 10, 0)
    assert [row // 100 for row in rows] == list(range(10))
    assert rows == spread_rows(1000, 10, 0) != spread_rows(1000, 10, 1)
    assert spread_rows(3, 10, 0) == [0, 1, 2]


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_single_rows_equal_those_of_whole_shards(
    tmp_path: Path, workspace: Path, container: str
) -> None:
    if container == "webdataset":
        shutil.rmtree(workspace)
        encode(tmp_path, format="webdataset")
    array = sealed(workspace, FEATURES)
    buffer = array.new_buffer()
    shards = [as_rows(array.read_shard(k, buffer), array.spec.layout) for k in range(3)]
    rows = [19, 0, 7, 8, 15]
    np.testing.assert_array_equal(read_rows(array, rows), np.concatenate(shards)[rows])
    path = workspace / "cache" / array.spec.shard_key(1)
    data = bytearray(path.read_bytes())
    data[2 * array.spec.layout.stride + array.spec.layout.record_offset + 5] ^= 4
    path.write_bytes(data)
    read_rows(array, [9, 11])
    with pytest.raises(DamagedError, match=r"row 10 fails its crc32c checksum; run `repa repair`"):
        read_rows(array, [9, 10])
    path.unlink()
    with pytest.raises(DamagedError, match="is missing or short, row 9"):
        read_rows(array, [9])


def test_latents_picture_shows_images_and_what_latents_decode_to(workspace: Path) -> None:
    torch = pytest.importorskip("torch")
    from repa_pipeline.autoencoders.base import load_autoencoder

    settings = config(workspace, rows=1, array=(LATENTS,))
    drawn = draw_pictures(settings, look(settings))
    assert drawn.notes == []
    (path,) = drawn.pictures
    sheet = read_picture(path)
    rows = spread_rows(NUM_IMAGES, 1, 0)
    np.testing.assert_array_equal(tile(sheet, 0), enlarged(originals(workspace, rows)[0]))
    network = load_autoencoder(TABLES["autoencoders"]["tiny-kl"])
    for place, view in ((1, ""), (2, ".flip")):
        mean = read_rows(sealed(workspace, LATENTS + view), rows).astype(np.float32)[:, :4]
        decoded = (network.decode(torch.from_numpy(mean))[0].permute(1, 2, 0).numpy() + 1) * 127.5
        expected = enlarged(np.clip(decoded.round(), 0, 255).astype(np.uint8))
        np.testing.assert_array_equal(tile(sheet, place), expected)


def test_features_picture_shows_three_components(workspace: Path) -> None:
    settings = config(workspace, rows=4, array=(FEATURES,))
    (path,) = draw_pictures(settings, look(settings)).pictures
    sheet = read_picture(path)
    rows = spread_rows(NUM_IMAGES, 4, 0)
    np.testing.assert_array_equal(tile(sheet, 0), enlarged(originals(workspace, rows)[0]))
    plain, mirrored = (tokens_of(workspace, FEATURES + view, rows) for view in ("", ".flip"))
    components = fit_components(plain.reshape(-1, 16))
    for place, tokens in ((1, plain), (2, mirrored)):
        expected = token_pictures(tokens, components, (4, 4))[0]
        np.testing.assert_array_equal(tile(sheet, place), enlarged(expected))


def tokens_of(workspace: Path, name: str, rows: list[int]) -> npt.NDArray[np.float32]:
    torch = pytest.importorskip("torch")
    from repa_pipeline.data.codec import CODECS

    array = sealed(workspace, name)
    decode = CODECS["int8"].decoder(array.spec.manifest["codec"])
    scale = torch.from_numpy(read_rows(sealed(workspace, f"{name}.scale"), rows))
    found: npt.NDArray[np.float32] = decode(torch.from_numpy(read_rows(array, rows)), scale).numpy()
    return found


def test_components_are_those_of_the_svd_with_a_fixed_sign() -> None:
    generator = np.random.default_rng(0)
    tokens = (generator.standard_normal((300, 6)) * [1, 5, 0.1, 3, 2, 0.5] + 7).astype(np.float32)
    found = fit_components(tokens)
    _, _, rows = np.linalg.svd(tokens.astype(np.float64) - tokens.mean(0, np.float64))
    for axis, row in zip(found.axes.T, rows, strict=False):
        sign = np.sign(row[np.abs(row).argmax()])
        np.testing.assert_allclose(axis, row * sign, atol=1e-8)
        assert axis[np.abs(axis).argmax()] > 0
    pictures = token_pictures(tokens[None], found, (20, 15))
    assert pictures.shape == (1, 20, 15, 3)
    for channel in range(3):
        at_ends = [(pictures[..., channel] == end).mean() for end in (0, 255)]
        assert all(0.005 < share < 0.015 for share in at_ends)


def test_few_or_equal_tokens_still_make_a_picture() -> None:
    found = fit_components(np.ones((4, 2), np.float32))
    assert token_pictures(np.ones((1, 4, 2), np.float32), found, (2, 2)).shape == (1, 2, 2, 3)


def test_without_weights_the_table_and_the_tokens_remain(workspace: Path) -> None:
    (workspace.parent / "kl.safetensors").unlink()
    drawn = draw_pictures(config(workspace), look(config(workspace)))
    assert drawn.pictures == [f"{workspace}/inspect/{FEATURES}.png"]
    (note,) = drawn.notes
    assert note.startswith(f"{LATENTS} is not drawn: no weights file at ")


def test_without_the_source_what_latents_decode_to_stands_beside(workspace: Path) -> None:
    shutil.rmtree(workspace.parent / "photos")
    settings = config(workspace, rows=2)
    drawn = draw_pictures(settings, look(settings))
    assert len(drawn.pictures) == 2
    (note,) = drawn.notes
    assert note.startswith("images of the source are not shown: ")
    by_array = {Path(path).name.removesuffix(".png"): path for path in drawn.pictures}
    latents, features = (read_picture(by_array[name]) for name in (LATENTS, FEATURES))
    np.testing.assert_array_equal(tile(latents, 0), tile(features, 0))


def test_other_weights_are_said_to_be_others(workspace: Path) -> None:
    write_weights(
        dataclasses.replace(
            TABLES["autoencoders"]["tiny-kl"], weights=str(workspace.parent / "other.safetensors")
        ),
        seed=1,
    )
    settings = config(
        workspace, array=(LATENTS,), weights=str(workspace.parent / "other.safetensors")
    )
    drawn = draw_pictures(settings, look(settings))
    assert len(drawn.pictures) == 1
    assert any("recorded are" in note for note in drawn.notes)


def test_pictures_go_to_a_url_too(workspace: Path) -> None:
    url = f"memory://pictures/{workspace.parent.name}"
    settings = config(workspace, rows=1, array=(LATENTS,), output=url)
    drawn = draw_pictures(settings, look(settings))
    assert drawn.pictures == [f"{open_store(url).url}/{LATENTS}.png"]
    data = open_store(url).get(f"{LATENTS}.png")
    assert Image.open(io.BytesIO(data)).format == "PNG"


def test_a_sheet_has_room_for_all_its_tiles_and_long_names() -> None:
    cell = Cell((np.zeros((8, 8, 3), np.uint8),) * 2, ("class 1, row 2", "long/" * 60 + "end.png"))
    for count in (1, 5, 23):
        sheet = contact_sheet("title", "about", ["image", "decoded"], [cell] * count, 128)
        black = (sheet == 0).all(-1).sum()
        assert count * 2 * 128 * 128 <= black < count * 2 * 128 * 128 * 1.01
        assert sheet.shape[1] <= 1900
        assert (sheet[:, -8:] == 255).all() and (sheet[-4:] == 255).all()


def test_tiles_are_whole_multiples_of_small_images() -> None:
    assert [tile_side(size) for size in (16, 48, 64, 128, 150, 256, 512)] == [
        128, 144, 128, 128, 150, 192, 192
    ]  # fmt: skip
