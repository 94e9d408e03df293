"""What `repa verify`, `repair` and `copy` print: every damage a line, then what it comes to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from repa_pipeline.commands import say
from repa_pipeline.config_care import CopyConfig, RepairConfig, VerifyConfig
from repa_pipeline.observe import progress_for_stream
from repa_pipeline.text import count, size

if TYPE_CHECKING:
    from repa_pipeline.stages.verify import Report


def verify(config: VerifyConfig) -> None:
    """`repa verify`; raises DamagedError after all damage is printed."""
    from repa_pipeline.cluster.select import choose_executor
    from repa_pipeline.stages.verify import verify_cache

    if config.dry_run:
        return _plan_verify(config)
    report = verify_cache(config, choose_executor(_without_devices(config)), progress_for_stream())
    for damage in report.damage:
        say(damage.what)
    for line in (*report.unread, *report.unfinished):
        say(line)
    _say_foreign(report)
    if not report.is_recorded:
        say(f"note: {report.where} cannot be written to, no records were kept")
    report.check()
    say(
        f"verified: {count(len(report.arrays), 'array')}, {count(report.num_shards, 'shard')}, "
        f"{count(report.num_records, 'record')}, {size(report.num_bytes)}"
    )


def repair(config: RepairConfig) -> None:
    """`repa repair`; raises for what could not be repaired after the rest is done."""
    from repa_pipeline.cluster.select import choose_executor
    from repa_pipeline.stages.repair import repair_cache

    if config.dry_run:
        return _plan_repair(config)
    reader = choose_executor(_without_devices(config))
    repaired = repair_cache(config, choose_executor(config), progress_for_stream(), reader)
    for line in repaired.done:
        say(line)
    for error in repaired.errors[1:]:
        say(f"not repaired: {error}")
    for damage in repaired.report.damage:
        say(f"still damaged: {damage.what}")
    _say_foreign(repaired.report)
    repaired.check()
    report = repaired.report
    shards = f"{count(len(report.arrays), 'array')}, {count(report.num_shards, 'shard')} sound"
    say(f"repaired: {shards}" if repaired.done else f"nothing to repair: {shards}")


def copy(config: CopyConfig) -> None:
    """`repa copy`; raises DamagedError after all that is sound is copied."""
    from repa_pipeline.stages.copy import copy_cache, plan_copy

    if config.dry_run:
        for line in plan_copy(config):
            say(line)
        return
    copied = copy_cache(config, progress_for_stream())
    for line in copied.damage:
        say(f"not copied: {line}")
    for name in copied.left_out:
        say(f"left out: {name} is unfinished")
    copied.check()
    shards = f"{count(copied.num_shards, 'shard')} ({copied.num_new:,} new)"
    looked = "read back" if config.verify == "read" else "sizes only"
    say(
        f"{'copied' if copied.num_new else 'nothing to do'}: "
        f"{count(len(copied.arrays), 'array')}, {shards}, {size(copied.num_bytes)}, {looked}"
    )
    say(f"output: {copied.target}")


def _plan_verify(config: VerifyConfig) -> None:
    from repa_pipeline.stages.survey import care_store, survey_cache
    from repa_pipeline.stages.verify import open_rounds

    survey = survey_cache(care_store(config), config.array)
    for current in open_rounds(survey, config.again):
        total, where = len(current.standing.recorded), current.array.where
        shards = f"{count(total, 'shard')}, {size(current.array.spec.num_bytes)}"
        say(f"plan: {where}: {shards} to read; done: {total - len(current.todo)}")


def _plan_repair(config: RepairConfig) -> None:
    from repa_pipeline.stages.repair import known_damage

    damage = known_damage(config)
    for found in damage:
        say(f"would repair: {found}")
    if not damage:
        say("no damage is known: would verify the cache first")


def _say_foreign(report: Report) -> None:
    for key in report.foreign:
        say(f"note: {report.where}/{key} is no part of the array: left alone")


def _without_devices(config: VerifyConfig) -> VerifyConfig:
    """Reading wants no GPU: several of them are no reason to start workers."""
    return dataclasses.replace(config, device="cpu")
