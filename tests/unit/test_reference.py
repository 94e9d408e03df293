"""`repa reference`: statistics of a source or of ADM's npz, in a file that says what it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repa_pipeline.cli import main
from repa_pipeline.config import IndexConfig
from repa_pipeline.config_evaluate import EvaluateConfig, ReferenceConfig
from repa_pipeline.data.index import read_index
from repa_pipeline.data.objects import open_store
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import DamagedError, DataError, MismatchError, MissingError
from repa_pipeline.metrics.frechet import frechet_distance
from repa_pipeline.metrics.networks import load_network
from repa_pipeline.observe import Silent
from repa_pipeline.stages import judge, reference
from repa_pipeline.stages.evaluate import evaluate
from repa_pipeline.stages.index import ensure_index
from repa_pipeline.stages.reference import MadeReference, make_reference, write_adm_layout
from repa_pipeline.stages.reference_file import pack_reference, read_reference, unpack_reference
from repa_pipeline.testing.samples import noise_images, write_sample_folder

COUNT, KEPT = 80, 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """80 pictures in two classes, and 70 samples."""
    folder = tmp_path_factory.mktemp("reference")
    for i, image in enumerate(noise_images(COUNT, seed=0)):
        path = folder / "val" / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    write_sample_folder(folder / "samples", noise_images(70, seed=1))
    yield folder


def config_of(base: Path, workspace: Path, **changes: Any) -> ReferenceConfig:
    settings: dict[str, Any] = {
        "source": str(base / "val"),
        "workspace": str(workspace),
        "network": "digits-cnn",
        "resolution": 64,
        "reference_images": KEPT,
        "device": "cpu",
        "threads": 1,
    }
    return ReferenceConfig(**{**settings, **changes})


def make(config: ReferenceConfig) -> MadeReference:
    return make_reference(config, LocalExecutor(), Silent())


def score(base: Path, workspace: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        **{"workspace": str(workspace), "samples": str(base / "samples"), "is_split": 35},
        **{"device": "cpu", "threads": 1, "allow_few": True, "blocks": 0, "kid_subsets": 2},
        **{"kid_size": 10, "reference_images": KEPT, "output": str(workspace / "result.json")},
    }
    return evaluate(EvaluateConfig(**{**settings, **changes}), Silent())


def features_of(images: Any) -> Any:
    network = load_network("digits-cnn", device="cpu")
    return network.features(torch.from_numpy(images).permute(0, 3, 1, 2))


def test_the_numbers_in_the_file(base: Path, tmp_path: Path) -> None:
    made = make(config_of(base, tmp_path))
    assert made.new and made.path == tmp_path / "references" / "val.digits-cnn.64.npz"
    found = features_of(noise_images(COUNT, seed=0))
    pool, spatial = found.pool.double().numpy(), found.spatial.double().numpy()
    reference = made.reference
    np.testing.assert_allclose(reference.mu, pool.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reference.sigma, np.cov(pool.T), rtol=1e-3, atol=1e-5)
    assert reference.mu_s is not None and reference.sigma_s is not None
    np.testing.assert_allclose(reference.mu_s, spatial.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reference.sigma_s, np.cov(spatial.T), rtol=1e-3, atol=1e-5)
    (index,) = (tmp_path / "references").glob("index.*")
    entries = read_index(open_store(str(index / "cache"))).entries
    order = [int(Path(entry.key).stem) for entry in entries]
    np.testing.assert_allclose(reference.rows, pool[order[:KEPT]], rtol=1e-3, atol=1e-4)
    about = reference.about
    assert (about["name"], about["kind"], about["num_images"]) == ("val", "own", COUNT)
    assert about["network"]["weights_sha256"] == load_network("digits-cnn").weights_sha256
    assert about["source"] == str(base / "val") and about["resolution"] == 64
    names = sorted(path.name for path in (tmp_path / "references").iterdir())
    assert names == [index.name, "val.digits-cnn.64.npz"]  # the features are reduced and gone


def test_it_serves_as_the_training_source_does(base: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shared = {"source": str(base / "val"), "workspace": str(workspace)}
    ensure_index(IndexConfig(**shared), LocalExecutor(), Silent())
    made = make(config_of(base, workspace))
    assert not list((workspace / "references").glob("index.*"))  # the cache has that source's rows
    of_source = score(base, workspace, source=shared["source"], network="digits-cnn")
    assert of_source["kind"] == "Fréchet distance to the training source"
    ours = score(base, workspace, reference=str(made.path))  # and the network is the reference's
    assert ours["network"]["name"] == "digits-cnn" and ours["new"]
    assert ours["metrics"] == of_source["metrics"]
    assert (ours["reference"]["name"], ours["reference"]["kind"]) == ("val", "own")
    assert len(ours["reference"]["sha256"]) == 64


def test_the_index_says_where_the_training_source_is(base: Path, tmp_path: Path) -> None:
    """A remote workspace is not asked for it when settings are settled, and Python users need not
    say it again."""
    ensure_index(
        IndexConfig(source=str(base / "val"), workspace=str(tmp_path)), LocalExecutor(), Silent()
    )
    found = score(base, tmp_path, network="digits-cnn")
    assert found["reference"]["source"] == str(base / "val")
    rows = features_of(noise_images(COUNT, seed=0)).pool.double().numpy()
    ours = features_of(noise_images(70, seed=1)).pool.double().numpy()
    distance = frechet_distance(ours.mean(0), np.cov(ours.T), rows.mean(0), np.cov(rows.T))
    assert found["metrics"]["frechet_distance"] == pytest.approx(distance, rel=1e-4)


def test_features_that_a_killed_run_left_go(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"source": str(base / "val"), "workspace": str(tmp_path)}
    ensure_index(IndexConfig(**shared), LocalExecutor(), Silent())

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "_remove", killed)
        score(base, tmp_path, source=shared["source"], network="digits-cnn")
    folder = tmp_path / "references"
    assert [path.suffix for path in sorted(folder.iterdir())] == [".features", ".npz"]
    score(base, tmp_path, source=shared["source"], network="digits-cnn")
    assert [path.suffix for path in folder.iterdir()] == [".npz"]


def test_another_driver_that_is_faster(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes the features that both share, once its reference stands."""
    shared = {"source": str(base / "val"), "workspace": str(tmp_path)}
    ensure_index(IndexConfig(**shared), LocalExecutor(), Silent())
    other: Any = {"network": "digits-cnn", "source": shared["source"], "output": None}
    plain = reference.statistics_of

    def overtaken(do: Any) -> Any:
        def statistics_of(*given: Any) -> Any:
            monkeypatch.setattr(reference, "statistics_of", plain)
            do()
            return plain(*given)

        return statistics_of

    first: list[Any] = []
    scored = overtaken(lambda: first.append(score(base, tmp_path, **other)))
    monkeypatch.setattr(reference, "statistics_of", scored)
    ours = score(base, tmp_path, source=shared["source"], network="digits-cnn")
    assert ours["metrics"] == first[0]["metrics"] and ours["new"] and first[0]["new"]
    made_too = overtaken(lambda: first.append(make(config_of(base, tmp_path))))
    monkeypatch.setattr(reference, "statistics_of", made_too)
    made = make(config_of(base, tmp_path))
    assert made.reference.about == first[1].reference.about


