"""Single rows of a cache: read by byte range, decoded, and the images they were made from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config import EMBEDDED, CommonConfig, EncodeConfig
from repa_pipeline.config_exchange import ExportConfig, InspectConfig
from repa_pipeline.data.array import SealedArray
from repa_pipeline.data.codec import codec_of
from repa_pipeline.data.index import Index
from repa_pipeline.data.shards import as_rows, check_records, split_records
from repa_pipeline.errors import DamagedError, MissingError

if TYPE_CHECKING:
    from torch import Tensor

Records = npt.NDArray[np.generic]
_READERS = 8

_log = logging.getLogger(__name__)


def spread_rows(num_rows: int, count: int, seed: int) -> list[int]:
    """At most `count` rows, ascending: one drawn from each of `count` equal parts of all."""
    count = min(count, num_rows)
    edges = np.linspace(0, num_rows, count + 1).astype(np.int64)
    generator = np.random.default_rng(seed)
    return [int(generator.integers(low, high)) for low, high in zip(edges, edges[1:], strict=False)]


def read_rows(array: SealedArray, rows: Sequence[int]) -> Records:
    """The records [n, *shape] of `rows`, each read by its byte range and checked by its crc32c.

    A few rows of a large cache cost a few requests; the digests of whole shards, which tell a
    foreign shard, are not compared. Raises DamagedError naming the row.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda row: _read_record(array, row), rows))
    return as_rows(np.stack(found), array.spec.layout)


def _read_record(array: SealedArray, row: int) -> npt.NDArray[np.uint8]:
    layout = array.spec.layout
    shard, inside = divmod(row, layout.shard_rows)
    where = f"{array.store.url}/{array.spec.shard_key(shard)} (shard {shard})"
    try:
        data = array.store.read_range(
            array.spec.shard_key(shard), inside * layout.stride, layout.stride
        )
    except (MissingError, DamagedError) as error:
        raise DamagedError(
            f"{where} is missing or short, row {row} cannot be read; {array.spec.advice}"
        ) from error
    block = np.frombuffer(data, np.uint8)
    heads, records, tails = split_records(block[None], layout)
    if check_records(layout, [row], heads, records, tails)[1]:
        raise DamagedError(f"{where}: row {row} fails its crc32c checksum; {array.spec.advice}")
    record: npt.NDArray[np.uint8] = records[0]
    return record


def decoded_tokens(
    manifest: Mapping[str, Any], where: str, records: Records, scale: Records | None
) -> Tensor:
    """Tokens float32 [n, T, D] of records as stored and, where given, their scales [n, T].

    Raises MismatchError for a codec of another version.
    """
    import torch

    decode = codec_of(manifest, where).decoder(manifest["codec"])
    return decode(
        torch.from_numpy(np.ascontiguousarray(records)),
        None if scale is None else torch.from_numpy(np.ascontiguousarray(scale)),
    )


def patch_tokens(manifest: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """The patch tokens [n, rows * columns, D] of stored ones: without the class token in front."""
    return tokens[:, 1:] if manifest.get("class_token") else tokens


def source_of(config: CommonConfig, index: Index) -> str:
    """Where the images of an index lie: where it was made of, or a --source of one's own (moved
    images)."""
    indexed: str = index.manifest["source"]
    return indexed if config.source == EMBEDDED else config.source


def told_source(config: CommonConfig, index: Index) -> str:
    """`source_of`; another one than the index's is said, as it may stand in repa.toml for another
    workspace."""
    source, indexed = source_of(config, index), index.manifest["source"]
    if source != indexed:
        _log.warning(
            "images are read from %s, the index was made of %s (--source says where they lie)",
            source,
            indexed,
        )
    return source


def image_config(
    config: InspectConfig | ExportConfig, index: Index, manifest: Mapping[str, Any]
) -> EncodeConfig:
    """How the images of an array were read and prepared, for `load_images`."""
    prepare = manifest["prepare"]
    return EncodeConfig(
        source=told_source(config, index),
        workspace=config.workspace,
        resolution=manifest["resolution"],
        exif=prepare["exif"],
        max_pixels=prepare["max_pixels"],
        decode_threads=config.decode_threads,
        scratch=config.scratch,
        scratch_gb=config.scratch_gb,
    )
