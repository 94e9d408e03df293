"""`repa export`: a cache as the reference's preprocessed data, or as webdataset tars.

Both are stages over the cache's own shards: every file is written under a temporary name and
renamed, a ledger beside the export says which shards are done, export.json is written last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.config_exchange import ExportConfig
from repa_pipeline.data.array import SealedArray, fingerprint, first_difference, open_sealed
from repa_pipeline.data.codec import codec_of
from repa_pipeline.data.fsstore import refuse_credentials
from repa_pipeline.data.index import Index, read_index
from repa_pipeline.data.names import MIRRORED, SCALE, parse_name
from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes, open_store
from repa_pipeline.data.shards import as_rows
from repa_pipeline.engine.contracts import Commit, Plan, Shard, split_rows
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.errors import ConfigError, MismatchError, MissingError

Records = npt.NDArray[np.generic]
FORMAT_VERSION = 1
STATE = ".repa-export"
RECORD = "export.json"


@dataclasses.dataclass(frozen=True)
class Exported:
    """The arrays of a cache that are exported: plain ones first, each with its mirrored view.

    scales: the scale array of a tokens array, by its name.
    """

    index: Index
    latents: tuple[SealedArray, ...]
    features: tuple[SealedArray, ...]
    scales: Mapping[str, SealedArray]

    @property
    def arrays(self) -> tuple[SealedArray, ...]:
        return (*self.latents, *self.features)

    @property
    def any_manifest(self) -> Mapping[str, Any]:
        """Of an array: resolution and prepare are the same in all."""
        return self.arrays[0].spec.manifest

    @property
    def shard_rows(self) -> int:
        return self.arrays[0].spec.layout.shard_rows


def choose_arrays(config: ExportConfig) -> Exported:
    """The sealed arrays that `config` names.

    Raises MissingError for what is absent or unsealed, ConfigError where "auto" would be a guess,
    MismatchError for arrays that do not belong together.
    """
    store = open_store(config.workspace).child("cache")
    index = read_index(store)
    sealed = [name for name in store.list("") if store.size(f"{name}/seal.json") is not None]
    latents = _choose_latents(config, store, sealed)
    features = _choose_features(config, store, sealed, latents)
    names = [name for name in (*latents, *features) if not name.endswith(SCALE)]
    if not names:
        raise MissingError(f"no finished array at {store.url}: run `repa encode` first")
    opened = {name: open_sealed(store, name, parse_name(name).made_by) for name in names}
    for array in opened.values():
        _check_together(array, opened[names[0]], index)
    # Without its scale a token comes back at an arbitrary length.
    scales = {
        name: open_sealed(store, name + SCALE, parse_name(name).made_by)
        for name in features
        if codec_of(opened[name].spec.manifest, opened[name].where).has_scale
    }
    for scale in scales.values():
        _check_together(scale, opened[names[0]], index)
    return Exported(
        index,
        tuple(opened[name] for name in latents),
        tuple(opened[name] for name in features),
        scales,
    )


def _choose_latents(config: ExportConfig, store: ObjectStore, sealed: list[str]) -> list[str]:
    plain = [n for n in sealed if n.startswith("latents.") and not n.endswith(MIRRORED)]
    if config.autoencoder != "auto":
        plain = [name for name in plain if parse_name(name).part == config.autoencoder]
    if len(plain) > 1:
        raise ConfigError(
            f"{store.url} holds several latents ({', '.join(plain)}): choose with --autoencoder"
        )
    if not plain and (config.autoencoder != "auto" or config.to == "reference"):
        wanted = "" if config.autoencoder == "auto" else f" of {config.autoencoder}"
        raise MissingError(
            f"no finished latents{wanted} at {store.url}: run `repa encode-latents` first"
        )
    views = [plain[0], plain[0] + MIRRORED] if plain else []
    kept = views if config.to == "webdataset" else views[:1]
    return [name for name in kept if name in sealed]


def _choose_features(
    config: ExportConfig, store: ObjectStore, sealed: list[str], latents: list[str]
) -> list[str]:
    if config.to == "reference" or config.encoder in (("none",), ()):
        return []
    plain = [
        name
        for name in sealed
        if name.startswith("features.") and not name.endswith((MIRRORED, SCALE))
    ]
    if latents:
        resolution = parse_name(latents[0]).resolution
        plain = [name for name in plain if parse_name(name).resolution == resolution]
    if config.encoder != ("auto",):
        absent = set(config.encoder) - {parse_name(name).part for name in plain}
        if absent:
            raise MissingError(
                f"no finished features of {sorted(absent)[0]} at {store.url} (of the latents' "
                f"resolution): it holds {', '.join(plain) or 'none'}"
            )
        plain = [name for name in plain if parse_name(name).part in config.encoder]
    both = [view for name in plain for view in (name, name + MIRRORED)]
    return [name for name in both if name in sealed]


def _check_together(array: SealedArray, first: SealedArray, index: Index) -> None:
    if array.spec.manifest["rows_digest"] != index.manifest["rows_digest"]:
        raise MismatchError(
            f"{array.where} holds other rows than the index: it belongs to another cache"
        )
    for key in ("resolution", "prepare"):
        difference = first_difference(array.spec.manifest[key], first.spec.manifest[key])
        if difference:
            raise MismatchError(
                f"{array.where} saw other images than {first.spec.name}: {key} is "
                f"{array.spec.manifest[key]!r}, expected {first.spec.manifest[key]!r}; name the "
                "arrays to export with --autoencoder and --encoder"
            )


@dataclasses.dataclass
class ShardRows:
    """Rows of a sealed array read in order, shard by shard; holds the last shard, verified."""

    array: SealedArray
    _shard: int = -1
    _records: npt.NDArray[np.uint8] | None = None
    _buffer: bytearray | None = None

    def rows(self, start: int, stop: int) -> Records:
        """Rows [start, stop) of one shard, copied: [n, *shape]. Raises DamagedError."""
        layout = self.array.spec.layout
        shard = start // layout.shard_rows
        if shard != self._shard or self._records is None:
            self._buffer = self._buffer or self.array.new_buffer()
            self._shard, self._records = -1, None
            self._records = self.array.read_shard(shard, self._buffer)
            self._shard = shard
        first = shard * layout.shard_rows
        return as_rows(self._records[start - first : stop - first], layout)


@dataclasses.dataclass
class ExportOutput:
    """What the two exports have in common as outputs: identity, plan, ledger.

    `store` is where the export goes, `state_store` where its ledger is.
    """

    config: ExportConfig
    exported: Exported
    store: ObjectStore
    state_store: ObjectStore
    rows_a_shard: int

    @property
    def name(self) -> str:
        return self.config.to

    @property
    def where(self) -> str:
        return self.store.url

    @property
    def with_images(self) -> bool:
        given = self.config.images
        return self.config.to == "reference" if given is None else given

    @property
    def identity(self) -> dict[str, Any]:
        """What decides every byte of the export."""
        arrays = (*self.exported.arrays, *self.exported.scales.values())
        return {
            "format_version": FORMAT_VERSION,
            "to": self.config.to,
            "images": self.with_images,
            "coded": self.config.coded,
            "rows_digest": self.exported.index.manifest["rows_digest"],
            "rows_a_shard": self.rows_a_shard,
            "arrays": {array.spec.name: array.spec.fingerprint for array in arrays},
        }

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.state_store, f"ledger/{self.name}", fingerprint(self.identity))

    def plan(self) -> Plan:
        num_rows = self.exported.index.num_rows
        return Plan(
            where=self.where,
            fingerprint=fingerprint(self.identity),
            shards=split_rows(num_rows, self.rows_a_shard),
            num_rows=num_rows,
            num_bytes=num_rows * self.row_bytes(),
            unit="rows",
        )

    def check(self) -> None:
        self.check_free()

    def sealed(self) -> list[Commit]:
        return []

    def begin(self) -> None:
        """Claims the destination; raises MismatchError when something else is there."""
        self.check_free()
        if not self.state_store.put_new("identity.json", json_bytes(self.identity)):
            self._check_identity(get_json(self.state_store, "identity.json"))

    def is_sealed(self) -> bool:
        if self.store.size(RECORD) is None:
            return False
        self._check_identity(get_json(self.store, RECORD)["identity"])
        return True

    def record(self, commits: list[Commit]) -> dict[str, Any]:
        """What export.json says, for any format."""
        manifest = self.exported.index.manifest
        kept = ("source", "num_rows", "num_classes", "class_names", "decode", "permutation_seed")
        return {
            "identity": self.identity,
            "index": {name: manifest[name] for name in kept},
            "num_bytes": sum(commit.num_bytes for commit in commits),
        }

    def check_free(self) -> None:
        """Raises MismatchError when files that are no export of ours stand there."""
        if self.state_store.size("identity.json") is not None:
            return
        names = [name for name in self.store.list("") if name != STATE]
        if names:
            raise MismatchError(
                f"{self.where} is not empty ('{names[0]}') and no export that can go on: give a "
                "new folder"
            )

    def _check_identity(self, there: Any) -> None:
        difference = first_difference(there, self.identity)
        if difference:
            name, got, expected = difference
            raise MismatchError(
                f"{self.where} holds another export: {name} is {got!r} there, {expected!r} now; "
                "give a new destination, or remove that one"
            )

    def row_bytes(self) -> int:
        """Bytes of a row's arrays as exported, without images."""
        raise NotImplementedError

    def stands(self, commit: Commit) -> bool:
        raise NotImplementedError

    def seal(self, commits: list[Commit]) -> None:
        raise NotImplementedError


def destination(config: ExportConfig) -> str:
    """Where the export goes; raises ConfigError without one, or for one that cannot be."""
    if not config.destination:
        raise ConfigError("no destination: repa export --to reference FOLDER (or SET.zip)")
    refuse_credentials(config.destination)
    if config.to == "reference" and "://" in config.destination:
        raise ConfigError(
            f"destination {config.destination}: the reference's format is written to local folders "
            "and zips; write it here and copy it, or use --to webdataset"
        )
    if config.to == "webdataset" and config.destination.endswith((".zip", ".tar")):
        raise ConfigError(
            f"destination {config.destination}: webdataset is a folder (or URL) of tars"
        )
    return config.destination


def shard_of(commit: Commit, output: ExportOutput) -> Shard:
    """The rows of a commit."""
    return output.plan().shards[commit.index]
