"""The embedded images: scikit-learn's handwritten digits, so that every command runs offline.

1797 grey images of 8x8 pixels with ten classes ship inside scikit-learn (`load_digits`, after the
UCI "Optical Recognition of Handwritten Digits" set). Every fifth one is held out: nothing in
`repa_pipeline/assets` was trained on it.
"""

from __future__ import annotations

import functools
import io

import numpy as np
import numpy.typing as npt

from repa_pipeline.errors import DataError

NUM_CLASSES = 10
SIDE = 8
HELD_OUT_EVERY = 5

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


def digit_grays() -> UInt8:
    """All digits as 8-bit grey: the stored 0..16 times 255/16, rounded. uint8 [1797, 8, 8]."""
    return _load()[0]


def labels() -> Int64:
    """The class of every digit, 0..9. int64 [1797]."""
    return _load()[1]


def embedded_digits(resolution: int = 64) -> tuple[UInt8, Int64]:
    """All digits as the pipeline prepares them, and their classes.

    Returns images uint8 [1797, resolution, resolution, 3] (ADM's centre crop, which enlarges by
    BICUBIC) and labels int64 [1797].
    """
    from PIL import Image

    from repa_pipeline.data.image import adm_center_crop

    images = [Image.fromarray(gray).convert("RGB") for gray in digit_grays()]
    return np.stack([adm_center_crop(image, resolution) for image in images]), labels()


def train_indices() -> Int64:
    """Indices that networks and statistics may see. int64 [1438], ascending."""
    return np.flatnonzero(~_is_held_out()).astype(np.int64)


def heldout_indices() -> Int64:
    """Indices that nothing is trained on. int64 [359], ascending."""
    return np.flatnonzero(_is_held_out()).astype(np.int64)


def digit_png(index: int) -> bytes:
    """Digit `index` (0..1796) as a PNG file: 8x8 pixels, 8-bit grey.

    Raises DataError when there is no such digit.
    """
    from PIL import Image

    grays = digit_grays()
    if not 0 <= index < len(grays):
        raise DataError(
            f"no embedded digit {index}: expected 0..{len(grays) - 1}, check the index of the rows"
        )
    buffer = io.BytesIO()
    Image.fromarray(grays[index]).save(buffer, format="PNG")
    return buffer.getvalue()


def _is_held_out() -> npt.NDArray[np.bool_]:
    index = np.arange(len(labels()), dtype=np.int64)
    held_out: npt.NDArray[np.bool_] = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return held_out


@functools.cache
def _load() -> tuple[UInt8, Int64]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Integer arithmetic: 8 * 255 / 16 = 127.5 becomes 128 on every machine.
    grays = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    targets = digits.target.astype(np.int64)
    grays.flags.writeable = False
    targets.flags.writeable = False
    return grays, targets
