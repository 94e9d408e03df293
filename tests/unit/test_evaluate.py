"""Scores of sets of images against plain numpy, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from repa_pipeline.cli import main
from repa_pipeline.config import IndexConfig
from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.data.index import read_index
from repa_pipeline.data.objects import open_store
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import (
    ConfigError,
    DataError,
    MismatchError,
    MissingError,
    UnknownNameError,
)
from repa_pipeline.metrics.networks import Features
from repa_pipeline.observe import Silent
from repa_pipeline.stages.evaluate import evaluate, summary
from repa_pipeline.stages.index import ensure_index
from repa_pipeline.stages.scored_samples import find_samples
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.samples import write_sample_folder

Images = npt.NDArray[np.uint8]
SIZE = 16

PLUGIN = '''
"""A network of fixed projections: pool [B, 6], spatial [B, 4], logits [B, 5]."""

import torch
from torch import nn

from repa_pipeline.metrics.networks import Features, NetworkSpec


class Projections(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, images):
        found = images.float().flatten(1) / 255 @ self.weights
        return Features(found[:, :6], found[:, 6:10], found[:, 10:])


class PoolOnly(Projections):
    def forward(self, images):
        return Features(super().forward(images).pool)


def load(spec, path):
    weights = torch.from_numpy(__import__("numpy").load(path, allow_pickle=False))
    return (PoolOnly if spec.name == "toy-pool" else Projections)(weights)


NETWORKS = [
    NetworkSpec("toy-net", "toy_network:load", {weights!r}, pool=6, spatial=4, logits=5),
    NetworkSpec("toy-pool", "toy_network:load", {weights!r}, pool=6),
]
'''


def random_images(count: int, seed: int) -> Images:
    """Smooth images, so that sets of another seed are alike and not equal."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 255, (count, 2, 2, 3))
    steps = np.linspace(0, 1, SIZE)
    rows = corners[:, :1] * (1 - steps)[None, :, None, None] + corners[:, 1:] * steps[:, None, None]
    images = rows[:, :, :1] * (1 - steps)[:, None] + rows[:, :, 1:] * steps[:, None]
    return images.round().astype(np.uint8)


def sample_images() -> Images:
    """30 images, 4 of them of a contrast that the source does not have."""
    images = random_images(30, seed=1)
    images[:4] = np.where(images[:4] > 128, 255, 0)
    return images


def write_samples(folder: Path, images: Images, shard_rows: int = 8) -> Path:
    return write_sample_folder(folder, images, shard_rows, cfg=1.5)


def write_source(folder: Path, images: Images) -> None:
    for i, image in enumerate(images):
        path = folder / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A plugin with two networks, a source with its index, and one set of samples."""
    folder = tmp_path_factory.mktemp("evaluate")
    weights = folder / "toy.npy"
    scale = np.random.default_rng(0).standard_normal((3 * SIZE * SIZE, 15)) / 8
    np.save(weights, scale.astype(np.float32))
    plugin = PLUGIN.replace("{weights!r}", repr(str(weights)))
    (folder / "toy_network.py").write_text(plugin)
    write_source(folder / "source", random_images(40, seed=0))
    index = IndexConfig(source=str(folder / "source"), workspace=str(folder / "ws"))
    ensure_index(index, LocalExecutor(), Silent())
    write_samples(folder / "samples", sample_images())
    with isolated_tables(folder):
        yield folder


def config_of(base: Path, tmp_path: Path, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "source": str(base / "source"),
        "workspace": str(base / "ws"),
        "samples": str(base / "samples"),
        "output": str(tmp_path / "result.json"),
        "plugins": ("toy_network",),
        "network": "toy-net",
        "device": "cpu",
        "threads": 1,
        "is_split": 12,
        "batch_size": 7,
        "kid_subsets": 3,
        "kid_size": 20,
        "blocks": 5,
    }
    return EvaluateConfig(**{**settings, **changes})


def features_of(base: Path, images: Images) -> Features:
    weights = torch.from_numpy(np.load(base / "toy.npy", allow_pickle=False))
    flat = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float().flatten(1) / 255
    found = flat @ weights
    return Features(found[:, :6], found[:, 6:10], found[:, 10:])


def closed_form(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the root by eigenvalues of the product."""
    s1, s2 = np.cov(a.astype(np.float64).T), np.cov(b.astype(np.float64).T)
    difference = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(s1 @ s2).real, 0))
    return float(difference @ difference + np.trace(s1) + np.trace(s2) - 2 * roots.sum())


