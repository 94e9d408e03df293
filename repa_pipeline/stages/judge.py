"""Judge rows: what a frozen network makes of every image of a set, kept as one sealed array.

`judge.<network>`, row k = features of image k, float32 [pool | spatial | logits] side by side, 20
KB an image with Inception. Every statistic, any subset and resampling follow from the rows in
index order, so a metric is computed again without a forward pass. `repa sample --score` writes
them as it samples, `repa evaluate` from images that stand there: equal bytes both ways.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import CommonConfig
from repa_pipeline.data.array import ArraySpec, SealedArray, open_sealed, read_spec
from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.data.shards import RecordLayout, as_rows
from repa_pipeline.device import choose_device
from repa_pipeline.encoders import ENCODERS, EncoderSpec
from repa_pipeline.errors import ConfigError, MismatchError, MissingError
from repa_pipeline.metrics.networks import (
    ENCODER_PREFIX,
    NETWORKS,
    NetworkSpec,
    Widths,
    check_published,
    find_network_weights,
    load_network,
)
from repa_pipeline.registry import encoder_spec, load_plugins, network_spec
from repa_pipeline.weights import file_sha256

# Images of one forward pass; fixed, so it decides bytes.
FORWARD_IMAGES = 64
MADE_BY = "evaluate"

Images = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]


def judge_name(network: str) -> str:
    """The name of the array that holds a network's rows."""
    return f"judge.{network.replace(':', '-')}"


def standing_batch(store: ObjectStore, network: str) -> int:
    """Images of a forward pass of the rows that stand, finished or not, in `store`; else 64."""
    try:
        return int(read_spec(store, judge_name(network)).manifest["batch_size"])
    except MissingError:
        return FORWARD_IMAGES


def judge_spec(
    config: CommonConfig,
    network: str,
    weights: str | None,
    *,
    resolution: int,
    num_rows: int,
    shard_rows: int,
    of: Mapping[str, Any],
    forward_images: int = FORWARD_IMAGES,
    any_weights: bool = False,
) -> ArraySpec:
    """The array of `network`'s rows over `num_rows` images of `resolution` pixels; loads nothing.

    `weights` is a local file and comes before the table's; `of` says which images they are: for
    samples `of_samples`. Raises UnknownNameError, ConfigError (an entry that repa.toml changes),
    MissingError (weights), MismatchError (not the published weights, unless `any_weights`).
    """
    path, widths = _settle(config, network, weights, resolution)
    if not any_weights:
        check_published(network, path)
    manifest = {
        "kind": "judge",
        "network": network,
        "weights_sha256": file_sha256(path),
        "widths": widths._asdict(),
        "resolution": resolution,
        "batch_size": forward_images,
        "of": dict(of),
    }
    layout = RecordLayout((sum(widths),), "float32", shard_rows)
    return ArraySpec(judge_name(network), num_rows, layout, manifest)


def of_samples(images: ArraySpec) -> dict[str, Any]:
    """What identifies the images of a sample folder, whether they are kept or not."""
    return {"samples": images.fingerprint}


