"""What is known of a cache without reading its shards: index, metadata, seals, ledgers, strays.

`repa verify`, `repair` and `copy` start from here. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from repa_pipeline.config import CommonConfig
from repa_pipeline.data.array import (
    FORMAT_VERSION,
    ArraySpec,
    SealedArray,
    array_names,
    fingerprint,
    first_difference,
    parse_seal,
    read_spec,
    stored_digest,
)
from repa_pipeline.data.index import FORMAT_VERSION as INDEX_VERSION
from repa_pipeline.data.index import INDEX, Index, read_index, read_manifest
from repa_pipeline.data.objects import LocalStore, ObjectStore, get_json, open_store
from repa_pipeline.data.shards import REPAIR
from repa_pipeline.engine.contracts import Commit
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.errors import (
    DamagedError,
    MissingError,
    RepaError,
    StoreError,
    UnknownNameError,
)
from repa_pipeline.stages.array_stage import commit_of, seal_entry

# A temporary file older than this is of a writer that was killed.
_ABANDONED_S = 3600.0
_MOST_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Damage:
    """One thing that is wrong; `what` is a whole line that names it.

    array: "" for the index. kind: index, rows, version, metadata, seal, ledger, stray or shard.
    shard, with rows [start, stop): of a shard. key: the object, where it is a stray one.
    """

    array: str
    kind: str
    what: str
    shard: int | None = None
    start: int = 0
    stop: int = 0
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Standing:
    """What is known of an array.

    array: its spec and what its seal says of every shard; without a readable seal what the ledger
    says, {} for shards that are not recorded; None when neither seal nor metadata can be read.
    is_sealed: whether there is a seal that can be read. ledger: its valid records. foreign: keys
    in its folders that no writer of ours made: no damage, and nobody's to remove but their owner's.
    """

    name: str
    array: SealedArray | None
    is_sealed: bool
    ledger: Mapping[int, Commit]
    damage: tuple[Damage, ...]
    foreign: tuple[str, ...] = ()

    @property
    def recorded(self) -> list[int]:
        """The shards that a seal or a ledger vouches for."""
        shards = self.array.shards if self.array else ()
        return [index for index, entry in enumerate(shards) if entry]

    @property
    def is_complete(self) -> bool:
        """Whether every shard is vouched for."""
        return self.array is not None and len(self.recorded) == self.array.spec.num_shards

    @property
    def fingerprint(self) -> str:
        """Changes with what the array is, or with what its shards should be."""
        shards = self.array.shards if self.array else ()
        digests = [stored_digest(entry) if entry else None for entry in shards]
        spec = self.array.spec.fingerprint if self.array else None
        return fingerprint({"array": spec, "shards": digests})

    def has(self, *kinds: str) -> bool:
        """Whether something of one of these kinds is damaged."""
        return any(damage.kind in kinds for damage in self.damage)


@dataclasses.dataclass(frozen=True)
class Survey:
    """A cache as it stands; `index` is None when it is damaged or missing."""

    store: ObjectStore
    index: Index | None
    damage: tuple[Damage, ...]
    standings: tuple[Standing, ...]


def care_store(config: CommonConfig) -> ObjectStore:
    """The cache of a workspace."""
    return open_store(config.workspace).child("cache")


def survey_cache(store: ObjectStore, names: Sequence[str] = ()) -> Survey:
    """Looks at the index and at the arrays `names` (none: all).

    Raises MissingError where there is no cache, UnknownNameError for an array that is not there.
    """
    chosen = choose_arrays(store, names)
    index, damage = _survey_index(store)
    standings = tuple(_survey_array(store, name, index) for name in chosen)
    return Survey(store, index, damage, standings)


def choose_arrays(store: ObjectStore, names: Sequence[str]) -> list[str]:
    """The arrays `names` (none: all), each once; raises as `survey_cache`."""
    known = array_names(store)
    if not known and store.size("manifest.json") is None and store.size(INDEX) is None:
        raise MissingError(f"no cache at {store.url}: run `repa encode-latents` first")
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise UnknownNameError(f"no array '{name}' in {store.url}: known are {listed}")
    return list(dict.fromkeys(names)) or known


def _survey_index(store: ObjectStore) -> tuple[Index | None, tuple[Damage, ...]]:
    command = "`repa index` with the settings it was made with"
    wrong = "manifest.json is missing or damaged"
    try:
        version = get_json(store, "manifest.json").get("format_version")
        if isinstance(version, int) and version != INDEX_VERSION:
            what = (
                f"{store.url}/manifest.json has format version {version}, this package reads "
                f"{INDEX_VERSION}: use the package version that wrote it"
            )
            return None, (Damage("", "version", what),)
        manifest = read_manifest(store)
        command = f"`repa index {_index_flags(manifest)}`"
        wrong = "it is not the file that manifest.json describes, or is damaged"
        index = read_index(store)
        if _rows_digest(index) == manifest["rows_digest"]:
            return index, ()
        wrong = "manifest.json does not have the digest of its rows"
    except StoreError:
        raise
    except (RepaError, KeyError, TypeError, ValueError, AttributeError):
        pass
    what = (
        f"{store.url}/{INDEX}: {wrong}; remove index.parquet and manifest.json and run {command}: "
        "of the same images the rows come out the same, and the arrays still belong to them"
    )
    return None, (Damage("", "index", what),)


def _index_flags(manifest: Mapping[str, Any]) -> str:
    """The flags of `repa index` that made an index."""
    settings = {"source": shlex.quote(manifest["source"]), **manifest["decode"]}
    settings |= {name: manifest[name] for name in ("permutation_seed", "shard_rows")}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def _rows_digest(index: Index) -> str:
    """As `data.index.rows_digest`, a row group at a time."""
    total = hashlib.sha256()
    for batch in index.batches(("key", "label", "digest")):
        for key, label, digest in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            total.update(f"{key}\t{label}\t{digest}\n".encode())
    return total.hexdigest()


def _survey_array(store: ObjectStore, name: str, index: Index | None) -> Standing:
    sealed, seal_damage = _read_seal(store, name)
    if any(damage.kind == "version" for damage in seal_damage):
        return Standing(name, None, False, {}, tuple(seal_damage))
    spec, metadata_damage = _read_metadata(store, name, sealed)
    damage = [*seal_damage, *metadata_damage]
    if spec is None:
        return Standing(name, None, False, {}, tuple(damage))
    ledger = Ledger(store, f"ledger/{name}", spec.fingerprint).entries()
    array = sealed or SealedArray(store, spec, _entries_of(spec, ledger))
    if sealed or seal_damage:
        damage += _ledger_damage(array, ledger)
    damage += _other_rows(array, index)
    strays, foreign = _strays(array)
    damage += strays
    return Standing(name, array, sealed is not None, ledger, tuple(damage), foreign)


def _read_seal(store: ObjectStore, name: str) -> tuple[SealedArray | None, list[Damage]]:
    key = f"{name}/seal.json"
    where = f"{store.url}/{key}"
    try:
        seal = get_json(store, key)
        version = seal.get("format_version")
        if isinstance(version, int) and version != FORMAT_VERSION:
            what = (
                f"{where} has format version {version}, this package reads {FORMAT_VERSION}: use "
                "the package version that wrote it"
            )
            return None, [Damage(name, "version", what)]
        spec = parse_seal(where, name, seal, "repair")
        return SealedArray(store, spec, tuple(seal["shards"])), []
    except MissingError:
        return None, []
    except StoreError:  # says nothing of what is stored
        raise
    except RepaError:
        return None, [Damage(name, "seal", f"{where}: the seal is damaged; {REPAIR}")]


def _read_metadata(
    store: ObjectStore, name: str, sealed: SealedArray | None
) -> tuple[ArraySpec | None, list[Damage]]:
    """The spec, by the seal where there is one, and whether the metadata object agrees."""
    if sealed is None:
        try:
            return read_spec(store, name), []
        except StoreError:
            raise
        except RepaError as error:
            what = f"{error}; without a seal nothing can be known of it: make it again"
            return None, [Damage(name, "metadata", what)]
    spec = sealed.spec
    wanted = json.loads(json.dumps(spec.metadata()))
    try:
        stored = get_json(store, spec.metadata_key)
        difference = first_difference({key: stored.get(key) for key in wanted}, wanted)
        wrong = "" if difference is None else "says {} is {!r}, the seal {!r}".format(*difference)
    except MissingError:
        wrong = "is missing"
    except DamagedError:
        wrong = "is not JSON"
    if not wrong:
        return spec, []
    what = f"{store.url}/{spec.metadata_key} {wrong}; {REPAIR}"
    return spec, [Damage(name, "metadata", what)]


def _entries_of(spec: ArraySpec, ledger: Mapping[int, Commit]) -> tuple[Mapping[str, Any], ...]:
    """What a seal would say of each shard; {} of one that is not recorded."""
    entries: list[Mapping[str, Any]] = []
    for shard in range(spec.num_shards):
        commit = ledger.get(shard)
        rows = spec.layout.rows_of(shard, spec.num_rows)
        entries.append(seal_entry(commit) if commit and commit.rows == rows else {})
    return tuple(entries)


def _ledger_damage(array: SealedArray, ledger: Mapping[int, Commit]) -> list[Damage]:
    """Records that are missing, torn, of other settings, or not what the seal says.

    A sealed array that never had a ledger lacks nothing that a reader needs.
    """
    name, store = array.spec.name, array.store
    wrong, damage = unrecorded(array, ledger), []
    if wrong and any(file.endswith(".json") for file in store.list(f"ledger/{name}")):
        what = (
            f"{store.url}/ledger/{name}: {_named(wrong)} missing, torn or not what the seal says; "
            f"{REPAIR}"
        )
        damage.append(Damage(name, "ledger", what))
    return damage


def unrecorded(array: SealedArray, ledger: Mapping[int, Commit]) -> list[int]:
    """The shards of which a ledger does not say what the array's seal says."""
    return [
        shard
        for shard, entry in enumerate(array.shards)
        if not entry or shard not in ledger or ledger[shard] != commit_of(entry)
    ]


