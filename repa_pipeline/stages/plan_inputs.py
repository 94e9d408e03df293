"""What `repa plan` plans from: the workload of the settings, rates from a file or a probe."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repa_pipeline.config_plan import PlanConfig
from repa_pipeline.data.array import ArraySpec
from repa_pipeline.data.coalesce import count_gets
from repa_pipeline.data.codec import CODECS
from repa_pipeline.data.index import Index, open_index
from repa_pipeline.data.names import MIRRORED, SCALE
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.data.source import Item
from repa_pipeline.device import cpu_count
from repa_pipeline.errors import ConfigError, MissingError
from repa_pipeline.registry import autoencoder_spec, encoder_spec, model_spec
from repa_pipeline.stages.features import DEFAULT_CODEC
from repa_pipeline.stages.images import views
from repa_pipeline.stages.index import cache_store, default_shard_rows, open_config_source
from repa_pipeline.stages.plan import Prices, Rates, Shape, Workload
from repa_pipeline.stages.probe import Probe, train_rate

IMAGENET_IMAGES = 1_281_167
IMAGENET_IMAGE_BYTES = 115_000
# Shards looked at to count the source's requests; the others are taken to be alike.
_SAMPLED_SHARDS = 8
_RATE_KEYS = {"networks", "decode", "train", "read", "write", "prices"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """A workload, and in words where its numbers come from."""

    work: Workload
    images_from: str


def find_facts(config: PlanConfig) -> Facts:
    """The workload of `config`: from the workspace's index if there is one."""
    index = _index(config)
    if config.num_images or index is None:
        num_images = config.num_images or IMAGENET_IMAGES
        size = config.image_bytes or IMAGENET_IMAGE_BYTES
        where = "as given" if config.num_images else "ImageNet's train set; --num-images sets it"
        gets, source_bytes = num_images, num_images * size
    else:
        num_images, where = index.num_rows, f"the index at {cache_store(config).url}"
        gets, source_bytes = _source_cost(config, index)
    arrays = planned_arrays(config, num_images)
    num_views = len(views(config))
    networks = dict.fromkeys((config.autoencoder, *config.encoder), num_views)
    work = Workload(
        num_images=num_images,
        arrays=arrays,
        networks=networks,
        teachers=config.encoder,
        source_gets=gets,
        source_bytes=source_bytes,
        train_images=config.train_steps * config.train_batch,
        runs=config.runs,
    )
    return Facts(work, where)


def planned_arrays(config: PlanConfig, num_images: int) -> tuple[ArraySpec, ...]:
    """The arrays that `repa encode` would write, without weights or an index."""
    shard_rows = config.shard_rows or default_shard_rows(num_images)
    resolution = config.resolution
    latents = autoencoder_spec(config, config.autoencoder)
    _, height, width = latents.latent_shape(resolution)
    shape: tuple[int, ...] = (latents.stored_channels, height, width)
    found = [(f"latents.{latents.name}.{resolution}", shape, config.moments_dtype, "")]
    codec = CODECS[DEFAULT_CODEC if config.codec == "auto" else config.codec]
    for name in config.encoder:
        spec = encoder_spec(config, name)
        codec.check(spec.width)
        num_tokens = spec.stored_tokens(resolution, config.tokens)
        record = codec.record_shape(num_tokens, spec.width)
        found.append((f"features.{spec.name}.{resolution}", record, codec.dtype, ""))
        if codec.has_scale:
            found.append((f"features.{spec.name}.{resolution}", (num_tokens,), "float16", SCALE))
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


def find_rates(config: PlanConfig, work: Workload) -> tuple[Rates, Prices, dict[str, str]]:
    """Rates, prices, and for each rate where it comes from.

    Raises ConfigError for a file with unknown or impossible entries, MissingError for a rate that
    is neither given nor to be probed.
    """
    given = _read_rates(config.rates)
    prices = _prices(given.get("prices", {}), str(config.rates))
    origins: dict[str, str] = {}
    probe = Probe(
        config.device, config.dtype, config.compile, config.resolution, config.probe_batch
    )
    networks = dict(given.get("networks", {}))
    for name in work.networks:
        if name in networks:
            origins[name] = "given"
        else:
            _need_probe(config, f"networks.{name}")
            is_teacher = name in work.teachers
            networks[name] = (
                probe.encoder(encoder_spec(config, name))
                if is_teacher
                else probe.autoencoder(autoencoder_spec(config, name))
            )
            origins[name] = "probed"
    decode = given.get("decode")
    origins["decode"] = "given" if decode else "probed"
    if not decode:
        _need_probe(config, "decode")
        decode = probe.decode()
    train = given.get("train")
    origins["train"] = "given" if train else "from the operations of model and network"
    if not train:
        train = _train_rate(config, work, networks)
    rates = Rates(networks, decode, train, given.get("read", 0.0), given.get("write", 0.0))
    return rates, prices, origins


def _train_rate(config: PlanConfig, work: Workload, networks: Mapping[str, float]) -> float:
    if not work.teachers:
        raise MissingError(
            "no rate for training: without a teacher there is nothing to derive it from; give "
            "`train` in --rates"
        )
    name = work.teachers[0]
    return train_rate(
        model_spec(config, config.model),
        autoencoder_spec(config, config.autoencoder),
        encoder_spec(config, name),
        config.resolution,
        networks[name],
    )


def _need_probe(config: PlanConfig, key: str) -> None:
    if not config.probe:
        raise MissingError(f"no rate for {key}: give it in --rates, or leave --probe on")


def _read_rates(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError(f"no rates file {path}: check --rates") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML ({error}): see docs/plan.md") from error
    unknown = sorted(content.keys() - _RATE_KEYS)
    if unknown:
        raise ConfigError(f"{path}: unknown {unknown[0]!r}, known are {', '.join(_RATE_KEYS)}")
    for key, value in {**content, **content.get("networks", {})}.items():
        if key not in ("networks", "prices") and not _is_rate(value):
            raise ConfigError(f"{path}: {key} is {value!r}, expected a number above 0")
    return content


def _prices(given: Mapping[str, Any], path: str) -> Prices:
    known = {field.name for field in dataclasses.fields(Prices)}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ConfigError(f"{path}: unknown price {unknown[0]!r}, known are {', '.join(known)}")
    for key, value in given.items():
        if key != "currency" and (not isinstance(value, int | float) or value < 0):
            raise ConfigError(f"{path}: price {key} is {value!r}, expected a number, 0 or above")
    return Prices(**given)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _index(config: PlanConfig) -> Index | None:
    try:
        return open_index(cache_store(config))
    except MissingError:
        return None


def _source_cost(config: PlanConfig, index: Index) -> tuple[int, int]:
    """(GETs, bytes) of reading every image of the index once, from a sample of its shards."""
    source = open_config_source(config)
    shard_rows = int(index.manifest["shard_rows"])
    starts = np.arange(0, index.num_rows, shard_rows)
    chosen = starts[:: max(1, len(starts) // _SAMPLED_SHARDS)]
    rows = gets = num_bytes = 0
    for start in map(int, chosen):
        entries = index.rows(start, min(start + shard_rows, index.num_rows))
        items = [Item(e.key, e.label, e.path, e.offset, e.num_bytes) for e in entries]
        rows += len(items)
        gets += count_gets(source, items)
        num_bytes += sum(item.num_bytes for item in items)
    share = index.num_rows / rows
    return round(gets * share), round(num_bytes * share)
