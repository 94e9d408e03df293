"""The metadata objects of the two containers: what they are called, hold, and mean.

zarr: NAME/zarr.json of the zarr v3 core specification. webdataset: NAME/array.json, ours, with
the same role. `attributes` of either hold the array's manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from repa_pipeline.data.shards import RecordLayout

METADATA_FILES: Mapping[str, str] = {"zarr": "zarr.json", "webdataset": "array.json"}
# What the data never takes, where there is such a value: zarr leaves out a record of it.
_FILLS: Mapping[str, Any] = {
    **{"float16": "NaN", "float32": "NaN"},
    **{"int8": -128, "uint8": 0, "uint16": 0},
}


def describe(num_rows: int, layout: RecordLayout, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata object of an array. Raises KeyError for a dtype that caches do not hold."""
    if layout.container == "zarr":
        return _zarr_json(num_rows, layout, manifest)
    return {
        "format_version": 1,
        "container": layout.container,
        "shape": [num_rows, *layout.shape],
        "dtype": np.dtype(layout.dtype).name,
        "shard_rows": layout.shard_rows,
        "attributes": dict(manifest),
    }


def parse(container: str, stored: Mapping[str, Any]) -> tuple[int, RecordLayout, dict[str, Any]]:
    """(rows, layout, manifest) of a metadata object, the inverse of `describe`.

    Raises KeyError, TypeError, ValueError or IndexError when it is not one.
    """
    if container == "zarr":
        dtype = stored["data_type"]
        shard_rows = stored["chunk_grid"]["configuration"]["chunk_shape"][0]
    else:
        dtype, shard_rows = stored["dtype"], stored["shard_rows"]
    num_rows, *shape = stored["shape"]
    counts = [num_rows, shard_rows, *shape]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"sizes {counts}")
    layout = RecordLayout(tuple(shape), dtype, shard_rows, container)
    return num_rows, layout, dict(stored["attributes"])


def _zarr_json(num_rows: int, layout: RecordLayout, manifest: Mapping[str, Any]) -> dict[str, Any]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    one_byte = np.dtype(layout.dtype).itemsize == 1
    inner = {"name": "bytes"} if one_byte else little
    sharding = {
        "chunk_shape": [1, *layout.shape],
        "codecs": [inner, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_rows, *layout.shape],
        "data_type": layout.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [layout.shard_rows, *layout.shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": _FILLS[layout.dtype],
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": dict(manifest),
        "storage_transformers": [],
    }