def manifold_share(reference: npt.NDArray[Any], samples: npt.NDArray[Any]) -> float:
    """Share of samples within the distance of some reference row to its third neighbour."""
    inside = 0
    for sample in samples:
        for row in reference:
            radius = np.sort(((reference - row) ** 2).sum(1))[3]
            if ((sample - row) ** 2).sum() <= radius:
                inside += 1
                break
    return inside / len(samples)


def rows_order(base: Path) -> list[int]:
    """Numbers of the source's images in the order of the index, in which its features are."""
    entries = read_index(open_store(str(base / "ws")).child("cache")).entries
    return [int(Path(entry.key).stem) for entry in entries]


def kernel_distance(reference: npt.NDArray[Any], samples: npt.NDArray[Any]) -> float:
    """Mean of 3 subsets of 20, drawn as torch-fidelity draws them, pair by pair."""
    random = np.random.RandomState(2020)
    found = []
    for _ in range(3):
        x = samples[random.choice(len(samples), 20, replace=False)]
        y = reference[random.choice(len(reference), 20, replace=False)]
        total = 0.0
        for a, b, sign in ((x, x, 1), (y, y, 1), (x, y, -2)):
            kernel = (a @ b.T / a.shape[1] + 1) ** 3
            pairs = 20 * 20 if sign < 0 else 20 * 19
            total += sign * (kernel.sum() - (0 if sign < 0 else np.trace(kernel))) / pairs
        found.append(total)
    return float(np.mean(found))


def block_score(logits: npt.NDArray[np.float64], size: int) -> float:
    scores = []
    for start in range(0, len(logits), size):
        p = np.exp(logits[start : start + size])
        p /= p.sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    return float(np.mean(scores))


def test_the_numbers_against_the_source(base: Path, tmp_path: Path) -> None:
    result = evaluate(config_of(base, tmp_path), Silent())
    ours = features_of(base, sample_images())
    theirs = features_of(base, random_images(40, seed=0))
    assert ours.spatial is not None and theirs.spatial is not None and ours.logits is not None
    pool, reference = ours.pool.double().numpy(), theirs.pool.double().numpy()
    expected = {
        "frechet_distance": closed_form(reference, pool),
        "spatial_frechet_distance": closed_form(theirs.spatial.numpy(), ours.spatial.numpy()),
        "inception_score": block_score(ours.logits.double().numpy(), 12),
        "precision": manifold_share(reference, pool),
        "recall": manifold_share(pool, reference),
        "kid": kernel_distance(reference[rows_order(base)], pool),
    }
    assert result["kid"] == {
        **{"mean": result["metrics"]["kid"], "std": result["kid"]["std"], "subsets": 3},
        **{"size": 20, "seed": 2020, "kernel": "(x.y / D + 1)^3, unbiased"},
    }
    assert result["kid"]["std"] > 0
    assert result["metrics"] == pytest.approx(expected, rel=1e-4)
    assert expected["frechet_distance"] > 0.01
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1


