"""`repa verify`: every stored byte of a cache against its checksums, and what belongs to what.

Shards are read in parallel: by threads here, by the executor's workers elsewhere. A shard that is
looked at leaves a record, so a verify that was stopped goes on where it was:

    verify/NAME/NNNNNN.json    what was found of a shard; of one round, which a new one overwrites
    verify/NAME/summary.json   the round; at its end what is damaged
    verify/report.json         what the last finished verify (or repair) found

Disks rot: after a finished round the next verify begins another. Records name a round, and the
array's seal; those of another are none.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from repa_pipeline.config_care import VerifyConfig
from repa_pipeline.data.array import ArraySpec, SealedArray, fingerprint, stored_digest
from repa_pipeline.data.names import parse_name
from repa_pipeline.data.objects import ObjectStore, get_json, json_bytes, open_store
from repa_pipeline.engine.contracts import (
    Commit,
    Commits,
    Executor,
    Shard,
    Wanted,
    Work,
    split_rows,
)
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import DamagedError, MissingError, RepaError, StoreError
from repa_pipeline.stages.survey import Damage, Standing, Survey, care_store, survey_cache
from repa_pipeline.text import count

DAMAGED, UNREAD = "damaged: ", "unread: "
_RECORDS = "verify"
_REPORT = f"{_RECORDS}/report.json"
_BLOCK_SHARDS = 16
_BLOCKS = 8


@dataclasses.dataclass
class Round:
    """One pass over an array's shards: which are sound, which damaged or unreadable, and why."""

    standing: Standing
    number: int
    sound: set[int] = dataclasses.field(default_factory=set)
    damaged: dict[int, str] = dataclasses.field(default_factory=dict)
    unread: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def todo(self) -> list[int]:
        """Recorded shards not looked at yet."""
        seen = {*self.sound, *self.damaged, *self.unread}
        return [shard for shard in self.standing.recorded if shard not in seen]

    @property
    def array(self) -> SealedArray:
        if self.standing.array is None:
            raise ValueError(f"{self.standing.name} has no shards to look at")
        return self.standing.array

    def note(self, commit: Commit) -> None:
        """Takes what was found of a shard."""
        for found in (self.damaged, self.unread):
            found.pop(commit.index, None)
        if commit.digest.startswith(DAMAGED):
            self.damaged[commit.index] = commit.digest.removeprefix(DAMAGED)
        elif commit.digest.startswith(UNREAD):
            self.unread[commit.index] = commit.digest.removeprefix(UNREAD)
        else:
            self.sound.add(commit.index)

    def ledger(self, store: ObjectStore) -> Ledger:
        """Its records."""
        name = self.standing.name
        tied = fingerprint({"array": self.standing.fingerprint, "round": self.number})
        return Ledger(store, f"{_RECORDS}/{name}", tied)

    def damage(self) -> list[Damage]:
        """The damaged shards."""
        layout, num_rows = self.array.spec.layout, self.array.spec.num_rows
        found = []
        for shard, what in sorted(self.damaged.items()):
            start = shard * layout.shard_rows
            stop = start + layout.rows_of(shard, num_rows)
            found.append(Damage(self.standing.name, "shard", what, shard, start, stop))
        return found


