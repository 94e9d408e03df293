"""Whether workers on other machines see the driver's folder: a file that says so."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def marked(folder: str | None) -> Iterator[tuple[str, ...]]:
    """A file in `folder` while it lasts: a worker that does not see it has another disk."""
    if folder is None:
        yield ()
        return
    prefix = f".shared-{socket.gethostname()}-"
    path = Path(folder).absolute() / f"{prefix}{os.getpid()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.glob(f"{glob.escape(prefix)}*"):  # left by a driver that was killed
        if not Path("/proc", other.name.removeprefix(prefix)).exists():
            other.unlink(missing_ok=True)
    path.touch()
    try:
        yield (str(path),)
    finally:
        path.unlink(missing_ok=True)
