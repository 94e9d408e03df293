"""Caches to and from the reference's format and webdataset: exact round trips, refusals, kills."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from repa_pipeline import commands_exchange
from repa_pipeline.config import FeaturesConfig, LatentsConfig
from repa_pipeline.config_exchange import ExportConfig, ImportConfig
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.array import SealedArray, open_sealed
from repa_pipeline.data.index import Index, read_index, read_labels
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.data.shards import as_rows
from repa_pipeline.data.source import open_source
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import StageResult, run_stage
from repa_pipeline.errors import (
    ConfigError,
    DataError,
    MismatchError,
    MissingError,
    RepaError,
    StageError,
)
from repa_pipeline.observe import Silent
from repa_pipeline.registry import TABLES
from repa_pipeline.stages.exporting import RECORD
from repa_pipeline.stages.exporting_reference import ReferenceZip, reference_export
from repa_pipeline.stages.exporting_webdataset import webdataset_export
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import ImagePass, run_pass
from repa_pipeline.stages.importing_reference import import_reference
from repa_pipeline.stages.importing_webdataset import import_webdataset
from repa_pipeline.stages.index import ensure_index
from repa_pipeline.stages.latents import latents_product
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights
from repa_pipeline.training.inputs import open_inputs

NUM_IMAGES, SIDE, SHARD_ROWS = 20, 32, 8
LATENTS, FEATURES = "latents.tiny-kl.32", "features.tiny-teacher.32"
Moments = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def parts(tmp_path: Path) -> Iterator[None]:
    autoencoder = tiny_autoencoder(weights=f"{tmp_path}/kl.safetensors")
    plain = tiny_autoencoder(
        "tiny-plain", weights=f"{tmp_path}/plain.safetensors", posterior="none"
    )
    encoder = tiny_encoder(weights=f"{tmp_path}/teacher.safetensors", patch_size=8)
    with isolated_tables():
        for kind, spec in (("autoencoders", autoencoder), ("autoencoders", plain)):
            write_weights(spec)
            TABLES[kind].add(spec)
        write_weights(encoder)
        TABLES["encoders"].add(encoder)
        yield


def image_name(number: int) -> str:
    return f"00000/img{number:08d}.png"


def latent_name(number: int) -> str:
    return f"00000/img-mean-std-{number:08d}.npy"


def write_reference(folder: Path, *, where: str = "vae-sd") -> tuple[Moments, list[int]]:
    """A reference set of NUM_IMAGES images; returns its moments [N, 8, 4, 4] and labels."""
    generator = np.random.default_rng(0)
    mean = generator.standard_normal((NUM_IMAGES, 4, 4, 4))
    std = generator.uniform(0.01, 0.6, mean.shape)
    moments = np.concatenate([mean, std], 1).astype(np.float32)
    labels = [int(label) for label in generator.integers(0, 5, NUM_IMAGES)]
    for number in range(NUM_IMAGES):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        save_image(folder / "images" / image_name(number), pixels)
        path = folder / "vae-sd" / latent_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, moments[number])
    name_of = latent_name if where == "vae-sd" else image_name
    pairs = [[name_of(number), label] for number, label in enumerate(labels)]
    (folder / where / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return moments, labels


def save_image(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def zip_folder(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


def import_config(source: Path | str, workspace: Path, **changes: Any) -> ImportConfig:
    settings: dict[str, Any] = {
        "source": str(source),
        "workspace": str(workspace),
        "autoencoder": "tiny-kl",
        "shard_rows": SHARD_ROWS,
        "decode_threads": 2,
        "executor": "local",
        "device": "cpu",
        **changes,
    }
    return ImportConfig(**settings)


def run_import(config: ImportConfig) -> tuple[Index, StageResult]:
    run = import_reference if config.from_ == "reference" else import_webdataset
    return run(config, LocalExecutor(pause_s=0), Silent())


def run_export(workspace: Path, where: Path | str, **changes: Any) -> StageResult:
    config = ExportConfig(
        **{"workspace": str(workspace), "destination": str(where), "decode_threads": 2, **changes}
    )
    stage: Any = (reference_export if config.to == "reference" else webdataset_export)(config)
    (output,) = stage.outputs
    return run_stage(stage, LocalExecutor(pause_s=0), {output.name: output.ledger}, Silent())


def cache(workspace: Path) -> ObjectStore:
    return open_store(str(workspace)).child("cache")


def sealed(workspace: Path, name: str) -> SealedArray:
    return open_sealed(cache(workspace), name, "import")


def records(workspace: Path, name: str) -> npt.NDArray[Any]:
    array = sealed(workspace, name)
    buffer = array.new_buffer()
    shards = range(array.spec.num_shards)
    return np.concatenate([as_rows(array.read_shard(k, buffer), array.spec.layout) for k in shards])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of an export but its own books."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".repa-export" not in path.parts and path.name != RECORD
    }


def as_the_reference_reads(folder: Path) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any], int]]:
    """(image, moments, label) by sorted position; labels by the names in vae-sd/."""
    images = sorted((folder / "images").rglob("*.png"))
    latents = sorted((folder / "vae-sd").rglob("*.npy"))
    assert len(images) == len(latents)
    labels = dict(json.loads((folder / "vae-sd/dataset.json").read_text())["labels"])
    return [
        (
            np.asarray(Image.open(image)),
            np.load(latent),
            labels[latent.relative_to(folder / "vae-sd").as_posix()],
        )
        for image, latent in zip(images, latents, strict=True)
    ]


def encode_folder(tmp_path: Path, **changes: Any) -> Path:
    """A cache of 20 images in class folders, with tiny-kl and tiny-teacher; its workspace."""
    generator = np.random.default_rng(3)
    for number in range(NUM_IMAGES):
        side = SIDE + number % 3
        pixels = generator.integers(0, 256, (side, side + 5, 3), np.uint8)
        save_image(tmp_path / "photos" / "abc"[number % 3] / f"p.{number:02d}.png", pixels)
    return encode(tmp_path / "photos", tmp_path / "work", **changes)


def encode(
    source: Path | str,
    workspace: Path,
    *,
    latents: bool = True,
    codec: str = "fp16",
    **changes: Any,
) -> Path:
    common: dict[str, Any] = {
        "source": str(source),
        "workspace": str(workspace),
        "resolution": SIDE,
        "batch_size": 4,
        "device": "cpu",
        "threads": 1,
        "shard_rows": SHARD_ROWS,
        **changes,
    }
    features = FeaturesConfig(encoder=("tiny-teacher",), codec=codec, **common)
    index = ensure_index(features, LocalExecutor(), Silent())
    products: list[Any] = list(features_products(features, index))
    if latents:
        products.append(latents_product(LatentsConfig(autoencoder="tiny-kl", **common), index))
    run_pass(ImagePass(features, tuple(products)), index, LocalExecutor(), Silent())
    return workspace


# The reference's format


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("where", ["vae-sd", "images"])
def test_import_pairs_keys_labels_and_moments(tmp_path: Path, kind: str, where: str) -> None:
    moments, labels = write_reference(tmp_path / "set", where=where)
    source = tmp_path / "set" if kind == "folder" else zip_folder(tmp_path / "set")
    index, result = run_import(import_config(source, tmp_path / "work"))
    order = [int(entry.key[9:17]) for entry in index.entries]
    assert order != sorted(order) and sorted(order) == list(range(NUM_IMAGES))
    assert [entry.key for entry in index.entries] == [image_name(number) for number in order]
    assert read_labels(cache(tmp_path / "work")).tolist() == [labels[number] for number in order]
    stored = records(tmp_path / "work", LATENTS)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, moments[order].astype(np.float16))
    assert result.outputs[LATENTS].num_new == 3
    manifest = sealed(tmp_path / "work", LATENTS).spec.manifest
    assert manifest["weights_sha256"] == "imported: unknown"
    assert manifest["imported"] is True
    assert (manifest["resolution"], manifest["scale"], manifest["shift"]) == (32, [0.5], [0.1])


def test_a_second_import_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reference(tmp_path / "set")
    config = import_config(tmp_path / "set", tmp_path / "work")
    commands_exchange.import_(config)
    assert f"{LATENTS}: 20 rows" in capsys.readouterr().out
    commands_exchange.import_(config)
    done = tmp_path / "work" / "cache" / LATENTS
    assert f"nothing to do: {done} is complete" in capsys.readouterr().out
    assert cache(tmp_path / "work").list("import.parts") == []


@pytest.mark.parametrize("to_zip", [False, True])
def test_reference_round_trip_is_bit_exact_in_float32(tmp_path: Path, to_zip: bool) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work", moments_dtype="float32"))
    back = tmp_path / "back"
    run_export(tmp_path / "work", tmp_path / "back.zip" if to_zip else back)
    if to_zip:
        with zipfile.ZipFile(tmp_path / "back.zip") as archive:
            archive.extractall(back)
        assert not (tmp_path / "back.zip.parts").exists()
    given, found = tree(tmp_path / "set"), tree(back)
    assert given.keys() | {"images/dataset.json"} == found.keys()
    for name in given:
        if name.endswith(".npy"):
            assert found[name] == given[name]
        elif name.endswith(".png"):
            images = [Image.open(io.BytesIO(files[name])) for files in (given, found)]
            np.testing.assert_array_equal(*map(np.asarray, images))
        else:
            assert json.loads(found[name]) == json.loads(given[name])


def test_reference_round_trip_rounds_to_float16(tmp_path: Path) -> None:
    moments, labels = write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    run_export(tmp_path / "work", tmp_path / "back")
    read = as_the_reference_reads(tmp_path / "back")
    assert [label for _, _, label in read] == labels
    for number, (_, found, _) in enumerate(read):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, moments[number].astype(np.float16).astype(np.float32))


def test_a_gap_in_the_numbers_survives_the_round_trip(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    (tmp_path / "set/images" / image_name(7)).unlink()
    (tmp_path / "set/vae-sd" / latent_name(7)).unlink()
    labels = json.loads((tmp_path / "set/vae-sd/dataset.json").read_text())["labels"]
    del labels[7]
    (tmp_path / "set/vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    run_export(tmp_path / "work", tmp_path / "back", images=False)
    assert json.loads((tmp_path / "back/vae-sd/dataset.json").read_text())["labels"] == labels
    assert not (tmp_path / "back/images").exists()


def test_export_of_an_encoded_folder_is_what_the_reference_would_pair(tmp_path: Path) -> None:
    """Names count in the source's order; image i, latent i and label i belong together."""
    from repa_pipeline.autoencoders.base import load_autoencoder

    torch = pytest.importorskip("torch")
    workspace = encode_folder(tmp_path)
    run_export(workspace, tmp_path / "back")
    photos = sorted((tmp_path / "photos").rglob("*.png"))
    read = as_the_reference_reads(tmp_path / "back")
    network = load_autoencoder(TABLES["autoencoders"]["tiny-kl"])
    assert [label for _, _, label in read] == ["abc".index(p.parent.name) for p in photos]
    for photo, (image, moments, _) in zip(photos, read, strict=True):
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        np.testing.assert_allclose(moments, network.encode(pixels)[0].numpy(), atol=2e-3)
        assert image.shape == (SIDE, SIDE, 3)
        with Image.open(photo) as opened:
            assert min(opened.size) >= SIDE
    names = json.loads((tmp_path / "back/images/dataset.json").read_text())["labels"]
    assert [name for name, _ in names] == [image_name(number) for number in range(NUM_IMAGES)]


