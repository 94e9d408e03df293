"""Pictures made of arrays: grids of samples."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.objects import LocalStore

Images = npt.NDArray[np.uint8]
_MAX_CLASS_ROWS = 10


def grid_indices(labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Which samples, ascending, a grid of at most `count` shows, given the classes [N] of all."""
    return np.sort(np.concatenate(_grid_rows(labels, count)))


def class_grid(images: Images, labels: npt.NDArray[np.int64], count: int) -> Images:
    """At most `count` images uint8 [N, R, R, 3] as one picture [H, W, 3], a row a class if few.

    With up to 10 classes, every row shows one class in order; otherwise images stand in order.
    """
    return tiled([images[indices] for indices in _grid_rows(labels, count)])


def _grid_rows(labels: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    classes = np.unique(labels)
    per_class = count // len(classes)
    if 1 < len(classes) <= _MAX_CLASS_ROWS and per_class:
        return [np.flatnonzero(labels == label)[:per_class] for label in classes]
    shown = np.arange(min(count, len(labels)))
    columns = math.ceil(math.sqrt(len(shown)))
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]


def tiled(rows: Sequence[Images], gap: int = 2) -> Images:
    """Rows of images uint8 [n, R, R, 3] as one picture [H, W, 3], `gap` white pixels between."""
    columns = max(map(len, rows))
    side = rows[0].shape[1]
    step = side + gap
    canvas = np.full((len(rows) * step + gap, columns * step + gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = gap + y * step, gap + x * step
            canvas[top : top + side, left : left + side] = image
    return canvas


def png_bytes(image: Images) -> bytes:
    """Encodes uint8 [H, W, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def jpeg_bytes(image: Images, quality: int) -> bytes:
    """Encodes uint8 [H, W, 3] with full colour resolution."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def save_png(path: Path, image: Images) -> None:
    """Writes uint8 [H, W, 3] in one step; an equal picture that stands there is left alone."""
    data = png_bytes(image)
    if not path.exists() or path.read_bytes() != data:
        LocalStore(str(path.parent)).put(path.name, data)
