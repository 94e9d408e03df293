"""Training on Ray: the curve of one process, however many ranks there are and whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from repa_pipeline.cli import main
from repa_pipeline.cluster import train as driver
from repa_pipeline.commands import run_training
from repa_pipeline.config_train import TrainConfig
from repa_pipeline.observe import Silent
from repa_pipeline.stages.train import plan_training, train
from repa_pipeline.testing.caches import (
    TOY_PROJECT,
    isolated_tables,
    toy_train_config,
    write_toy_cache,
)
from repa_pipeline.testing.ranks import (
    Slowed,
    assert_same_curve,
    curve,
    train_arguments,
    wait_for,
)
from repa_pipeline.training.checkpoint import checkpoint_path, complete_steps, load_checkpoint

pytestmark = pytest.mark.slow

STEPS = 60
TIMEOUT_S = 150
NODE = {"num_cpus": 3, "object_store_memory": 80 * 2**20}  # larger than the head: a rank each
MARK = "REPA_TEST_OF_TRAINING"


def settings(workspace: Path, name: str, **changes: Any) -> TrainConfig:
    given = {"steps": STEPS, "log_every": 1, "checkpoint_every": 7, "keep": 100}
    given["tensorboard"] = False
    return toy_train_config(workspace, name=name, **{**given, "worker_cpus": 1.0, **changes})


def steps_saved(workspace: Path, name: str) -> list[int]:
    return complete_steps(workspace / "runs" / name / "checkpoints")


def last_step(workspace: Path, name: str) -> int:
    """The last one logged."""
    lines = curve(workspace, name)
    return int(lines[-1]["step"]) if lines else 0


def rank0(workspace: Path, name: str) -> int:
    """Its process, by the lock that it holds."""
    return int((workspace / "runs" / name / "lock").read_text())


def node_of(cluster: Any, pid: int) -> Any:
    """The simulated node that a worker's process belongs to."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    (found,) = [
        node
        for node in cluster.list_all_nodes()
        if parent in {info.process.pid for info in node.all_processes["raylet"]}
    ]
    return found


class Starts(Silent):
    """The step from which every group of ranks went on."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def start(self, title: str, total: int, done: int, unit: str) -> None:
        self.steps.append(done)


class Job:
    """A run on the cluster in a thread: nodes can only be made and ended in the main one."""

    def __init__(self, config: TrainConfig, address: str, pause_s: float):
        self.starts = Starts()
        self._config, self._address = config, address
        self._release = Path(config.workspace) / f"release-{config.name}"
        self._function = Slowed(run_training, pause_s, str(self._release))
        self._code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        config, address = self._config, self._address
        self._code = driver.train_on_ray(config, address, self._function, self.starts)

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def begun(self, times: int) -> None:
        """Waits until that many groups have begun, and the last has made a few steps."""
        name, workspace = str(self._config.name), Path(self._config.workspace)
        wait_for(lambda: len(self.starts.steps) >= times or self.is_over)
        first = self.starts.steps[times - 1]
        wait_for(lambda: last_step(workspace, name) > first + 2 or self.is_over)
        assert not self.is_over

    def finish(self) -> list[int]:
        self._release.touch()
        self._thread.join(TIMEOUT_S)
        assert self._code == 0
        return self.starts.steps


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and the run of one process that all are compared with."""
    folder = tmp_path_factory.mktemp("ray-train")
    write_toy_cache(folder)
    train(plan_training(settings(folder, "one")), Silent())
    return folder


@pytest.fixture
def nodes(cluster: Any) -> Iterator[Callable[[], Any]]:
    """Adds a node that holds one rank."""
    head = cluster.list_all_nodes()

    def add() -> Any:
        return cluster.add_node(**NODE)

    yield add
    for node in cluster.list_all_nodes():
        if node not in head:
            cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def undisturbed(cluster: Any, workspace: Path) -> list[dict[str, float]]:
    """The curve of two ranks, which have got a plugin that only the driver has on its path."""
    project, marks = workspace / "project", workspace / "marks"
    project.mkdir()
    marks.mkdir()
    (project / "ray_train_plugin.py").write_text(
        f"import os\nopen(os.path.join({str(marks)!r}, str(os.getpid())), 'w').close()\n"
    )
    config = settings(workspace, "two", workers=(2,), plugins=("ray_train_plugin",))
    with isolated_tables(project):  # importable here, after Ray was started
        assert driver.train_on_ray(config, cluster.address, run_training, Silent()) == 0
    assert len(os.listdir(marks)) == 3
    return curve(workspace, "two")


def test_two_ranks_give_the_curve_of_one_process(
    cluster: Any, workspace: Path, undisturbed: list[dict[str, float]]
) -> None:
    assert_same_curve(undisturbed, curve(workspace, "one"))
    ours, theirs = (
        load_checkpoint(checkpoint_path(workspace / "runs" / name / "checkpoints", STEPS))
        for name in ("two", "one")
    )
    assert ours["reader"] == theirs["reader"]
    assert ours["ema"].keys() == theirs["ema"].keys()
    for name, value in theirs["ema"].items():
        mine, width = ours["ema"][name], len(value) // 3
        # The keys' bias has no gradient but rounding, which Adam scales up.
        if name.endswith("qkv.bias"):
            mine, value = (torch.cat([x[:width], x[2 * width :]]) for x in (mine, value))
        torch.testing.assert_close(mine, value, rtol=0, atol=1e-5)
    assert {path.name for path in (workspace / "runs").iterdir()} >= {"one", "two"}
    assert not list((workspace / "runs").glob(".shared*"))


