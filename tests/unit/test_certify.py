"""`repa certify` on stand-in files: what passes, what fails, what is not run and says so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repa_pipeline.cli import main
from repa_pipeline.commands_evaluate import certify as command
from repa_pipeline.config_evaluate import CertifyConfig, EvaluateConfig
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.errors import DataError
from repa_pipeline.metrics.networks import load_network
from repa_pipeline.observe import Silent
from repa_pipeline.stages.certify import PARTS, Limit, Part, certify, lines
from repa_pipeline.stages.evaluate import evaluate
from repa_pipeline.testing.samples import write_sample_folder

COUNT = 80
PLAIN = {
    **{"model": "SiT-XL/2", "sampler": "sde", "num_steps": 250, "cfg": 1.0},
    **{"labels": "random", "use_ema": True},
}


def images_of(seed: int, count: int = COUNT) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


def pool_of(images: Any) -> Any:
    network = load_network("digits-cnn", device="cpu")
    return network.features(torch.from_numpy(images).permute(0, 3, 1, 2)).pool.double().numpy()


def write_samples(folder: Path, images: Any, **settings: Any) -> str:
    return str(write_sample_folder(folder, images, 64, **settings))


@pytest.fixture
def config(tmp_path: Path) -> CertifyConfig:
    """The pair of files for the evaluator, scored by the digits' network."""
    images = images_of(0)
    pool = pool_of(images)
    np.savez(tmp_path / "ref.npz", arr_0=images, mu=pool.mean(0), sigma=np.cov(pool.T))
    np.savez(tmp_path / "adm.npz", arr_0=images_of(1))
    return CertifyConfig(
        workspace=str(tmp_path / "ws"),
        device="cpu",
        threads=1,
        network="digits-cnn",
        allow_few=True,
        blocks=0,
        adm_reference=str(tmp_path / "ref.npz"),
        adm_samples=str(tmp_path / "adm.npz"),
    )


def score(config: EvaluateConfig) -> Mapping[str, Any]:
    return evaluate(config, Silent())


def never(checkpoint: str, changes: Mapping[str, Any]) -> str:
    raise AssertionError("nothing is to be sampled")


def parts_for(expected: float, tolerance: float = 1e-6) -> list[Part]:
    """The real parts with the stand-ins' expectation, count and name of the distance."""
    limits = {"frechet_distance": Limit.around(expected, tolerance)}
    changes: dict[str, Any] = {"kind": "Fréchet distance", "num_samples": COUNT, "limits": limits}
    return [dataclasses.replace(part, **changes) for part in PARTS]


def distance_of(config: CertifyConfig) -> float:
    stored = np.load(str(config.adm_reference), allow_pickle=False)
    pool = pool_of(images_of(1))
    sigma = np.cov(pool.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(stored["sigma"] @ sigma).real, 0)).sum()
    difference = stored["mu"] - pool.mean(0)
    return float(difference @ difference + np.trace(stored["sigma"]) + np.trace(sigma) - 2 * roots)


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
    return {part["part"]: part["verdict"] for part in result["parts"]}


def test_what_the_published_parts_expect() -> None:
    evaluator, plain, guided, trainer = PARTS
    found = {n: (limit.low, limit.high) for n, limit in evaluator.limits.items()}
    assert found["frechet_distance"] == pytest.approx((3.938, 3.948))
    assert found["spatial_frechet_distance"] == pytest.approx((6.135, 6.145))
    assert found["inception_score"] == pytest.approx((215.54, 216.14))
    assert found["precision"] == pytest.approx((0.8245, 0.8285))
    assert found["recall"] == pytest.approx((0.5269, 0.5349))
    assert plain.limits["frechet_distance"].published == 5.9
    assert guided.limits["frechet_distance"].published == 1.42
    assert guided.made["cfg"] == 1.8 and guided.made["interval"] == [0.0, 0.7]
    limit = trainer.limits["frechet_distance"]
    assert (limit.low, limit.high, trainer.made["step"]) == (21.5, 24.5, 400_000)
    assert {part.kind for part in PARTS} == {"FID"}
    assert {part.num_samples for part in PARTS} == {50_000}