def test_what_the_result_says(base: Path, tmp_path: Path) -> None:
    result = evaluate(config_of(base, tmp_path), Silent())
    stored = json.loads((tmp_path / "result.json").read_text())
    assert result == {**stored, "path": str(tmp_path / "result.json"), "new": True}
    assert (stored["num_samples"], stored["sample_settings"]["cfg"]) == (30, 1.5)
    assert stored["network"]["name"] == "toy-net" and len(stored["network"]["weights_sha256"]) == 64
    assert stored["reference"]["kind"] == "training source"
    assert stored["reference"]["num_images"] == stored["precision_recall"]["reference"] == 40
    assert stored["precision_recall"]["mode"] == "float32" and stored["precision_recall"]["k"] == 3
    assert {"python", "torch", "numpy", "repa-pipeline"} == set(stored["versions"])
    assert stored["kind"] == "Fréchet distance to the training source" and stored["names"] == {}
    assert stored["network"]["published"] and stored["clipped_eigenvalues"]["frechet_distance"] <= 0
    assert stored["protocol"]["cfg"] == 1.5 and stored["protocol"]["checkpoint_sha256"] is None
    errors = stored["standard_errors"]
    assert errors["precision"]["value"] == pytest.approx(
        (stored["metrics"]["precision"] * (1 - stored["metrics"]["precision"]) / 30) ** 0.5
    )
    assert 0 < errors["frechet_distance"]["value"] < stored["metrics"]["frechet_distance"]
    assert "jackknife over consecutive blocks" in errors["frechet_distance"]["method"]
    line = summary(result)
    assert line.startswith("frechet_distance ") and "against the training source" in line
    assert "fid" not in (line + json.dumps(stored)).lower()  # not the Inception network


def test_samples_against_themselves(base: Path, tmp_path: Path) -> None:
    images = random_images(40, seed=0)
    order = np.random.default_rng(1).permutation(40)
    write_samples(tmp_path / "same", images[order])
    result = evaluate(config_of(base, tmp_path, samples=str(tmp_path / "same")), Silent())
    assert abs(result["metrics"]["frechet_distance"]) < 1e-6
    assert abs(result["metrics"]["spatial_frechet_distance"]) < 1e-6
    assert result["metrics"]["precision"] == result["metrics"]["recall"] == 1


def test_an_npz_scores_as_the_folder_does(base: Path, tmp_path: Path) -> None:
    folder = evaluate(config_of(base, tmp_path), Silent())
    np.savez(tmp_path / "samples.npz", arr_0=sample_images())
    config = config_of(base, tmp_path, samples=str(tmp_path / "samples.npz"), output=None)
    result = evaluate(config, Silent())
    assert result["metrics"] == folder["metrics"] and result["sample_settings"] is None
    assert result["path"] == str(tmp_path / "samples.result.json")
    assert summary(result).endswith("; how the samples were made is not known)")
    assert set(result["protocol"].values()) == {None}
    np.savez_compressed(tmp_path / "small.npz", arr_0=sample_images())
    config = config_of(base, tmp_path, samples=str(tmp_path / "small.npz"), output=None)
    assert evaluate(config, Silent())["metrics"] == folder["metrics"]


@pytest.mark.parametrize(
    "settings", ["not JSON", "[1]", '{"cfg": 2}', np.array({"cfg": 2}, dtype=object)]
)
def test_settings_in_somebody_elses_npz_are_not_ours(
    base: Path, tmp_path: Path, settings: Any
) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=sample_images(), settings=settings)
    config = config_of(base, tmp_path, samples=str(tmp_path / "samples.npz"), output=None)
    assert evaluate(config, Silent())["sample_settings"] is None


def test_batch_sizes_change_nothing(base: Path, tmp_path: Path) -> None:
    def score(batch_size: int) -> Any:
        features = str(tmp_path / f"features{batch_size}")
        config = config_of(base, tmp_path, batch_size=batch_size, features=features)
        return evaluate(config, Silent())["metrics"]

    one, many = score(1), score(64)
    assert one == pytest.approx(many, rel=1e-4)


