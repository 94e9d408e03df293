"""The workers of one run as Ray actors: hired, greeted, opened, given shards, replaced, ended.

What happens comes out of `poll` as events; who gets which shard is decided elsewhere. Imported
only once Ray is chosen and its environment is set (session.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from repa_pipeline import __version__
from repa_pipeline.cluster.actors import Failure, Greeting, ShardWorker
from repa_pipeline.cluster.carry import Source
from repa_pipeline.cluster.health import StartHealth, explain_death, is_node_death
from repa_pipeline.cluster.placement import Ask, count_places, describe
from repa_pipeline.cluster.run import Answered, Event, Lost, Ready
from repa_pipeline.cluster.scheduler import Loss
from repa_pipeline.engine.contracts import Shard, Work
from repa_pipeline.errors import ConfigError, RepaError, StageError

LOOK_EVERY_S = 5.0  # at the cluster, for nodes that came
ASK_EVERY_S = 1.0  # the workers for their states
COMPLAIN_EVERY_S = 30.0  # about a cluster without room for one worker
SHOW_DEAD_S = 5.0

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FleetSpec:
    """What workers to have: how large, how many (0: as many as the nodes hold), with what.

    folder is their working folder where it exists, must_see what must exist on their machine.
    """

    ask: Ask
    workers: int
    can_grow: bool
    folder: str
    modules: Mapping[str, Source]
    must_see: tuple[str, ...] = ()


@dataclasses.dataclass
class _Member:
    key: str
    handle: Any
    host: str = ""
    is_ready: bool = False
    state: str = "waiting for a place"
    is_asked: bool = False

    @property
    def label(self) -> str:
        return f"{self.key}@{self.host}" if self.host else self.key


@dataclasses.dataclass(frozen=True)
class _Call:
    member: _Member
    kind: str
    index: int = -1


def current_nodes() -> list[Mapping[str, float]]:
    """The resources of every node that is up."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


