"""Ranks for tests of whoever starts them; importable by name in the workers of a cluster."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repa_pipeline.config_train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Slowed:
    """`function` of a rank, with a pause after every step, time to disturb it, until the file
    `release` exists."""

    function: Callable[..., int]
    pause_s: float
    release: str

    def __call__(self, config: TrainConfig, progress: Any, notice: Callable[[], bool]) -> int:
        def asked() -> bool:
            if not Path(self.release).exists():
                time.sleep(self.pause_s)
            return notice()

        return self.function(config, progress, asked)
