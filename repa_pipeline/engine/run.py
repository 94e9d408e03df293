"""`run_stage`: do what is missing, record it, seal it. Exit 0 means sealed."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from repa_pipeline.engine.contracts import Commit, Executor, Plan, Stage
from repa_pipeline.engine.ledger import Ledger
from repa_pipeline.errors import StageError


class Progress(Protocol):
    """Who is told how far a stage is."""

    def start(self, title: str, total: int, done: int, unit: str) -> None: ...

    def advance(self, count: int, **facts: float) -> None: ...

    def finish(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a run of a stage did: commits of all shards, and how many of them are new."""

    plan: Plan
    commits: tuple[Commit, ...]
    num_new: int


def run_stage(stage: Stage, executor: Executor, ledger: Ledger, progress: Progress) -> StageResult:
    """Runs the missing shards of a stage, then seals it; a sealed stage is left alone.

    Raises StageError when shards could not be done; what was done stays recorded.
    """
    plan = stage.plan()
    stage.begin()
    done = _standing(stage, plan, ledger)
    if stage.is_sealed() and len(done) == len(plan.shards):
        return StageResult(plan, _in_order(done), 0)
    missing = [shard for shard in plan.shards if shard.index not in done]
    rows_done = sum(commit.rows for commit in done.values())
    progress.start(stage.name, plan.num_rows, rows_done, plan.unit)
    try:
        for commit in executor.map(stage.open, missing) if missing else ():
            ledger.record(commit)
            done[commit.index] = commit
            progress.advance(commit.rows, **commit.seconds)
    finally:
        progress.finish()
    absent = [shard.index for shard in plan.shards if shard.index not in done]
    if absent:
        raise StageError(f"{stage.name}: executor '{executor.name}' left out shards {absent[:5]}")
    commits = _in_order(done)
    stage.seal(list(commits))
    return StageResult(plan, commits, len(missing))


def _standing(stage: Stage, plan: Plan, ledger: Ledger) -> dict[int, Commit]:
    """Recorded shards of this plan (another partition's are none) whose objects are there."""
    rows = {shard.index: shard.num_rows for shard in plan.shards}
    return {
        index: commit
        for index, commit in ledger.entries().items()
        if rows.get(index) == commit.rows and stage.stands(commit)
    }


def _in_order(done: dict[int, Commit]) -> tuple[Commit, ...]:
    return tuple(done[index] for index in sorted(done))