@dataclasses.dataclass(frozen=True)
class Report:
    """What a verify found. Counts are of sound shards; `unread` names shards nobody could read,
    `foreign` keys in the arrays' folders that are not ours: no damage, left alone.

    is_recorded: whether records could be written; a cache may be one that cannot be written to.
    """

    where: str
    arrays: tuple[str, ...]
    unfinished: tuple[str, ...]
    num_shards: int
    num_records: int
    num_bytes: int
    damage: tuple[Damage, ...]
    unread: tuple[str, ...]
    is_recorded: bool = True
    foreign: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises DamagedError, or StoreError when shards could not be read, naming the first."""
        if self.damage:
            places = count(len(self.damage), "place")
            kept = f" ({self.where}/{_REPORT} has all)" if self.is_recorded else ""
            raise DamagedError(f"damaged in {places}{kept}, the first: {self.damage[0].what}")
        if self.unread:
            unread = count(len(self.unread), "shard")
            raise StoreError(
                f"{unread} could not be read, the others are verified; the first: "
                f"{self.unread[0]}; run the same command again, it goes on with these"
            )


def verify_cache(config: VerifyConfig, executor: Executor, progress: Progress) -> Report:
    """Verifies a cache, or goes on with it; see the module.

    Finishes everything before it returns; `Report.check` raises for what was found. Raises
    MissingError where there is no cache, UnknownNameError for an array that is not there.
    """
    survey = survey_cache(care_store(config), config.array)
    can_record = True
    try:
        rounds = begin_rounds(survey, config.again)
    except (OSError, StoreError):
        rounds, can_record = open_rounds(survey, config.again), False
    run_checks(config, survey.store, rounds, executor, progress, can_record)
    return conclude(survey, rounds, can_record)


def open_rounds(survey: Survey, again: bool = False) -> list[Round]:
    """The round of every array that has one to do, as far as it is; writes nothing.

    `again`: all begin anew.
    """
    return [
        _open_round(survey.store, standing, again)
        for standing in survey.standings
        if standing.array is not None
    ]


def begin_rounds(survey: Survey, again: bool = False) -> list[Round]:
    """As `open_rounds`, and notes that they are under way."""
    rounds = open_rounds(survey, again)
    for current in rounds:
        _write_summary(survey.store, current, finished=False)
    return rounds


def run_checks(
    config: VerifyConfig,
    store: ObjectStore,
    rounds: Sequence[Round],
    executor: Executor,
    progress: Progress,
    can_record: bool = True,
) -> None:
    """Looks at every round's `todo` and records what is found."""
    targets = tuple((k, shard) for k, current in enumerate(rounds) for shard in current.todo)
    if not targets:
        return
    arrays = tuple((current.array.spec, current.array.shards) for current in rounds)
    stage = CheckStage(store.url, arrays, targets, config.read_threads)
    by_name = {current.standing.name: current for current in rounds}
    ledgers = {name: current.ledger(store) for name, current in by_name.items()}
    total = sum(len(current.standing.recorded) for current in rounds)
    progress.start(stage.name, total, total - len(targets), "shards")
    try:
        for commits in executor.map(
            functools.partial(stage.open, {}), stage.blocks(), progress.workers
        ):
            for commit in commits:
                by_name[commit.output].note(commit)
                if can_record and not commit.digest.startswith(UNREAD):
                    ledgers[commit.output].record(commit)
            progress.advance(len(commits), damaged=sum(len(r.damaged) for r in rounds))
    finally:
        progress.finish()


def conclude(survey: Survey, rounds: Sequence[Round], can_record: bool = True) -> Report:
    """Closes the rounds that are complete and writes the report."""
    store = survey.store
    damage = [*survey.damage, *(d for standing in survey.standings for d in standing.damage)]
    damage += [found for current in rounds for found in current.damage()]
    sizes = [_sizes(current.array, current.sound) for current in rounds]
    report = Report(
        where=store.url,
        arrays=tuple(standing.name for standing in survey.standings),
        unfinished=tuple(_unfinished(s) for s in survey.standings if _is_unfinished(s)),
        num_shards=sum(len(current.sound) for current in rounds),
        num_records=sum(rows for rows, _ in sizes),
        num_bytes=sum(num_bytes for _, num_bytes in sizes),
        damage=tuple(damage),
        unread=tuple(what for r in rounds for _, what in sorted(r.unread.items())),
        is_recorded=can_record,
        foreign=tuple(sorted(key for s in survey.standings for key in s.foreign)),
    )
    if can_record:
        for current in rounds:
            _write_summary(store, current, finished=not current.todo and not current.unread)
        store.put(_REPORT, json_bytes(dataclasses.asdict(report)))
    return report