def test_images_of_another_place_than_the_indexed_one_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace, moved = encode_folder(tmp_path), tmp_path / "moved"
    run_export(workspace, tmp_path / "plain")
    assert caplog.messages == []
    (tmp_path / "photos").rename(moved)
    run_export(workspace, tmp_path / "back", source=str(moved))
    said = f"images are read from {moved}, the index was made of {tmp_path / 'photos'} (--source"
    assert [message.startswith(said) for message in caplog.messages] == [True]
    with pytest.raises(StageError, match="3 of 3 shards failed.*source changed"):
        run_export(workspace, tmp_path / "none", source=str(tmp_path / "plain" / "images"))
    assert f"images are read from {tmp_path / 'plain' / 'images'}" in caplog.text


def test_training_takes_imported_latents_with_features_cached_afterwards(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    workspace = tmp_path / "work"
    run_import(import_config(tmp_path / "set", workspace))
    encode(tmp_path / "set", workspace, latents=False)
    inputs = open_inputs(
        TrainConfig(workspace=str(workspace), autoencoder="tiny-kl", encoder=("tiny-teacher",))
    )
    assert [array.spec.name for array in inputs.arrays] == [LATENTS, FEATURES]
    with pytest.raises(MismatchError, match="was made with other settings"):
        encode(tmp_path / "set", workspace)


def missing_latent(folder: Path) -> None:
    (folder / "vae-sd" / latent_name(11)).unlink()


def missing_latent_and_no_labels(folder: Path) -> None:
    missing_latent(folder)
    (folder / "vae-sd/dataset.json").write_text('{"labels": null}')


def missing_image(folder: Path) -> None:
    (folder / "images" / image_name(11)).unlink()
    (folder / "vae-sd/dataset.json").write_text('{"labels": null}')


def other_missing(folder: Path) -> None:
    missing_image(folder)
    (folder / "vae-sd" / latent_name(3)).unlink()


def no_latents(folder: Path) -> None:
    for path in (folder / "vae-sd").rglob("*.npy"):
        path.unlink()
    (folder / "vae-sd/dataset.json").write_text('{"labels": null}')


def foreign_resolution(folder: Path) -> None:
    for number in range(NUM_IMAGES):
        np.save(folder / "vae-sd" / latent_name(number), np.ones((8, 8, 8), np.float32))


def foreign_channels(folder: Path) -> None:
    for number in range(NUM_IMAGES):
        np.save(folder / "vae-sd" / latent_name(number), np.ones((32, 4, 4), np.float32))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (missing_latent, r"img-mean-std-00000011|img00000011"),
        (missing_latent_and_no_labels, r"first without its latent is 00000/img00000011\.png"),
        (missing_image, r"first without its image is 00000/img-mean-std-00000011\.npy"),
        (other_missing, r"00000/img00000003\.png"),
        (no_latents, "has no latents in vae-sd/"),
        (foreign_resolution, "is 32x32, the latents are of images of 64x64"),
        (foreign_channels, r"latents have shape \[32, 4, 4\].*--autoencoder"),
    ],
)
def test_unfit_reference_sets_are_refused(tmp_path: Path, damage: Any, said: str) -> None:
    write_reference(tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises((DataError, MismatchError), match=said) as caught:
        run_import(import_config(tmp_path / "set", tmp_path / "work"))
    assert "\n" not in str(caught.value)
    assert cache(tmp_path / "work").size(f"{LATENTS}/seal.json") is None


def with_values(change: Any) -> bytes:
    moments = np.ones((8, 4, 4), np.float32)
    buffer = io.BytesIO()
    np.save(buffer, change(moments))
    return buffer.getvalue()


def put(moments: Moments, where: tuple[int, int, int], value: float) -> Moments:
    moments[where] = value
    return moments


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (with_values(lambda m: put(m, (0, 0, 0), np.nan)), "not finite"),
        (with_values(lambda m: put(m, (4, 0, 0), 0.0)), "std of 0, expected all above 0"),
        (with_values(lambda m: put(m, (7, 3, 3), -1.5)), "std of -1.5"),
        (with_values(lambda m: put(m, (0, 0, 0), 1e6)), "do not fit float16"),
        (with_values(lambda m: m.astype(np.float64)), "holds float64"),
        (with_values(lambda m: m[:, :2]), r"shape \[8, 2, 4\], expected \[8, 4, 4\]"),
        (with_values(lambda m: m)[:-1], "is torn"),
        (b"", "not a whole .npy"),
        (b"\x93NUMPY\x01\x00\x05\x00{'a'\n" + bytes(512), "not a whole .npy"),
    ],
)
def test_unusable_latents_are_refused_and_named(tmp_path: Path, content: bytes, said: str) -> None:
    write_reference(tmp_path / "set")
    (tmp_path / "set/vae-sd" / latent_name(9)).write_bytes(content)
    with pytest.raises(StageError, match=said) as caught:
        run_import(import_config(tmp_path / "set", tmp_path / "work"))
    if "float16" not in said:
        assert f"vae-sd/{latent_name(9)}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cache(tmp_path / "work").size(f"{LATENTS}/seal.json") is None


