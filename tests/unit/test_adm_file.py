"""The ADM suite's `.npz`: against plain numpy, and what interruption and damage do to it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa_pipeline.errors import (
    DamagedError,
    DataError,
    MismatchError,
    MissingError,
    StageError,
)
from repa_pipeline.metrics import adm_file
from repa_pipeline.metrics.adm_file import (
    AdmWriter,
    adm_shape,
    read_adm,
    read_adm_settings,
    read_reference_statistics,
)


@pytest.fixture()
def images() -> np.ndarray:
    return np.random.default_rng(16).integers(0, 256, (11, 6, 6, 3), dtype=np.uint8)


def write(path: Path, images: np.ndarray, block: int) -> None:
    with AdmWriter(path, num_images=len(images), resolution=images.shape[1]) as writer:
        for start in range(0, len(images), block):
            writer.write(images[start : start + block])


def test_adm_file_is_read_by_numpy_and_by_blocks(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "new" / "samples.npz"
    write(path, images, block=4)
    with np.load(path, allow_pickle=False) as stored:
        assert stored.files == ["arr_0"]
        np.testing.assert_array_equal(stored["arr_0"], images)
    blocks = list(read_adm(path, block_images=3))
    assert [len(block) for block in blocks] == [3, 3, 3, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), images)
    assert adm_shape(path) == (11, 6, 6, 3)


def test_adm_file_written_by_numpy_is_read(tmp_path: Path, images: np.ndarray) -> None:
    np.savez_compressed(tmp_path / "numpy.npz", images, arr_1=np.arange(3))
    blocks = list(read_adm(tmp_path / "numpy.npz", block_images=5))
    np.testing.assert_array_equal(np.concatenate(blocks), images)


def test_settings_behind_the_images_leave_the_suites_reader_alone(
    tmp_path: Path, images: np.ndarray
) -> None:
    """The suite's rules: `arr_0.npy` streamed from the zip, C order uint8; no key `mu`."""
    path, text = tmp_path / "samples.npz", '{"cfg": 1.8, "class_names": ["Käse", "寿司"]}'
    for name in ("samples.npz", "again.npz"):
        with AdmWriter(tmp_path / name, num_images=11, resolution=6, settings=text) as writer:
            writer.write(images)
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()
    assert read_adm_settings(path) == text
    with np.load(path, allow_pickle=False) as stored:
        assert stored.files == ["arr_0", "settings"] and "mu" not in stored
        assert str(stored["settings"]) == text
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        assert archive.testzip() is None
        assert np.lib.format.read_magic(stream) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        assert (shape, fortran, dtype) == ((11, 6, 6, 3), False, np.uint8)
        assert stream.read() == images.tobytes()
    assert np.array_equal(np.concatenate(list(read_adm(path))), images)
    with pytest.raises(DataError, match="has no mu and no sigma"):
        read_reference_statistics(path)
    write(tmp_path / "plain.npz", images, 4)
    assert read_adm_settings(tmp_path / "plain.npz") is None
    with pytest.raises(MissingError):
        read_adm_settings(tmp_path / "none.npz")


def test_equal_images_give_equal_bytes(tmp_path: Path, images: np.ndarray) -> None:
    write(tmp_path / "a.npz", images, block=4)
    write(tmp_path / "b.npz", images[..., ::1].copy(order="F"), block=11)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        (entry,) = archive.infolist()
    assert entry.date_time == (1980, 1, 1, 0, 0, 0)
    assert entry.compress_type == zipfile.ZIP_STORED and entry.extract_version == 45