def _named(shards: list[int]) -> str:
    listed = ", ".join(map(str, shards[:_MOST_NAMED]))
    more = f" and {len(shards) - _MOST_NAMED} more" if len(shards) > _MOST_NAMED else ""
    return f"record {listed} is" if len(shards) == 1 else f"records {listed}{more} are"


def _other_rows(array: SealedArray, index: Index | None) -> list[Damage]:
    if index is None:
        return []
    manifest = array.spec.manifest
    stored = {"rows_digest": manifest.get("rows_digest"), "num_rows": array.spec.num_rows}
    there = {"rows_digest": index.manifest["rows_digest"], "num_rows": index.num_rows}
    difference = first_difference(stored, there)
    if difference is None:
        return []
    what = (
        "{} belongs to other rows than the index: {} is {!r}, the index says {!r}; restore the "
        "index it was made with, or remove the array and make it again"
    ).format(array.where, *difference)
    return [Damage(array.spec.name, "rows", what)]


def _strays(array: SealedArray) -> tuple[list[Damage], tuple[str, ...]]:
    """Objects in the array's folders that are no part of it: what a writer of ours left there
    (temporary files, shards and records beyond the last), and keys of everything else."""
    spec, store = array.spec, array.store
    own = {spec.metadata_key, f"{spec.name}/seal.json"}
    own.update(spec.shard_key(shard) for shard in range(spec.num_shards))
    own.update(_record_key(spec, shard) for shard in range(spec.num_shards))
    folders = (spec.name, f"ledger/{spec.name}")
    found = [key for folder in folders for key in store.keys(folder) if key not in own]
    left = {key for key in found if _is_left_behind(spec, key)}
    strays = [
        Damage(spec.name, "stray", f"{store.url}/{key} does not belong there; {REPAIR}", key=key)
        for key in sorted(left.union(_abandoned(store, folders)))
    ]
    return strays, tuple(sorted(set(found) - left))


def _record_key(spec: ArraySpec, shard: int) -> str:
    """The ledger's record of a shard."""
    return f"ledger/{spec.name}/{shard:06d}.json"


def _is_left_behind(spec: ArraySpec, key: str) -> bool:
    """Whether a key that is none of the array's has a name that only our writers give."""
    if key.rpartition("/")[2].startswith(".tmp-"):
        return True
    return any(
        key in (spec.shard_key(number), _record_key(spec, number))
        for number in map(int, re.findall(r"\d+", key.removeprefix(spec.name)))
    )


def _abandoned(store: ObjectStore, folders: Sequence[str]) -> list[str]:
    """Temporary files that killed writers of any machine left in local folders."""
    if not isinstance(store, LocalStore):
        return []
    old = time.time() - _ABANDONED_S
    return [
        path.relative_to(store.root).as_posix()
        for folder in folders
        for path in (store.root / folder).rglob(".tmp-*")
        if path.is_file() and path.stat().st_mtime < old
    ]
