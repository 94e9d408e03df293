"""`repa repair`: what is damaged or missing, made again; nothing else is touched.

What our own killed writers left behind is removed; files of anybody else are left alone and named.

Metadata and ledger come from the seal, a seal from ledger and metadata once every shard verifies.
Shards are encoded again by the recipe in the array's manifest: the same network and weights, the
same images, the same batches. An object is replaced only by bytes that have the sealed digest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from repa_pipeline.config_care import RepairConfig
from repa_pipeline.data.array import SealedArray, seal_array, stored_digest
from repa_pipeline.data.objects import ObjectStore, json_bytes
from repa_pipeline.engine.contracts import Commit, Executor
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import ConfigError, DamagedError, RepaError
from repa_pipeline.stages.array_stage import commit_of, seal_entry
from repa_pipeline.stages.cached_rows import told_source
from repa_pipeline.stages.heal import add_partners, jobs_of, run_job
from repa_pipeline.stages.survey import (
    Standing,
    Survey,
    care_store,
    survey_cache,
    unrecorded,
)
from repa_pipeline.stages.verify import (
    Report,
    Round,
    begin_rounds,
    conclude,
    read_summary,
    run_checks,
)
from repa_pipeline.text import count


@dataclasses.dataclass(frozen=True)
class Repaired:
    """What a repair did, a line each, what it could not do, and how the cache is now."""

    done: tuple[str, ...]
    errors: tuple[RepaError, ...]
    report: Report

    def check(self) -> None:
        """Raises the first error, else what is still damaged."""
        if self.errors:
            raise self.errors[0]
        self.report.check()


def repair_cache(
    config: RepairConfig,
    executor: Executor,
    progress: Progress,
    reader: Executor | None = None,
) -> Repaired:
    """Verifies a cache, mends it and encodes again what is damaged or missing.

    `executor` encodes, and reads too unless there is a `reader` for that.
    A finished verify that found damage is taken at its word, but for what is missing or of
    another size since; without one (or with `again`) everything is read first. Raises as
    `verify_cache`; what cannot be repaired is in the result, whose `check` raises.
    """
    store = care_store(config)
    survey = survey_cache(store, config.array)
    rounds = None if config.again else standing_rounds(config, survey)
    if rounds is None:
        rounds = begin_rounds(survey, config.again)
    run_checks(config, store, rounds, reader or executor, progress)
    conclude(survey, rounds)
    done = [line for standing in survey.standings for line in _mend(store, standing)]
    healed, errors = _heal(config, survey, rounds, executor, progress)
    done += healed
    rounds = _surveyed_again(store, config, rounds)
    done += [line for current in rounds for line in _seal(store, current, errors)]
    survey = survey_cache(store, config.array)
    return Repaired(tuple(done), tuple(errors), conclude(survey, _with(survey, rounds)))


def standing_rounds(config: RepairConfig, survey: Survey) -> list[Round] | None:
    """The finished rounds of all arrays, when there is something damaged in them.

    What they call damaged, and what is missing or of another size by now, is to be read again.
    """
    rounds, has_damage = [], False
    for standing in survey.standings:
        if standing.array is None:
            continue
        summary = read_summary(survey.store, standing)
        if not summary.get("finished") or summary.get("fingerprint") != standing.fingerprint:
            return None
        has_damage = has_damage or bool(summary["damage"])
        damaged = {found["shard"] for found in summary["damage"]}
        sound = _of_right_size(standing, config.read_threads) - damaged
        rounds.append(Round(standing, summary["round"], sound=sound))
    return rounds if has_damage else None


def known_damage(config: RepairConfig) -> list[str]:
    """What a repair would see to first, a line each: found now without reading, or by a verify."""
    survey = survey_cache(care_store(config), config.array)
    found = [damage.what for damage in survey.damage]
    found += [damage.what for standing in survey.standings for damage in standing.damage]
    for current in standing_rounds(config, survey) or ():
        found += [f"{current.standing.name}: shard {shard}" for shard in current.todo]
    return found


def _of_right_size(standing: Standing, threads: int) -> set[int]:
    array = standing.array
    if array is None:
        return set()
    keys = [array.spec.shard_key(shard) for shard in standing.recorded]
    with ThreadPoolExecutor(threads) as pool:
        sizes = list(pool.map(array.store.size, keys))
    return {
        shard
        for shard, size in zip(standing.recorded, sizes, strict=True)
        if size == array.shards[shard]["num_bytes"]
    }


def _mend(store: ObjectStore, standing: Standing) -> list[str]:
    """Puts right what the seal says, and removes strays; lines of what was done.

    Strays are what our own writers left: what is not of their kinds (`Standing.foreign`) stays.
    """
    done = []
    array = standing.array
    if array is not None and standing.has("metadata"):
        store.put(array.spec.metadata_key, json_bytes(array.spec.metadata()))
        done.append(f"{standing.name}: metadata written again from the seal")
    lacking = unrecorded(array, standing.ledger) if array is not None else []
    if array is not None and standing.is_sealed and lacking:
        ledger = Ledger(store, f"ledger/{standing.name}", array.spec.fingerprint)
        for shard in lacking:
            ledger.record(commit_of(array.shards[shard]))
        done.append(f"{standing.name}: {count(len(lacking), 'ledger record')} from the seal")
    for stray in (damage for damage in standing.damage if damage.kind == "stray"):
        store.delete(stray.key)
        done.append(f"{standing.name}: removed {stray.key}")
    return done


def _seal(store: ObjectStore, current: Round, errors: list[RepaError]) -> list[str]:
    """Seals an array without a readable seal once all its shards are recorded and verified."""
    standing = current.standing
    if standing.is_sealed or standing.has("rows"):
        return []
    is_sound = current.sound.issuperset(standing.recorded) and not current.damaged
    if standing.is_complete and is_sound:
        seal_array(store, current.array.spec, [dict(entry) for entry in current.array.shards])
        return [f"{standing.name}: sealed from its ledger"]
    if standing.has("seal") and not standing.is_complete:
        lacking = current.array.spec.num_shards - len(standing.recorded)
        errors.append(
            DamagedError(
                f"{current.array.where}: the seal is damaged and {count(lacking, 'shard')} without "
                "a ledger record: run the command that made the array again, it makes what is "
                "missing and seals"
            )
        )
    return []


def _heal(
    config: RepairConfig,
    survey: Survey,
    rounds: Sequence[Round],
    executor: Executor,
    progress: Progress,
) -> tuple[list[str], list[RepaError]]:
    """Encodes damaged shards again: lines of what was done, and what went wrong."""
    damaged = [current for current in rounds if current.damaged]
    if not damaged:
        return [], []
    if survey.index is None:
        return [], [DamagedError(survey.damage[0].what)]
    jobs, errors = jobs_of(config, survey.index, damaged)
    if jobs:
        told_source(config, survey.index)
    if config.weights and len(jobs) > 1:
        raise ConfigError(
            f"--weights names one file, {len(jobs)} networks are needed: repair array by array "
            'with --array, or set weights = "..." of each in repa.toml'
        )
    done: list[str] = []
    by_name = {current.standing.name: current for current in rounds}
    for job in jobs:
        if config.accept:
            add_partners(job, by_name)
        commits: list[Commit] = []
        try:
            run_job(job, survey.index, config.accept, executor, progress, commits)
        except RepaError as error:
            errors.append(error)
        done += _take(survey.store, by_name, commits)
    return done, errors


def _take(store: ObjectStore, by_name: Mapping[str, Round], commits: Sequence[Commit]) -> list[str]:
    """Notes what was stored; arrays that took other bytes get records and seals of these."""
    done = []
    for name in sorted({commit.output for commit in commits}):
        current, array = by_name[name], by_name[name].array
        own = [commit for commit in commits if commit.output == name]
        other = [c for c in own if c.digest != stored_digest(array.shards[c.index])]
        healed = sorted(commit.index for commit in own if commit.index in current.damaged)
        for commit in own:
            current.note(commit)
        if other:
            _accept(store, current.standing, array, other)
            done.append(f"{name}: {count(len(other), 'shard')} with other bytes accepted")
        if healed:
            listed = ", ".join(map(str, healed))
            done.append(
                f"{name}: encoded again {'shards' if len(healed) > 1 else 'shard'} {listed}"
            )
    return done


def _accept(
    store: ObjectStore, standing: Standing, array: SealedArray, commits: Sequence[Commit]
) -> None:
    spec, entries = array.spec, [dict(entry) for entry in array.shards]
    ledger = Ledger(store, f"ledger/{spec.name}", spec.fingerprint)
    for commit in commits:
        entries[commit.index] = seal_entry(commit)
        ledger.record(commit)
    if standing.is_sealed:
        seal_array(store, spec, entries)


def _surveyed_again(store: ObjectStore, config: RepairConfig, rounds: list[Round]) -> list[Round]:
    return _with(survey_cache(store, config.array), rounds)


def _with(survey: Survey, rounds: Sequence[Round]) -> list[Round]:
    """The rounds over the arrays as they stand now."""
    by_name = {standing.name: standing for standing in survey.standings}
    return [
        dataclasses.replace(current, standing=by_name[current.standing.name]) for current in rounds
    ]