def test_what_there_are_files_for_is_run(config: CertifyConfig) -> None:
    expected = distance_of(config)
    result = certify(config, score, never, parts_for(expected, 1e-3))
    assert verdicts(result) == {
        "evaluator": "PASS",
        "sampler, plain": "NOT RUN",
        "sampler, guided": "NOT RUN",
        "trainer": "NOT RUN",
    }
    assert result["exit_code"] == 0 and result["certified"] == ["evaluator"]
    stored = json.loads((Path(config.workspace) / "certify.json").read_text())
    assert stored == result
    number = stored["parts"][0]["numbers"]["frechet_distance"]
    assert number["value"] == pytest.approx(expected, rel=1e-4) and number["ok"]
    said = lines(result)
    assert said[0] == "PASS     evaluator: within the ranges"
    assert said[2] == "NOT RUN  sampler, plain: not given: --plain (or --checkpoint)"
    assert said[4] == "NOT RUN  trainer: not given: --trained"
    assert said[-1] == "certified: evaluator; of all else nothing is claimed"


def test_a_number_outside_fails(config: CertifyConfig) -> None:
    result = certify(config, score, never, parts_for(distance_of(config) + 1, 0.5))
    assert verdicts(result)["evaluator"] == "FAIL" and result["exit_code"] == 1
    assert result["certified"] == []
    assert "outside the range: frechet_distance" in lines(result)[0]


def test_samples_must_be_what_the_part_speaks_of(config: CertifyConfig, tmp_path: Path) -> None:
    plain = write_samples(tmp_path / "plain", images_of(1), **PLAIN)
    other = write_samples(tmp_path / "other", images_of(1), **{**PLAIN, "cfg": 1.5})
    given = dataclasses.replace(config, plain=plain, guided=other)
    result = certify(given, score, never, parts_for(distance_of(config), 1e-3))
    found = verdicts(result)
    assert (found["sampler, plain"], found["sampler, guided"]) == ("PASS", "NOT RUN")
    (guided,) = (p for p in result["parts"] if p["part"] == "sampler, guided")
    assert "cfg is 1.5, expected 1.8; interval is None, expected [0.0, 0.7]" in guided["because"]
    assert result["exit_code"] == 3  # asked for, and not run
    for name, value in (("labels", "balanced"), ("use_ema", False), ("guide", {"step": 5})):
        foreign = write_samples(tmp_path / name, images_of(1), **{**PLAIN, name: value})
        one = dataclasses.replace(config, adm_samples=None, plain=foreign)
        result = certify(one, score, never, parts_for(distance_of(config), 1e-3))
        (told,) = (p for p in result["parts"] if p["part"] == "sampler, plain")
        assert told["verdict"] == "NOT RUN" and f"{name} is {value!r}, expected" in told["because"]
    # The real parts want the real network, the real reference and all samples.
    result = certify(given, score, never, PARTS)
    assert set(verdicts(result).values()) == {"NOT RUN"} and result["exit_code"] == 3
    assert (
        "80 samples, expected 50,000; the distance is a Fréchet distance, expected FID"
        in (result["parts"][0]["because"])
    )


def test_a_checkpoint_is_sampled_twice(config: CertifyConfig, tmp_path: Path) -> None:
    made: list[tuple[str, Mapping[str, Any]]] = []

    def sample(checkpoint: str, changes: Mapping[str, Any]) -> str:
        made.append((checkpoint, changes))
        settings = {**PLAIN, **changes}
        return write_samples(tmp_path / f"cfg{changes['cfg']}", images_of(1), **settings)

    published = str(tmp_path / "published.pt")
    Path(published).touch()
    given = dataclasses.replace(config, adm_samples=None, checkpoint=published)
    result = certify(given, score, sample, parts_for(distance_of(config), 1e-3))
    assert made == [
        (published, {"cfg": 1.0}),
        (published, {"cfg": 1.8, "interval": [0.0, 0.7]}),
    ]
    found = verdicts(result)
    assert (found["evaluator"], found["sampler, plain"], found["sampler, guided"]) == (
        "NOT RUN",
        "PASS",
        "PASS",
    )
    assert result["exit_code"] == 0


