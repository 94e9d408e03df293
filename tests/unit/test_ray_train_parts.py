"""What training on Ray decides and tells, without a cluster."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from repa_pipeline.cluster import train as driver
from repa_pipeline.cluster.actors import Failure
from repa_pipeline.cluster.board import Board, Teller, ToldLines, ToldProgress
from repa_pipeline.cluster.placement import Ask
from repa_pipeline.cluster.select import ray_address
from repa_pipeline.cluster.train import Growth, num_workers
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.errors import ConfigError, DamagedError, StageError
from repa_pipeline.exits import EXIT_TERMINATED
from repa_pipeline.observe import PlainLines
from repa_pipeline.resolve import Project, resolve
from repa_pipeline.training.runs import Run, locked
from repa_pipeline.training.world import Stopping, World

CPU4, GPU2 = {"CPU": 4.0}, {"CPU": 32.0, "GPU": 2.0}


class Handle:
    """A board as its actor's handle is called."""

    def __init__(self) -> None:
        self.board = Board()
        self.tell = self

    def remote(self, *news: Any) -> None:
        self.board.tell(*news)


def test_what_a_rank_prints_and_does_is_told_in_order() -> None:
    handle, out, errors = Handle(), io.StringIO(), io.StringIO()
    handle.remote("ranks", 2)
    print("train", "a run", file=ToldLines(handle, "out"))
    progress = ToldProgress(handle)
    progress.start("train x", 10, 4, "steps")
    for step in range(6):
        progress.advance(1, loss=float(step))
    progress.finish()
    stream = ToldLines(handle, "err")
    stream.write("half")
    stream.write(" a line\nnot yet")
    teller = Teller(PlainLines(errors), out, errors)
    teller.say(handle.board.take())
    assert (teller.num_ranks, out.getvalue()) == (2, "train a run\n")
    started, finished, line = errors.getvalue().splitlines()
    assert started == "train x: 4 of 10 steps done, 6 to do"
    assert finished.startswith("train x: 10 of 10 steps")
    assert line == "half a line"
    assert handle.board.take() == []


def test_a_lost_group_is_told_and_its_progress_closed() -> None:
    errors = io.StringIO()
    teller = Teller(PlainLines(errors), io.StringIO(), errors)
    teller.say([("ranks", 2), ("start", "t", 9, 0, "steps"), ("advance", 3, {})])
    teller.say([("lost", "rank 1 is gone")])
    assert teller.num_ranks == 0
    teller.say([("start", "t", 9, 2, "steps"), ("advance", 7, {}), ("finish",)])
    teller.close()
    lines = errors.getvalue().splitlines()
    assert [line.partition(" steps")[0] for line in lines] == [
        "t: 0 of 9", "rank 1 is gone", "t: 3 of 9", "t: 2 of 9", "t: 9 of 9",
    ]  # fmt: skip


def test_ray_trains_where_an_address_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address(TrainConfig()) is None
    assert ray_address(TrainConfig(executor="ray")) == "local"
    assert ray_address(TrainConfig(address="head:6379")) == "head:6379"
    assert ray_address(TrainConfig(address="head:6379", executor="local")) is None
    with pytest.raises(ConfigError, match="--workers are Ray's: give --executor ray"):
        ray_address(TrainConfig(workers=(2,)))
    with pytest.raises(ConfigError, match="--ranks are processes on this machine"):
        ray_address(TrainConfig(ranks=2, executor="ray"))
    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    assert ray_address(TrainConfig()) == "other:6379"


@pytest.mark.parametrize(
    ("workers", "expected"), [((), 3), ((2,), 2), ((2, 5), (2, 5)), ((2, 2), 2)]
)
def test_how_many_ranks(workers: tuple[int, ...], expected: Any) -> None:
    nodes, ask = [CPU4, CPU4, CPU4], Ask(4.0, 0.0, 4)
    for can_grow in (False, True):
        assert num_workers(TrainConfig(workers=workers), ask, nodes, can_grow) == expected


def test_ranks_without_room() -> None:
    ask = Ask(9.0, 1.0, 9)
    assert num_workers(TrainConfig(), ask, [CPU4, GPU2], can_grow=False) == 2
    asked = TrainConfig(workers=(3,))
    assert num_workers(asked, ask, [GPU2], can_grow=True) == 3  # nodes may come
    with pytest.raises(StageError, match=r"3 workers are to ask for 9 CPU cores and 1 GPU each"):
        num_workers(asked, ask, [GPU2], can_grow=False)
    with pytest.raises(StageError, match="the cluster has no nodes"):
        num_workers(TrainConfig(), ask, [], can_grow=True)