def test_a_mended_import_does_only_what_is_missing(tmp_path: Path) -> None:
    moments, _ = write_reference(tmp_path / "set")
    whole = (tmp_path / "set/vae-sd" / latent_name(9)).read_bytes()
    (tmp_path / "set/vae-sd" / latent_name(9)).write_bytes(whole[:-4] + bytes(4))
    config = import_config(tmp_path / "set", tmp_path / "work")
    with pytest.raises(StageError, match="1 of 3 shards failed"):
        run_import(config)
    (tmp_path / "set/vae-sd" / latent_name(9)).write_bytes(whole)
    index, result = run_import(config)
    assert result.outputs[LATENTS].num_new == 1
    order = [int(entry.key[9:17]) for entry in index.entries]
    np.testing.assert_array_equal(
        records(tmp_path / "work", LATENTS), moments[order].astype(np.float16)
    )


def test_weights_are_recorded_by_their_hash(tmp_path: Path) -> None:
    import hashlib

    write_reference(tmp_path / "set")
    weights = tmp_path / "kl.safetensors"
    run_import(import_config(tmp_path / "set", tmp_path / "work", weights=str(weights)))
    recorded = sealed(tmp_path / "work", LATENTS).spec.manifest["weights_sha256"]
    assert recorded == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_another_set_or_another_autoencoder_in_the_workspace_is_refused(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    np.save(tmp_path / "set/vae-sd" / latent_name(0), np.ones((8, 4, 4), np.float16))
    with pytest.raises(MismatchError, match="latents_listing"):
        run_import(import_config(tmp_path / "set", tmp_path / "work"))
    save_image(tmp_path / "photos/a/1.png", np.zeros((SIDE, SIDE, 3), np.uint8))
    encode(tmp_path / "photos", tmp_path / "other", latents=False)
    with pytest.raises(MismatchError, match="source"):
        run_import(import_config(tmp_path / "set", tmp_path / "other"))


KILLED = """
    import os, signal, sys
    from repa_pipeline import commands_exchange
    from repa_pipeline.data import objects
    from repa_pipeline.config_exchange import ExportConfig, ImportConfig
    from repa_pipeline.registry import TABLES
    from repa_pipeline.testing.parts import tiny_autoencoder

    TABLES["autoencoders"].add(tiny_autoencoder())
    written, plain = [0], objects.LocalStore._write_temporary

    def write(self, final, data):
        if KEY in str(final):
            written[0] += 1
            if written[0] == AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, final, data)

    objects.LocalStore._write_temporary = write
    RUN
"""


def run_killed(run: str, key: str, after: int) -> None:
    """Runs `run` in a process that is killed at its `after`-th write of an object named `key`."""
    code = textwrap.dedent(KILLED).replace("KEY", repr(key)).replace("AFTER", str(after))
    code = code.replace("RUN", run)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def arguments(config: Any) -> str:
    given = dataclasses.asdict(config)
    return f"{type(config).__name__}(**{given!r})"


@pytest.mark.parametrize(("key", "after"), [(f"{LATENTS}/c/", 2), ("ledger/latents", 3)])
def test_a_killed_import_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, key: str, after: int
) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "undisturbed"))
    config = import_config(tmp_path / "set", tmp_path / "work")
    run_killed(f"commands_exchange.import_({arguments(config)})", key, after)
    assert cache(tmp_path / "work").size(f"{LATENTS}/seal.json") is None
    _, result = run_import(config)
    assert 0 < result.outputs[LATENTS].num_new < (4 if "/c/" in key else 3)
    expected, got = tree(tmp_path / "undisturbed"), tree(tmp_path / "work")
    assert got == expected


