"""The executor of many processes and machines: Ray actors, a queue of our own, the same bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

from repa_pipeline.cluster.carry import collect
from repa_pipeline.cluster.mark import marked
from repa_pipeline.cluster.placement import Wish, settle_ask
from repa_pipeline.cluster.run import run_shards
from repa_pipeline.cluster.scheduler import Policy, Scheduler
from repa_pipeline.cluster.session import check_address, ray_session, unwinding_on_sigterm
from repa_pipeline.engine.contracts import Commits, Shard, Tell, Work, say_nothing
from repa_pipeline.engine.local import raise_failed


@dataclasses.dataclass(frozen=True)
class RayExecutor:
    """Runs shards on Ray workers that load the stage once.

    A worker or node that dies costs the shards it held, which are done again elsewhere; a shard
    that workers die of, and one whose data cannot be used, is reported at the end, the rest
    being finished. Passing faults (OSError) are retried. At the end of the queue idle workers
    take copies of stragglers and the first result counts. No worker outlives `map`.

    address: HOST:PORT of a cluster's head, "auto", or None for a cluster of this machine that
    lives as long as `map`. plugins: user modules, carried to workers. shared: a local folder
    that every worker must see (the workspace), None when it is a URL.
    """

    wish: Wish = Wish()
    policy: Policy = Policy()
    address: str | None = None
    plugins: tuple[str, ...] = ()
    shared: str | None = None

    name = "ray"

    def __post_init__(self) -> None:
        check_address(self.address)

    def map(
        self, open_stage: Callable[[], Work], shards: list[Shard], tell: Tell = say_nothing
    ) -> Iterator[Commits]:
        scheduler = Scheduler(shards, self.policy)
        with (
            unwinding_on_sigterm(),
            ray_session(self.address) as is_own,
            marked(None if is_own else self.shared) as must_see,
        ):
            from repa_pipeline.cluster.fleet import Fleet, FleetSpec, current_nodes

            ask = settle_ask(self.wish, current_nodes(), can_grow=not is_own)
            spec = FleetSpec(
                ask, self.wish.workers, not is_own, os.getcwd(), collect(self.plugins), must_see
            )
            with contextlib.closing(Fleet(spec, open_stage)) as fleet:
                yield from run_shards(scheduler, fleet, tell)
        if scheduler.failed:
            raise_failed(scheduler.failed, len(shards))
