"""What `repa plan` plans from: the images, the arrays that `repa encode` would make of them, the
cluster. Rates are in plan_rates.py."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from repa_pipeline.config import EMBEDDED
from repa_pipeline.config_plan import PlanConfig
from repa_pipeline.data.array import ArraySpec
from repa_pipeline.data.coalesce import count_gets
from repa_pipeline.data.index import Index, open_index
from repa_pipeline.data.names import MIRRORED, SCALE
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.data.source import Item, Source, open_source
from repa_pipeline.device import cpu_count
from repa_pipeline.errors import ConfigError, MissingError, RepaError
from repa_pipeline.registry import autoencoder_spec, encoder_spec
from repa_pipeline.stages.features import chosen_codec
from repa_pipeline.stages.images import views
from repa_pipeline.stages.index import cache_store, default_shard_rows, open_config_source
from repa_pipeline.stages.plan import Shape, Workload

IMAGENET_IMAGES = 1_281_167
IMAGENET_IMAGE_BYTES = 115_000
# Shards looked at to count the source's requests; the others are taken to be alike.
_SAMPLED_SHARDS = 8
_SAMPLED_FILES = 16


@dataclasses.dataclass(frozen=True)
class Images:
    """The source's images: how many, requests and bytes that read each once, and in words where
    the numbers come from. files: a few of them where they lie at hand."""

    num_images: int
    gets: int
    num_bytes: int
    images_from: str
    gets_from: str
    is_indexed: bool = False
    shard_rows: int = 0
    files: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """A workload, and the images it is of."""

    work: Workload
    images: Images


def teachers_of(config: PlanConfig) -> tuple[str, ...]:
    """Table names of the teachers; none for the encoder "none".

    Raises UnknownNameError, and ConfigError for one that is named twice.
    """
    if config.encoder == ("none",):
        return ()
    names = tuple(encoder_spec(config, name).name for name in config.encoder)
    if len(set(names)) < len(names):
        raise ConfigError(f"--encoder names one twice: {', '.join(config.encoder)}")
    return names


def find_facts(config: PlanConfig) -> Facts:
    """The workload of `config`; raises ConfigError for settings that no cache can have."""
    images = find_images(config)
    teachers = teachers_of(config)
    latents = autoencoder_spec(config, config.autoencoder).name
    work = Workload(
        num_images=images.num_images,
        arrays=planned_arrays(config, images.num_images, images.shard_rows),
        networks=dict.fromkeys((latents, *teachers), len(views(config))),
        teachers=teachers,
        source_gets=images.gets,
        source_bytes=images.num_bytes,
        is_indexed=images.is_indexed,
        train_images=config.train_steps * config.train_batch,
        runs=config.runs,
    )
    return Facts(work, images)


def find_images(config: PlanConfig) -> Images:
    """The images of the workspace's index; of the embedded data set; else as given, or ImageNet.

    A source without an index is not listed, which may take long and cost requests.
    """
    index = _index(config)
    if index is not None:
        return _indexed(config, index)
    if _is_embedded(config) and not config.num_images:
        source = open_source(config.source)
        items = source.items()
        files = tuple(source.read(item) for item in items[:_SAMPLED_FILES])
        size = sum(item.num_bytes for item in items)
        where = f"the embedded data set {config.source}"
        return Images(len(items), 0, size, where, "part of this package: no GETs", files=files)
    num_images = config.num_images or IMAGENET_IMAGES
    where = "as given" if config.num_images else "ImageNet's train set; --num-images says others"
    size = num_images * (config.image_bytes or IMAGENET_IMAGE_BYTES)
    if config.source != EMBEDDED and not _is_remote(config.source):
        return Images(num_images, 0, size, where, "a local source costs no GETs")
    return Images(num_images, num_images, size, where, "1 an image in each pass; fewer for tars")


def planned_arrays(
    config: PlanConfig, num_images: int, index_shard_rows: int = 0
) -> tuple[ArraySpec, ...]:
    """The arrays that `repa encode` would write, without weights or an index.

    Raises ConfigError and UnknownNameError for settings that no cache can have.
    """
    shard_rows = config.shard_rows or index_shard_rows or default_shard_rows(num_images)
    resolution = config.resolution
    latents = autoencoder_spec(config, config.autoencoder)
    _, height, width = latents.latent_shape(resolution)
    shape: tuple[int, ...] = (latents.stored_channels, height, width)
    found = [(f"latents.{latents.name}.{resolution}", shape, config.moments_dtype, "")]
    for teacher in teachers_of(config):
        spec = encoder_spec(config, teacher)
        name = f"features.{spec.name}.{resolution}"
        codec = chosen_codec(config, name)
        codec.check(spec.width)
        num_tokens = spec.stored_tokens(resolution, config.tokens)
        record = codec.record_shape(num_tokens, spec.width)
        found.append((name, record, codec.dtype, ""))
        if codec.has_scale:
            found.append((name, (num_tokens,), "float16", SCALE))
    return tuple(
        ArraySpec(
            name + MIRRORED * mirrored + part,
            num_images,
            RecordLayout(record, dtype, shard_rows, config.format),
            {},
        )
        for mirrored in views(config)
        for name, record, dtype, part in found
    )


def find_shape(config: PlanConfig) -> Shape:
    """The cluster of `config`."""
    return Shape(config.devices, config.devices_per_node, config.cores_per_node or cpu_count())


def _is_embedded(config: PlanConfig) -> bool:
    # The preset of another data set plans for that, not for the default source.
    return config.source.startswith("embedded:") and config.preset != "imagenet"


def _is_remote(url: str) -> bool:
    return "://" in url and not url.startswith(("file://", "local://"))


def _index(config: PlanConfig) -> Index | None:
    """The workspace's index, if it is of the source that is planned."""
    try:
        index = open_index(cache_store(config))
    except MissingError:
        return None
    source = str(index.manifest["source"])
    if config.source not in (EMBEDDED, source):
        return None
    is_embedded = source.startswith("embedded:")
    return None if is_embedded and config.preset == "imagenet" else index


