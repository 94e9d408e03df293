"""Import of the reference's preprocessed data: images/ becomes the index, vae-sd/ the latents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from repa_pipeline.autoencoders import AutoencoderSpec
from repa_pipeline.config_exchange import ImportConfig
from repa_pipeline.data.array import ArraySpec
from repa_pipeline.data.index import Index
from repa_pipeline.data.items import Item
from repa_pipeline.data.refset import RefSet, open_refset
from repa_pipeline.engine.contracts import Executor
from repa_pipeline.engine.run import Progress, StageResult
from repa_pipeline.errors import ConfigError, DataError, MismatchError
from repa_pipeline.registry import autoencoder_spec
from repa_pipeline.stages.importing import (
    Member,
    latents_spec,
    parse_npy,
    resolution_of,
    run_import,
)
from repa_pipeline.stages.index import ensure_index


def import_reference(
    config: ImportConfig, executor: Executor, progress: Progress
) -> tuple[Index, StageResult]:
    """Makes the index over the set's images and the sealed latents beside it.

    Raises DataError naming the first file that is missing or unusable, MismatchError for latents
    of another autoencoder or other images.
    """
    pairs = check_reference(config)
    autoencoder = autoencoder_spec(config, config.autoencoder)
    shape = first_shape(config, pairs, autoencoder)
    index = ensure_index(config, executor, progress)
    check_sizes(index, resolution_of(autoencoder, shape))
    spec = reference_spec(config, autoencoder, shape, index, pairs)
    latent_of = {image.key: latent for image, latent in pairs}

    def members(name: str) -> Iterator[Member]:
        for batch in index.batches(("key",)):
            for key in batch["key"].to_pylist():
                item = latent_of[key]
                yield Member(f"vae-sd/{item.key}", item.path, item.offset, item.num_bytes)

    return index, run_import(config, [spec], members, executor, progress)


def check_reference(config: ImportConfig) -> list[tuple[Item, Item]]:
    """(image, latent) in the set's order.

    Raises MissingError or DataError for what is no whole reference set: counts, names and labels
    must agree.
    """
    if config.source.startswith("embedded:"):
        raise ConfigError("nothing to import: repa import FOLDER (or SET.zip) of the reference")
    found = open_refset(config.source)
    _check_complete(found)
    return found.pairs()


def first_shape(
    config: ImportConfig, pairs: list[tuple[Item, Item]], autoencoder: AutoencoderSpec
) -> tuple[int, ...]:
    """The shape of the first latent; raises DataError or MismatchError when it cannot be one."""
    first = pairs[0][1]
    data = open_refset(config.source).read(first)
    shape = parse_npy(data, f"vae-sd/{first.key}").shape
    resolution_of(autoencoder, shape)
    return shape


def reference_spec(
    config: ImportConfig,
    autoencoder: AutoencoderSpec,
    shape: tuple[int, ...],
    index: Index,
    pairs: list[tuple[Item, Item]],
) -> ArraySpec:
    """The array of the set's latents; the listing is part of what decides its bytes."""
    total = hashlib.sha256()
    for _, latent in pairs:
        total.update(f"{latent.key}\t{latent.num_bytes}\n".encode())
    known = {"latents_listing": total.hexdigest()}
    return latents_spec(config, autoencoder, shape, index, known)


def check_sizes(index: Index, resolution: int) -> None:
    """Raises MismatchError for an image that the latents cannot have been made from."""
    for batch in index.batches(("key", "width", "height")):
        columns = (column.to_pylist() for column in batch.columns)
        for key, width, height in zip(*columns, strict=True):
            if (width, height) != (resolution, resolution):
                raise MismatchError(
                    f"image {key} is {width}x{height}, the latents are of images of {resolution}x"
                    f"{resolution}: they were not made from it"
                )


def _check_complete(found: RefSet) -> None:
    """Raises DataError naming the first image without a latent, or latent without an image."""
    images = {_number_of(item.key): item.key for item in found.image_items()}
    latents = {_number_of(item.key): item.key for item in found.latent_items()}
    if not images or not latents:
        what = "images in images/" if not images else "latents in vae-sd/"
        raise DataError(f"{found.url} has no {what}: the preprocessing did not finish")
    for there, others, what in ((images, latents, "latent"), (latents, images, "image")):
        if len(others) >= len(there):
            continue
        missing = min(there[number] for number in there if number not in others)
        raise DataError(
            f"{found.url} is half finished: {len(images)} images, {len(latents)} latents; the "
            f"first without its {what} is {missing}; finish the preprocessing, or restore the files"
        )


def _number_of(key: str) -> str:
    """What an image and its latent have in common: '00000/img00000007'."""
    folder, _, base = key.rpartition("/")
    return f"{folder}/{base.rpartition('.')[0].replace('-mean-std-', '')}"
