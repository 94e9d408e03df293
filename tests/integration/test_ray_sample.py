"""The sampling farm on Ray: the bytes of one process, for any number of workers and any kill."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from repa_pipeline.cluster.executor import RayExecutor
from repa_pipeline.cluster.placement import Wish
from repa_pipeline.cluster.scheduler import Policy
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.sampling import (
    PLUGIN_NAME,
    make_samples,
    toy_sample_config,
    write_toy_runs,
)
from repa_pipeline.training.runs import Run

pytestmark = pytest.mark.slow

NUM_SHARDS = 12
TIMEOUT_S = 120
OUTPUTS: dict[str, Any] = {
    "outputs": ("npz", "png", "latents"),
    "score": ("digits-cnn",),
    "num_images": 4 * NUM_SHARDS,
    "shard_rows": 4,
    "num_steps": 30,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy run whose plugin leaves the number of every process that it is loaded in, and the
    samples of an undisturbed local run at `whole`."""
    folder = tmp_path_factory.mktemp("farm")
    (folder / "pids").mkdir()
    with isolated_tables(folder):
        write_toy_runs(folder)
        with open(folder / f"{PLUGIN_NAME}.py", "a") as plugin:
            plugin.write(
                "import os, pathlib\n"
                f"pathlib.Path({str(folder / 'pids')!r}, str(os.getpid())).touch()\n"
            )
        make_samples(toy_sample_config(folder, output=str(folder / "whole"), **OUTPUTS))
        yield folder


@pytest.fixture
def whole(workspace: Path) -> dict[str, bytes]:
    made = files(workspace / "whole")
    assert {"samples.npz", "png/seal.json", "judge.digits-cnn/seal.json"} <= made.keys()
    return made


def executor(workers: int, **policy: Any) -> RayExecutor:
    return RayExecutor(
        Wish("cpu", workers=workers, threads=1), Policy(**policy), plugins=(PLUGIN_NAME,)
    )


def files(folder: Path) -> dict[str, bytes]:
    """But for what a killed driver leaves to say that it had this disk (cluster/mark.py)."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    kept = (path for path in found if not path.name.startswith(".shared-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def num_done(folder: Path) -> int:
    return len(list((folder / "ledger" / "images").glob("*.json")))


def wait_for(done: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := done()):
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_bytes_of_one_process(
    cluster: Any, workspace: Path, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    """The checkpoint comes from a URL, as on machines that share no disk with the driver."""
    path = Run(workspace / "runs" / "toy").newest_checkpoint()
    config = toy_sample_config(
        workspace, output=str(tmp_path / "out"), checkpoint=f"file://{path}",
        downloads=str(tmp_path / "downloads"), plugins=(PLUGIN_NAME,), **OUTPUTS,
    )  # fmt: skip
    make_samples(config, executor(workers))
    assert files(tmp_path / "out") == whole
    assert len(list((tmp_path / "downloads").rglob("*.pt"))) == 1


def test_a_killed_worker(
    cluster: Any, workspace: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    seeded, out = random.Random(3), tmp_path / "out"
    before = {path.name for path in (workspace / "pids").iterdir()}
    killed: list[int] = []

    def kill() -> None:
        for count in sorted(seeded.sample(range(1, NUM_SHARDS - 2), 2)):
            wait_for(lambda count=count: num_done(out) >= count)
            workers = {path.name for path in (workspace / "pids").iterdir()} - before
            pid = int(seeded.choice(sorted(workers - {str(pid) for pid in killed})))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    config = toy_sample_config(workspace, output=str(out), **OUTPUTS)
    make_samples(config, executor(2, straggler_factor=0))
    thread.join()
    assert killed and files(out) == whole


DRIVER = """
import sys
from repa_pipeline.cli import main
main(sys.argv[1:])
"""


def test_a_killed_driver(
    cluster: Any, workspace: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed twice at seeded moments on two workers, then finished by one process."""
    out, seeded = tmp_path / "out", random.Random(5)
    line = (
        f"sample --workspace {workspace} --output {out} --device cpu --threads 1 --cfg 2 "
        f"--interval 0,0.7 --num-images {OUTPUTS['num_images']} --num-steps 30 --batch-size 4 "
        f"--shard-rows 4 --grid 0 --preset imagenet --executor ray --address {cluster.address} "
        "--workers 2 --outputs npz,png,latents --score digits-cnn"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("REPA_")}
    environment["PYTHONPATH"] = f"{Path(__file__).resolve().parents[2]}:{workspace}"
    for low, high in ((1, 3), (5, 7)):
        count = seeded.randint(low, high)
        with open(tmp_path / "told.txt", "w+") as told:
            process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, *line.split()],
                cwd=workspace, env=environment, stdout=told, stderr=told,
            )  # fmt: skip
            wait_for(lambda n=count, p=process: num_done(out) >= n or p.poll() is not None)
            assert process.poll() is None, (tmp_path / "told.txt").read_text()
            process.kill()
            process.wait(TIMEOUT_S)
        assert count <= num_done(out) < NUM_SHARDS and not (out / "images/seal.json").exists()
    make_samples(toy_sample_config(workspace, output=str(out), **OUTPUTS))
    assert files(out) == whole