@pytest.mark.parametrize("to", ["back", "back.zip"])
def test_a_killed_reference_export_goes_on(tmp_path: Path, to: str) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    run_export(tmp_path / "work", tmp_path / "undisturbed" / to)
    config = ExportConfig(workspace=str(tmp_path / "work"), destination=str(tmp_path / to))
    run_killed(f"commands_exchange.export({arguments(config)})", "ledger/", 2)
    result = run_export(tmp_path / "work", tmp_path / to)
    assert result.outputs["reference"].num_new == 2
    if to == "back":
        assert tree(tmp_path / to) == tree(tmp_path / "undisturbed" / to)
    else:
        assert (tmp_path / to).read_bytes() == (tmp_path / "undisturbed" / to).read_bytes()


def test_a_lost_file_of_an_export_is_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    run_export(tmp_path / "work", tmp_path / "back")
    before = tree(tmp_path / "back")
    (tmp_path / "back/vae-sd" / latent_name(4)).unlink()
    (tmp_path / "back/images" / image_name(5)).write_bytes(b"")
    (tmp_path / "back/vae-sd/00000/.tmp-999999999-0").write_bytes(b"left")
    result = run_export(tmp_path / "work", tmp_path / "back")
    assert 1 <= result.outputs["reference"].num_new <= 2
    assert tree(tmp_path / "back") == before
    config = ExportConfig(workspace=str(tmp_path / "work"), destination=str(tmp_path / "back"))
    commands_exchange.export(config)
    assert "nothing to do" in capsys.readouterr().out