def test_the_command_samples_as_the_published_numbers_were(
    config: CertifyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features alone of 50,000 images a guidance, as `repa sample` would plan them."""
    asked: list[SampleConfig] = []

    def planned(settings: SampleConfig) -> None:
        asked.append(settings)
        raise DataError("far too many for a test")

    monkeypatch.setattr("repa_pipeline.commands_sample.make_samples", planned)
    (tmp_path / "xl.pt").touch()
    changes: dict[str, Any] = {
        "checkpoint": str(tmp_path / "xl.pt"),
        "network_weights": "fid.pth",
        "adm_samples": None,
    }
    changes["output"] = str(tmp_path / "certify.json")
    with pytest.raises(SystemExit) as ended:
        command(dataclasses.replace(config, **changes, workspace="s3://bucket/ws/"))
    assert ended.value.code == 3
    plain, guided = asked
    assert (plain.cfg, guided.cfg, guided.interval) == (1.0, 1.8, (0.0, 0.7))
    for made in asked:
        assert (made.sampler, made.num_steps, made.num_images) == ("sde", 250, 50_000)
        assert made.checkpoint == str(tmp_path / "xl.pt")
        assert (made.score, made.outputs) == ((config.network,), ())
        assert made.network_weights == "fid.pth" and made.labels == "random"
    assert plain.output == "s3://bucket/ws/certify/xl.cfg1"
    assert guided.output == "s3://bucket/ws/certify/xl.cfg1.8"


def test_nothing_given_is_nothing_claimed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def repa(*arguments: str) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as caught:
            main(["certify", *arguments])
        return int(str(caught.value.code)), capsys.readouterr().out.splitlines()

    code, said = repa()
    assert code == 3 and said[-1] == "certified: nothing; of all else nothing is claimed"
    assert said[0] == "NOT RUN  evaluator: not given: --adm-samples, --adm-reference"
    given = ("--adm-samples", "a.npz", "--adm-reference", "b.npz", "--checkpoint", "c.pt")
    code, said = repa(*given)
    assert code == 3 and said[:3] == [
        "NOT RUN  evaluator: no file or folder a.npz: check --adm-samples",
        "NOT RUN  sampler, plain: no file or folder c.pt: check --checkpoint",
        "NOT RUN  sampler, guided: no file or folder c.pt: check --checkpoint",
    ]
    code, planned = repa(*given, "--dry-run")
    assert code == 0 and planned == said[:4]


def test_nothing_is_sampled_for_a_reference_that_is_none(
    config: CertifyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "xl.pt").touch()
    given = dataclasses.replace(config, adm_samples=None, checkpoint=str(tmp_path / "xl.pt"))
    own = {"name": "val", "kind": "own", "num_images": 80}
    np.savez(
        tmp_path / "own.npz",
        about=np.frombuffer(json.dumps(own).encode(), np.uint8),
        **{"mu": np.zeros(64), "sigma": np.eye(64)},
    )
    for name, words in (
        ("none.npz", "no reference file"),
        ("adm.npz", "has no mu and no sigma"),
        ("own.npz", "is a reference of other images than ADM's: check --adm-reference"),
    ):
        other = dataclasses.replace(given, adm_reference=str(tmp_path / name))
        result = certify(other, score, never)
        assert set(verdicts(result).values()) == {"NOT RUN"} and result["exit_code"] == 3
        assert all(words in part["because"] for part in result["parts"][1:3])
    command(dataclasses.replace(given, dry_run=True))
    assert capsys.readouterr().out.splitlines() == [
        "NOT RUN  evaluator: not given: --adm-samples",
        "would run sampler, plain",
        "would run sampler, guided",
        "NOT RUN  trainer: not given: --trained",
    ]