@dataclasses.dataclass(frozen=True)
class CheckStage:
    """Verifies shards of arrays; an executor's unit is a block of `targets`.

    targets: (position in `arrays`, shard). A block's commits say of each of its shards what was
    found: the sealed digest, or DAMAGED or UNREAD and why.
    """

    url: str
    arrays: tuple[tuple[ArraySpec, tuple[Mapping[str, Any], ...]], ...]
    targets: tuple[tuple[int, int], ...]
    threads: int
    name: str = "verify"

    def blocks(self) -> list[Shard]:
        """Few shards a block, so that a stopped verify loses little and workers share evenly."""
        size = max(1, min(_BLOCK_SHARDS, len(self.targets) // _BLOCKS))
        return list(split_rows(len(self.targets), size))

    def open(self, wanted: Wanted) -> Work:
        return _CheckWork(self)


class _CheckWork:
    """Threads that each hold one shard in memory; the next block is queued while one is read."""

    def __init__(self, stage: CheckStage):
        store = open_store(stage.url)
        self._arrays = [SealedArray(store, spec, shards) for spec, shards in stage.arrays]
        self._targets = stage.targets
        self._pool = ThreadPoolExecutor(stage.threads, "repa-verify")
        self._held = threading.local()

    def load(self, shard: Shard) -> list[Future[Commit]]:
        targets = self._targets[shard.start : shard.stop]
        return [self._pool.submit(self._check, *target) for target in targets]

    def compute(self, shard: Shard, loaded: list[Future[Commit]]) -> Commits:
        return tuple(future.result() for future in loaded)

    def store(self, shard: Shard, computed: Commits) -> Commits:
        return computed

    def _check(self, position: int, shard: int) -> Commit:
        array = self._arrays[position]
        digest = check_sealed_shard(array, shard, self._buffer(array))
        rows = array.spec.layout.rows_of(shard, array.spec.num_rows)
        num_bytes = array.spec.layout.shard_bytes(rows)
        return Commit(shard, rows, num_bytes, digest, output=array.spec.name)

    def _buffer(self, array: SealedArray) -> bytearray:
        needed = array.spec.layout.shard_bytes(array.spec.layout.shard_rows)
        held: bytearray = getattr(self._held, "buffer", bytearray())
        if len(held) < needed:
            held = self._held.buffer = bytearray(needed)
        return held


def check_sealed_shard(array: SealedArray, shard: int, buffer: bytearray) -> str:
    """The digest that the seal gives the shard if it is sound, else DAMAGED or UNREAD and why."""
    try:
        array.verify_shard(shard, buffer)
    except DamagedError as error:
        return f"{DAMAGED}{error}"
    except (RepaError, OSError) as error:
        where = f"{array.store.url}/{array.spec.shard_key(shard)} (shard {shard})"
        # A sector that cannot be read is damage; a store that does not answer says nothing of it.
        if isinstance(error, OSError) and error.errno == errno.EIO:
            return f"{DAMAGED}{where} cannot be read ({error}); {array.spec.advice}"
        return f"{UNREAD}{where}: {error}"
    return stored_digest(array.shards[shard])


def _open_round(store: ObjectStore, standing: Standing, again: bool) -> Round:
    summary = read_summary(store, standing)
    is_same = summary.get("fingerprint") == standing.fingerprint
    number = summary["round"] if isinstance(summary.get("round"), int) else 0
    if again or not is_same or summary.get("finished"):
        return Round(standing, number + 1)
    current = Round(standing, number)
    for commit in current.ledger(store).entries().values():
        if commit.index in standing.recorded:
            current.note(commit)
    return current


def read_summary(store: ObjectStore, standing: Standing) -> dict[str, Any]:
    """What the last round over an array left; empty where there was none, or it is damaged."""
    try:
        return get_json(store, f"{_RECORDS}/{standing.name}/summary.json")
    except (MissingError, DamagedError):
        return {}


def _write_summary(store: ObjectStore, current: Round, finished: bool) -> None:
    standing = current.standing
    damage = [*standing.damage, *current.damage()] if finished else []
    summary = {
        "fingerprint": standing.fingerprint,
        "round": current.number,
        "finished": finished,
        "num_shards": len(standing.recorded),
        "damage": [dataclasses.asdict(found) for found in damage],
    }
    store.put(f"{_RECORDS}/{standing.name}/summary.json", json_bytes(summary))


def _sizes(array: SealedArray, shards: Iterable[int]) -> tuple[int, int]:
    """Records and bytes of shards."""
    layout = array.spec.layout
    rows = [layout.rows_of(shard, array.spec.num_rows) for shard in shards]
    return sum(rows), sum(layout.shard_bytes(n) for n in rows)


def _is_unfinished(standing: Standing) -> bool:
    return standing.array is not None and not standing.is_sealed and not standing.has("seal")


def _unfinished(standing: Standing) -> str:
    total = count(standing.array.spec.num_shards, "shard") if standing.array else "?"
    done = f"{standing.name} is unfinished: {len(standing.recorded):,} of {total} recorded"
    try:
        return f"{done}; run `repa {parse_name(standing.name).made_by}`"
    except RepaError:
        return done