def test_unfit_exports_are_refused(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    workspace = tmp_path / "work"
    with pytest.raises(MissingError, match="no cache"):
        run_export(workspace, tmp_path / "back")
    run_import(import_config(tmp_path / "set", workspace))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(MismatchError, match="not empty"):
        run_export(workspace, tmp_path / "full")
    (tmp_path / "full.zip").write_bytes(b"mine")
    with pytest.raises(MismatchError, match="no export of ours"):
        run_export(workspace, tmp_path / "full.zip")
    run_export(workspace, tmp_path / "back")
    with pytest.raises(MismatchError, match="another export: images is True there, False now"):
        run_export(workspace, tmp_path / "back", images=False)
    with pytest.raises(MismatchError, match="another export: "):
        run_export(workspace, tmp_path / "back", to="webdataset")
    for to, where in (("reference", "s3://bucket/x"), ("webdataset", "x.zip"), ("reference", "")):
        with pytest.raises(ConfigError, match="destination"):
            run_export(workspace, where, to=to)
    with pytest.raises(MissingError, match="no finished latents of taesd"):
        run_export(workspace, tmp_path / "new", autoencoder="taesd")
    with pytest.raises(MissingError, match="no finished features of dinov2-b"):
        run_export(workspace, tmp_path / "new", to="webdataset", encoder=("dinov2-b",))


def test_latents_without_std_have_no_reference_format(tmp_path: Path) -> None:
    workspace = encode_folder(tmp_path)
    common: dict[str, Any] = {
        "source": str(tmp_path / "photos"), "workspace": str(workspace), "resolution": SIDE,
        "batch_size": 4, "device": "cpu", "threads": 1,
    }  # fmt: skip
    config = LatentsConfig(autoencoder="tiny-plain", **common)
    index = ensure_index(config, LocalExecutor(), Silent())
    stage = ImagePass(config, (latents_product(config, index),))
    run_pass(stage, index, LocalExecutor(), Silent())
    with pytest.raises(ConfigError, match="several latents"):
        run_export(workspace, tmp_path / "back")
    with pytest.raises(ConfigError, match="no mean and std"):
        run_export(workspace, tmp_path / "back", autoencoder="tiny-plain")


def test_a_damaged_cache_is_not_exported(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    shard = tmp_path / "work/cache" / LATENTS / "c/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StageError, match=r"1 of 3 shards failed.*crc32c"):
        run_export(tmp_path / "work", tmp_path / "back")
    assert not (tmp_path / "back" / RECORD).exists()


# Webdataset


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """The samples as plain webdataset gives them, decoded."""
    webdataset = pytest.importorskip("webdataset")
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    opened = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    return list(opened.decode("rgb8"))


def test_plain_webdataset_opens_the_export(tmp_path: Path) -> None:
    workspace = encode_folder(tmp_path, codec="int8", flip=True)
    run_export(workspace, tmp_path / "tars", to="webdataset", images=True)
    index = read_index(cache(workspace))
    samples = samples_of(tmp_path / "tars")
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(NUM_IMAGES)]
    moments, mirrored = records(workspace, LATENTS), records(workspace, f"{LATENTS}.flip")
    tokens = decoded(workspace, FEATURES)
    for row, (sample, entry) in enumerate(zip(samples, index.entries, strict=True)):
        assert sample["cls"] == entry.label
        assert sample["json"] == {"key": entry.key, "label": entry.label, "row": row}
        assert "." in entry.key and "/" in entry.key
        assert sample["moments.npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["moments.npy"], moments[row])
        np.testing.assert_array_equal(sample["moments.flip.npy"], mirrored[row])
        assert sample["tiny-teacher.npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["tiny-teacher.npy"], tokens[row].astype(np.float16))
        assert sample["tiny-teacher.flip.npy"].shape == (16, 16)
        assert sample["png"].shape == (SIDE, SIDE, 3)
    tars = json.loads((tmp_path / "tars" / RECORD).read_text())["tars"]
    assert [tar["rows"] for tar in tars] == [8, 8, 4]


def decoded(workspace: Path, name: str) -> npt.NDArray[np.float32]:
    """Tokens of an array with its scales."""
    torch = pytest.importorskip("torch")
    from repa_pipeline.data.codec import codec_of

    manifest = sealed(workspace, name).spec.manifest
    codec = codec_of(manifest, name)
    scale = torch.from_numpy(records(workspace, f"{name}.scale")) if codec.has_scale else None
    coded = torch.from_numpy(records(workspace, name))
    found: npt.NDArray[np.float32] = codec.decoder(manifest["codec"])(coded, scale).numpy()
    return found


def test_coded_export_holds_what_is_stored(tmp_path: Path) -> None:
    workspace = encode_folder(tmp_path, codec="int8")
    run_export(workspace, tmp_path / "tars", to="webdataset", coded=True, autoencoder="auto")
    stored, scales = records(workspace, FEATURES), records(workspace, f"{FEATURES}.scale")
    for row, sample in enumerate(samples_of(tmp_path / "tars")):
        assert sample["tiny-teacher.npy"].dtype == np.int8
        np.testing.assert_array_equal(sample["tiny-teacher.npy"], stored[row])
        np.testing.assert_array_equal(sample["tiny-teacher.scale.npy"], scales[row])
        assert "png" not in sample
    with pytest.raises(DataError, match="exported with --coded"):
        run_import(import_config(tmp_path / "tars", tmp_path / "other", from_="webdataset"))


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_webdataset_round_trip_without_images(tmp_path: Path, container: str) -> None:
    workspace = encode_folder(tmp_path, flip=True)
    run_export(workspace, tmp_path / "tars", to="webdataset")
    again = tmp_path / "again"
    config = import_config(
        tmp_path / "tars", again, from_="webdataset", shard_rows=0, format=container
    )
    index, _ = run_import(config)
    given = read_index(cache(workspace))
    assert [(e.key, e.label) for e in index.entries] == [(e.key, e.label) for e in given.entries]
    assert index.manifest["class_names"] == ["a", "b", "c"]
    for name in (LATENTS, f"{LATENTS}.flip", FEATURES, f"{FEATURES}.flip"):
        np.testing.assert_array_equal(records(again, name), records(workspace, name))
        there, here = sealed(workspace, name).spec, sealed(again, name).spec
        assert here.manifest["weights_sha256"] == there.manifest["weights_sha256"]
        assert here.manifest["imported"] is True
        assert here.layout == dataclasses.replace(there.layout, container=container)
    settings: dict[str, Any] = {"autoencoder": "tiny-kl", "encoder": ("tiny-teacher",)}
    inputs = open_inputs(TrainConfig(workspace=str(again), flip=True, **settings))
    assert len(inputs.mirrored) == 2
    with pytest.raises(MissingError, match="imported from .* without images"):
        open_source(index.manifest["source"])
    run_import(config)


def test_webdataset_with_images_can_be_encoded_further(tmp_path: Path) -> None:
    workspace = encode_folder(tmp_path)
    run_export(workspace, tmp_path / "tars", to="webdataset", images=True, encoder=("none",))
    again = tmp_path / "again"
    run_import(import_config(tmp_path / "tars", again, from_="webdataset"))
    encode(tmp_path / "tars", again, latents=False)
    np.testing.assert_array_equal(records(again, FEATURES), records(workspace, FEATURES))
    open_inputs(TrainConfig(workspace=str(again), autoencoder="tiny-kl", encoder=("tiny-teacher",)))


def test_tars_without_their_record_are_read_by_the_tables(tmp_path: Path) -> None:
    workspace = encode_folder(tmp_path)
    run_export(workspace, tmp_path / "tars", to="webdataset")
    bare = tmp_path / "bare"
    bare.mkdir()
    for tar in (tmp_path / "tars").glob("*.tar"):
        tar.rename(bare / tar.name)
    run_import(import_config(bare, tmp_path / "again", from_="webdataset"))
    np.testing.assert_array_equal(
        records(tmp_path / "again", FEATURES), records(workspace, FEATURES)
    )
    manifest = sealed(tmp_path / "again", FEATURES).spec.manifest
    assert (manifest["grid"], manifest["weights_sha256"]) == ([4, 4], "imported: unknown")


def test_webdataset_goes_to_and_comes_from_a_url(tmp_path: Path) -> None:
    workspace = encode_folder(tmp_path)
    url = f"memory://exports/{tmp_path.name}"
    run_export(workspace, url, to="webdataset", images=True)
    assert run_export(workspace, url, to="webdataset", images=True).num_new == 0
    run_import(import_config(url, tmp_path / "again", from_="webdataset"))
    np.testing.assert_array_equal(records(tmp_path / "again", LATENTS), records(workspace, LATENTS))


def test_a_killed_webdataset_export_goes_on(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    run_export(tmp_path / "work", tmp_path / "undisturbed", to="webdataset", images=True)
    config = ExportConfig(
        workspace=str(tmp_path / "work"), destination=str(tmp_path / "tars"), to="webdataset",
        images=True,
    )  # fmt: skip
    run_killed(f"commands_exchange.export({arguments(config)})", "ledger/webdataset", 3)
    with pytest.raises(DataError, match="did not finish"):
        run_import(import_config(tmp_path / "tars", tmp_path / "again", from_="webdataset"))
    result = run_export(tmp_path / "work", tmp_path / "tars", to="webdataset", images=True)
    assert result.outputs["webdataset"].num_new == 1
    assert tree(tmp_path / "tars") == tree(tmp_path / "undisturbed")


def rewrite(tar: Path, change: Any) -> None:
    """Passes every (name, data) of a tar through `change`; None drops the member."""
    with tarfile.open(tar) as opened:
        members = [(m.name, opened.extractfile(m).read()) for m in opened]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as opened:
        for member in map(change, members):
            if member is not None:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                opened.addfile(info, io.BytesIO(member[1]))


def drop(name: str) -> Any:
    return lambda member: None if member[0] == name else member


def replace(name: str, data: bytes) -> Any:
    return lambda member: (name, data) if member[0] == name else member


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("000000009.cls"), "'000000009' in 000001.tar has no class"),
        (drop("000000009.moments.npy"), r"has arrays \['tiny-teacher'\]"),
        (replace("000000009.cls", b"dog"), "000000009.cls in 000001.tar is unusable"),
        (replace("000000009.json", b"{}"), "000000009.json in 000001.tar is unusable"),
        (replace("000000009.moments.npy", with_values(lambda m: m[:4])), r"shape \[4, 4, 4\]"),
    ],
)
def test_unusable_samples_are_refused_and_named(tmp_path: Path, change: Any, said: str) -> None:
    workspace = encode_folder(tmp_path)
    run_export(workspace, tmp_path / "tars", to="webdataset")
    (tmp_path / "tars" / RECORD).unlink()
    (tmp_path / "tars/.repa-export/identity.json").unlink()
    rewrite(tmp_path / "tars/000001.tar", change)
    with pytest.raises(RepaError, match=said) as caught:
        run_import(import_config(tmp_path / "tars", tmp_path / "again", from_="webdataset"))
    assert "\n" not in str(caught.value)


def test_unfit_tars_are_refused(tmp_path: Path) -> None:
    workspace = encode_folder(tmp_path, format="webdataset")
    run_export(workspace, tmp_path / "tars", to="webdataset")

    def refused(source: Path, said: str) -> None:
        with pytest.raises(RepaError, match=said) as caught:
            run_import(import_config(source, tmp_path / "again", from_="webdataset"))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "absent", "no folder of tars")
    refused(workspace / "cache" / LATENTS, "one array of a cache.*repa copy")
    refused(tmp_path / "photos", "no tars")
    whole = (tmp_path / "tars/000001.tar").read_bytes()
    (tmp_path / "tars/000001.tar").unlink()
    refused(tmp_path / "tars", "000001.tar .* is missing")
    (tmp_path / "tars/000001.tar").write_bytes(whole[:-2048])
    refused(tmp_path / "tars", "000001.tar .* is missing or not")
    (tmp_path / "tars" / RECORD).unlink()
    (tmp_path / "tars/.repa-export/identity.json").unlink()
    (tmp_path / "tars/000001.tar").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "tars", "000001.tar is not a whole tar")


