"""The same samples in every form give the same features and numbers; features serve again."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.errors import (
    ConfigError,
    DamagedError,
    DataError,
    MismatchError,
    MissingError,
    StageError,
)
from repa_pipeline.observe import Silent
from repa_pipeline.stages import judge
from repa_pipeline.stages.evaluate import evaluate, name_distances, summary
from repa_pipeline.testing.samples import noise_images, write_sample_folder

COUNT = 70
IMAGES = noise_images(COUNT, seed=1)
SETTINGS = {"cfg": 1.5, "interval": [0.0, 0.7], "sampler": "sde", "num_steps": 250, "seed": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    reference = noise_images(20, seed=0)
    generator = np.random.default_rng(0)
    factor = generator.standard_normal((64, 64)) / 8
    mu, sigma = generator.standard_normal(64), factor @ factor.T
    np.savez(folder / "reference.npz", arr_0=reference, mu=mu, sigma=sigma)
    write_sample_folder(folder / "folder", IMAGES, **SETTINGS)
    return folder


def config_of(base: Path, samples: Path | str, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "workspace": str(base / "ws"),
        "samples": str(samples),
        "reference": str(base / "reference.npz"),
        "network": "digits-cnn",
        "device": "cpu",
        "threads": 1,
        "is_split": 35,
        "kid_subsets": 2,
        "kid_size": 10,
        "blocks": 2,
        "allow_few": True,
    }
    return EvaluateConfig(**{**settings, **changes})


def write_tars(folder: Path, images: Any, suffix: str = "png", split: int = 40) -> Path:
    folder.mkdir()
    for start in range(0, len(images), split):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as tar:
            for i, image in enumerate(images[start : start + split], start):
                data = io.BytesIO()
                Image.fromarray(image).save(data, "JPEG" if suffix == "jpg" else suffix.upper())
                for name, content in (
                    (f"{i:09d}.cls", b"0"),
                    (f"{i:09d}.{suffix}", data.getvalue()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def rows_of(folder: Path) -> Any:
    from repa_pipeline.data.objects import open_store

    judged = judge.open_judged(open_store(str(folder)), "digits-cnn")
    return np.concatenate([block.pool for block in judged.blocks()])


def test_every_form_gives_the_same_numbers(base: Path, tmp_path: Path) -> None:
    want = evaluate(config_of(base, base / "folder"), Silent())
    assert want["protocol"]["cfg"] == 1.5 and want["protocol"]["sampler"] == "sde"
    assert want["sample_settings"]["interval"] == [0.0, 0.7]
    rows = rows_of(base / "folder")

    np.savez(tmp_path / "plain.npz", arr_0=IMAGES)
    told = json.dumps({"kind": "samples", **SETTINGS})
    np.savez(tmp_path / "said.npz", arr_0=IMAGES, settings=np.array(told))
    tars = write_tars(tmp_path / "tars", IMAGES)
    (tars / "settings.json").write_text(told)
    known = {"plain.npz": None, "said.npz": 1.5, "tars": 1.5}
    for name, cfg in known.items():
        features = tmp_path / f"features-{name}"
        found = evaluate(config_of(base, tmp_path / name, features=str(features)), Silent())
        assert found["metrics"] == want["metrics"] and found["new"]
        assert found["protocol"]["cfg"] == cfg
        np.testing.assert_array_equal(rows_of(features), rows)
    shutil.copytree(base / "folder" / "images", tmp_path / "url" / "images")
    url = evaluate(config_of(base, f"file://{tmp_path}/url"), Silent())
    assert url["path"] == f"file://{tmp_path}/url/result.json"
    assert url["metrics"] == want["metrics"]
    pattern = str(tars / "{000000,000040}.tar")
    found = evaluate(config_of(base, pattern, output=str(tmp_path / "r.json")), Silent())
    assert found["metrics"] == want["metrics"] and found["sample_settings"] is None
    for text in ('{"cfg": 9, "kind": "workflow"}', "not JSON"):  # somebody else's
        (tars / "settings.json").write_text(text)
        found = evaluate(config_of(base, tars, output=str(tmp_path / "other.json")), Silent())
        assert found["sample_settings"] is None


def test_jpeg_pictures_are_scored_as_they_are(base: Path, tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", IMAGES, "jpg")
    found = evaluate(config_of(base, tars, workspace=str(tmp_path / "ws")), Silent())
    decoded = []
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith("jpg"):
                    decoded.append(np.asarray(Image.open(tar.extractfile(member))))  # type: ignore[arg-type]
    np.savez(tmp_path / "decoded.npz", arr_0=np.stack(decoded))
    same = evaluate(config_of(base, tmp_path / "decoded.npz"), Silent())
    assert found["metrics"] == same["metrics"]
    assert found["path"].startswith(str(tmp_path / "ws" / "judged"))


def test_a_metric_again_needs_no_forward_pass_and_no_image(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "samples"
    shutil.copytree(base / "folder", folder)
    (folder / "settings.json").write_text(json.dumps({"kind": "samples", **SETTINGS}))
    first = evaluate(config_of(base, folder), Silent())

    def never(*_: Any) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr(judge.Judge, "rows", never)
    assert evaluate(config_of(base, folder), Silent()) == {**first, "new": False}
    again = evaluate(config_of(base, folder, pr_mode="adm_fp16"), Silent())
    assert again["new"] and again["precision_recall"]["mode"] == "adm_fp16"
    assert again["metrics"]["frechet_distance"] == first["metrics"]["frechet_distance"]
    kept = [path.name for path in folder.glob("result.*.json")]
    assert len(kept) == 1 and kept[0].startswith("result.digits-cnn.")
    stored = json.loads((folder / kept[0]).read_text())
    assert stored["precision_recall"]["mode"] == "float32"

    # What `repa sample --score` leaves where nothing but features is wanted.
    shutil.rmtree(folder / "images")
    alone = evaluate(config_of(base, folder, output=str(tmp_path / "r.json")), Silent())
    assert alone["metrics"] == first["metrics"] and alone["protocol"]["cfg"] == 1.5
    with pytest.raises(DataError, match="expected at least"):
        evaluate(config_of(base, folder, allow_few=False, is_split=10), Silent())


def test_features_half_made_go_on(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    shutil.copytree(base / "folder" / "images", folder / "images")
    want = evaluate(config_of(base, folder, features=str(tmp_path / "whole")), Silent())
    damaged = folder / "images" / "c" / "3" / "0" / "0" / "0"
    data = damaged.read_bytes()
    damaged.write_bytes(b"\0" * len(data))
    output = str(tmp_path / "r.json")
    with pytest.raises(StageError, match=r"1 of 5 shards failed, the others are kept; shard 3"):
        evaluate(config_of(base, folder, output=output), Silent())
    assert not (tmp_path / "r.json").exists()
    damaged.write_bytes(data)
    seen: list[int] = []
    rows = judge.Judge.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge.Judge, "rows", lambda self, i: seen.append(len(i)) or rows(self, i))
        found = evaluate(config_of(base, folder, output=output), Silent())
    assert seen == [16] and found["metrics"] == want["metrics"]


def test_too_few_samples_for_a_number(base: Path, tmp_path: Path) -> None:
    def score(count: int, **changes: Any) -> Any:
        folder = tmp_path / f"few{count}"
        if not folder.exists():
            write_sample_folder(folder, IMAGES[:count])
        return evaluate(config_of(base, folder, allow_few=False, **changes), Silent())

    with pytest.raises(DataError, match=r"Fréchet distance of 63 samples in 64 pool features"):
        score(63)
    with pytest.raises(DataError, match=r"distance of 70 samples in 448 spatial features: expecte"):
        score(70)
    with pytest.raises(DataError, match="scoring 3 samples: at least 4 of each are needed"):
        score(3)
    assert not list(tmp_path.glob("few*/judge.*"))  # said before any forward pass
    network = {"network": "encoder:digits-vit", "reference": None}
    with pytest.raises(DataError, match="of 70 samples in 128 pool features"):
        score(70, **network)


def test_an_inception_score_of_less_than_a_block() -> None:
    from repa_pipeline.metrics.networks import Widths
    from repa_pipeline.stages.scores import check_counts

    with pytest.raises(DataError, match=r"score of 4,999 samples in blocks of 5,000: expected at"):
        check_counts(EvaluateConfig(), 4999, Widths(64, 0, 10))
    check_counts(EvaluateConfig(), 5000, Widths(64, 0, 10))
    check_counts(EvaluateConfig(), 4999, Widths(64, 0, 0))
    check_counts(EvaluateConfig(allow_few=True), 4999, Widths(8000, 0, 10))


def test_forms_that_cannot_be_scored(base: Path, tmp_path: Path) -> None:
    other = write_tars(tmp_path / "other", IMAGES[:5])
    Image.fromarray(noise_images(1, 0, 32)[0]).save(tmp_path / "small.png")
    with tarfile.open(other / "000001.tar", "w") as tar:
        tar.add(tmp_path / "small.png", "zz.png")
    with pytest.raises(DataError, match="have no label"):
        evaluate(config_of(base, other), Silent())
    (tmp_path / "zz.cls").write_text("0")
    with tarfile.open(other / "000001.tar", "a") as tar:
        tar.add(tmp_path / "zz.cls", "zz.cls")
    with pytest.raises(StageError, match=r"picture zz .* is 32x32, expected 64x64"):
        evaluate(config_of(base, other), Silent())
    np.savez(tmp_path / "torn.npz", arr_0=IMAGES)
    data = bytearray((tmp_path / "torn.npz").read_bytes())
    data[50_000] ^= 1
    (tmp_path / "torn.npz").write_bytes(data)
    with pytest.raises(DamagedError, match=r"cannot read .*torn.npz"):
        evaluate(config_of(base, tmp_path / "torn.npz"), Silent())
    with pytest.raises(DataError, match=r"reference.npz holds statistics \(mu\) beside its images"):
        evaluate(config_of(base, base / "reference.npz"), Silent())
    with pytest.raises(MissingError, match="no tar at "):
        evaluate(config_of(base, tmp_path / "absent" / "{0..1}.tar"), Silent())
    folder = write_sample_folder(tmp_path / "samples", IMAGES)
    (folder / "images" / "seal.json").rename(tmp_path / "seal.json")
    with pytest.raises(MissingError, match="holds no finished images, pictures or features of dig"):
        evaluate(config_of(base, folder), Silent())
    (tmp_path / "seal.json").rename(folder / "images" / "seal.json")
    evaluate(config_of(base, folder, batch_size=8), Silent())
    (tmp_path / "package.json").write_text('{"name": "of somebody else"}')
    with pytest.raises(ConfigError, match=r"package.json is no result of `repa evaluate`: give an"):
        evaluate(config_of(base, folder, output=str(tmp_path / "package.json")), Silent())
    with pytest.raises(MismatchError, match=r"other settings: batch_size is 8 there, 16 now"):
        evaluate(config_of(base, folder, batch_size=16), Silent())


def test_pictures_class_by_class_give_no_score_of_blocks(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    for i, image in enumerate(IMAGES[:20]):
        path = folder / str(i // 10) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    with pytest.raises(DataError, match="stand class by class: .* give --is-split 20 for one"):
        evaluate(config_of(base, folder, is_split=10), Silent())
    shared = {"workspace": str(tmp_path / "ws"), "is_split": 20}
    whole = evaluate(config_of(base, folder, **shared), Silent())
    mixed = write_sample_folder(tmp_path / "mixed", IMAGES[:20][::-1])
    want = evaluate(config_of(base, mixed, **shared), Silent())
    assert whole["metrics"]["inception_score"] == pytest.approx(want["metrics"]["inception_score"])


@pytest.mark.parametrize(
    ("network", "published", "reference", "kind", "names"),
    [
        ("inception-v3", True, "adm", "FID", {"FID", "sFID"}),
        ("inception-v3", True, "own", "FID to val", {"FID to val", "sFID to val"}),
        ("inception-v3", True, "training source", "Fréchet distance to the training source", set()),
        ("inception-v3", False, "adm", "Fréchet distance", set()),
        ("digits-cnn", True, "adm", "Fréchet distance", set()),
        ("fd-dinov2", True, "own", "FD-DINOv2 to val", {"FD-DINOv2 to val"}),
        ("fd-dinov2", True, "training source", "Fréchet distance to the training source", set()),
    ],
)
def test_what_a_distance_is_called(
    network: str, published: bool, reference: str, kind: str, names: set[str]
) -> None:
    found = name_distances(
        {"name": network, "published": published}, {"kind": reference, "name": "val"}
    )
    assert (found[0], set(found[1].values())) == (kind, names)


def test_the_summary_uses_the_fields_names() -> None:
    result = {
        "names": {"frechet_distance": "FID"},
        "metrics": {"frechet_distance": 7.9, "recall": None, "precision": 0.7},
        "standard_errors": {"frechet_distance": {"value": 0.051, "method": "m"}},
        "num_samples": 50_000,
        "network": {"name": "inception-v3"},
        "reference": {"name": "ref.npz"},
        "sample_settings": {"cfg": 1},
    }
    assert summary(result) == (
        "FID 7.9 ± 0.051, precision 0.7 (50,000 samples, network inception-v3, against ref.npz)"
    )
