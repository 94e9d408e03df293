"""Real photos and real weights through the commands of examples/tiny20, made small."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.cli import main
from repa_pipeline.data.index import read_index
from repa_pipeline.data.objects import open_store
from repa_pipeline.observe import read_events

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny20"
NUM_IMAGES = 32


def first_images(shared: Path, target: Path) -> dict[str, int]:
    """Writes the first images of the validation tar; returns their classes by key."""
    labels: dict[str, int] = {}
    source = shared / "data" / "tiny20" / "val-0000.tar.gz"
    with tarfile.open(source) as given, tarfile.open(target, "w") as made:
        for member in given.getmembers()[: 2 * NUM_IMAGES]:
            file = given.extractfile(member)
            assert file is not None
            data = file.read()
            made.addfile(member, io.BytesIO(data))
            key, _, extension = member.name.rpartition(".")
            if extension == "cls":
                labels[key] = int(data)
    assert len(labels) == NUM_IMAGES
    return labels


def commands() -> list[str]:
    """The command lines of run.sh."""
    lines = (EXAMPLE / "run.sh").read_text().splitlines()
    return [line.removeprefix("repa ") for line in lines if line.startswith("repa ")]


def environment(shared: Path, tmp_path: Path) -> dict[str, str]:
    weights = shared / "data" / "weights"
    return {
        "REPA_CONFIG": str(EXAMPLE / "repa.toml"),
        "REPA_SOURCE": str(tmp_path / "small.tar"),
        "REPA_WORKSPACE": str(tmp_path / "work"),
        "REPA_ENCODE_LATENTS_WEIGHTS": str(weights / "taesd_bf16.safetensors"),
        "REPA_CACHE_FEATURES_WEIGHTS": str(weights / "mobilenet_v2_1.0_int8.safetensors"),
        "REPA_DECODER_WEIGHTS": str(weights / "taesd_bf16.safetensors"),
        "REPA_NETWORK_WEIGHTS": str(weights / "mobilenet_v1_1.0_uint8.safetensors"),
        "REPA_ENCODE_LATENTS_BATCH_SIZE": "16",
        "REPA_CACHE_FEATURES_BATCH_SIZE": "16",
        "REPA_DEVICE": "cpu",
        "REPA_THREADS": "1",
        "REPA_MODEL": "SiT-XS/2",
        "REPA_STEPS": "8",
        "REPA_TRAIN_BATCH_SIZE": "16",
        "REPA_LOG_EVERY": "1",
        "REPA_PREVIEW_EVERY": "0",
        "REPA_NUM_IMAGES": "8",
        "REPA_NUM_STEPS": "3",
        "REPA_SAMPLE_BATCH_SIZE": "8",
        "REPA_ALLOW_FEW": "true",
    }


def test_run_sh_sets_what_the_test_sets(shared: Path, tmp_path: Path) -> None:
    text = (EXAMPLE / "run.sh").read_text()
    for name, value in environment(shared, tmp_path).items():
        if name.endswith("WEIGHTS"):
            assert f'export {name}="$data/weights/{Path(value).name}"' in text
    assert commands()[0] == "encode-latents" and len(commands()) == 9


def test_the_example(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = first_images(shared, tmp_path / "small.tar")
    monkeypatch.chdir(tmp_path)
    for name, value in environment(shared, tmp_path).items():
        monkeypatch.setenv(name, value)
    for line in commands():
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        assert caught.value.code == 0, (line, capsys.readouterr().err)

    work = tmp_path / "work"
    index = read_index(open_store(str(work / "cache")))
    assert {entry.key: entry.label for entry in index.entries} == labels
    check_runs(work / "runs")
    assert (work / "report.html").stat().st_size > 10_000


def check_runs(runs: Path) -> None:
    losses = {}
    for name in ("aligned", "vanilla"):
        events = read_events(runs / name / "events.jsonl")
        losses[name] = [event for event in events if event["event"] == "scalars"]
        assert [event["step"] for event in losses[name]] == list(range(1, 9))
        (found,) = (runs / name).glob("samples/*/result.json")
        check_result(json.loads(found.read_text()))
        with np.load(found.with_name("samples.npz"), allow_pickle=False) as stored:
            images = stored["arr_0"]
        assert images.shape == (8, 128, 128, 3) and images.std() > 10
    aligned, vanilla = losses["aligned"], losses["vanilla"]
    assert aligned[0]["denoising"] == pytest.approx(vanilla[0]["denoising"], abs=1e-4)
    assert aligned[-1]["alignment"] < aligned[0]["alignment"] - 0.01
    assert vanilla[-1]["denoising"] < vanilla[0]["denoising"]


def check_result(result: dict[str, Any]) -> None:
    metrics = result["metrics"]
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["frechet_distance"] > 100 and metrics["inception_score"] >= 1
    assert 0 <= metrics["precision"] <= 1 and 0 <= metrics["recall"] <= 1
    assert (result["num_samples"], result["reference"]["num_images"]) == (8, NUM_IMAGES)
    assert result["network"]["name"] == "mobilenet-v1"