def test_a_zip_that_is_done_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    config = ExportConfig(workspace=str(tmp_path / "work"), destination=str(tmp_path / "a.zip"))
    commands_exchange.export(config)
    before = (tmp_path / "a.zip").stat()
    capsys.readouterr()
    commands_exchange.export(config)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "a.zip").stat().st_mtime_ns == before.st_mtime_ns
    (output,) = reference_export(config).outputs
    assert isinstance(output, ReferenceZip) and output.is_sealed()
    run_import(import_config(tmp_path / "a.zip", tmp_path / "again"))
    keys = [entry.key for entry in read_index(cache(tmp_path / "again")).entries]
    assert sorted(keys) == [image_name(number) for number in range(NUM_IMAGES)]


def test_dry_runs_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_reference(tmp_path / "set")
    config = import_config(tmp_path / "set", tmp_path / "work", dry_run=True)
    commands_exchange.import_(config)
    assert "20 images and latents" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    run_import(dataclasses.replace(config, dry_run=False))
    for to, where in (("reference", "a"), ("reference", "a.zip"), ("webdataset", "b")):
        commands_exchange.export(
            ExportConfig(
                workspace=str(tmp_path / "work"),
                destination=str(tmp_path / where),
                to=to,
                dry_run=True,
            )  # fmt: skip
        )
        assert "20 rows in 3 shards" in capsys.readouterr().out
        assert not (tmp_path / where).exists()


