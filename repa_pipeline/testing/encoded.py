"""A small real cache: PNGs of random pixels, encoded by tiny networks through the real stages.

    with tiny_parts(folder):
        config = encode_tiny_cache(folder)

gives FOLDER/images, weight files, and in FOLDER/work the latents `tiny-kl` and the tokens of
`tiny-teacher`, both views of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from repa_pipeline.config import EncodeAllConfig
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import ledger_of, run_stage
from repa_pipeline.observe import Silent
from repa_pipeline.registry import TABLES
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_autoencoder, tiny_encoder, write_weights

RESOLUTION = 16


@contextmanager
def tiny_parts(folder: Path) -> Iterator[None]:
    """Inside, the tables know `tiny-kl` and `tiny-teacher`; their weights are made if absent."""
    autoencoder = tiny_autoencoder(weights=str(folder / "kl.safetensors"))
    encoder = tiny_encoder(weights=str(folder / "teacher.safetensors"), patch_size=8)
    for spec in (autoencoder, encoder):
        if not Path(str(spec.weights)).exists():
            write_weights(spec)
    with isolated_tables():
        TABLES["autoencoders"].add(autoencoder)
        TABLES["encoders"].add(encoder)
        yield


def write_images(folder: Path, num_images: int) -> None:
    """PNGs of random pixels and several sizes in three classes."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(num_images):
        path = folder / "abc"[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = RESOLUTION + number % 5
        pixels = generator.integers(0, 256, (side, side + number % 3, 3), np.uint8)
        Image.fromarray(pixels).save(path)


def encode_tiny_cache(folder: Path, *, num_images: int = 22, **changes: Any) -> EncodeAllConfig:
    """Makes images and cache (see the module) inside `tiny_parts`; returns the settings used."""
    from repa_pipeline.stages.features import features_products
    from repa_pipeline.stages.images import ImagePass
    from repa_pipeline.stages.index import cache_store, ensure_index
    from repa_pipeline.stages.latents import latents_product

    settings: dict[str, Any] = {
        "source": str(folder / "images"),
        "workspace": str(folder / "work"),
        "autoencoder": "tiny-kl",
        "encoder": ("tiny-teacher",),
        "codec": "int8",
        "resolution": RESOLUTION,
        "batch_size": 3,
        "shard_rows": 4,
        "flip": True,
        "device": "cpu",
        "threads": 1,
    }
    config = EncodeAllConfig(**{**settings, **changes})
    if not (folder / "images").exists():
        write_images(folder / "images", num_images)
    executor, store = LocalExecutor(0), cache_store(config)
    index = ensure_index(config, executor, Silent())
    products = (latents_product(config, index), *features_products(config, index))
    stage = ImagePass(config, products)
    ledgers = {output.name: ledger_of(store, output) for output in stage.outputs}
    run_stage(stage, executor, ledgers, Silent())
    return config
