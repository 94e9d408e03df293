"""`repa inspect --fidelity`: sound arrays reach their codec's floor, foreign shards do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa_pipeline import commands_exchange
from repa_pipeline.config import FeaturesConfig, LatentsConfig
from repa_pipeline.config_exchange import InspectConfig
from repa_pipeline.data.objects import open_store
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import DamagedError, MissingError
from repa_pipeline.observe import Silent
from repa_pipeline.registry import TABLES
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.fidelity import FLOORS, ArrayFidelity, check_fidelity, require_fidelity
from repa_pipeline.stages.images import ImagePass, run_pass
from repa_pipeline.stages.index import ensure_index
from repa_pipeline.stages.latents import latents_product
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights

SIDE, NUM_IMAGES = 32, 20
LATENTS, FEATURES = "latents.tiny-kl.32", "features.tiny-teacher.32"


@pytest.fixture(autouse=True)
def parts(tmp_path: Path) -> Iterator[None]:
    """20 images in photos/; tiny-kl and tiny-teacher, whose weights are files here."""
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = tmp_path / "photos" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
    specs: list[tuple[str, Any]] = [
        ("autoencoders", tiny_autoencoder(weights=f"{tmp_path}/kl.safetensors")),
        ("encoders", tiny_encoder(weights=f"{tmp_path}/teacher.safetensors", patch_size=8)),
    ]
    with isolated_tables():
        for kind, spec in specs:
            write_weights(spec)
            TABLES[kind].add(spec)
        yield


def encode(folder: Path, name: str = "work", codec: str = "int8", **changes: Any) -> Path:
    common: dict[str, Any] = {
        "source": str(folder / "photos"), "workspace": str(folder / name), "resolution": SIDE,
        "batch_size": 4, "device": "cpu", "threads": 1, "shard_rows": 8, **changes,
    }  # fmt: skip
    features = FeaturesConfig(encoder=("tiny-teacher",), codec=codec, **common)
    index = ensure_index(features, LocalExecutor(), Silent())
    latents = latents_product(LatentsConfig(autoencoder="tiny-kl", **common), index)
    stage = ImagePass(features, (latents, *features_products(features, index)))
    run_pass(stage, index, LocalExecutor(), Silent())
    return folder / name


def config(workspace: Path, **changes: Any) -> InspectConfig:
    settings = {"workspace": str(workspace), "device": "cpu", "threads": 1, "fidelity": True}
    return InspectConfig(**{**settings, **changes})


def check(workspace: Path, **changes: Any) -> dict[str, ArrayFidelity]:
    return {found.name: found for found in check_fidelity(config(workspace, **changes))}


def other_networks() -> None:
    """The networks' files now hold other weights."""
    write_weights(TABLES["encoders"]["tiny-teacher"], seed=1)
    write_weights(TABLES["autoencoders"]["tiny-kl"], seed=1)


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "int4"])
def test_every_codec_reaches_its_floor(tmp_path: Path, codec: str) -> None:
    found = check(encode(tmp_path, codec=codec))
    tokens, latents = found[FEATURES], found[LATENTS]
    assert found.keys() == {FEATURES, LATENTS}
    assert (tokens.rows, tokens.passed, tokens.limit) == (NUM_IMAGES, True, FLOORS[codec])
    assert tokens.worst_cosine is not None and tokens.mean_cosine is not None
    assert FLOORS[codec] <= tokens.worst_cosine <= tokens.mean_cosine <= 1 + 1e-12
    assert tokens.spatial_error is not None
    assert tokens.spatial_error < {"fp16": 1e-3, "bf16": 6e-3, "int8": 0.02, "int4": 0.2}[codec]
    if codec in ("int8", "int4"):
        assert tokens.spatial_error_without_scale is not None
        assert tokens.spatial_error_without_scale > tokens.spatial_error
    else:
        assert tokens.spatial_error_without_scale is None
    assert latents.passed and latents.max_abs_error is not None
    assert 0 < latents.max_abs_error < 2e-3
    require_fidelity(list(found.values()))


def test_errors_are_those_of_the_stored_values(tmp_path: Path) -> None:
    """The reported error of moments is that of float16 rounding, row by row."""
    torch = pytest.importorskip("torch")
    from repa_pipeline.autoencoders.base import load_autoencoder
    from repa_pipeline.data.index import read_index
    from repa_pipeline.data.source import open_source

    workspace = encode(tmp_path)
    store = open_store(str(workspace)).child("cache")
    network = load_autoencoder(TABLES["autoencoders"]["tiny-kl"])
    source = open_source(str(tmp_path / "photos"))
    by_key = {item.key: item for item in source.items()}
    images = [
        np.asarray(Image.open(tmp_path / "photos" / by_key[entry.key].path))
        for entry in read_index(store).entries
    ]
    given = network.encode(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).numpy()
    worst = np.abs(given.astype(np.float16).astype(np.float64) - given).max()
    assert check(workspace)[LATENTS].max_abs_error == pytest.approx(worst, rel=1e-2)


