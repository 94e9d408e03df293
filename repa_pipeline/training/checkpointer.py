"""TEMPORARY until the branch ckpt is merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.training import checkpoint
from repa_pipeline.training.runs import Run


def load_newest(run: Run, config: TrainConfig) -> tuple[dict[str, Any] | None, list[str]]:
    return checkpoint.load_newest(run.checkpoints, "cpu")


class Checkpointer:
    def __init__(self, run: Run, config: TrainConfig, in_use: Callable[[], set[int]]):
        self.run, self.config, self.in_use = run, config, in_use

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *args: Any) -> None:
        return

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        checkpoint.save_checkpoint(self.run.checkpoints, step, content)
        checkpoint.prune(self.run.checkpoints, self.config.keep, self.in_use())

    def wait(self) -> None:
        return