class Fleet:
    """See the module. Every method returns at once, but for `poll` and `drain`."""

    def __init__(self, spec: FleetSpec, open_stage: Callable[[], Work]):
        self._spec = spec
        self._open_stage = ray.put(open_stage)
        self._actor = ray.remote(
            num_cpus=spec.ask.cpus,
            num_gpus=spec.ask.gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": worker_environment(spec.ask)},
        )(ShardWorker)
        self._members: dict[str, _Member] = {}
        self._calls: dict[Any, _Call] = {}
        self._dead: dict[str, float] = {}
        self._health = StartHealth()
        self._num_hired = self._places = 0
        self._looked_at = self._asked_at = float("-inf")
        self._complained_at = time.monotonic()

    def hire(self, num_useful: int) -> None:
        """Asks for workers up to the number wanted, at most `num_useful`."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._look()
        wanted = self._spec.workers or max(1, self._places)
        if not self._spec.can_grow:
            wanted = min(wanted, self._places)
        while len(self._members) < min(wanted, num_useful) and self._health.may_start(now):
            member = _Member(f"w{self._num_hired}", None)
            self._num_hired += 1
            member.handle = self._actor.remote(self._spec.folder, self._spec.modules)
            self._members[member.key] = member
            self._call(member, "greet", member.handle.greet.remote(self._spec.must_see))

    def start(self, worker: str, shard: Shard) -> None:
        member = self._members[worker]
        self._call(member, "run", member.handle.run.remote(shard), shard.index)

    def drop(self, worker: str, index: int) -> None:
        self._members[worker].handle.drop.remote(index)

    def stop(self, worker: str) -> None:
        """Ends a worker at once, without an event."""
        self._bury(self._members[worker])

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened, waiting at most `timeout_s` for a first thing.

        Raises what a worker could not open the stage for, and StageError or ConfigError when no
        worker can ever be ready.
        """
        self._ask_states()
        events: list[Event] = []
        for ref in self._answered(timeout_s):
            call = self._calls.pop(ref, None)
            if call is not None:  # else its worker was buried a moment ago
                events += self._handle(call, ref)
        return events

    def states(self) -> dict[str, str]:
        """What every worker does, by its name; the dead for a moment."""
        now = time.monotonic()
        self._dead = {label: at for label, at in self._dead.items() if now - at < SHOW_DEAD_S}
        living = {member.label: member.state for member in self._members.values()}
        return {**dict.fromkeys(self._dead, "dead"), **living}

    def drain(self, timeout_s: float) -> None:
        """Lets every worker end what it is storing, and begin nothing."""
        refs = [m.handle.drain.remote() for m in self._members.values() if m.is_ready]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    def close(self) -> None:
        """Ends all workers."""
        for member in list(self._members.values()):
            self._bury(member)

    def _call(self, member: _Member, kind: str, ref: Any, index: int = -1) -> None:
        self._calls[ref] = _Call(member, kind, index)

    def _answered(self, timeout_s: float) -> list[Any]:
        if not self._calls:
            time.sleep(timeout_s)
            return []
        first, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        if not first:
            return []
        return list(ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)[0])

    def _handle(self, call: _Call, ref: Any) -> list[Event]:
        try:
            answer = ray.get(ref)
        except RayError as error:
            return self._handle_error(call, error)
        if call.kind == "run":
            return [Answered(call.member.key, call.index, answer)]
        if call.kind == "greet":
            self._greeted(call.member, answer)
        elif call.kind == "state":
            call.member.state, call.member.is_asked = answer, False
        elif call.kind == "open":
            return self._opened(call.member, answer)
        return []

    def _handle_error(self, call: _Call, error: RayError) -> list[Event]:
        if isinstance(error, RayTaskError | RuntimeEnvSetupError | ActorUnschedulableError) or (
            isinstance(error, RayActorError) and error.actor_init_failed
        ):
            raise StageError(
                f"a worker cannot run the stage: {_last_line(error)}; every node needs the same "
                "packages in the same versions"
            ) from error
        cut_off = isinstance(error, ActorUnavailableError) or is_node_death(str(error))
        return self._lose(
            call.member, Loss.NODE if cut_off else Loss.WORKER, explain_death(str(error))
        )

    def _greeted(self, member: _Member, greeting: Greeting) -> None:
        member.host = greeting.host
        if greeting.version != __version__:
            raise ConfigError(
                f"the worker on {greeting.host} has repa_pipeline {greeting.version}, this is "
                f"{__version__}: install the same version on every node"
            )
        if greeting.unseen:
            raise ConfigError(
                f"the worker on {greeting.host} does not see {greeting.unseen[0]}: --workspace "
                "must be a folder that all nodes share, or a URL"
            )
        member.state = "starting"
        self._call(member, "open", member.handle.open.remote(self._open_stage))

    def _opened(self, member: _Member, failed: Failure | None) -> list[Event]:
        if failed is None:
            member.is_ready, member.state = True, "idle"
            self._health.succeeded()
            return [Ready(member.key)]
        if isinstance(failed.error, RepaError) or not isinstance(failed.error, OSError):
            failed.raise_here()
        return self._lose(member, Loss.WORKER, f"opening the stage: {failed.error}")

    def _lose(self, member: _Member, loss: Loss, cause: str) -> list[Event]:
        self._bury(member)
        now = time.monotonic()
        self._dead[member.label] = now
        log.warning("worker %s is gone: %s", member.label, cause)
        if member.is_ready:
            return [Lost(member.key, loss, cause)]
        others_ready = any(other.is_ready for other in self._members.values())
        self._health.failed(now, cause, answered=bool(member.host), others_ready=others_ready)
        return []

    def _bury(self, member: _Member) -> None:
        self._members.pop(member.key, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call.member is not member}
        with contextlib.suppress(Exception):  # it may be dead, or Ray itself
            ray.kill(member.handle, no_restart=True)

    def _ask_states(self) -> None:
        now = time.monotonic()
        if now - self._asked_at < ASK_EVERY_S:
            return
        self._asked_at = now
        for member in self._members.values():
            if member.is_ready and not member.is_asked:
                member.is_asked = True
                self._call(member, "state", member.handle.state.remote())

    def _look(self) -> None:
        """Counts the places of the cluster, and says when there is none."""
        nodes = current_nodes()
        self._places = count_places(self._spec.ask, nodes)
        lacking = f"a worker asks for {self._spec.ask}, the cluster has {describe(nodes)}"
        if not self._spec.can_grow and not self._places:
            raise StageError(f"{lacking}: lower --threads, --worker-cpus or --worker-gpus")
        if not self._spec.can_grow and self._places < self._spec.workers and not self._members:
            log.warning(
                "%d workers asked for, there is room for %d", self._spec.workers, self._places
            )
        now = time.monotonic()
        if any(member.host for member in self._members.values()):
            self._complained_at = now
        elif now - self._complained_at >= COMPLAIN_EVERY_S:
            self._complained_at = now
            log.warning("no worker has a place yet, waiting: %s", lacking)
            for member in self._members.values():
                member.state = f"waiting for a place: {lacking}"


def worker_environment(ask: Ask) -> dict[str, str]:
    """Environment of a worker: its compute threads, and no GPU where it has reserved none."""
    names = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
    threads = {f"{name}_NUM_THREADS": str(ask.threads) for name in names}
    return threads if ask.gpus else {**threads, "CUDA_VISIBLE_DEVICES": ""}


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