def test_again_it_costs_nothing_and_other_images_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(config_of(base, tmp_path))
    data = first.path.read_bytes()

    def never(*_: Any) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr(judge.Judge, "rows", never)
    again = make(config_of(base, tmp_path))
    assert not again.new and again.path.read_bytes() == data
    with pytest.raises(
        MismatchError, match=f"keeps {KEPT} images for .*, expected {KEPT - 1}: set"
    ):
        make(config_of(base, tmp_path, reference_images=KEPT - 1))
    other = tmp_path / "other" / "val" / "a"
    other.mkdir(parents=True)
    for i, image in enumerate(noise_images(5, seed=9)):
        Image.fromarray(image).save(other / f"{i}.png")
    with pytest.raises(
        MismatchError, match=r"is a reference of other images or settings \(val, 80"
    ):
        make(config_of(base, tmp_path, source=str(tmp_path / "other" / "val")))


def test_equal_sources_give_equal_bytes(base: Path, tmp_path: Path) -> None:
    one = make(config_of(base, tmp_path / "a")).path.read_bytes()
    two = make(config_of(base, tmp_path / "b", output=str(tmp_path / "b" / "r.npz"))).path
    assert two.read_bytes() == one


def test_adm_layout_for_the_tools_of_others(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "adm.npz"
    config = config_of(base, tmp_path / "ws", adm_npz=str(target))
    made = make(config)
    write_adm_layout(config, made)
    with np.load(target, allow_pickle=False) as stored:
        assert sorted(stored.files) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        np.testing.assert_array_equal(stored["sigma_s"], made.reference.sigma_s)
        images = stored["arr_0"]
    assert images.shape == (KEPT, 64, 64, 3) and images.dtype == np.uint8
    np.testing.assert_allclose(
        features_of(images).pool.numpy(), made.reference.rows, rtol=1e-3, atol=1e-4
    )
    ours = score(base, tmp_path / "ws", reference=str(made.path), network="digits-cnn")
    theirs = score(base, tmp_path / "ws", reference=str(target), network="digits-cnn")
    assert theirs["metrics"] == ours["metrics"] and theirs["reference"]["kind"] == "adm"
    assert not list(target.parent.glob("*.partial"))


def test_of_adms_own_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, generator = noise_images(30, seed=3), np.random.default_rng(0)
    mu, sigma = generator.standard_normal(64), np.eye(64)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma)
    made = make(config_of(base, tmp_path / "ws", adm=str(tmp_path / "adm.npz"), name="imagenet"))
    assert made.path.name == "imagenet.digits-cnn.64.npz"
    np.testing.assert_array_equal(made.reference.mu, mu)
    assert made.reference.mu_s is None and len(made.reference.rows) == KEPT
    about = made.reference.about
    assert (about["kind"], about["name"], about["adm_file"]) == ("adm", "imagenet", "adm.npz")
    assert about["file"] == made.path.name and about["adm_sha256"] != about["sha256"]
    ours = score(base, tmp_path / "ws", reference=str(made.path))
    # The features of its images are kept: scoring by the file itself runs none again.
    seen: list[int] = []
    rows = judge.Judge.rows
    monkeypatch.setattr(judge.Judge, "rows", lambda s, i: seen.append(len(i)) or rows(s, i))
    own = score(base, tmp_path / "ws", reference=str(tmp_path / "adm.npz"), network="digits-cnn")
    assert own["metrics"] == ours["metrics"] and seen == []


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    made = make(config_of(base, tmp_path))
    file = str(made.path)
    with pytest.raises(
        MismatchError, match="was made with network digits-cnn .* this is encoder:d"
    ):
        score(base, tmp_path, reference=file, network="encoder:digits-vit")
    write_sample_folder(tmp_path / "small", noise_images(70, 0, side=32))
    with pytest.raises(MismatchError, match="is of images of 64 pixels, the samples have 32"):
        score(base, tmp_path, reference=file, samples=str(tmp_path / "small"))
    with pytest.raises(MissingError, match="no reference file .*absent.npz: check --reference"):
        score(base, tmp_path, reference=str(tmp_path / "absent.npz"))

    about = {**made.reference.about}
    about["network"] = {**about["network"], "weights_sha256": "0" * 64}
    other = tmp_path / "weights.npz"
    other.write_bytes(pack_reference(dataclasses.replace(made.reference, about=about)))
    with pytest.raises(MismatchError, match=r"\(weights 000000000000\), this is digits-cnn"):
        score(base, tmp_path, reference=str(other))

    data = bytearray(made.path.read_bytes())
    at = data.find(np.ascontiguousarray(made.reference.mu).tobytes())
    data[at] ^= 1
    (tmp_path / "flipped.npz").write_bytes(data)
    with pytest.raises(DamagedError, match=r"flipped.npz is damaged .*remove it and make it again"):
        score(base, tmp_path, reference=str(tmp_path / "flipped.npz"))
    (tmp_path / "torn.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedError, match="torn.npz is damaged"):
        score(base, tmp_path, reference=str(tmp_path / "torn.npz"))
    np.savez(tmp_path / "images.npz", arr_0=noise_images(4, 0))
    with pytest.raises(DataError, match="is no reference of `repa reference`"):
        read_reference(tmp_path / "images.npz")
    assert not (tmp_path / "result.json").exists()


def test_a_packed_reference_is_itself_again(base: Path, tmp_path: Path) -> None:
    made = make(config_of(base, tmp_path)).reference
    packed = pack_reference(made)
    again = unpack_reference(packed, "some/where.npz")
    for name, value in made.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], value)
    assert again.about["file"] == "where.npz"
    wrong = packed.replace(json.dumps("own").encode(), json.dumps("adm").encode(), 1)
    with pytest.raises(DamagedError):  # the zip's own checksum
        unpack_reference(wrong, "x")


def test_the_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    def repa(line: str, code: int = 0) -> list[str]:
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        printed = capsys.readouterr()
        assert caught.value.code == code, printed.err
        return list((printed.err if code else printed.out).splitlines())

    line = f"reference --source {base}/val --network digits-cnn --resolution 64 --device cpu"
    line += " --threads 1 --adm-npz out.npz --reference-images 20"
    assert repa(line + " --dry-run") == [
        f"would make a reference of {base}/val at 64 pixels with digits-cnn"
    ]
    for flags, words in (
        ("--source nowhere", "nowhere"),
        ("--adm none.npz", "none.npz"),
        ("--network-weights none.pt", "no weights file at none.pt"),
    ):
        (said_of_it,) = repa(f"{line} {flags} --dry-run", code=2)
        assert words in said_of_it
    said = repa(line)
    file = "repa-workspace/references/val.digits-cnn.64.npz"
    assert said[0].startswith(f"made: {file} (val, 80 images of 64 pixels, network digits-cnn, 20 ")
    assert said[1] == "made: out.npz (ADM's layout)"
    assert said[2] == f"next: repa evaluate --reference {file}"
    assert repa(line)[0].startswith(f"nothing to do: {file}")
