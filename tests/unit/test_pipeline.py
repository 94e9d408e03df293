"""How far a worker's pipeline runs ahead: every phase busy, two shards' images at the most."""

from __future__ import annotations

import threading

import pytest

from repa_pipeline.engine.contracts import Commit, Commits, Shard, split_rows
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.pipeline import Pipeline

WAIT_S = 10.0


class Gates:
    """A Work whose phases note the shards that enter them, and wait at closed gates."""

    def __init__(self, *closed: str):
        self.entered: dict[str, list[int]] = {"load": [], "compute": [], "store": []}
        self.gates = {name: threading.Event() for name in self.entered}
        self.changed = threading.Condition()
        for name in self.entered.keys() - set(closed):
            self.gates[name].set()

    def _pass(self, name: str, shard: Shard) -> None:
        with self.changed:
            self.entered[name].append(shard.index)
            self.changed.notify_all()
        assert self.gates[name].wait(WAIT_S)

    def wait_for(self, name: str, shards: list[int]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.entered[name] == shards, WAIT_S)

    def load(self, shard: Shard) -> None:
        self._pass("load", shard)

    def compute(self, shard: Shard, loaded: None) -> None:
        self._pass("compute", shard)

    def store(self, shard: Shard, computed: None) -> Commits:
        self._pass("store", shard)
        return (Commit(shard.index, shard.num_rows, 0, "", output="x"),)


def test_a_third_shard_loads_when_the_first_has_left_the_model() -> None:
    work = Gates("compute")
    with Pipeline(work) as pipeline:
        futures = [pipeline.submit(shard) for shard in split_rows(8, 2)]
        work.wait_for("load", [0, 1])
        assert pipeline.state() == "compute 0"
        work.gates["compute"].set()
        assert [future.result(WAIT_S)[0].index for future in futures] == [0, 1, 2, 3]
    assert work.entered["load"] == [0, 1, 2, 3]


def test_the_local_executor_keeps_all_phases_busy() -> None:
    """While the first shard is stored, the second is in the model and the third loads."""
    work = Gates("store")
    found: list[int] = []

    def run() -> None:
        for commits in LocalExecutor().map(lambda: work, list(split_rows(8, 2))):
            found.append(commits[0].index)

    driver = threading.Thread(target=run)
    driver.start()
    work.wait_for("compute", [0, 1, 2])
    assert work.entered == {"load": [0, 1, 2], "compute": [0, 1, 2], "store": [0]}
    work.gates["store"].set()
    driver.join(WAIT_S)
    assert found == [0, 1, 2, 3]


@pytest.mark.parametrize("phase", ["load", "compute"])
def test_a_shard_that_fails_leaves_its_room(phase: str) -> None:
    class Bad(Gates):
        def _pass(self, name: str, shard: Shard) -> None:
            super()._pass(name, shard)
            if name == phase and shard.index < 3:
                raise OSError("no")

    with Pipeline(Bad()) as pipeline:
        futures = [pipeline.submit(shard) for shard in split_rows(10, 2)]
        assert [type(future.exception(WAIT_S)) for future in futures[:3]] == [OSError] * 3
        assert [future.result(WAIT_S)[0].index for future in futures[3:]] == [3, 4]


def test_closing_drops_what_waits_for_room() -> None:
    work = Gates("compute")
    pipeline = Pipeline(work)
    futures = [pipeline.submit(shard) for shard in split_rows(8, 2)]
    work.wait_for("compute", [0])
    work.wait_for("load", [0, 1])
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    work.gates["compute"].set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert work.entered["load"] == [0, 1]
    assert not futures[3].done() or futures[3].exception() is not None
