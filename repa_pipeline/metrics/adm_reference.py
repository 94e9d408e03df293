"""A reference in ADM's layout, written block by block: `arr_0` and mu, sigma, mu_s, sigma_s."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repa_pipeline.errors import MismatchError
from repa_pipeline.metrics.adm_file import whole_file

_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_adm_reference(
    path: Path,
    blocks: Iterable[NDArray[np.uint8]],
    shape: tuple[int, int, int, int],
    statistics: Mapping[str, NDArray[np.float64]],
) -> None:
    """Writes images uint8 in blocks [b, R, R, 3], `shape` in all, and the statistics.

    10,000 images of 256 pixels are 2 GB; one block is held. The file appears, whole, at the end.
    Raises MismatchError when the blocks do not make up `shape`.
    """
    with (
        whole_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        _write_images(archive, blocks, shape)
        for name, value in statistics.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w") as stream:
                np.lib.format.write_array(stream, value, allow_pickle=False)


def _write_images(
    archive: zipfile.ZipFile,
    blocks: Iterable[NDArray[np.uint8]],
    shape: tuple[int, int, int, int],
) -> None:
    count = 0
    with archive.open(zipfile.ZipInfo("arr_0.npy", _EPOCH), "w", force_zip64=True) as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for block in blocks:
            stream.write(np.ascontiguousarray(block).data)
            count += len(block)
            if block.shape[1:] != shape[1:]:
                raise MismatchError(f"images of shape {block.shape}, expected {shape}")
    if count != shape[0]:
        raise MismatchError(f"{count} images for a file of {shape[0]}: nothing was written")
