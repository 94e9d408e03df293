"""The demo is a list of public commands; its judge counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from repa_pipeline import demo
from repa_pipeline.data.digits import embedded_digits, train_indices
from repa_pipeline.errors import StageError
from repa_pipeline.stages import sample, sample_labels


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = demo.demo_steps("ws", 3)
    assert [step[0][0] for step in steps] == (
        ["encode-latents", "cache-features", "train"] + 2 * ["sample", "evaluate"] + ["report"]
    )
    assert steps[2] == [
        ["train", "repa", "--seed", "3"],
        ["train", "vanilla", "--encoder", "none", "--seed", "3"],
    ]
    last = steps[5][0]
    assert last[last.index("--checkpoint") + 1] == "ws/runs/repa/checkpoints/step-00000600.pt"
    assert steps[6][1] == ["evaluate", "--samples", "ws/runs/vanilla/samples/step600"]
    demo.run_demo(str(tmp_path / "none"), 3, dry_run=True)
    assert capsys.readouterr().out.count("$ repa ") == sum(map(len, steps))
    assert not (tmp_path / "none").exists()


def test_lines_are_marked_and_a_failure_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageError, match="`repa train` ended with exit code 2"):
        demo._together(str(tmp_path), [["runs"], ["train"]])
    out = capsys.readouterr().out
    assert "[repa] no runs in" in out and "[vanilla] repa: no cache at" in out


def test_the_judge_counts_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes = embedded_digits()
    chosen = train_indices()[:40]
    asked = classes[chosen].copy()
    asked[:10] = (asked[:10] + 1) % 10
    array = type("Array", (), {"spec": type("Spec", (), {"manifest": {}})})
    monkeypatch.setattr(sample, "open_samples", lambda folder: array)
    monkeypatch.setattr(sample, "sample_blocks", lambda array: [images[chosen]])
    monkeypatch.setattr(sample_labels, "labels_of", lambda manifest, count, store: asked[:count])
    line = demo.judge_samples(tmp_path)
    verdict = json.loads((tmp_path / "judge.json").read_text())
    assert verdict["num_samples"] == 40 and np.isclose(verdict["agreement"], 0.75)
    assert line.startswith("the judge agrees with 75.0% of 40 labels")
