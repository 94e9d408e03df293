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

from repa_pipeline.config import EncodeAllConfig, FeaturesConfig, IndexConfig, LatentsConfig
from repa_pipeline.data.array import open_sealed
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.data.index import Index, read_index, read_manifest
from repa_pipeline.data.shards import as_rows
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import StageResult
from repa_pipeline.errors import ConfigError, MismatchError, StageError
from repa_pipeline.observe import Silent
from repa_pipeline.registry import TABLES
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import Encoded, ImagePass, Product, encode_in_batches, run_pass
from repa_pipeline.stages.index import cache_store, ensure_index
from repa_pipeline.stages.latents import latents_product
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights

SMALL = {"resolution": 16, "batch_size": 6, "device": "cpu", "threads": 1}


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
    return ensure_index(settings, LocalExecutor(0), Silent())


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
        **{**SMALL, **changes},
    )


def run(*products: Product, index: Index) -> StageResult:
    stage = ImagePass(products[0].config, products)
    return run_pass(stage, index, LocalExecutor(0), Silent())


def encode(settings: LatentsConfig) -> np.ndarray[Any, Any]:
    """The whole sealed array of a pass over the images."""
    index = build(settings)
    product = latents_product(settings, index)
    run(product, index=index)
    return read_array(settings, product.name)


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
        codec="fp16",
    )
    index = build(settings)
    (product,) = features_products(settings, index)
    assert list(run(product, index=index).seconds) == ["read", "decode", "encode", "write"]
    features = read_array(settings, "features.tiny-teacher.16")
    assert features.shape == (40, 4, 16)
    teacher = load_encoder("tiny-teacher", resolution=16)
    for row in (0, 17, 39):
        decoded = decode_image((source / index.entries[row].path).read_bytes())
        image = torch.from_numpy(adm_center_crop(decoded.image, 16)).permute(2, 0, 1)[None]
        assert np.allclose(features[row], teacher.tokens(image)[0].numpy(), atol=4e-3)
    assert product.specs[False, ""].manifest["grid"] == [2, 2]
    for changes, message in (
        ({"encoder": ("tiny-teacher",) * 2}, "--encoder names one twice"),
        ({"encoder": ("siglip2", "siglip2-b")}, "--encoder names one twice: siglip2, siglip2-b"),
        ({"encoder": ("tiny-teacher", "x"), "weights": "w"}, "--weights names one file for 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            features_products(dataclasses.replace(settings, **changes), index)


def test_batches_have_one_size() -> None:
    seen: list[int] = []

    def encode_one(batch: np.ndarray[Any, np.dtype[np.uint8]], num_rows: int) -> Encoded:
        seen.append(len(batch))
        return Encoded({"": batch[:num_rows, 0, 0].astype(np.float16)}, {"rows": num_rows})

    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    encoded = encode_in_batches(encode_one, images, 4)
    assert seen == [4, 4, 4] and encoded.counts == {"rows": 10}
    assert np.array_equal(encoded.parts[""], images[:, 0, 0].astype(np.float16))


def test_changed_bytes_are_refused_and_restored_ones_taken(source: Path, parts: None) -> None:
    """Same path and size, other content; then a file of another size."""
    settings = latents_config(source)
    index = build(settings)
    victim = source / index.entries[20].path
    data = victim.read_bytes()
    product = latents_product(settings, index)
    store = cache_store(settings)
    for changed, message in (
        (data[:-1] + bytes([data[-1] ^ 1]), "is not the one that was indexed: restore it, or"),
        (data + b"x", "source changed since it was indexed"),
    ):
        victim.write_bytes(changed)
        with pytest.raises(StageError, match=r"1 of \d shards? failed, .*rows 16 to 31.*") as e:
            run(product, index=index)
        assert message in str(e.value)
        assert store.list(f"ledger/{product.name}") == ["000000.json", "000002.json"]
        assert store.size(f"{product.name}/seal.json") is None
    victim.write_bytes(data)
    assert run(product, index=index).num_new == 1
    assert read_array(settings, product.name).shape == (40, 8, 2, 2)


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


def features_config(source: Path, *encoders: str, **changes: Any) -> FeaturesConfig:
    return FeaturesConfig(
        source=str(source),
        encoder=encoders or ("tiny-teacher",),
        **{"workspace": str(source.parent / "work"), **SMALL, **changes},
    )


@pytest.fixture
def second_teacher(parts: None, tmp_path: Path) -> None:
    spec = tiny_encoder("other", weights=f"{tmp_path}/other.safetensors", width=12, patch_size=4)
    write_weights(spec, seed=5)
    TABLES["encoders"].add(spec)


def test_one_pass_equals_a_pass_for_each(
    source: Path, second_teacher: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And decodes each image once."""
    from repa_pipeline.stages import images

    alone = shutil.copytree(source, tmp_path / "alone/images")
    encode(latents_config(alone, flip=True))
    for name in ("tiny-teacher", "other"):
        settings = features_config(alone, name, flip=True)
        run(*features_products(settings, build(settings)), index=build(settings))
    settings = EncodeAllConfig(
        **{
            **dataclasses.asdict(features_config(source, "tiny-teacher", "other", flip=True)),
            "autoencoder": "tiny-kl",
        }  # fmt: skip
    )
    index = build(settings)
    decoded: list[int] = []
    plain = images.decode_image
    monkeypatch.setattr(images, "decode_image", lambda *a, **k: decoded.append(1) or plain(*a, **k))
    run(latents_product(settings, index), *features_products(settings, index), index=index)
    assert len(decoded) == 40
    here, there = files(tmp_path / "work/cache"), files(tmp_path / "alone/work/cache")
    assert here.keys() == there.keys()
    different = [name for name in here if here[name] != there[name]]
    assert different == ["manifest.json"]  # the source's path
    names = {name.split("/")[0] for name in here if "seal.json" in name}
    teachers = [f"features.{name}.16" for name in ("tiny-teacher", "other")]
    assert names == {
        *("latents.tiny-kl.16", "latents.tiny-kl.16.flip"),
        *(name + view + part for name in teachers for view in ("", ".flip") for part in
          ("", ".scale")),
    }  # fmt: skip


def test_an_encoder_added_later_touches_nothing(source: Path, second_teacher: None) -> None:
    encode(latents_config(source))
    first = features_config(source)
    run(*features_products(first, build(first)), index=build(first))
    cache = source.parent / "work/cache"
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    both = features_config(source, "tiny-teacher", "other")
    result = run(*features_products(both, build(both)), index=build(both))
    assert {name: output.num_new for name, output in result.outputs.items()} == {
        "features.tiny-teacher.16.scale": 0,
        "features.other.16.scale": 3,
        "features.tiny-teacher.16": 0,
        "features.other.16": 3,
    }
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_the_mirrored_view_is_that_of_the_mirrored_image(source: Path, parts: None) -> None:
    import torch

    from repa_pipeline.autoencoders.base import load_autoencoder
    from repa_pipeline.encoders.base import load_encoder

    encode(latents_config(source, flip=True))
    settings = features_config(source, flip=True, codec="fp16")
    run(*features_products(settings, build(settings)), index=build(settings))
    latents = read_array(settings, "latents.tiny-kl.16.flip")
    tokens = read_array(settings, "features.tiny-teacher.16.flip")
    network, teacher = load_autoencoder("tiny-kl"), load_encoder("tiny-teacher", resolution=16)
    for row, entry in enumerate(read_index(cache_store(settings)).entries):
        decoded = decode_image((source / entry.path).read_bytes())
        mirrored = adm_center_crop(decoded.image, 16)[:, ::-1].copy()
        image = torch.from_numpy(mirrored).permute(2, 0, 1)[None]
        assert np.allclose(latents[row], network.encode(image)[0].numpy(), atol=2e-3)
        assert np.allclose(tokens[row], teacher.tokens(image)[0].numpy(), atol=4e-3)
    manifest = open_sealed(cache_store(settings), "latents.tiny-kl.16.flip", "x").spec.manifest
    assert manifest["view"] == "mirrored"


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_every_codec_and_container(codec: str, container: str, source: Path, parts: None) -> None:
    import torch

    from repa_pipeline.data.codec import CODECS
    from repa_pipeline.data.fidelity import fidelity
    from repa_pipeline.encoders.base import load_encoder

    settings = features_config(source, codec=codec, format=container)
    index = build(settings)
    run(*features_products(settings, index), index=index)
    coded = torch.from_numpy(read_array(settings, "features.tiny-teacher.16"))
    scale = None
    if CODECS[codec].has_scale:
        scale = torch.from_numpy(read_array(settings, "features.tiny-teacher.16.scale"))
    array = open_sealed(cache_store(settings), "features.tiny-teacher.16", "x")
    decoded = CODECS[codec].decoder(array.spec.manifest["codec"])(coded, scale)
    teacher = load_encoder("tiny-teacher", resolution=16)
    images = [
        adm_center_crop(decode_image((source / entry.path).read_bytes()).image, 16)
        for entry in index.entries
    ]
    tokens = teacher.tokens(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    found = fidelity(tokens, decoded)
    assert found.mean_cosine > {"int4": 0.98}.get(codec, 0.9999)
    assert found.worst_cosine > {"int4": 0.93}.get(codec, 0.9995)


def test_the_codec_follows_what_stands(source: Path, parts: None) -> None:
    settings = features_config(source, codec="fp16")
    index = build(settings)
    run(*features_products(settings, index), index=index)
    auto = features_config(source)
    assert run(*features_products(auto, index), index=index).num_new == 0
    (fresh,) = features_products(features_config(source, workspace=f"{source}-new"), index)
    assert fresh.codec == "int8" and fresh.specs[False, ".scale"].layout.shape == (4,)
    with pytest.raises(MismatchError, match=r"codec.name is 'fp16' there, 'int8' now"):
        run(*features_products(features_config(source, codec="int8"), index), index=index)


def test_moments_in_float32_are_the_network_s_own(source: Path, parts: None) -> None:
    import torch

    from repa_pipeline.autoencoders.base import load_autoencoder

    moments = encode(latents_config(source, moments_dtype="float32", batch_size=1))
    assert moments.dtype == np.float32
    network = load_autoencoder("tiny-kl")
    for row, entry in enumerate(read_index(cache_store(latents_config(source))).entries):
        decoded = decode_image((source / entry.path).read_bytes())
        image = torch.from_numpy(adm_center_crop(decoded.image, 16)).permute(2, 0, 1)[None]
        assert np.array_equal(moments[row], network.encode(image)[0].numpy())


def test_compute_settings_are_watched(source: Path, parts: None) -> None:
    encode(latents_config(source))
    with pytest.raises(MismatchError, match="compute is None there, .*bf16"):
        encode(latents_config(source, dtype="bf16"))


def test_a_worker_with_other_weights_writes_nothing(source: Path, parts: None) -> None:
    """The driver hashed its file; the worker's, at the same path, is another one."""
    for settings, make in (
        (latents_config(source), lambda c, i: [latents_product(c, i)]),
        (features_config(source), features_products),
    ):
        index = build(settings)
        products = make(settings, index)
        name = products[0].name
        spec = next(
            entry
            for table in ("autoencoders", "encoders")
            for entry in TABLES[table].values()
            if entry.name in name
        )
        write_weights(spec, seed=9)
        with pytest.raises(MismatchError, match=r"the weights of .* have sha256 .*, expected "):
            run(*products, index=index)
        assert cache_store(settings).list(f"{name}/c") == []


def test_an_entry_of_one_s_own_is_in_the_manifest(source: Path, parts: None) -> None:
    settings = latents_config(source)
    index = build(settings)
    product = latents_product(settings, index)
    entry = product.specs[False, ""].manifest["entry"]
    assert entry == {"loader": "repa_pipeline.testing.networks:load_autoencoder", "model": {}}
    changed = dataclasses.replace(
        settings, overrides={"autoencoders.tiny-kl": {"config": {"depth": 2}}}
    )
    encode(settings)
    with pytest.raises(MismatchError, match=r"entry.model.depth is None there, 2 now"):
        encode(changed)


def test_a_packaged_entry_is_not(source: Path) -> None:
    from repa_pipeline.autoencoders import AUTOENCODERS
    from repa_pipeline.stages.images import own_entry

    spec = AUTOENCODERS["digits-vae"]
    assert own_entry(AUTOENCODERS, spec) == {}
    assert own_entry(AUTOENCODERS, dataclasses.replace(spec, weights="elsewhere")) == {}
    assert own_entry(AUTOENCODERS, dataclasses.replace(spec, config={"x": 1})) != {}
