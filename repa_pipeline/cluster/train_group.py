"""A group of ranks under Ray Train: started, watched, started again, asked to end.

Imported only once Ray is chosen and its environment is set (session.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from repa_pipeline.cluster.board import Board, News
from repa_pipeline.cluster.fleet import worker_environment
from repa_pipeline.cluster.health import explain_death
from repa_pipeline.cluster.placement import Ask
from repa_pipeline.cluster.train_rank import RankFailed, RankSpec, run_rank
from repa_pipeline.errors import StageError

# Ray's own resizing ends ranks without a word, and what they did since the last checkpoint is lost.
NEVER_S = 1e9


@dataclasses.dataclass(frozen=True)
class GroupSpec:
    """How many ranks (a number, or the least and the most), what each asks for, how often they may
    fail; storage is a folder of the driver's that Ray Train wants to have."""

    num_workers: int | tuple[int, int]
    ask: Ask
    max_failures: int
    name: str
    storage: str


class Group:
    """Ranks that run in the background from the start on; a context manager."""

    def __init__(self, spec: GroupSpec, rank: RankSpec):
        here = ray.get_runtime_context().get_node_id()
        place = {"ray.io/node-id": here}
        self._board: Any = ray.remote(num_cpus=0, label_selector=place)(Board).remote()
        self._spec, self._rank = spec, dataclasses.replace(rank, board=self._board)
        self._code: int | None = None
        self._error: BaseException | None = None
        # Ray Train takes over SIGINT where it runs on the main thread.
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)
        self._thread.start()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: Any) -> None:
        """Ranks that still run are told to end, and nobody listens to them any more."""
        with contextlib.suppress(RayError):
            if self._thread.is_alive():
                self.ask_to_end()
            else:
                ray.kill(self._board)

    def wait(self, timeout_s: float) -> bool:
        """Whether all is over."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def news(self) -> list[News]:
        """What the ranks told since the last call."""
        news: list[News] = ray.get(self._board.take.remote())
        return news

    def ask_to_end(self) -> None:
        """Ranks save after their next step, and end."""
        self._board.ask_to_end.remote()

    def result(self) -> int:
        """The exit code of rank 0. Raises what ended the ranks."""
        if self._error is not None:
            self._raise(self._error)
        if self._code is None:
            raise RuntimeError("result before the end")
        return self._code

    def _run(self) -> None:
        try:
            self._code = self._trainer().fit().return_value
        except BaseException as error:
            self._error = error

    def _trainer(self) -> Any:
        spec, ask = self._spec, self._spec.ask
        environment = {**worker_environment(ask), "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
        resources = {"CPU": ask.cpus, **({"GPU": ask.gpus} if ask.gpus else {})}
        return DataParallelTrainer(
            run_rank,
            train_loop_config={"spec": self._rank},
            backend_config=_Devices(),
            scaling_config=ScalingConfig(
                num_workers=spec.num_workers,
                use_gpu=bool(ask.gpus),
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=NEVER_S,
            ),
            run_config=RunConfig(  # type: ignore[arg-type]  # ray.train's own annotation is of V1
                name=spec.name,
                storage_path=spec.storage,
                failure_config=FailureConfig(max_failures=spec.max_failures),
                callbacks=[Watcher(self._board, spec.max_failures)],
                worker_runtime_env={"env_vars": environment},
                logging_config=LoggingConfig("ERROR"),
            ),
        )

    def _raise(self, error: BaseException) -> NoReturn:
        cause = getattr(error, "controller_failure", None)
        failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
        failed = [e for e in (cause, *failures.values()) if isinstance(e, RankFailed)]
        if failed and len(failed) >= len(failures):
            failed[0].failed.raise_here()
        if failures:
            raise StageError(
                f"{first_cause(failures)}, and so it went {self._spec.max_failures + 1} times: "
                "look for what ends ranks (memory, most often); the newest checkpoint is kept"
            ) from error
        if isinstance(error, RayError | TrainingFailedError):
            said = [line for line in str(cause or error).splitlines() if line.strip()]
            raise StageError(f"Ray Train gave up: {' '.join(said[-1:])}") from error
        raise error


class _ShareDevices(Backend):
    """Ranks of a node see each other's devices, so that NCCL goes from one to the other."""

    share_cuda_visible_devices = True


class _Devices(BackendConfig):
    """What Ray sets up: devices alone. Ranks join each other as under torchrun."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _ShareDevices


class Watcher(UserCallback):
    """Tells the board why ranks are started again, and ends a run that it cannot help.

    It lives in Ray Train's controller.
    """

    def __init__(self, board: Any, max_failures: int):
        self._board, self._max_failures = board, max_failures
        self._num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, RankFailed) and error.ends_run:
                raise error
        self._num_failures += 1
        if self._num_failures <= self._max_failures or self._max_failures < 0:
            line = f"{first_cause(worker_exceptions)}; all start again from the newest checkpoint"
            self._board.tell.remote("lost", line)


def first_cause(errors: Mapping[int, Exception]) -> str:
    """Which rank failed, and why: one that died, rather than those that then missed it."""
    died = {r: e for r, e in errors.items() if not isinstance(e, RankFailed)}
    rank, error = min((died or errors).items())
    if isinstance(error, RankFailed):
        return f"rank {rank} failed with {' '.join(str(error).split())[:240]}"
    cause = getattr(error, "health_check_failure", error)
    return f"rank {rank} is gone: {explain_death(str(cause))}"
