"""The centre crop against outputs of the published preparation."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.data.image import adm_center_crop


@pytest.mark.parametrize("case", range(5))
def test_center_crop_is_bit_equal(shared: pathlib.Path, case: int) -> None:
    with np.load(shared / "golden" / "preprocessing.npz", allow_pickle=False) as golden:
        pixels, expected = golden[f"crop{case}_in"], golden[f"crop{case}_out"]
    assert np.array_equal(adm_center_crop(Image.fromarray(pixels), 256), expected)
