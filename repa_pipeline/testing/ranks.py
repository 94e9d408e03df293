"""Ranks for tests of whoever starts them; importable by name in the workers of a cluster."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.observe import read_events

SCALARS = ("loss", "denoising", "alignment", "grad_norm")
PATIENCE_S = 150.0
_POLL_S = 0.02


def wait_for(done: Callable[[], Any]) -> Any:
    """What `done` says, once it says something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := done()):
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(_POLL_S)
    return found


def curve(workspace: Path, name: str) -> list[dict[str, float]]:
    """What a run has logged that does not depend on how fast it went; empty without a log."""
    path = workspace / "runs" / name / "events.jsonl"
    return [
        {key: value for key, value in event.items() if key == "step" or key in SCALARS}
        for event in (read_events(path) if path.exists() else [])
        if event["event"] == "scalars"
    ]


def assert_same_curve(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """To rounding: an order of rows that differs anywhere would show at once."""
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert abs(value - theirs[name]) <= 1e-5, (name, ours, theirs)


def train_arguments(config: TrainConfig, *more: str) -> list[str]:
    """The arguments of `repa` for a run as `toy_train_config` gives it, but for its trunk, which
    TOY_PROJECT has, and for the settings named by `more`."""
    names = (
        *("workspace", "device", "threads", "model", "steps", "batch_size", "learning_rate"),
        *("ema_decay", "projector_width", "log_every", "checkpoint_every", *more),
    )
    flags = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names]
    return ["train", str(config.name), *flags]


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