@pytest.mark.parametrize(
    ("member", "changes", "said"),
    [
        ("tiny-teacher", {"encoder": "x/../../../EVIL"}, "no name of an encoder"),
        ("tiny-teacher", {"encoder": "x\n/EVIL"}, "no name of an encoder"),
        ("tiny-teacher", {"encoder": None}, "no name of an encoder"),
        (
            "tiny-teacher",
            {"encoder": "other"},
            "encoder is 'other', its members say 'tiny-teacher'",
        ),
        ("tiny-teacher", {"grid": [3, 4]}, r"grid is \[3, 4\], its members say 16 tokens"),
        ("tiny-teacher", {"grid": "4x4"}, "grid is '4x4', its members say 16 tokens"),
        ("tiny-teacher", {"grid": [-4, -4]}, "grid is"),
        ("tiny-teacher", {"class_token": True}, "and a class token, its members say 16 tokens"),
        ("tiny-teacher", {"width": 15}, "width is 15, its members say 16"),
        ("tiny-teacher", {"weights_sha256": 5}, "weights_sha256 is 5, expected text"),
        ("tiny-teacher", {"tokens": None}, "tokens is None, expected text"),
        ("moments", {"scale": [0.7]}, r"scale is \[0.7\] .*'tiny-kl' has \[0.5\] here.*repa.toml"),
        ("moments", {"shift": [0.7]}, r"shift is \[0.7\] .*'tiny-kl' has \[0.1\] here"),
        ("moments", {"posterior": "none"}, "posterior is 'none' .*has 'gaussian' here"),
        ("moments", {"downsample": 4}, "downsample is 4 .*has 8 here"),
        ("moments", {"autoencoder": ["x"]}, "no name of an encoder or autoencoder"),
    ],
)
def test_a_record_that_does_not_fit_its_members_is_refused(
    tmp_path: Path, member: str, changes: dict[str, Any], said: str
) -> None:
    write_reference(tmp_path / "set")
    encode(tmp_path / "set", tmp_path / "work")
    run_export(tmp_path / "work", tmp_path / "tars", to="webdataset")
    path = tmp_path / "tars" / RECORD
    record = json.loads(path.read_text())
    record["members"][member]["manifest"].update(changes)
    path.write_text(json.dumps(record))
    with pytest.raises(MismatchError, match=said) as caught:
        run_import(import_config(tmp_path / "tars", tmp_path / "again", from_="webdataset"))
    assert "\n" not in str(caught.value)
    assert cache(tmp_path / "again").list("") == ["index.parquet", "manifest.json"]
    assert not list(tmp_path.rglob("*EVIL*"))


