"""A command that has done its work ends with 0: no library's thread aborts the process at exit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image


def test_index_exits_cleanly_every_time(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for shade in range(4):
        Image.new("RGB", (16, 16), (60 * shade, 0, 0)).save(folder / f"{shade}.png")
    command = [sys.executable, "-m", "repa_pipeline", "index", "--source", str(folder.parent)]
    for _ in range(6):  # it aborted about every other time
        done = subprocess.run(
            [*command, "--workspace", str(tmp_path / "ws")], capture_output=True, text=True
        )
        assert (done.returncode, "terminate" in done.stderr) == (0, False), done.stderr