def _indexed(config: PlanConfig, index: Index) -> Images:
    config = dataclasses.replace(config, source=str(index.manifest["source"]))
    gets, num_bytes, gets_from = _source_cost(config, index)
    where = f"the index at {cache_store(config).url}"
    num_images = config.num_images or index.num_rows
    if config.num_images:
        where = f"as given; size and GETs of an image from {where}"
    return Images(
        num_images=num_images,
        gets=round(gets * num_images),
        num_bytes=num_images * config.image_bytes or round(num_bytes * num_images),
        images_from=where,
        gets_from=gets_from,
        is_indexed=num_images == index.num_rows,
        shard_rows=0 if config.num_images else int(index.manifest["shard_rows"]),
        files=_files_at_hand(config, index),
    )


def _source_cost(config: PlanConfig, index: Index) -> tuple[float, float, str]:
    """(GETs, bytes) an image of reading those of the index, from a sample of its shards."""
    shard_rows = int(index.manifest["shard_rows"])
    starts = range(0, index.num_rows, shard_rows)
    places = np.linspace(0, len(starts) - 1, min(_SAMPLED_SHARDS, len(starts)))
    shards = [
        _items(index, starts[int(place)], min(starts[int(place)] + shard_rows, index.num_rows))
        for place in places
    ]
    rows = sum(len(items) for items in shards)
    # Where the index knows no sizes (-1), ImageNet's serves.
    sizes = [item.num_bytes for item in itertools.chain(*shards) if item.num_bytes >= 0]
    num_bytes = sum(sizes) / len(sizes) if sizes else IMAGENET_IMAGE_BYTES
    if not _is_remote(config.source):
        return 0.0, num_bytes, "a local source costs no GETs"
    try:
        source = open_config_source(config)
    except RepaError as error:
        return 1.0, num_bytes, f"taken as 1 an image, as the source does not open: {error}"
    gets = sum(count_gets(source, items) for items in shards)
    counted = f"counted on {len(shards)} of {len(starts)} shards of the index"
    return gets / rows, num_bytes, counted


def _files_at_hand(config: PlanConfig, index: Index) -> tuple[bytes, ...]:
    """A few images of a local source; none when they are gone, which a cache does not mind."""
    if _is_remote(config.source):
        return ()
    items = _items(index, 0, min(_SAMPLED_FILES, index.num_rows))
    try:
        source: Source = open_config_source(config)
        return tuple(source.read(item) for item in items)
    except (RepaError, OSError):
        return ()


def _items(index: Index, start: int, stop: int) -> list[Item]:
    return [
        Item(row.key, row.label, row.path, row.offset, row.num_bytes)
        for row in index.rows(start, stop)
    ]