def test_what_dies_or_is_taken_away_costs_nothing(
    cluster: Any,
    workspace: Path,
    undisturbed: list[dict[str, float]],
    nodes: Callable[[], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A node that goes with notice, then a rank, then a node without notice, in one run."""
    for _ in range(4):
        nodes()
    config = settings(workspace, "moved", workers=(2,), worker_cpus=3.0, checkpoint_every=1000)
    job = Job(config, cluster.address, 0.5)
    job.begun(1)
    drained = node_of(cluster, rank0(workspace, "moved"))
    drain(cluster.address, drained.node_id)
    job.begun(2)
    killed = rank0(workspace, "moved")
    assert node_of(cluster, killed).node_id != drained.node_id
    os.kill(killed, signal.SIGKILL)
    job.begun(3)
    gone = node_of(cluster, rank0(workspace, "moved"))
    assert rank0(workspace, "moved") != killed and gone.node_id != drained.node_id
    cluster.remove_node(gone, allow_graceful=False)
    first, second, third, fourth = job.finish()
    # What was saved at the notice is what all go on from.
    assert first == 0 < second == third == fourth
    assert steps_saved(workspace, "moved") == [second, STEPS]
    assert curve(workspace, "moved") == undisturbed  # bit for bit
    said = capsys.readouterr()
    assert "saved; all ranks start again on the nodes there are\n" in said.err
    assert said.err.count("; all start again from the newest checkpoint\n") == 2
    assert said.out.count("train moved: SiT-XS/2") == 4
    assert "next: repa sample" in said.out


def drain(address: str, node_id: str) -> None:
    """As a cloud announces that it takes a machine away."""
    command = ["drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    command += ["--deadline-remaining-seconds", "60"]
    program = "from ray.scripts.scripts import main; main()"
    subprocess.run([sys.executable, "-c", program, *command], check=True, capture_output=True)


def test_an_elastic_group_goes_on_with_fewer_and_with_more(
    cluster: Any,
    workspace: Path,
    nodes: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(driver, "GROW_AFTER_S", 2.0)
    added = [nodes(), nodes()]
    config = settings(workspace, "elastic", workers=(1, 2), worker_cpus=3.0, micro_batch=4)
    job = Job(config, cluster.address, 0.6)
    job.begun(1)
    wait_for(lambda: steps_saved(workspace, "elastic"))
    cluster.remove_node(added[0], allow_graceful=False)
    count_nodes()
    job.begun(2)
    nodes()
    count_nodes()
    job.begun(3)
    first, second, third = job.finish()
    assert (first, second % 7) == (0, 0) and 0 < second < third
    assert_same_curve(curve(workspace, "elastic"), curve(workspace, "one"))
    begun = [x for x in capsys.readouterr().out.splitlines() if x.startswith("train elastic: ")]
    assert [line.endswith(", 2 ranks") for line in begun] == [True, False, True]


def count_nodes() -> None:
    """Ray Train learns of nodes every 20 s: now, this time."""
    coordinator = ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator")
    ray.get(coordinator._tick.remote())


def test_an_error_of_a_rank_is_one_line(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_cache(tmp_path)
    shard = tmp_path / "cache" / "features.toy-vit.64" / "c" / "3" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        main(command(tmp_path, "damaged", "--address", cluster.address))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("repa: ")]
    assert "fails its crc32c checksum; run `repa repair`" in line and "Traceback" not in said


def command(workspace: Path, name: str, *more: str) -> list[str]:
    """The arguments of `repa` for a run that `settings` describes."""
    (workspace / "repa.toml").write_text(TOY_PROJECT)
    arguments = train_arguments(settings(workspace, name), "worker_cpus")
    return [*arguments, "--config", str(workspace / "repa.toml"), "--workers", "2", *more]


def test_sigterm_saves_and_nothing_is_left_running(
    workspace: Path, undisturbed: list[dict[str, float]]
) -> None:
    """With a cluster of its own on this machine."""
    changes = ["--executor", "ray", "--steps", "2000", "--checkpoint-every", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "repa_pipeline", *command(workspace, "ended", *changes)],
        env={**os.environ, MARK: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(curve(workspace, "ended")) > 3 or process.poll())
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM, saved; the same command goes on from here\n" in out
    (step,) = steps_saved(workspace, "ended")
    made = curve(workspace, "ended")
    assert 3 < step == len(made) < 2000
    assert made[:STEPS] == undisturbed[: len(made)]
    wait_for(lambda: not marked_processes())
    for noise in ("SIGTERM received", "(raylet)", "Traceback", "WARNING"):
        assert noise not in out + errors


def marked_processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}=1".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
