"""TensorFlow 1's legacy bilinear resize: the step before the FID network's first layer.

Source position = destination * in / out: no half pixel, no antialias. In numpy, because the
parity of FID hangs on these exact values and not on their speed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repa_pipeline.errors import MismatchError


def tf1_bilinear_resize(images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Resizes images uint8 [N, H, W, C] to float32 [N, size, size, C], range 0 to 255."""
    if images.ndim != 4 or images.dtype != np.uint8:
        raise MismatchError(
            f"images are {images.dtype} of shape {images.shape}: expected uint8 [N, H, W, C]"
        )
    top, bottom, weight_y = _taps(images.shape[1], size)
    left, right, weight_x = _taps(images.shape[2], size)
    weight_x = weight_x[:, None]
    rows = [
        _mix(images[:, side][:, :, left], images[:, side][:, :, right], weight_x)
        for side in (top, bottom)
    ]
    return _mix(rows[0], rows[1], weight_y[:, None, None])


def _taps(
    size_in: int, size_out: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Indices of the two neighbours of each output position, and the weight of the second."""
    scale = np.float32(size_in) / np.float32(size_out)
    position = np.arange(size_out, dtype=np.float32) * scale
    lower = np.floor(position).astype(np.intp)
    return lower, np.minimum(lower + 1, size_in - 1), position - lower.astype(np.float32)


def _mix(
    first: NDArray[np.generic], second: NDArray[np.generic], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    start = first.astype(np.float32)
    return start + (second.astype(np.float32) - start) * weight
