"""The two passes over the images: aligned rows, watched inputs, bytes of nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.config import FeaturesConfig, IndexConfig, LatentsConfig
from repa_pipeline.data.array import open_sealed
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.data.index import Index, read_index, read_manifest
from repa_pipeline.data.shards import as_rows
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import StageResult, run_stage
from repa_pipeline.errors import ConfigError, MismatchError, StageError
from repa_pipeline.observe import Silent
from repa_pipeline.registry import TABLES
from repa_pipeline.stages.features import features_stages
from repa_pipeline.stages.images import ImageStage, encode_in_batches
from repa_pipeline.stages.index import cache_store, ensure_index
from repa_pipeline.stages.latents import latents_stage
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 images of several sizes in 3 classes."""
    folder = tmp_path / "images"
    generator = np.random.default_rng(0)
    for number in range(40):
        path = folder / "abc"[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 16 + number % 5
        pixels = generator.integers(0, 256, (side, side + number % 3, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def build(settings: IndexConfig) -> Index:
    return ensure_index(settings, Silent())


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[None]:
    folder = str(tmp_path)
    autoencoders = [
        tiny_autoencoder(weights=f"{folder}/kl.safetensors"),
        tiny_autoencoder("tiny-plain", weights=f"{folder}/plain.safetensors", posterior="none"),
    ]
    encoder = tiny_encoder(weights=f"{folder}/teacher.safetensors", patch_size=8)
    with isolated_tables():
        for spec in autoencoders:
            write_weights(spec)
            TABLES["autoencoders"].add(spec)
        write_weights(encoder)
        TABLES["encoders"].add(encoder)
        yield


def latents_config(source: Path, autoencoder: str = "tiny-kl", **changes: Any) -> LatentsConfig:
    return LatentsConfig(
        source=str(source),
        workspace=str(source.parent / "work"),
        autoencoder=autoencoder,
        **{"resolution": 16, "batch_size": 6, "device": "cpu", "threads": 1, **changes},
    )


def run(stage: ImageStage) -> StageResult:
    plan = stage.plan()
    ledger = Ledger(cache_store(stage.config), f"ledger/{stage.name}", plan.fingerprint)
    return run_stage(stage, LocalExecutor(0), ledger, Silent())


def encode(settings: LatentsConfig) -> np.ndarray[Any, Any]:
    """The whole sealed array of a pass over the images."""
    stage = latents_stage(settings, build(settings))
    run(stage)
    return read_array(settings, stage.spec.name)


def read_array(settings: IndexConfig, name: str) -> np.ndarray[Any, Any]:
    array = open_sealed(cache_store(settings), name, "x")
    shards = [array.read_shard(k, array.new_buffer()) for k in range(array.spec.num_shards)]
    return np.concatenate([as_rows(shard, array.spec.layout) for shard in shards])


@pytest.mark.parametrize(("autoencoder", "channels"), [("tiny-kl", 8), ("tiny-plain", 4)])
def test_latents_are_the_images_in_row_order(
    autoencoder: str, channels: int, source: Path, parts: None
) -> None:
    import torch

    from repa_pipeline.autoencoders.base import load_autoencoder

    settings = latents_config(source, autoencoder)
    latents = encode(settings)
    assert latents.shape == (40, channels, 2, 2) and latents.dtype == np.float16
    network = load_autoencoder(autoencoder)
    entries = read_index(cache_store(settings)).entries
    for row, entry in enumerate(entries):
        decoded = decode_image((source / entry.path).read_bytes())
        image = torch.from_numpy(adm_center_crop(decoded.image, 16)).permute(2, 0, 1)[None]
        expected = network.encode(image)[0].numpy()
        assert np.allclose(latents[row], expected, atol=2e-3)
    manifest = open_sealed(cache_store(settings), f"latents.{autoencoder}.16", "x").spec.manifest
    weights = source.parent / f"{'kl' if channels == 8 else 'plain'}.safetensors"
    assert manifest["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert manifest["rows_digest"] == read_manifest(cache_store(settings))["rows_digest"]
    assert (manifest["scale"], manifest["shift"]) == ([0.5], [0.1])


def test_features_are_row_aligned(source: Path, parts: None) -> None:
    import torch

    from repa_pipeline.encoders.base import load_encoder

    settings = FeaturesConfig(
        source=str(source),
        workspace=str(source.parent / "work"),
        encoder=("tiny-teacher",),
        resolution=16,
        batch_size=6,
        device="cpu",
        threads=1,
    )
    index = build(settings)
    (stage,) = features_stages(settings, index)
    run(stage)
    features = read_array(settings, "features.tiny-teacher.16")
    assert features.shape == (40, 4, 16)
    teacher = load_encoder("tiny-teacher", resolution=16)
    for row in (0, 17, 39):
        decoded = decode_image((source / index.entries[row].path).read_bytes())
        image = torch.from_numpy(adm_center_crop(decoded.image, 16)).permute(2, 0, 1)[None]
        assert np.allclose(features[row], teacher.tokens(image)[0].numpy(), atol=4e-3)
    assert stage.spec.manifest["grid"] == [2, 2]
    for changes, message in (
        ({"encoder": ("tiny-teacher",) * 2}, "--encoder names one twice"),
        ({"encoder": ("tiny-teacher", "x"), "weights": "w"}, "--weights names one file for 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            features_stages(dataclasses.replace(settings, **changes), index)


def test_batches_have_one_size() -> None:
    seen: list[int] = []

    def encode_one(batch: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, Any]:
        seen.append(len(batch))
        return batch[:, 0, 0].astype(np.float16)

    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    records = encode_in_batches(encode_one, images, 4)
    assert seen == [4, 4, 4] and np.array_equal(records, images[:, 0, 0].astype(np.float16))


def test_changed_bytes_are_refused_and_restored_ones_taken(source: Path, parts: None) -> None:
    """Same path and size, other content; then a file of another size."""
    settings = latents_config(source)
    index = build(settings)
    victim = source / index.entries[20].path
    data = victim.read_bytes()
    stage = latents_stage(settings, index)
    store = cache_store(settings)
    for changed, message in (
        (data[:-1] + bytes([data[-1] ^ 1]), "is not the one that was indexed: restore it, or"),
        (data + b"x", "source changed since it was indexed"),
    ):
        victim.write_bytes(changed)
        with pytest.raises(StageError, match=r"1 of \d shards? failed, .*rows 16 to 31.*") as e:
            run(stage)
        assert message in str(e.value)
        assert store.list(f"ledger/{stage.name}") == ["000000.json", "000002.json"]
        assert store.size(f"{stage.name}/seal.json") is None
    victim.write_bytes(data)
    assert run(stage).num_new == 1
    assert read_array(settings, stage.name).shape == (40, 8, 2, 2)


def test_where_and_how_fast_do_not_decide_bytes(source: Path, parts: None, tmp_path: Path) -> None:
    encode(latents_config(source))
    moved = shutil.copytree(source, tmp_path / "copy/images")
    encode(latents_config(moved, decode_threads=1, retries=7))
    here, there = files(tmp_path / "work/cache"), files(tmp_path / "copy/work/cache")
    assert here.keys() == there.keys()
    arrays = [name for name in here if name.startswith("latents.")]
    assert len(arrays) == 5 and all(here[name] == there[name] for name in arrays)
    assert here["index.parquet"] == there["index.parquet"]


def test_a_finished_cache_does_without_its_images(source: Path, parts: None) -> None:
    before = encode(latents_config(source))
    shutil.rmtree(source)
    assert np.array_equal(encode(latents_config(source)), before)


def test_settings_that_decide_bytes_are_watched(source: Path, parts: None) -> None:
    settings = latents_config(source)
    encode(settings)
    with pytest.raises(MismatchError, match="batch_size is 6 there, 8 now"):
        encode(dataclasses.replace(settings, batch_size=8))
    write_weights(dataclasses.replace(TABLES["autoencoders"]["tiny-kl"]), seed=1)
    with pytest.raises(MismatchError, match="weights_sha256 is "):
        encode(settings)


def test_values_that_are_not_finite_name_the_image(source: Path, parts: None) -> None:
    import safetensors.numpy

    path = source.parent / "plain.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays["down.weight"][1, 0, 0, 0] = np.inf
    path.write_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(StageError, match="3 of 3 shards failed.* do not fit float16: got one of"):
        encode(latents_config(source, "tiny-plain"))