@pytest.mark.parametrize("content", [b"[]", b'{"members": []}', b'{"members": {"moments": 1}}'])
def test_a_record_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    run_export(tmp_path / "work", tmp_path / "tars", to="webdataset")
    (tmp_path / "tars" / RECORD).write_bytes(content)
    with pytest.raises(DataError, match="export.json .*is not that of an export"):
        run_import(import_config(tmp_path / "tars", tmp_path / "again", from_="webdataset"))


def test_samples_of_the_same_key_are_refused(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    run_export(tmp_path / "work", tmp_path / "tars", to="webdataset")
    key = read_index(cache(tmp_path / "work")).entries[0].key
    said = json.dumps({"key": key}).encode()
    rewrite(tmp_path / "tars/000001.tar", replace("000000009.json", said))
    with pytest.raises(DataError, match=f"'000000009' in 000001.tar .* '000000000' in .*'{key}'"):
        run_import(import_config(tmp_path / "tars", tmp_path / "again", from_="webdataset"))


def test_lossy_tokens_are_not_exported_without_their_scale(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    encode(tmp_path / "set", tmp_path / "work", codec="int8")
    (tmp_path / "work/cache" / f"{FEATURES}.scale" / "seal.json").unlink()
    for coded in (False, True):
        with pytest.raises(MissingError, match=rf"{FEATURES}\.scale .*cache-features"):
            run_export(tmp_path / "work", tmp_path / "tars", to="webdataset", coded=coded)


def test_a_destination_with_credentials_is_refused_unseen(tmp_path: Path) -> None:
    write_reference(tmp_path / "set")
    run_import(import_config(tmp_path / "set", tmp_path / "work"))
    with pytest.raises(ConfigError, match="carries credentials") as caught:
        run_export(tmp_path / "work", "https://host/x?sig=s3cr3t")
    assert "s3cr3t" not in str(caught.value)
