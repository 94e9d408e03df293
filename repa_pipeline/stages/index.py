"""`repa index`: source -> rows in one seeded global permutation.

Every image is read and decoded once. What cannot be used is a row marked excluded, with the
reason; above --max-bad the command fails after finishing the rest, keeping it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from repa_pipeline.config import IndexConfig
from repa_pipeline.data.array import fingerprint, first_difference
from repa_pipeline.data.index import (
    Entry,
    Index,
    content_digest,
    read_index,
    read_manifest,
    write_index,
)
from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes, open_store
from repa_pipeline.data.source import Item, Source, num_classes, open_source
from repa_pipeline.data.tables import TableRows, table_bytes
from repa_pipeline.engine.contracts import (
    Commit,
    Commits,
    Executor,
    Plan,
    Shard,
    SimpleWork,
    Wanted,
    Work,
    split_rows,
)
from repa_pipeline.engine.ledger import NUM_READERS, Ledger
from repa_pipeline.engine.run import Progress, run_stage
from repa_pipeline.errors import (
    DamagedError,
    DataError,
    MismatchError,
    MissingError,
    StageError,
)

_PART_ITEMS = 512
_PARTS = "index.parts"
_CLAIM = f"{_PARTS}/claim"
_LISTING = f"{_PARTS}/listing.parquet"
_LISTING_TYPES = {
    "key": "string",
    "label": "int32",
    "path": "string",
    "offset": "int64",
    "num_bytes": "int64",
}


def cache_store(config: IndexConfig) -> ObjectStore:
    """The cache of a workspace."""
    return open_store(config.workspace).child("cache")


def open_config_source(config: IndexConfig) -> Source:
    """The source of a configuration, with its scratch folder."""
    return open_source(
        config.source,
        scratch_dir=config.scratch,
        scratch_limit_bytes=int(config.scratch_gb * 2**30),
    )


def ensure_index(
    config: IndexConfig, executor: Executor, progress: Progress, relist: bool = False
) -> Index:
    """The finished index of the workspace, made now if need be.

    A finished one is compared with the source's listing when the source has another name, or with
    `relist`; otherwise a finished cache does without its images. Raises MismatchError when the
    workspace's index is of another source or other settings.
    """
    _listing.cache_clear()
    store = cache_store(config)
    if store.size("manifest.json") is None:
        stage = IndexStage(config)
        ledger = Ledger(store, _PARTS, stage.plan().fingerprint)
        try:
            run_stage(stage, executor, {stage.name: ledger}, progress)
        except (MissingError, StageError):
            if not stage.is_sealed():  # else another command finished meanwhile and tidied up
                raise
            _check_same_index(config, store)
    else:
        _check_same_index(config, store, relist)
    for name in store.list(_PARTS):  # the index holds all that they said
        store.delete(f"{_PARTS}/{name}")
    return read_index(store)


def planned_index(config: IndexConfig) -> tuple[Index, int]:
    """An index without rows that has the counts a plan needs, and the source's bytes (known ones).

    Every listed image counts as usable, so what is planned from it is an upper bound.
    """
    _listing.cache_clear()
    plan = IndexStage(config).plan()
    manifest = {
        "num_rows": plan.num_rows,
        "rows_digest": "not indexed yet",
        "shard_rows": config.shard_rows or default_shard_rows(plan.num_rows),
        "decode": _decode_settings(config),
    }
    return Index(manifest), plan.num_bytes


@dataclasses.dataclass(frozen=True)
class IndexStage:
    """Reads every image of the source once; `seal` permutes the rows and writes the index."""

    config: IndexConfig
    name: str = "index"

    def plan(self) -> Plan:
        items = _items(self.config)
        if not items:
            raise DataError(f"{self.config.source} holds no images: check --source")
        settings = {"listing": listing_digest(items), **_decode_settings(self.config)}
        return Plan(
            where=f"{cache_store(self.config).url}/index.parquet",
            fingerprint=fingerprint(settings),
            shards=split_rows(len(items), _PART_ITEMS),
            num_rows=len(items),
            num_bytes=sum(item.num_bytes for item in items if item.num_bytes > 0),
        )

    @property
    def outputs(self) -> tuple[IndexStage, ...]:
        return (self,)

    def check(self) -> None:
        return

    def sealed(self) -> list[Commit]:
        return []

    def begin(self) -> None:
        """Claims the workspace for these settings and writes the listing, so that workers need
        not list the source again.

        Raises MismatchError when an index of other settings was begun here.
        """
        if not self.is_sealed():
            self._claim()
            items = _items(self.config)
            columns = {name: [getattr(item, name) for item in items] for name in _LISTING_TYPES}
            cache_store(self.config).put(_LISTING, table_bytes(columns, _LISTING_TYPES))

    def _claim(self) -> None:
        """Of two commands with different settings on one fresh workspace, one goes on."""
        store = cache_store(self.config)
        claim = {"source": self.config.source, "shard_rows": self.config.shard_rows}
        claim |= {"permutation_seed": self.config.permutation_seed}
        claim |= _decode_settings(self.config)
        if store.put_new(_CLAIM, json_bytes(claim)):
            return
        difference = first_difference(get_json(store, _CLAIM), claim)
        if difference:
            name, there, here = difference
            raise MismatchError(
                f"an index with other settings was begun at {store.url}: {name} is {there!r} "
                f"there, {here!r} now; set it back, or remove {store.url}/{_PARTS} if nobody is "
                "making it"
            )

    def open(self, wanted: Wanted) -> Work:
        source, store = open_config_source(self.config), cache_store(self.config)
        listing = TableRows(store, _LISTING)

        def work(shard: Shard) -> Commits:
            rows = listing.rows(shard.start, shard.stop, tuple(_LISTING_TYPES))
            entries = _examine(source, self.config, [Item(**row) for row in rows])
            data = json_bytes([dataclasses.asdict(entry) for entry in entries])
            store.put(f"{_PARTS}/{shard.index:06d}.part", data)
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            return (Commit(shard.index, len(entries), len(data), digest, output=self.name),)

        return SimpleWork(work)

    def seal(self, commits: list[Commit]) -> None:
        store = cache_store(self.config)
        if self.is_sealed():  # by another command that began beside this one
            return _check_same_index(self.config, store)
        try:
            with ThreadPoolExecutor(NUM_READERS) as pool:
                parts = list(pool.map(functools.partial(_read_entries, store), commits))
        except MissingError:
            if not self.is_sealed():  # else the other command finished meanwhile and tidied up
                raise
            return _check_same_index(self.config, store)
        usable = [entry for part in parts for entry in part if entry.excluded is None]
        excluded = [entry for part in parts for entry in part if entry.excluded is not None]
        if len(excluded) > self.config.max_bad:
            # Whoever mends an image must have it looked at again, even at the same size.
            for commit, part in zip(commits, parts, strict=True):
                if any(entry.excluded is not None for entry in part):
                    store.delete(f"{_PARTS}/{commit.index:06d}.part")
        _check_bad(self.config, usable, excluded)
        order = np.random.default_rng(self.config.permutation_seed).permutation(len(usable))
        rows = [usable[i] for i in order]
        manifest = _manifest(self.config, rows, excluded)
        write_index(store, rows, excluded, manifest)

    def is_sealed(self) -> bool:
        return cache_store(self.config).size("manifest.json") is not None

    def stands(self, commit: Commit) -> bool:
        key = f"{_PARTS}/{commit.index:06d}.part"
        return cache_store(self.config).size(key) == commit.num_bytes


def listing_digest(items: Sequence[Item]) -> str:
    """sha256 of a source's listing: keys, labels and where the bytes are."""
    total = hashlib.sha256()
    for item in items:
        total.update(f"{item.key}\t{item.label}\t{item.path}\t{item.offset}\t".encode())
        total.update(f"{item.num_bytes}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=4)
def _listing(source: str, scratch: str | None, scratch_gb: float) -> Source:
    limit = int(scratch_gb * 2**30)
    return open_source(source, scratch_dir=scratch, scratch_limit_bytes=limit)


def _listed(config: IndexConfig) -> Source:
    """The source of `config`, listed once in a command: what is indexed is what was listed."""
    return _listing(config.source, config.scratch, config.scratch_gb)


def _items(config: IndexConfig) -> list[Item]:
    return _listed(config).items()


def _read_entries(store: ObjectStore, commit: Commit) -> list[Entry]:
    key = f"{_PARTS}/{commit.index:06d}.part"
    data = store.get(key)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != commit.digest:
        raise DamagedError(
            f"{store.url}/{key} is damaged, its sha256 is not the recorded one: remove it and run "
            "`repa index` again"
        )
    return [Entry(**entry) for entry in json.loads(data)]


def _decode_settings(config: IndexConfig) -> dict[str, Any]:
    return {"exif": config.exif, "max_pixels": config.max_pixels}


def _examine(source: Source, config: IndexConfig, items: list[Item]) -> list[Entry]:
    from repa_pipeline.stages.images import read_images

    found: dict[int, Entry] = {}

    def look(i: int, data: bytes) -> None:
        found[i] = _entry(items[i], data, config)

    read_images(source, items, look, config.decode_threads)
    return [found[i] for i in range(len(items))]


def _entry(item: Item, data: bytes, config: IndexConfig) -> Entry:
    from repa_pipeline.data.image import decode_image

    common: dict[str, Any] = {
        "key": item.key,
        "label": item.label or 0,
        "path": item.path,
        "offset": item.offset,
        "num_bytes": item.num_bytes,
        "digest": content_digest(data),
    }
    try:
        image = decode_image(data, upright=config.exif == "upright", max_pixels=config.max_pixels)
    except DataError as error:
        return Entry(**common, width=0, height=0, notes="", excluded=str(error))
    return Entry(**common, width=image.width, height=image.height, notes="; ".join(image.notes))


def _check_bad(config: IndexConfig, usable: list[Entry], excluded: list[Entry]) -> None:
    if len(excluded) > config.max_bad:
        first = excluded[0]
        raise DataError(
            f"{len(excluded)} of {len(usable) + len(excluded)} images cannot be used, --max-bad "
            f"allows {config.max_bad}; the first is {first.key} ({first.path}): {first.excluded}; "
            f"mend them or accept them with --max-bad {len(excluded)}"
        )
    if not usable:
        raise DataError(f"{config.source} holds no usable image: check --source")


def _manifest(config: IndexConfig, rows: list[Entry], excluded: list[Entry]) -> dict[str, Any]:
    source = _listed(config)
    items = source.items()
    digests = Counter(entry.digest for entry in rows)
    notes = Counter(n for entry in rows for n in entry.notes.split("; ") if n)
    return {
        "source": source.url,
        "listing": listing_digest(items),
        "permutation_seed": config.permutation_seed,
        "decode": _decode_settings(config),
        "shard_rows": config.shard_rows or default_shard_rows(len(rows)),
        "num_classes": num_classes(items, source.class_names),
        "class_names": list(source.class_names) if source.class_names else None,
        "num_excluded": len(excluded),
        "excluded_reasons": dict(Counter(str(entry.excluded) for entry in excluded)),
        "notes": dict(sorted(notes.items())),
        "remarks": list(source.remarks),
        "num_duplicates": sum(count - 1 for count in digests.values()),
    }


def default_shard_rows(num_rows: int) -> int:
    """512, or for small sets the power of two that gives at least 16 shards (16 at the least)."""
    for rows in (512, 256, 128, 64, 32):
        if num_rows >= 16 * rows:
            return rows
    return 16


def _check_same_index(config: IndexConfig, store: ObjectStore, relist: bool = False) -> None:
    manifest = read_manifest(store)
    got = {"permutation_seed": manifest["permutation_seed"], **manifest["decode"]}
    now = {"permutation_seed": config.permutation_seed, **_decode_settings(config)}
    if config.shard_rows:
        got["shard_rows"], now["shard_rows"] = manifest["shard_rows"], config.shard_rows
    if relist or manifest["source"] != config.source:
        got["listing"], now["listing"] = manifest["listing"], _listing_or_none(config)
    difference = first_difference(got, now)
    if difference:
        name, there, here = difference
        if name == "listing" and manifest["source"] == config.source:
            raise MismatchError(
                f"{config.source} lists other images than the index at {store.url}: files were "
                "added, removed or replaced; restore them or use another --workspace"
            )
        if name == "listing":
            name, there, here = "source", manifest["source"], config.source
        raise MismatchError(
            f"the index at {store.url} was made with other settings: {name} is {there!r} there, "
            f"{here!r} now; set it back or use another --workspace"
        )


def _listing_or_none(config: IndexConfig) -> str | None:
    try:
        return listing_digest(_items(config))
    except MissingError:
        return None