def test_a_reference_file(base: Path, tmp_path: Path) -> None:
    images = random_images(25, seed=2)
    generator = np.random.default_rng(3)
    factor, factor_s = generator.standard_normal((6, 6)), generator.standard_normal((4, 4))
    statistics = {
        "mu": generator.standard_normal(6),
        "sigma": factor @ factor.T,
        "mu_s": generator.standard_normal(4),
        "sigma_s": factor_s @ factor_s.T,
    }
    np.savez(tmp_path / "reference.npz", arr_0=images, **statistics)
    config = config_of(
        base, tmp_path, reference=str(tmp_path / "reference.npz"), reference_images=20
    )
    result = evaluate(config, Silent())

    ours = features_of(base, sample_images())
    pool = ours.pool.double().numpy()
    difference = statistics["mu"] - pool.mean(0)
    roots = np.sqrt(np.linalg.eigvals(statistics["sigma"] @ np.cov(pool.T)).real)
    traces = np.trace(statistics["sigma"]) + np.trace(np.cov(pool.T))
    expected = difference @ difference + traces - 2 * roots.sum()
    assert result["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    reference = features_of(base, images[:20]).pool.double().numpy()
    assert result["metrics"]["precision"] == manifold_share(reference, pool)
    assert result["reference"]["name"] == "reference.npz" and result["reference"]["kind"] == "adm"
    assert (result["reference"]["num_images"], result["precision_recall"]["reference"]) == (25, 20)

    without = {name: statistics[name] for name in ("mu", "sigma")}
    np.savez(tmp_path / "plain.npz", arr_0=images, **without)
    config = config_of(base, tmp_path, reference=str(tmp_path / "plain.npz"))
    metrics = evaluate(config, Silent())["metrics"]
    assert metrics["spatial_frechet_distance"] is None and metrics["inception_score"] > 1


def test_a_network_with_pool_features_alone(base: Path, tmp_path: Path) -> None:
    whole = evaluate(config_of(base, tmp_path), Silent())["metrics"]
    result = evaluate(config_of(base, tmp_path, network="toy-pool"), Silent())
    metrics = result["metrics"]
    assert metrics["spatial_frechet_distance"] is None and metrics["inception_score"] is None
    assert metrics["frechet_distance"] == whole["frechet_distance"]
    assert "inception_score" not in summary(result)


def test_statistics_of_the_source_are_made_once(base: Path, tmp_path: Path) -> None:
    source, workspace = tmp_path / "source", tmp_path / "ws"
    write_source(source, random_images(12, seed=5))
    ensure_index(
        IndexConfig(source=str(source), workspace=str(workspace)), LocalExecutor(), Silent()
    )
    config = config_of(base, tmp_path, source=str(source), workspace=str(workspace))
    first = evaluate(config, Silent())
    (stored,) = (workspace / "references").iterdir()
    assert stored.name.startswith(f"source.toy-net.{SIZE}.") and stored.suffix == ".npz"
    source.rename(tmp_path / "gone")
    assert evaluate(config, Silent()) == {**first, "new": False}
    elsewhere = dataclasses.replace(config, output=str(tmp_path / "again.json"))
    again = evaluate(elsewhere, Silent())
    assert again == {**first, "path": elsewhere.output}
    other = evaluate(dataclasses.replace(config, is_split=7), Silent())
    assert other["new"] and other["metrics"]["inception_score"] != pytest.approx(
        first["metrics"]["inception_score"]
    )

    settings = {"workspace": str(workspace), "reference_images": 6}
    with pytest.raises(MissingError):  # other rows are kept for precision, so it is made anew
        evaluate(config_of(base, tmp_path, source=str(source), **settings), Silent())
    changed = config_of(base, tmp_path, source=str(tmp_path / "gone"), **settings)
    assert evaluate(changed, Silent())["precision_recall"]["reference"] == 6
    assert len(list((workspace / "references").iterdir())) == 2


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    def score(**changes: Any) -> Any:
        return evaluate(config_of(base, tmp_path, **changes), Silent())

    with pytest.raises(MissingError, match=r"no samples at .*nothing: check --samples"):
        score(samples=str(tmp_path / "nothing"))
    with pytest.raises(UnknownNameError, match="unknown network 'toy-nett': did you mean"):
        score(network="toy-nett")
    with pytest.raises(UnknownNameError, match="unknown encoder 'dinov2b': did you mean"):
        score(network="encoder:dinov2b")
    with pytest.raises(MissingError, match="no weights file at none.npy for network 'toy-net'"):
        score(network_weights="none.npy")
    changed = {"networks.toy-net": {"config": {"layer": 3}}}
    with pytest.raises(ConfigError, match="changes more of 'toy-net' than its weights"):
        score(overrides=changed)
    with pytest.raises(MissingError, match="no weights file at none.npy for network 'toy-net'"):
        score(overrides={"networks.toy-net": {"weights": "none.npy"}})
    with pytest.raises(MissingError, match=r"no cache at .*: run `repa encode-latents` first"):
        score(workspace=str(tmp_path / "empty"))
    larger = np.zeros((5, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "larger.npz", arr_0=larger, mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(MismatchError, match="holds images of 32 pixels, the samples have 16"):
        score(reference=str(tmp_path / "larger.npz"))
    np.savez(tmp_path / "other.npz", arr_0=random_images(9, 0), mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(
        MismatchError, match="has pool statistics of width 7, network toy-net gives 6"
    ):
        score(reference=str(tmp_path / "other.npz"))
    np.savez(tmp_path / "bare.npz", arr_0=random_images(9, 0))
    with pytest.raises(DataError, match="has no mu and no sigma"):
        score(reference=str(tmp_path / "bare.npz"))
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((4, 16, 24, 3), np.uint8))
    with pytest.raises(MismatchError, match="are 16x24: expected square ones"):
        score(samples=str(tmp_path / "wide.npz"))
    write_samples(tmp_path / "few", random_images(3, seed=1))
    with pytest.raises(DataError, match="at least 4 of each are needed"):
        score(samples=str(tmp_path / "few"))
    assert not (tmp_path / "result.json").exists()


def test_finding_samples(base: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(workspace=str(tmp_path))
    with pytest.raises(MissingError, match="no finished samples in the workspace: run `repa samp"):
        find_samples(config)
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    only = write_samples(tmp_path / "runs" / "one" / "samples" / "a", random_images(4, 0))
    (tmp_path / "runs" / "one" / "samples" / "unfinished" / "images").mkdir(parents=True)
    assert find_samples(config) == str(only)
    second = write_samples(tmp_path / "runs" / "two" / "samples" / "b", random_images(4, 0))
    with pytest.raises(ConfigError, match=r"2 sets of samples \(.*\): choose with --samples"):
        find_samples(config)
    assert find_samples(EvaluateConfig(workspace=str(tmp_path), run="two")) == str(second)


def test_the_command(base: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(base)
    line = f"evaluate --source source --workspace ws --samples samples --output {tmp_path}/r.json"
    line += " --plugins toy_network --network toy-net --threads 1 --is-split 12 --kid-subsets 3"

    def repa(arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            main(arguments.split())
        assert caught.value.code == code
        printed = capsys.readouterr()
        return str(printed.err if code else printed.out)

    planned = repa(line + " --dry-run")
    assert "would score samples with toy-net against statistics" in planned
    assert "30 images in 4 shards" in planned
    # A plan of a score that would be refused is refused in the same words.
    larger = np.zeros((5, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "large.npz", arr_0=larger, mu=np.zeros(6), sigma=np.eye(6))
    np.savez(tmp_path / "wide.npz", arr_0=random_images(9, 0), mu=np.zeros(7), sigma=np.eye(7))
    for flags, words in (
        (f"--reference {tmp_path}/large.npz", "holds images of 32 pixels, the samples have 16"),
        (f"--reference {tmp_path}/wide.npz", "has pool statistics of width 7, network toy-net"),
        (f"--reference {tmp_path}/none.npz", "no reference file"),
        (f"--workspace {tmp_path}/empty", "no cache at"),
        ("--is-split 31", "inception score of 30 samples in blocks of 31"),
    ):
        for dry in ("", " --dry-run"):
            assert words in repa(f"{line} {flags}{dry}", code=2)
    assert not (tmp_path / "r.json").exists()
    said = repa(line).splitlines()
    assert said[0].startswith("frechet_distance ") and "30 samples" in said[0]
    assert said[1] == f"result: {tmp_path}/r.json; next: repa report"
    again = repa(line).splitlines()  # from the file, told in the same words
    assert again[0].startswith("nothing to do: ") and again[1:] == said