def test_mirrored_views_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    found = check(encode(tmp_path, flip=True))
    assert found.keys() == {LATENTS, f"{LATENTS}.flip", FEATURES, f"{FEATURES}.flip"}
    assert all(array.passed for array in found.values())
    cache = tmp_path / "work/cache"
    for name in (f"{FEATURES}.flip", f"{LATENTS}.flip"):
        for shard in range(3):
            swap(cache, name.removesuffix(".flip"), name, shard)
    found = check(tmp_path / "work")
    assert {name for name, array in found.items() if not array.passed} == {
        f"{FEATURES}.flip",
        f"{LATENTS}.flip",
    }


def swap(cache: Path, source: str, target: str, shard: int) -> None:
    """Puts a shard of one array in the place of another's; every checksum in it is right."""
    (there,) = [p for p in (cache / source / "c" / str(shard)).rglob("*") if p.is_file()]
    (here,) = [p for p in (cache / target / "c" / str(shard)).rglob("*") if p.is_file()]
    shutil.copyfile(there, here)


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_a_shard_of_another_teacher_is_caught(
    tmp_path: Path, codec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = encode(tmp_path, codec=codec)
    weights = (tmp_path / "teacher.safetensors").read_bytes()
    other_networks()
    other = encode(tmp_path, "other", codec=codec)
    (tmp_path / "teacher.safetensors").write_bytes(weights)
    write_weights(TABLES["autoencoders"]["tiny-kl"])
    (here,) = [p for p in (workspace / "cache" / FEATURES / "c/1").rglob("*") if p.is_file()]
    shutil.copyfile(other / here.relative_to(workspace), here)
    found = check(workspace)
    assert found[LATENTS].passed and not found[FEATURES].passed
    assert found[FEATURES].worst_row in range(8, 16)
    with pytest.raises(DamagedError, match=r"1 of 2 arrays .*features.*in row \d+") as caught:
        commands_exchange.inspect(config(workspace))
    assert "\n" not in str(caught.value)
    assert "FAILED" in capsys.readouterr().out


def test_foreign_latents_are_caught(tmp_path: Path) -> None:
    workspace = encode(tmp_path)
    other_networks()
    found = check(workspace)
    assert not found[LATENTS].passed and not found[FEATURES].passed
    assert "recorded are" in found[LATENTS].note and "recorded are" in found[FEATURES].note
    with pytest.raises(DamagedError, match="2 of 2 arrays.*also latents.tiny-kl.32"):
        require_fidelity(list(found.values()))


def test_a_damaged_row_is_said_and_the_rest_compared(tmp_path: Path) -> None:
    workspace = encode(tmp_path)
    (shard,) = [p for p in (workspace / "cache" / FEATURES / "c/0").rglob("*") if p.is_file()]
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    found = check(workspace)
    assert not found[FEATURES].checked and "row 0 fails its crc32c" in found[FEATURES].note
    assert found[LATENTS].passed


def test_zero_tokens_pass(tmp_path: Path) -> None:
    import safetensors.numpy

    path = tmp_path / "teacher.safetensors"
    state = safetensors.numpy.load(path.read_bytes())
    state["embed.weight"][:] = 0
    path.write_bytes(safetensors.numpy.save(state))
    found = check(encode(tmp_path))[FEATURES]
    assert (found.worst_cosine, found.passed) == (1.0, True)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    workspace = encode(tmp_path)
    (tmp_path / "teacher.safetensors").rename(tmp_path / "moved.safetensors")
    found = check(workspace)
    assert not found[FEATURES].checked and "no weights file" in found[FEATURES].note
    assert found[LATENTS].checked
    named = check(workspace, array=(FEATURES,), weights=str(tmp_path / "moved.safetensors"))
    assert named[FEATURES].passed and named.keys() == {FEATURES}
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    with pytest.raises(MissingError, match="nothing could be compared"):
        check(workspace)
    assert check(workspace, source=str(tmp_path / "elsewhere"))[LATENTS].passed


def test_few_rows_are_enough_and_json_holds_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = encode(tmp_path)
    commands_exchange.inspect(config(workspace, rows=3, json=True))
    found = {array["name"]: array for array in json.loads(capsys.readouterr().out)}
    assert found[FEATURES]["rows"] == 3
    assert found[FEATURES]["worst_cosine"] > 0.999
    assert found[LATENTS]["max_abs_error"] > 0
    commands_exchange.inspect(config(workspace, rows=3))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [FEATURES, LATENTS]
    assert all(line.endswith(": ok") for line in lines)


def test_the_class_token_is_left_out_of_the_comparison(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "source": str(tmp_path / "photos"), "workspace": str(tmp_path / "work"), "resolution": 64,
        "batch_size": 10, "device": "cpu", "threads": 1,
    }  # fmt: skip
    features = FeaturesConfig(encoder=("digits-vit",), tokens="patch+cls", codec="int8", **settings)
    index = ensure_index(features, LocalExecutor(), Silent())
    stage = ImagePass(features, tuple(features_products(features, index)))
    run_pass(stage, index, LocalExecutor(), Silent())
    found = check(tmp_path / "work", rows=8)["features.digits-vit.64"]
    assert found.passed and found.worst_cosine is not None and found.worst_cosine > 0.9999
