"""`repa copy`: a cache from one store to another, every byte verified on the way.

The index goes first, then every array: metadata, shards with their ledger records, the seal last,
once all of its shards stand verified. What stands at the target already is looked at and kept, so
a copy that was stopped goes on, and a second one finds nothing to do.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

from repa_pipeline.config_care import CopyConfig
from repa_pipeline.data.array import SealedArray, array_names, begin_array
from repa_pipeline.data.index import INDEX, read_index
from repa_pipeline.data.names import SCALE
from repa_pipeline.data.objects import ObjectStore, open_store
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import ConfigError, DamagedError, MismatchError, MissingError, StoreError
from repa_pipeline.stages.array_stage import commit_of
from repa_pipeline.stages.survey import Standing, survey_cache
from repa_pipeline.text import count, size


@dataclasses.dataclass(frozen=True)
class Copied:
    """What a copy did. Shards and bytes are those now at the target; `new` ones were written.

    left_out: unfinished arrays. damage: a line for each shard or array that was not copied.
    """

    target: str
    arrays: tuple[str, ...]
    num_shards: int
    num_new: int
    num_bytes: int
    left_out: tuple[str, ...]
    damage: tuple[str, ...]

    def check(self) -> None:
        """Raises DamagedError when something was not copied, naming the first."""
        if self.damage:
            raise DamagedError(
                f"the origin is damaged in {count(len(self.damage), 'place')}, which were not "
                f"copied and whose arrays were not sealed; the first: {self.damage[0]}; then copy "
                "again"
            )


def copy_stores(config: CopyConfig) -> tuple[ObjectStore, ObjectStore]:
    """The caches of the two workspaces; raises ConfigError when one is not given."""
    if not config.origin or not config.target:
        raise ConfigError("a copy needs two workspaces: repa copy FROM TO")
    origin, target = (open_store(url).child("cache") for url in (config.origin, config.target))
    if origin.url == target.url:
        raise ConfigError(f"FROM and TO are the same workspace, {config.origin}: name another TO")
    return origin, target


def copy_cache(config: CopyConfig, progress: Progress) -> Copied:
    """Copies sealed arrays (or those named, with their scales) and the index; runs are not copied.

    Everything else is finished before damage of the origin is reported by `Copied.check`. Raises
    MissingError without a cache or for a named array that is unfinished, UnknownNameError,
    DamagedError for the index, MismatchError when the target holds something else.
    """
    origin, target = copy_stores(config)
    survey = survey_cache(origin, _with_scales(origin, config.array))
    if survey.index is None:
        raise DamagedError(survey.damage[0].what)
    chosen, left_out, damage = _choose(survey.standings, bool(config.array))
    _copy_index(origin, target)
    pairs = [(standing, _begin(target, standing)) for standing in chosen]
    pump = _Pump(target, config.verify == "read", config.copy_threads)
    total = sum(len(standing.recorded) for standing in chosen)
    progress.start("copy", total, 0, "shards")
    try:
        for standing, copy in pairs:
            wrong = pump.copy(standing, copy, progress)
            damage += wrong
            if not wrong:
                _put_equal(origin, target, f"{standing.name}/seal.json")
    finally:
        progress.finish()
    names = tuple(standing.name for standing in chosen)
    return Copied(
        target.url, names, pump.num_shards, pump.num_new, pump.num_bytes, left_out, tuple(damage)
    )


def plan_copy(config: CopyConfig) -> list[str]:
    """What a copy would do, a line an array; writes nothing, raises as `copy_cache`."""
    origin, target = copy_stores(config)
    chosen, left_out, damage = _choose(
        survey_cache(origin, _with_scales(origin, config.array)).standings, bool(config.array)
    )
    lines = [f"unfinished, left out: {name}" for name in left_out]
    lines += [f"damaged: {line}" for line in damage]
    for standing in chosen:
        if standing.array is not None:
            spec = standing.array.spec
            is_there = target.size(f"{spec.name}/seal.json") is not None
            lines.append(
                f"plan: {target.url}/{spec.name}: {count(spec.num_shards, 'shard')}, "
                f"{size(spec.num_bytes)}" + ("; done: sealed there" if is_there else "")
            )
    return lines


def _with_scales(origin: ObjectStore, names: Sequence[str]) -> list[str]:
    """The arrays `names` and the scales of those that have one: tokens are not whole without."""
    known = array_names(origin) if names else []
    return [*names, *(name + SCALE for name in names if name + SCALE in known)]


def _choose(
    standings: Sequence[Standing], are_named: bool
) -> tuple[list[Standing], tuple[str, ...], list[str]]:
    """The sealed arrays, scales before what a reader looks for; those left out; damage."""
    damage = [
        found.what
        for standing in standings
        for found in standing.damage
        if found.kind in ("seal", "version", "rows")
        or (found.kind == "metadata" and standing.array is None)
    ]
    sound = [s for s in standings if s.array is not None and not s.has("seal", "rows")]
    unfinished = tuple(standing.name for standing in sound if not standing.is_sealed)
    if are_named and unfinished:
        raise MissingError(f"{unfinished[0]} is unfinished: finish it before it is copied")
    chosen = [standing for standing in sound if standing.is_sealed]
    return sorted(chosen, key=lambda s: not s.name.endswith(SCALE)), unfinished, damage


def _copy_index(origin: ObjectStore, target: ObjectStore) -> None:
    """manifest.json, which says that the index is finished, goes last."""
    read_index(origin)
    for key in ("manifest.json", INDEX):
        standing = target.size(key)
        if standing is not None and target.get(key) != origin.get(key):
            raise _foreign(target, key)
    for key in (INDEX, "manifest.json"):
        _put_equal(origin, target, key)


def _put_equal(origin: ObjectStore, target: ObjectStore, key: str) -> None:
    """Copies a small object; raises MismatchError when another stands there."""
    data = origin.get(key)
    if not target.put_new(key, data) and target.get(key) != data:
        raise _foreign(target, key)


def _foreign(target: ObjectStore, key: str) -> MismatchError:
    return MismatchError(
        f"{target.url}/{key} is not that of the origin: the target holds something else there; "
        "remove it, or copy to another workspace"
    )


def _begin(target: ObjectStore, standing: Standing) -> SealedArray:
    """Metadata at the target, and the array as it will be there.

    Raises MismatchError when the target has an array of that name that is another.
    """
    if standing.array is None:
        raise ValueError(f"{standing.name} cannot be copied")
    array = standing.array
    begin_array(target, array.spec)
    key = f"{standing.name}/seal.json"
    if target.size(key) is not None and target.get(key) != array.store.get(key):
        raise _foreign(target, key)
    return SealedArray(target, array.spec, array.shards)


class _Pump:
    """Threads that each hold one shard in memory."""

    def __init__(self, target: ObjectStore, read_back: bool, threads: int):
        self._target, self._read_back, self._threads = target, read_back, threads
        self._held = threading.local()
        self.num_shards = self.num_new = self.num_bytes = 0

    def copy(self, standing: Standing, there: SealedArray, progress: Progress) -> list[str]:
        """Copies an array's shards and ledger records: what is damaged, a line each."""
        here, wrong = standing.array, []
        if here is None:
            raise ValueError(f"{standing.name} cannot be copied")
        with _abandoned_on_error(ThreadPoolExecutor(self._threads, "repa-copy")) as pool:
            futures: dict[Future[bool], int] = {
                pool.submit(self._copy_shard, here, there, shard): shard
                for shard in standing.recorded
            }
            for future in as_completed(futures):
                shard = futures[future]
                try:
                    self.num_new += future.result()
                except DamagedError as error:
                    wrong.append((shard, str(error)))
                    continue
                self.num_shards += 1
                self.num_bytes += here.shards[shard]["num_bytes"]
                progress.advance(1)
        return [what for _, what in sorted(wrong)]

    def _copy_shard(self, here: SealedArray, there: SealedArray, shard: int) -> bool:
        """Whether the shard was written; raises DamagedError when the origin's is damaged."""
        is_new = not self._stands(there, shard)
        if is_new:
            self._write(here, there, shard)
        commit, spec = commit_of(here.shards[shard]), here.spec
        ledger = Ledger(self._target, f"ledger/{spec.name}", spec.fingerprint)
        if is_new or self._target.size(f"{ledger.prefix}/{shard:06d}.json") is None:
            ledger.record(commit)
        return is_new

    def _stands(self, there: SealedArray, shard: int) -> bool:
        """Whether the target has the shard already; raises MismatchError for another object."""
        key = there.spec.shard_key(shard)
        size = self._target.size(key)
        if size is None:
            return False
        if size != there.shards[shard]["num_bytes"]:
            raise _foreign(self._target, key)
        if self._read_back:
            try:
                there.verify_shard(shard, self._buffer(there))
            except DamagedError as error:
                raise _foreign(self._target, key) from error
        return True

    def _write(self, here: SealedArray, there: SealedArray, shard: int) -> None:
        key, buffer = here.spec.shard_key(shard), self._buffer(here)
        here.verify_shard(shard, buffer)
        num_bytes = here.shards[shard]["num_bytes"]
        if not self._target.put_new(key, memoryview(buffer)[:num_bytes]):
            self._stands(there, shard)  # another copy, or our own first attempt, was faster
            return
        if self._read_back:
            try:
                there.verify_shard(shard, buffer)
            except DamagedError as error:
                raise StoreError(f"what was written reads back otherwise: {error}") from error
        elif self._target.size(key) != num_bytes:
            raise StoreError(f"{self._target.url}/{key} has another size than what was written")

    def _buffer(self, array: SealedArray) -> bytearray:
        needed = array.spec.layout.shard_bytes(array.spec.layout.shard_rows)
        held: bytearray = getattr(self._held, "buffer", bytearray())
        if len(held) < needed:
            held = self._held.buffer = bytearray(needed)
        return held


@contextmanager
def _abandoned_on_error(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Ends a pool; after an error (or an interrupt) what has not begun is dropped."""
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
