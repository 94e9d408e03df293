"""`repa train --executor ray`: the ranks of a run on the machines of a Ray cluster.

Ray Train starts them, notices that one died or its node is gone, and starts all again, as many as
there is room for; what they do is what ranks do under torchrun. They go on from the run's own
checkpoints. A group that can be asked beforehand (a node is going to be taken away, there is room
for more ranks) saves, ends, and is started anew: no step is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from repa_pipeline import __version__
from repa_pipeline.cluster.board import Teller
from repa_pipeline.cluster.carry import collect
from repa_pipeline.cluster.mark import marked
from repa_pipeline.cluster.placement import Ask, Node, Wish, count_places, describe, settle_ask
from repa_pipeline.cluster.session import check_address, ray_session, unwinding_on_sigterm
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.engine.run import Progress
from repa_pipeline.errors import StageError
from repa_pipeline.exits import EXIT_TERMINATED
from repa_pipeline.stages.train import plan_training
from repa_pipeline.training.runs import runs_folder

if TYPE_CHECKING:
    from repa_pipeline.cluster.train_group import Group
    from repa_pipeline.cluster.train_rank import RankFunction

POLL_S = 0.5
LOOK_EVERY_S = 2.0
GROW_AFTER_S = 30.0
COMPLAIN_EVERY_S = 30.0


def train_on_ray(
    config: TrainConfig, address: str, function: RankFunction, progress: Progress
) -> int:
    """Runs `function` as every rank; returns the exit code of the run.

    address: HOST:PORT of a cluster's head, "auto", or "local" for a cluster of this machine that
    lives as long as this call. SIGTERM makes the ranks save and end. Raises what a rank ended
    with, if starting it again could not help, and StageError when ranks keep dying.
    """
    check_address(address)
    name = plan_training(dataclasses.replace(config, device="cpu")).name  # its errors come first
    teller = Teller(progress, sys.stdout, sys.stderr)
    with (
        unwinding_on_sigterm(),
        ray_session(address) as is_own,
        marked(None if is_own else _shared(config)) as must_see,
        tempfile.TemporaryDirectory() as storage,
        contextlib.closing(teller),
    ):
        from repa_pipeline.cluster.fleet import current_nodes
        from repa_pipeline.cluster.train_group import Group, GroupSpec
        from repa_pipeline.cluster.train_rank import RankSpec

        ask = settle_ask(_wish(config), current_nodes(), can_grow=not is_own)
        workers = num_workers(config, ask, current_nodes(), can_grow=not is_own)
        group_spec = GroupSpec(workers, ask, config.max_failures, name, storage)
        rank_spec = RankSpec(
            function, config, None, __version__, os.getcwd(), collect(config.plugins), must_see
        )
        growth = Growth(workers[1] if isinstance(workers, tuple) else 0)
        with _noting_sigterm() as came:
            while True:
                with Group(group_spec, rank_spec) as group:
                    _follow(group, ask, teller, growth, came)
                    code = group.result()
                if code != EXIT_TERMINATED:
                    return code
                if came:
                    print("stopped by SIGTERM, saved; the same command goes on from here")
                    return code
                print("saved; all ranks start again on the nodes there are", file=sys.stderr)


def num_workers(
    config: TrainConfig, ask: Ask, nodes: list[Node], can_grow: bool
) -> int | tuple[int, int]:
    """How many ranks: as the settings say, else as many as the nodes hold.

    Raises StageError when a cluster that cannot grow has no room for them.
    """
    places = count_places(ask, nodes)
    least = config.workers[0] if config.workers else 1
    if places < least and not (can_grow and config.workers):
        raise StageError(
            f"{least} workers are to ask for {ask} each, the cluster has {describe(nodes)}: lower "
            "--workers, --threads or --worker-cpus, or add nodes"
        )
    if len(config.workers) == 2 and len(set(config.workers)) == 2:
        return least, config.workers[1]
    return least if config.workers else places


class Growth:
    """When an elastic group is started anew because there is room for more ranks.

    The room must have been there for a while: Ray Train counts nodes every 20 s. After a start
    that came to nothing it must be there for twice as long.
    """

    def __init__(self, most: int):
        self._most = most
        self._after_s = GROW_AFTER_S
        self._tried_from = self._num_ranks = 0
        self._room_since: float | None = None
        self._looked_at = float("-inf")

    def is_due(self, num_ranks: int, has_room: Callable[[], bool], now: float) -> bool:
        """Whether to try to have more than `num_ranks`, which run now."""
        if num_ranks != self._num_ranks:
            self._num_ranks, self._room_since = num_ranks, None
        if not num_ranks or num_ranks >= self._most or now - self._looked_at < LOOK_EVERY_S:
            return False
        self._looked_at = now
        if not has_room():
            self._room_since = None
            return False
        if num_ranks > self._tried_from:
            self._after_s = GROW_AFTER_S
        if self._room_since is None:
            self._room_since = now
        if now - self._room_since < self._after_s:
            return False
        self._room_since, self._tried_from = None, num_ranks
        self._after_s *= 2
        return True


def _follow(group: Group, ask: Ask, teller: Teller, growth: Growth, came: list[int]) -> None:
    """Until the group is over: says what it tells, and hands on what it is asked."""
    complained_at = time.monotonic()
    teller.num_ranks = 0
    while True:
        is_over = group.wait(POLL_S)
        teller.say(group.news())
        if is_over:
            return
        now = time.monotonic()
        if teller.num_ranks:
            complained_at = now
        elif came:
            raise SystemExit(EXIT_TERMINATED)  # no rank has begun
        elif now - complained_at >= COMPLAIN_EVERY_S:
            complained_at = now
            print(f"waiting for room: {_lacking(ask)}", file=sys.stderr)
        if came or growth.is_due(teller.num_ranks, lambda: _has_room(ask), now):
            group.ask_to_end()


def _lacking(ask: Ask) -> str:
    from repa_pipeline.cluster.fleet import current_nodes

    return f"a worker asks for {ask}, the cluster has {describe(current_nodes())}"


def _has_room(ask: Ask) -> bool:
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free.get("CPU", 0) >= ask.cpus and free.get("GPU", 0) >= ask.gpus


def _wish(config: TrainConfig) -> Wish:
    return Wish(
        device=config.device,
        workers=config.workers[-1] if config.workers else 0,
        worker_cpus=config.worker_cpus,
        threads=config.threads or int(os.environ.get("OMP_NUM_THREADS", 0)),
        decode_threads=config.read_threads,
    )


def _shared(config: TrainConfig) -> str | None:
    """The folder that holds the checkpoints, which workers must see; None when it is a URL."""
    where = config.checkpoints or config.workspace
    if "://" in where:
        return None
    return config.checkpoints or str(runs_folder(config))


@contextlib.contextmanager
def _noting_sigterm() -> Iterator[list[int]]:
    """Inside, SIGTERM is noted in the value; a second one ends the process."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise SystemExit(EXIT_TERMINATED)
        came.append(number)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, note) if in_main else None
    try:
        yield came
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
