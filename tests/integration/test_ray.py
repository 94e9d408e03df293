"""The Ray executor on a real cluster: the bytes of a local run, whatever dies on the way."""

from __future__ import annotations

import contextlib
import functools
import os
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
from repa_pipeline.cluster.placement import Ask, Wish
from repa_pipeline.cluster.scheduler import Policy
from repa_pipeline.data.objects import LocalStore
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.engine.run import Progress, StageResult, ledger_of, run_stage
from repa_pipeline.errors import ConfigError, MissingError, StageError
from repa_pipeline.observe import Silent
from repa_pipeline.testing.caches import isolated_tables
from repa_pipeline.testing.parts import tiny_encoder, write_weights
from repa_pipeline.testing.stages import NAME, ToyStage, read_marks

pytestmark = pytest.mark.slow

WISH = Wish("cpu", workers=2, threads=1)
TIMEOUT_S = 120


@pytest.fixture
def stage(tmp_path: Path) -> ToyStage:
    return ToyStage(str(tmp_path / "cache"), str(tmp_path / "marks"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed local run."""
    folder = tmp_path_factory.mktemp("local")
    run(ToyStage(str(folder / "cache"), str(folder / "marks")), LocalExecutor())
    return files(folder)


def run(
    stage: ToyStage, executor: LocalExecutor | RayExecutor, progress: Progress | None = None
) -> StageResult:
    (output,) = stage.outputs
    ledgers = {output.name: ledger_of(LocalStore(stage.url), output)}
    return run_stage(stage, executor, ledgers, progress or Silent())


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted((folder / "cache").rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def wait_for(done: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)
    return done()


def pid_of(stage: ToyStage, shard: int) -> int | None:
    """The process that began a shard."""
    marks = list(Path(stage.marks).glob(f"shard-{shard}-*"))
    return int(marks[0].name.rsplit("-", 1)[1]) if marks else None


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    return False


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` goes on in a thread."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    assert failed == []


def test_commits_and_bytes_are_those_of_the_local_executor(
    cluster: Any, stage: ToyStage, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    told: list[str] = []
    other = ToyStage(str(tmp_path / "other"), stage.marks, work_s=0.2)
    shards = list(other.outputs[0].plan().shards)
    executor = RayExecutor(WISH, shared=str(tmp_path))
    opened = functools.partial(other.open, {})
    local = {c[0].index: c for c in LocalExecutor().map(opened, shards)}
    remote = {c[0].index: c for c in executor.map(opened, shards, lambda s: told.extend(s))}
    assert remote.keys() == set(range(10))
    again = {k: [(x.rows, x.num_bytes, x.digest) for x in v] for k, v in remote.items()}
    assert again == {k: [(x.rows, x.num_bytes, x.digest) for x in v] for k, v in local.items()}
    result = run(stage, executor)
    assert files(tmp_path) == expected
    assert result.num_new == 10
    facts = [fact for fact in read_marks(stage.marks, "opened") if fact["pid"] != os.getpid()]
    assert {(fact["OMP_NUM_THREADS"], fact["CUDA_VISIBLE_DEVICES"]) for fact in facts} == {
        ("1", "")
    }
    assert {fact["folder"] for fact in facts} == {os.getcwd()}
    assert {"w0", "w1"} & set(told)
    assert sorted(os.listdir(tmp_path)) == ["cache", "marks", "other"]


def test_a_session_of_another_cluster_is_not_taken(cluster: Any, stage: ToyStage) -> None:
    own = RayExecutor(WISH, address=str(cluster.address))
    assert run(stage, own).num_new == 10
    host, _, port = str(cluster.address).rpartition(":")
    other = RayExecutor(WISH, address=f"{host}:{int(port) + 1}")
    with pytest.raises(StageError, match=f"connected to the Ray cluster at {cluster.address}"):
        list(other.map(lambda: None, []))  # type: ignore[arg-type, return-value]


def test_a_killed_worker_costs_the_shards_it_held(
    cluster: Any, stage: ToyStage, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    stage = ToyStage(stage.url, stage.marks, faults={5: "once hang"})

    def kill() -> None:
        os.kill(wait_for(lambda: pid_of(stage, 5)), signal.SIGKILL)

    with meanwhile(kill):
        run(stage, RayExecutor(WISH, Policy(straggler_factor=0)))
    assert files(tmp_path) == expected
    assert len(list(Path(stage.marks).glob("shard-5-*"))) == 2


def test_what_cannot_be_done_is_reported_and_the_rest_is_done(
    cluster: Any, stage: ToyStage, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    faults = {1: "data", 3: "exit", 6: "once passing", 8: "once exit"}
    faulty = ToyStage(stage.url, stage.marks, faults=faults)
    with pytest.raises(StageError, match="2 of 10 shards failed, the others are kept") as caught:
        run(faulty, RayExecutor(WISH, Policy(pause_s=0.1)))
    said = str(caught.value)
    assert "shard 1 (rows 4 to 7): image n7.jpg cannot be used" in said
    assert "shard 3 (rows 12 to 15)" in said
    assert len(list(Path(stage.marks).glob("shard-3-*"))) == 3
    assert len(list((Path(stage.url) / "ledger" / NAME).glob("*.json"))) == 8
    result = run(stage, RayExecutor(WISH))
    assert (result.num_new, files(tmp_path) == expected) == (2, True)


def test_a_straggler_is_overtaken_by_its_copy(
    cluster: Any, stage: ToyStage, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    stage = ToyStage(stage.url, stage.marks, faults={0: "once hang"}, work_s=0.05)
    run(stage, RayExecutor(WISH, Policy(straggler_floor_s=1.0)))
    assert files(tmp_path) == expected
    assert len(list(Path(stage.marks).glob("shard-0-*"))) == 2


def test_a_worker_over_the_time_limit_is_replaced(
    cluster: Any, stage: ToyStage, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    stage = ToyStage(stage.url, stage.marks, faults={2: "once hang"})
    policy = Policy(straggler_factor=0, shard_timeout_s=2.0, pause_s=0.1)
    run(stage, RayExecutor(Wish("cpu", workers=1, threads=1), policy))
    assert files(tmp_path) == expected


def test_a_stage_that_cannot_be_opened_says_so_at_once(cluster: Any, stage: ToyStage) -> None:
    with pytest.raises(MissingError, match="no weights at teacher.pth"):
        run(ToyStage(stage.url, stage.marks, open_fault="missing"), RayExecutor(WISH))
    passing = ToyStage(stage.url, stage.marks, open_fault="once passing")
    assert run(passing, RayExecutor(Wish("cpu", workers=1, threads=1))).num_new == 10


def test_a_bug_ends_the_run_with_its_traceback(cluster: Any, stage: ToyStage) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        run(ToyStage(stage.url, stage.marks, faults={4: "bug"}), RayExecutor(WISH))
    assert "testing/stages.py" in str(caught.value.__cause__)
    pids = [fact["pid"] for fact in read_marks(stage.marks, "opened")]
    wait_for(lambda: not any(map(is_running, pids)))


def test_two_workers_share_a_gpu(cluster: Any, stage: ToyStage) -> None:
    slow = ToyStage(stage.url, stage.marks, work_s=0.3)
    wish = Wish("cuda", worker_gpus=0.5, worker_cpus=0.5, threads=1)
    run(slow, RayExecutor(wish))
    facts = read_marks(stage.marks, "opened")
    assert [fact["CUDA_VISIBLE_DEVICES"] for fact in facts] == ["0", "0"]


def test_a_plugin_reaches_workers_that_do_not_have_it(
    cluster: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("project")
    weights = folder / "teacher.safetensors"
    write_weights(tiny_encoder(weights=str(weights), patch_size=8))
    (folder / "ray_plugin.py").write_text(
        "from ray_plugin_parts import mine\nENCODERS = [mine()]\n"
    )
    (folder / "ray_plugin_parts.py").write_text(
        "from repa_pipeline.testing.parts import tiny_encoder\n"
        f"def mine():\n    return tiny_encoder('mine', weights={str(weights)!r}, patch_size=8)\n"
    )

    def stage(name: str) -> ToyStage:
        return ToyStage(
            str(tmp_path / name / "cache"), str(tmp_path / "marks"), 8, plugin="ray_plugin"
        )

    with isolated_tables(folder):  # importable here, after Ray was started
        run(stage("local"), LocalExecutor())
        executor = RayExecutor(Wish("cpu", workers=1, threads=1), plugins=("ray_plugin",))
        run(stage("remote"), executor)
        assert files(tmp_path / "remote") == files(tmp_path / "local")
        with pytest.raises(ConfigError, match="plugin 'ray_plugin' cannot be imported"):
            run(stage("without"), RayExecutor(Wish("cpu", workers=1, threads=1)))


def test_a_node_that_dies_is_survived_and_a_new_one_is_used(
    cluster: Any, stage: ToyStage, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    slow = ToyStage(stage.url, stage.marks, work_s=0.8)
    node = {"num_cpus": 1, "resources": {"extra": 1}, "object_store_memory": 80 * 2**20}
    added = cluster.add_node(**node)
    pids: list[int] = []

    def end_node() -> None:
        pids.extend(fact["pid"] for fact in wait_for(lambda: read_marks(stage.marks, "opened")))
        wait_for(lambda: len(list(Path(stage.url).rglob("c/*"))) >= 3)
        cluster.remove_node(added, allow_graceful=False)

    with meanwhile(end_node):
        run(slow, RayExecutor(Wish("cpu", threads=1)))  # workers: as many as fit
    assert files(tmp_path) == expected
    assert len(read_marks(stage.marks, "opened")) >= 3


def test_a_cluster_without_room_is_told(
    cluster: Any, stage: ToyStage, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from repa_pipeline.cluster import fleet

    def hire(can_grow: bool) -> fleet.Fleet:
        spec = fleet.FleetSpec(Ask(64.0, 0.0, 64), 1, can_grow, os.getcwd(), {})
        made = fleet.Fleet(spec, functools.partial(stage.open, {}))
        with contextlib.closing(made):
            made.hire(1)
            made.hire(1)
            return made

    lacking = r"a worker asks for 64 CPU cores, the cluster has .* 1 x \(2 CPU \+ 1 GPU\)"
    with pytest.raises(StageError, match=lacking):
        hire(can_grow=False)
    monkeypatch.setattr(fleet, "COMPLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(fleet, "LOOK_EVERY_S", 0.0)
    hire(can_grow=True)
    assert "no worker has a place yet, waiting: a worker asks for 64 CPU cores" in caplog.text


DRIVER = """
import sys, threading
sys.path.insert(0, {tests!r})
import test_ray
from repa_pipeline.testing.stages import ToyStage

class Watcher(test_ray.Silent):
    def workers(self, states):
        print("threads:", *(thread.name for thread in threading.enumerate()), flush=True)

stage = ToyStage({url!r}, {marks!r}, work_s=1.0)  # far from done when it is killed
test_ray.run(stage, test_ray.RayExecutor(test_ray.WISH), Watcher())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_driver_leaves_no_worker_and_is_resumed(
    number: signal.Signals, stage: ToyStage, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    code = DRIVER.format(tests=str(Path(__file__).parent), url=stage.url, marks=stage.marks)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    ledger = Path(stage.url) / "ledger" / NAME
    wait_for(lambda: len(list(ledger.glob("*.json"))) >= 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    if number == signal.SIGINT:  # Ctrl-C goes to all processes of the terminal
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    told = "".join(process.communicate(timeout=TIMEOUT_S))
    code_of = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: -2}
    assert process.returncode == code_of[number], told
    pids = [fact["pid"] for fact in read_marks(stage.marks, "opened")]
    assert pids
    wait_for(lambda: not any(map(is_running, pids)))
    for noise in ("SIGTERM received", "(raylet)", "ray_listen_error_messages"):
        assert noise not in told
    assert "threads: MainThread" in told
    assert 0 < len(list(ledger.glob("*.json"))) < 10
    resumed = run(stage, LocalExecutor())
    assert (0 < resumed.num_new < 10, files(tmp_path) == expected) == (True, True)
