"""One rank of a run that `repa train` started on this machine: `-m repa_pipeline.commands_rank`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from repa_pipeline.errors import RepaError
from repa_pipeline.exits import EXIT_TERMINATED

_PARENT_DEATH_SIGNAL = 1  # prctl(2)


def main(path: str, starter: int) -> int:
    """Trains with the settings in `path` as a child of process `starter`; returns the exit code."""
    # A starter that is killed takes its ranks along: they save and end.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != starter:  # it ended before this one could ask to be told
        return EXIT_TERMINATED
    from repa_pipeline.commands import run_training
    from repa_pipeline.training.launch import read_config

    try:
        return run_training(read_config(path))
    except RepaError as error:
        print(f"repa: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
