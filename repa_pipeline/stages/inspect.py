"""`repa inspect`: what is in a cache, from its manifests, seals and ledgers alone.

Reads no data: a cache of any size answers after a few requests an array.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from repa_pipeline.config_exchange import InspectConfig
from repa_pipeline.data.array import ArraySpec, array_names, open_sealed, read_spec
from repa_pipeline.data.index import read_manifest
from repa_pipeline.data.names import parse_name
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.errors import MissingError, RepaError

SEALED, UNFINISHED, UNREADABLE = "sealed", "unfinished", "unreadable"
# Settings that have a column or a line of their own, or repeat the index.
_OWN = ("kind", "of", "resolution", "weights_sha256", "rows_digest", "num_rows", "codec", "view")


@dataclasses.dataclass(frozen=True)
class ArrayState:
    """What is known of one array without reading its data.

    state: "sealed", "unfinished" or "unreadable" (then `problem` says why, and the rest is empty).
    num_bytes: of all shards when complete. zero_tokens: None unless a seal counted them.
    """

    name: str
    state: str
    problem: str = ""
    kind: str = ""
    part: str = ""
    resolution: int = 0
    view: str = "plain"
    codec: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    container: str = ""
    shards: int = 0
    shards_done: int = 0
    num_bytes: int = 0
    weights_sha256: str = ""
    zero_tokens: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def progress(self) -> str:
        """'sealed', '3 of 16 shards' or 'unreadable'."""
        is_partial = self.state == UNFINISHED
        return f"{self.shards_done:,} of {self.shards:,} shards" if is_partial else self.state


@dataclasses.dataclass(frozen=True)
class CacheState:
    """The index's manifest and the state of every array of a cache."""

    url: str
    index: Mapping[str, Any]
    arrays: tuple[ArrayState, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dataclasses.asdict(self)


def look(config: InspectConfig) -> CacheState:
    """The state of the cache in a workspace.

    Raises MissingError without a cache or without the arrays asked for; a damaged array is said
    to be one.
    """
    store = open_store(config.workspace).child("cache")
    manifest = read_manifest(store)
    names = chosen_names(store, config.array)
    return CacheState(store.url, manifest, tuple(array_state(store, name) for name in names))


def chosen_names(store: ObjectStore, wanted: tuple[str, ...]) -> list[str]:
    """The arrays of a cache, or those of them that are wanted; raises MissingError."""
    names = array_names(store)
    absent = [name for name in wanted if name not in names]
    if absent:
        raise MissingError(
            f"no array '{absent[0]}' at {store.url}: it holds {', '.join(names) or 'none'}"
        )
    return [name for name in names if name in wanted or not wanted]


def array_state(store: ObjectStore, name: str) -> ArrayState:
    """What is known of array `name`; never raises for what is damaged."""
    try:
        spec = read_spec(store, name)
        parts = parse_name(name)
    except RepaError as error:
        return ArrayState(name, UNREADABLE, str(error))
    manifest = spec.manifest
    state = ArrayState(
        name=name,
        state=UNFINISHED,
        kind=str(manifest.get("kind", "")),
        part=parts.part,
        resolution=parts.resolution,
        view="mirrored" if parts.mirrored else "plain",
        codec=_codec_text(manifest),
        dtype=spec.layout.dtype,
        shape=(spec.num_rows, *spec.layout.shape),
        container=spec.layout.container,
        shards=spec.num_shards,
        num_bytes=spec.num_bytes,
        weights_sha256=str(manifest.get("weights_sha256", "")),
        settings={key: value for key, value in manifest.items() if key not in _OWN},
    )
    return _with_progress(store, spec, state)


def _with_progress(store: ObjectStore, spec: ArraySpec, state: ArrayState) -> ArrayState:
    try:
        array = open_sealed(store, spec.name, "verify")
    except MissingError:
        done = [name for name in store.list(f"ledger/{spec.name}") if name.endswith(".json")]
        return dataclasses.replace(state, shards_done=min(len(done), spec.num_shards))
    except RepaError as error:
        return dataclasses.replace(state, state=UNREADABLE, problem=str(error))
    counts: Counter[str] = Counter()
    for shard in array.shards:
        counts.update(shard.get("counts", {}))
    zeros = counts["zero_tokens"] if state.kind == "features" else None
    return dataclasses.replace(state, state=SEALED, shards_done=spec.num_shards, zero_tokens=zeros)


def _codec_text(manifest: Mapping[str, Any]) -> str:
    codec = manifest.get("codec", {})
    return f"{codec.get('name', '?')} v{codec.get('version', '?')}"
