"""Which class each sample is asked for: rules, files, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.data.objects import LocalStore
from repa_pipeline.errors import ConfigError, DamagedError, DataError, MissingError
from repa_pipeline.stages.sample import open_samples, read_settings, sample_blocks
from repa_pipeline.stages.sample_labels import labels_of, settle_labels, stands_by_class
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.sampling import make_samples, toy_sample_config, write_toy_runs

CLASSES = [2, 0, 1, 1, 0, 2, 0, 1, 2, 0]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("labels")
    with isolated_tables(folder):
        write_toy_runs(folder)
        yield folder


def write(path: Path, labels: Any) -> str:
    if path.suffix == ".npy":
        np.save(path, labels)
    else:
        path.write_text("\n".join(map(str, labels)) + "\n")
    return str(path)


def images_of(workspace: Path, output: Path, **changes: Any) -> Any:
    make_samples(toy_sample_config(workspace, output=str(output), npz=False, **changes))
    return np.concatenate(list(sample_blocks(open_samples(str(output)))))


@pytest.mark.parametrize("suffix", ["npy", "txt"])
def test_classes_of_a_file(workspace: Path, tmp_path: Path, suffix: str) -> None:
    """Sample k is the one of class file[k], and the folder knows it when the file is gone."""
    path = write(tmp_path / f"classes.{suffix}", CLASSES)
    got = images_of(workspace, tmp_path / "out", labels=path)
    single = [images_of(workspace, tmp_path / str(c), labels=str(c)) for c in range(3)]
    for k, label in enumerate(CLASSES):
        assert np.array_equal(got[k], single[label][k])
    assert all((single[0][k] != single[1][k]).any() for k in range(10))
    Path(path).unlink()
    settings = read_settings(str(tmp_path / "out"))
    assert settings["labels"] == "file" and len(settings["labels_sha256"]) == 64
    kept = labels_of(settings, 10, LocalStore(str(tmp_path / "out")))
    assert kept.tolist() == CLASSES and kept.dtype == np.int64


def test_the_classes_decide_the_recipe(workspace: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.npy", CLASSES)
    same = write(tmp_path / "b.txt", CLASSES)
    other = write(tmp_path / "c.npy", CLASSES[::-1])
    from repa_pipeline.stages.sample_plan import sample_stage

    prints = [
        sample_stage(toy_sample_config(workspace, labels=path)).spec.fingerprint
        for path in (first, same, other)
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (CLASSES[:9], r"got 9 classes, expected one for each of 10 images: set --num-images 9"),
        ([*CLASSES[:9], 3], "got 3 at 9, expected classes from 0 to 2"),
        ([-1, *CLASSES[1:]], "got -1 at 0, expected classes from 0 to 2"),
        (sorted(CLASSES), "stand class by class: the inception score .* --sorted-labels"),
        (sorted(CLASSES)[::-1], "stand class by class"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, labels: list[int], said: str) -> None:
    for name in ("x.npy", "x.txt"):
        with pytest.raises(DataError, match=said):
            settle_labels(write(tmp_path / name, labels), 0, 3, 10)


def test_files_that_hold_no_classes(tmp_path: Path) -> None:
    for array, said in (
        (np.zeros(10, np.float32), r"got float32 \[10\], expected whole numbers"),
        (np.zeros((10, 1), np.int64), r"got int64 \[10, 1\]"),
        (np.array([{}] * 10, dtype=object), "no .npy array of whole numbers"),
    ):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match=said):
            settle_labels(str(tmp_path / "x.npy"), 0, 3, 10)
    (tmp_path / "x.txt").write_text("1\n2.5\n")
    with pytest.raises(DataError, match="invalid literal .*2.5"):
        settle_labels(str(tmp_path / "x.txt"), 0, 3, 2)
    (tmp_path / "x.npy").write_bytes(b"no numpy")
    with pytest.raises(DataError, match="no .npy array"):
        settle_labels(str(tmp_path / "x.npy"), 0, 3, 2)
    with pytest.raises(MissingError, match="no labels file nowhere.npy: check --labels"):
        settle_labels("nowhere.npy", 0, 3, 10)
    with pytest.raises(ConfigError, match="or a .npy or .txt file"):
        settle_labels("nowhere.csv", 0, 3, 10)


def test_sorted_classes_are_taken_when_said(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npy", sorted(CLASSES))
    assert settle_labels(path, 0, 3, 10, sorted_too=True).of([0, 9]).tolist() == [0, 2]


def test_what_stands_by_class() -> None:
    for labels, expected in (
        ([0, 0, 1, 1], True),
        ([1, 1, 0], True),
        ([0, 1, 2], False),  # one image a class has no other order
        ([0, 1, 0], False),
        ([1, 1, 1], False),
    ):
        assert stands_by_class(np.array(labels)) is expected


def test_no_rule_gives_images_class_by_class() -> None:
    """The default order cannot be sorted: neighbours differ as classes drawn at random do."""
    for rule in ("random", "balanced"):
        labels = settle_labels(rule, 0, 10, 5000).of(range(5000))
        assert not stands_by_class(labels)
        assert 0.85 < float((labels[1:] != labels[:-1]).mean()) <= 1.0
        for block in labels.reshape(5, 1000):
            assert np.bincount(block, minlength=10).min() > 60


def test_kept_classes_that_were_altered(workspace: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npy", CLASSES)
    images_of(workspace, tmp_path / "out", labels=path)
    settings = read_settings(str(tmp_path / "out"))
    with pytest.raises(MissingError, match="give the folder that keeps them"):
        labels_of(settings, 10)
    np.save(tmp_path / "out" / "labels.npy", np.array(CLASSES[::-1]))
    with pytest.raises(DamagedError, match="is not what the samples were made with"):
        labels_of(settings, 10, LocalStore(str(tmp_path / "out")))
