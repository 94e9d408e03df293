"""Sample folders for tests: sealed images as `repa sample` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.array import ArraySpec, begin_array, seal_array, write_shard
from repa_pipeline.data.objects import open_store
from repa_pipeline.data.shards import RecordLayout

Images = npt.NDArray[np.uint8]


def noise_images(count: int, seed: int, side: int = 64) -> Images:
    """uint8 [count, side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def write_sample_folder(
    folder: Path, images: Images, shard_rows: int = 16, **settings: Any
) -> Path:
    """Seals images uint8 [N, R, R, 3] as the array `images` of a sample folder."""
    layout = RecordLayout(images.shape[1:], "uint8", shard_rows)
    spec = ArraySpec("images", len(images), layout, {"kind": "samples", **settings})
    store = open_store(str(folder))
    begin_array(store, spec)
    shards = []
    for k in range(spec.num_shards):
        part = images[k * shard_rows : (k + 1) * shard_rows]
        num_bytes, digest = write_shard(store, spec, k, part)
        shards.append({"index": k, "rows": len(part), "num_bytes": num_bytes, "digest": digest})
    seal_array(store, spec, shards)
    return folder