class Judge:
    """The network of a judge array, loaded once in the worker."""

    def __init__(self, config: CommonConfig, weights: str | None, spec: ArraySpec) -> None:
        """`weights` as for `judge_spec`. Raises MismatchError unless they are those of `spec`:
        another machine may hold another file at the same path."""
        manifest = spec.manifest
        name = str(manifest["network"])
        path, widths = _settle(config, name, weights, manifest["resolution"])
        device = choose_device(config.device)
        self._network = load_network(name, weights=str(path), device=device)
        self._widths = widths
        self._batch: int = manifest["batch_size"]
        loaded, wanted = self._network.weights_sha256, manifest["weights_sha256"]
        if loaded != wanted:
            raise MismatchError(
                f"the weights of network {name} on {socket.gethostname()} have sha256 "
                f"{loaded[:12]}, expected {wanted[:12]}: give every machine the same file"
            )

    def rows(self, images: Images) -> Rows:
        """images uint8 [n, R, R, 3] -> float32 [n, W], in forward passes of one fixed size, the
        last one padded. Raises MismatchError for features of other widths than the table's."""
        import torch

        found = np.empty((len(images), sum(self._widths)), np.float32)
        for start in range(0, len(images), self._batch):
            batch = images[start : start + self._batch]
            missing = self._batch - len(batch)
            padded = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)])
            with torch.inference_mode():
                made = self._network.features(torch.from_numpy(padded).permute(0, 3, 1, 2))
                parts = [part.float().cpu() for part in made if part is not None]
            got = tuple(0 if part is None else part.shape[1] for part in made)
            if got != self._widths:
                raise MismatchError(
                    f"network {self._network.name} makes features of widths {got}, its table entry "
                    f"says {tuple(self._widths)}: correct the entry"
                )
            found[start : start + len(batch)] = torch.cat(parts, 1)[: len(batch)].numpy()
        return found


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of consecutive images: pool float32 [n, D]; spatial [n, S] and logits [n, K], or
    None where the network has none."""

    pool: Rows
    spatial: Rows | None
    logits: Rows | None


@dataclasses.dataclass(frozen=True)
class Judged:
    """Finished judge rows, open for reading."""

    array: SealedArray

    @property
    def widths(self) -> Widths:
        return Widths(**self.array.spec.manifest["widths"])

    @property
    def num_rows(self) -> int:
        return self.array.spec.num_rows

    def blocks(self, num_rows: int | None = None) -> Iterator[Features]:
        """Verified features in index order, a shard at a time, of the first `num_rows` images.

        Holds one shard. Raises DamagedError.
        """
        left = self.num_rows if num_rows is None else num_rows
        pool, spatial, _ = self.widths
        buffer = self.array.new_buffer()
        for shard in range(self.array.spec.num_shards):
            if left <= 0:
                return
            rows = as_rows(self.array.read_shard(shard, buffer), self.array.spec.layout)[:left]
            left -= len(rows)
            parts = np.split(rows.astype(np.float32, copy=False), [pool, pool + spatial], axis=1)
            yield Features(parts[0], *(part if part.shape[1] else None for part in parts[1:]))

    def parts(self, name: str, size: int) -> Iterator[Rows]:
        """One part of the features ("pool", "spatial", "logits") in index order, in blocks of
        exactly `size` rows, the last one shorter."""
        waiting: list[Rows] = []
        count = 0
        for block in self.blocks():
            waiting.append(getattr(block, name))
            count += len(waiting[-1])
            while count >= size:
                joined = np.concatenate(waiting)
                yield joined[:size]
                waiting, count = [joined[size:]], count - size
        if count:
            yield np.concatenate(waiting)

    def first_pool(self, num_rows: int) -> Rows:
        """Pool features float32 [n, D] of the first `num_rows` images."""
        rows = np.empty((min(num_rows, self.num_rows), self.widths.pool), np.float32)
        start = 0
        for block in self.blocks(len(rows)):
            rows[start : start + len(block.pool)] = block.pool
            start += len(block.pool)
        return rows


def open_judged(store: ObjectStore, network: str) -> Judged:
    """The finished rows of `network` in a folder of samples; raises as `open_sealed`."""
    return Judged(open_sealed(store, judge_name(network), MADE_BY))


def _settle(
    config: CommonConfig, network: str, weights: str | None, resolution: int
) -> tuple[Path, Widths]:
    """The weights file of a network and the widths of its features.

    Entries may be changed in repa.toml in their weights alone: else scores by them would pass for
    the table entry's.
    """
    load_plugins(config.plugins)
    spec: EncoderSpec | NetworkSpec
    entry: EncoderSpec | NetworkSpec
    if network.startswith(ENCODER_PREFIX):
        encoder = network.removeprefix(ENCODER_PREFIX)
        spec, entry = encoder_spec(config, encoder), ENCODERS[encoder]
        widths = Widths(spec.width)
    else:
        spec, entry = network_spec(config, network), NETWORKS[network]
        widths = spec.widths(resolution)
    if dataclasses.replace(entry, weights=spec.weights) != spec:
        raise ConfigError(
            f"repa.toml changes more of '{network}' than its weights, and scores by it would pass "
            "for those of the table's entry: give it a name of its own in a plugin"
        )
    return find_network_weights(network, weights or spec.weights), widths