def test_an_interrupted_write_leaves_no_file(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "samples.npz"
    with pytest.raises(KeyboardInterrupt):
        with AdmWriter(path, num_images=11, resolution=6) as writer:
            writer.write(images[:4])
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_no_final_file_and_can_be_repeated(
    tmp_path: Path, images: np.ndarray
) -> None:
    path = tmp_path / "samples.npz"
    code = (
        "import os, sys, numpy as np\n"
        "from repa_pipeline.metrics.adm_file import AdmWriter\n"
        "with AdmWriter(sys.argv[1], num_images=11, resolution=6) as writer:\n"
        "    writer.write(np.zeros((4, 6, 6, 3), np.uint8))\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert not path.exists()
    write(path, images, block=4)
    np.testing.assert_array_equal(np.concatenate(list(read_adm(path))), images)
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_two_writers_never_mix(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "samples.npz"
    with AdmWriter(path, num_images=11, resolution=6) as first:
        first.write(images[:4])
        with pytest.raises(StageError, match="samples.npz is being written by another process"):
            write(path, images, block=11)
        first.write(images[4:])
    np.testing.assert_array_equal(np.concatenate(list(read_adm(path))), images)
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_one_that_was_finished_meanwhile_is_not_written_into(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "samples.npz", adm_file.fcntl.flock
    write(tmp_path / "made.npz", images, block=4)

    def finished_first(file: Any, how: int) -> None:
        (tmp_path / "samples.npz.partial").rename(path)
        path.write_bytes((tmp_path / "made.npz").read_bytes())
        lock(file, how)

    monkeypatch.setattr(adm_file.fcntl, "flock", finished_first)
    with pytest.raises(StageError, match="is being written by another process"):
        write(path, images[:2], block=2)
    np.testing.assert_array_equal(np.concatenate(list(read_adm(path))), images)


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "samples.npz"
    write(path, images, block=4)
    before = path.read_bytes()
    with pytest.raises(DataError, match="got 4 images, expected 5"):
        with AdmWriter(path, num_images=5, resolution=6) as writer:
            writer.write(images[:4])
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrong", [np.zeros((2, 6, 5, 3), np.uint8), np.zeros((2, 6, 6, 3))])
def test_writer_refuses_other_images(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(MismatchError, match=r"expected uint8 \[B, 6, 6, 3\]"):
        with AdmWriter(tmp_path / "samples.npz", num_images=2, resolution=6) as writer:
            writer.write(wrong)


def test_reading_refuses_damage(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "samples.npz"
    write(path, images, block=4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DamagedError, match="no .npz"):
        list(read_adm(path))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DamagedError, match="CRC"):
        list(read_adm(path))
    with pytest.raises(MissingError):
        list(read_adm(tmp_path / "absent.npz"))


@pytest.mark.parametrize(
    "arrays",
    [
        {"other": np.zeros((1, 2, 2, 3), np.uint8)},
        {"arr_0": np.zeros((1, 2, 2, 3), np.float32)},
        {"arr_0": np.zeros((1, 2, 2), np.uint8)},
        {"arr_0": np.asfortranarray(np.zeros((2, 2, 2, 3), np.uint8))},
        {"arr_0": np.array([{}], dtype=object)},
    ],
)
def test_reading_refuses_other_arrays(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(DataError, match="arr_0"):
        list(read_adm(tmp_path / "other.npz"))


def test_reference_statistics(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "reference.npz"
    mu, sigma = np.arange(4) / 3, np.cov(np.random.default_rng(17).normal(size=(4, 9)))
    np.savez(path, images, mu=mu.astype(np.float32), sigma=sigma, mu_s=mu[:2], sigma_s=np.eye(2))
    found = read_reference_statistics(path)
    np.testing.assert_array_equal(found.mu, mu.astype(np.float32))
    np.testing.assert_array_equal(found.sigma, sigma)
    assert found.mu_s is not None and found.sigma_s is not None
    np.testing.assert_array_equal(found.mu_s, mu[:2])
    np.testing.assert_array_equal(found.sigma_s, np.eye(2))
    assert found.mu.dtype == np.float64
    np.savez(path, mu=mu, sigma=sigma)
    assert read_reference_statistics(path).mu_s is None


def test_reference_statistics_refuse_samples_and_pickles(
    tmp_path: Path, images: np.ndarray
) -> None:
    write(tmp_path / "samples.npz", images, block=4)
    with pytest.raises(DataError, match="no mu and no sigma"):
        read_reference_statistics(tmp_path / "samples.npz")
    pickled = np.array([{}], dtype=object)
    np.savez(tmp_path / "pickled.npz", mu=pickled, sigma=pickled)
    with pytest.raises(DamagedError, match="allow_pickle"):
        read_reference_statistics(tmp_path / "pickled.npz")
