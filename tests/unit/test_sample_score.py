"""`repa sample --score` and `repa evaluate`: the same rows, byte for byte, and the same numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.errors import MismatchError
from repa_pipeline.metrics import networks
from repa_pipeline.observe import Silent
from repa_pipeline.stages.evaluate import evaluate
from repa_pipeline.stages.sample import open_samples, sample_blocks
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.sampling import make_samples, toy_sample_config, write_toy_runs

NUM_IMAGES = 12


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy run, and a reference with statistics of the network's own."""
    folder = tmp_path_factory.mktemp("score")
    with isolated_tables(folder):
        write_toy_runs(folder)
        images = np.random.default_rng(0).integers(0, 255, (70, 64, 64, 3), np.uint8)
        network = networks.load_network("digits-cnn", weights=None, device="cpu")
        import torch

        pool = network.features(torch.from_numpy(images).permute(0, 3, 1, 2)).pool.double().numpy()
        np.savez(
            folder / "reference.npz",
            arr_0=images, mu=pool.mean(0), sigma=np.cov(pool, rowvar=False),
        )  # fmt: skip
        yield folder


def make(workspace: Path, name: str, **changes: Any) -> Path:
    output = workspace / name
    make_samples(toy_sample_config(workspace, output=str(output), num_images=NUM_IMAGES, **changes))
    return output


def score(workspace: Path, samples: Path) -> dict[str, Any]:
    config = EvaluateConfig(
        workspace=str(workspace), samples=str(samples), network="digits-cnn", device="cpu",
        reference=str(workspace / "reference.npz"), threads=1, is_split=NUM_IMAGES,
        allow_few=True,
    )  # fmt: skip
    return evaluate(config, Silent())


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_rows_of_both_ways(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = make(workspace, "scored", score=("digits-cnn",))
    with_images = make(workspace, "with_images", npz=False)
    late = score(workspace, with_images)
    assert files(scored / "judge.digits-cnn") == files(with_images / "judge.digits-cnn")

    # Of features that stand there, no network is loaded.
    monkeypatch.setattr(networks, "load_network", lambda *_, **__: pytest.fail("a network"))
    monkeypatch.setattr(
        "repa_pipeline.stages.judge.load_network", lambda *_, **__: pytest.fail("a network")
    )
    early = score(workspace, scored)
    assert early["metrics"] == late["metrics"] and early["metrics"]["frechet_distance"] > 0
    assert early["sample_settings"] == late["sample_settings"]
    assert early["sample_settings"]["cfg"] == 2.0

    settings = json.loads((scored / "settings.json").read_text())
    (scored / "settings.json").write_text(json.dumps({**settings, "cfg": 1.0}))
    with pytest.raises(MismatchError, match="is not what the features there were made with"):
        score(workspace, scored)
    for name in ("settings.json", "result.json"):
        (scored / name).unlink()
    unknown = score(workspace, scored)
    assert unknown["metrics"] == late["metrics"] and unknown["sample_settings"] is None


def test_an_npz_says_how_its_images_were_made(workspace: Path) -> None:
    folder = make(workspace, "npz")
    result = score(workspace, folder / "samples.npz")
    assert result["sample_settings"] == score(workspace, folder)["sample_settings"]
    assert result["metrics"] == score(workspace, folder)["metrics"]
    images = np.concatenate(list(sample_blocks(open_samples(str(folder)))))
    assert len(images) == result["num_samples"] == NUM_IMAGES


def test_pictures_score_as_images_do(workspace: Path) -> None:
    folder, images = make(workspace, "png", outputs=("png",)), make(workspace, "same", npz=False)
    found, expected = score(workspace, folder), score(workspace, images)
    assert found["metrics"] == expected["metrics"]