@pytest.mark.parametrize("given", ["0", "3,2", "1,2,3", "two"])
def test_numbers_of_workers_that_are_none(given: str) -> None:
    with pytest.raises(ConfigError, match=r"workers \(flag --workers\): got .*, expected "):
        resolve("train", {"workers": [given]}, Project(Path("."), None, {}))


def test_an_elastic_group_grows_seldom_where_it_did_not_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "GROW_AFTER_S", 10.0)
    growth = Growth(3)

    def due(num_ranks: int, times: range, room: bool = True) -> list[int]:
        return [t for t in times if growth.is_due(num_ranks, lambda: room, float(t))]

    assert due(1, range(0, 8, 2)) == []  # too soon
    assert due(1, range(8, 16, 2), room=False) == []
    assert due(1, range(16, 40)) == [26]  # there for 10 s, looked at every 2 s
    assert due(1, range(40, 60)) == [48]  # it had not grown: 20 s since 28
    assert due(2, range(60, 80)) == [70]  # it had
    assert due(2, range(80, 93)) == [92]
    assert due(3, range(100, 300)) == []  # all there are
    assert due(0, range(300, 500)) == []  # nothing runs
    growth = Growth(0)
    assert due(1, range(100)) == []  # not elastic


def test_a_rank_waits_for_the_one_before_it_to_let_go(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with contextlib.ExitStack() as first:
        first.enter_context(locked(run))
        with pytest.raises(StageError, match=f"is being trained by process {os.getpid()}: wait"):
            with locked(run):
                raise AssertionError("two hold it")
        timer = threading.Timer(0.3, first.pop_all().close)
        timer.start()
        with locked(run, patience_s=30.0):
            timer.join()


def test_a_notice_stops_as_sigterm_does() -> None:
    noticed: list[bool] = []
    with Stopping(World(), lambda: bool(noticed)) as stopping:
        assert not stopping.asked()
        noticed.append(True)
        assert stopping.asked()
        noticed.clear()
        assert stopping.asked()  # for good


def test_sigterm_is_noted_and_a_second_one_ends() -> None:
    before = signal.getsignal(signal.SIGTERM)  # tests of a cluster leave a handler
    with driver._noting_sigterm() as came:
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == EXIT_TERMINATED
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_ranks_must_share() -> None:
    shared = driver._shared
    assert shared(TrainConfig(workspace="/data/ws")) == "/data/ws/runs"
    assert shared(TrainConfig(workspace="/data/ws", runs_dir="/runs")) == "/runs"
    assert shared(TrainConfig(workspace="/data/ws", checkpoints="/nfs")) == "/nfs"
    assert shared(TrainConfig(workspace="/data/ws", checkpoints="s3://b/runs")) is None
    assert shared(TrainConfig(workspace="s3://b/ws", runs_dir="/tmp/runs")) is None


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (DamagedError("a shard"), True),
        (StageError("ranks"), True),
        (ZeroDivisionError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ConnectionResetError(), False),
    ],
)
def test_which_errors_end_a_run(error: Exception, ends: bool) -> None:
    from repa_pipeline.cluster.train_rank import ends_run

    assert ends_run(error) == ends


def test_the_cause_is_a_rank_that_died_rather_than_those_that_miss_it() -> None:
    from ray.exceptions import RayActorError

    from repa_pipeline.cluster.train_group import Watcher, first_cause
    from repa_pipeline.cluster.train_rank import RankFailed

    missed = RankFailed(Failure(RuntimeError("Connection closed\nby peer"), "trace"), False)
    died = RayActorError(error_msg="The actor died because its node has died. Node Id: 1")
    assert first_cause({0: missed, 1: died}) == "rank 1 is gone: its node has died. Node Id: 1"
    assert first_cause({2: missed}) == (
        "rank 2 failed with RuntimeError: Connection closed by peer"
    )
    handle = Handle()
    watcher = Watcher(handle, max_failures=1)
    for _ in range(2):
        watcher.after_exception(None, {0: missed})
    (news,) = handle.board.take()  # the second time nothing starts again
    assert news[0] == "lost" and news[1].endswith("; all start again from the newest checkpoint")
    final = RankFailed(Failure(DamagedError("bad"), "trace"), True)
    with pytest.raises(RankFailed, match="DamagedError: bad"):
        watcher.after_exception(None, {0: missed, 1: final})
