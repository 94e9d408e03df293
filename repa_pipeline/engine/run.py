"""`run_stage`: do what is missing, record it, seal it. Exit 0 means sealed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Protocol

from repa_pipeline.data.objects import ObjectStore
from repa_pipeline.engine.contracts import Commit, Executor, Output, Plan, Stage, Wanted
from repa_pipeline.engine.ledger import Ledger, standing
from repa_pipeline.errors import StageError


class Progress(Protocol):
    """Who is told how far a stage is."""

    def start(self, title: str, total: int, done: int, unit: str) -> None: ...

    def advance(self, count: int, **facts: float) -> None: ...

    def workers(self, states: Mapping[str, str]) -> None:
        """What every worker does now, by its name."""
        ...

    def finish(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class OutputResult:
    """What a run did for one output: commits of all its shards, and how many of them are new."""

    plan: Plan
    commits: tuple[Commit, ...]
    num_new: int


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a run of a stage did: each output by name, and the seconds of the phases of new work."""

    outputs: Mapping[str, OutputResult]
    seconds: Mapping[str, float]

    @property
    def num_new(self) -> int:
        """New shard objects of all outputs."""
        return sum(output.num_new for output in self.outputs.values())


def ledger_of(store: ObjectStore, output: Output, prefix: str = "ledger") -> Ledger:
    """The done records of an output below `prefix`/NAME of a store."""
    return Ledger(store, f"{prefix}/{output.name}", output.plan().fingerprint)


def run_stage(
    stage: Stage, executor: Executor, ledgers: Mapping[str, Ledger], progress: Progress
) -> StageResult:
    """Does what is missing of a stage's outputs, then seals them; a sealed one is left alone.

    `ledgers` holds a ledger an output, by name. Raises StageError when shards could not be done;
    what was done stays recorded, and outputs that are complete are sealed all the same.
    """
    state = _State(stage, ledgers)
    if state.is_finished:
        return state.result()
    wanted = state.wanted()
    shards = [shard for shard in state.shards if shard.index in wanted]
    rows_missing = sum(shard.num_rows for shard in shards)
    plan = state.plans[stage.outputs[0].name]
    progress.start(stage.name, plan.num_rows, plan.num_rows - rows_missing, plan.unit)
    open_stage = functools.partial(stage.open, wanted)
    try:
        for commits in executor.map(open_stage, shards, progress.workers) if shards else ():
            state.record(commits)
            shards_done = len(state.shards) - len(shards) + state.num_done
            progress.advance(commits[0].rows, shards=shards_done, **state.shares())
    finally:
        progress.finish()
        state.seal_complete()
    absent = {name: state.absent(name)[:5] for name in state.plans if state.absent(name)}
    if absent:
        raise StageError(f"{stage.name}: executor '{executor.name}' left out shards {absent}")
    return state.result()


class _State:
    """What stands and what is new of every output while a stage runs."""

    def __init__(self, stage: Stage, ledgers: Mapping[str, Ledger]):
        self.outputs = {output.name: output for output in stage.outputs}
        self.plans = {name: output.plan() for name, output in self.outputs.items()}
        self.shards = self.plans[stage.outputs[0].name].shards
        if any(plan.shards != self.shards for plan in self.plans.values()):
            raise ValueError(f"outputs of stage {stage.name} have different shards")
        self._ledgers = ledgers
        # Nothing is written where one is refused; the main ones, which are last, speak first.
        for output in reversed(stage.outputs):
            output.check()
        for output in stage.outputs:
            output.begin()
        self._done = {name: standing(out, ledgers[name]) for name, out in self.outputs.items()}
        self._sealed = {
            name
            for name, output in self.outputs.items()
            if output.is_sealed() and not self.absent(name)
        }
        self._new = dict.fromkeys(self.outputs, 0)
        self.num_done = 0
        self.seconds: dict[str, float] = {}

    @property
    def is_finished(self) -> bool:
        return len(self._sealed) == len(self.outputs)

    def wanted(self) -> Wanted:
        """The outputs each unfinished shard has yet to be written to."""
        missing = {name: set(self.absent(name)) for name in self.outputs}
        wanted = {
            shard.index: frozenset(name for name in missing if shard.index in missing[name])
            for shard in self.shards
        }
        return {index: names for index, names in wanted.items() if names}

    def absent(self, name: str) -> list[int]:
        return [shard.index for shard in self.shards if shard.index not in self._done[name]]

    def record(self, commits: tuple[Commit, ...]) -> None:
        self.num_done += 1
        for commit in commits:
            self._ledgers[commit.output].record(commit)
            self._done[commit.output][commit.index] = commit
            self._new[commit.output] += 1
            for phase, seconds in commit.seconds.items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """Seconds of each phase so far, as facts for people."""
        return {f"{phase}_s": round(seconds, 1) for phase, seconds in self.seconds.items()}

    def seal_complete(self) -> None:
        for name, output in self.outputs.items():
            if name not in self._sealed and not self.absent(name):
                output.seal(list(self._in_order(name)))
                self._sealed.add(name)

    def result(self) -> StageResult:
        return StageResult(
            {
                name: OutputResult(plan, self._in_order(name), self._new[name])
                for name, plan in self.plans.items()
            },
            self.seconds,
        )

    def _in_order(self, name: str) -> tuple[Commit, ...]:
        return tuple(commit for _, commit in sorted(self._done[name].items()))
