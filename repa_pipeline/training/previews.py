"""EMA previews: made from the saved EMA in a process of their own.

The trainer never needs the decoder. A preview that cannot be made is one event, not a failure.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.observe import RunLog


class Previews:
    """Starts preview processes and reports how they ended."""

    def __init__(self, config: TrainConfig, folder: Path, log: RunLog):
        self._config = config
        self._folder = folder
        self._log = log
        self._running: dict[int, subprocess.Popen[str]] = {}

    @property
    def steps_in_use(self) -> set[int]:
        """Steps whose checkpoint a preview may still read."""
        return set(self._running)

    def start(self, step: int, checkpoint: Path) -> None:
        """Starts sampling from the EMA of `checkpoint`."""
        output = self._folder / f"step-{step:08d}"
        command = [sys.executable, "-m", "repa_pipeline", "sample"]
        command += ["--checkpoint", str(checkpoint), "--output", str(output), "--no-npz"]
        command += ["--sampler", "euler", "--num-steps", "50", "--labels", "balanced"]
        command += ["--num-images", str(self._config.preview_count)]
        command += ["--grid", str(self._config.preview_count)]
        command += ["--batch-size", str(self._config.preview_count)]
        command += ["--workspace", self._config.workspace, "--threads", "1"]
        command += ["--device", self._config.device]
        self._running[step] = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def poll(self, wait: bool = False) -> None:
        """Reports finished previews; with `wait` all of them."""
        for step, process in list(self._running.items()):
            if not wait and process.poll() is None:
                continue
            _, errors = process.communicate()
            del self._running[step]
            picture = self._folder / f"step-{step:08d}" / "grid.png"
            if process.returncode == 0 and picture.is_file():
                self._log.event(step, "preview", path=str(picture))
                self._log.image(step, "preview", picture)
            else:
                reason = (errors.strip().splitlines() or ["no message"])[-1]
                self._log.event(step, "preview_skipped", reason=reason)
                print(f"preview of step {step} skipped: {reason}", file=sys.stderr)
