"""Which executor settings choose, what a worker asks of a node, and what travels to it."""

from __future__ import annotations

import importlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from repa_pipeline.cluster import select
from repa_pipeline.cluster.carry import Source, collect, install
from repa_pipeline.cluster.executor import RayExecutor
from repa_pipeline.cluster.mark import marked
from repa_pipeline.cluster.placement import Ask, Wish, count_places, describe, settle_ask
from repa_pipeline.cluster.scheduler import Policy
from repa_pipeline.cluster.select import choose_executor
from repa_pipeline.cluster.session import unwinding_on_sigterm
from repa_pipeline.commands_evaluate import _written
from repa_pipeline.config import IndexConfig
from repa_pipeline.config_evaluate import EvaluateConfig
from repa_pipeline.engine.contracts import Commits, Shard, SimpleWork
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.errors import ConfigError, StageError
from repa_pipeline.exits import EXIT_TERMINATED

CPU8, CPU64 = {"CPU": 8.0}, {"CPU": 64.0, "memory": 1e9}
GPU8 = {"CPU": 32.0, "GPU": 8.0}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(select, "_num_devices", lambda device: 1)


def test_auto_is_this_process_unless_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (IndexConfig(), IndexConfig(executor="local", address="head:6379")):
        assert isinstance(choose_executor(config), LocalExecutor)
    assert isinstance(choose_executor(IndexConfig(executor="ray")), RayExecutor)
    assert isinstance(choose_executor(IndexConfig(address="head:6379")), RayExecutor)
    monkeypatch.setattr(select, "_num_devices", lambda device: 2)
    assert isinstance(choose_executor(IndexConfig()), RayExecutor)
    monkeypatch.setattr(select, "_num_devices", lambda device: 1)
    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    chosen = choose_executor(IndexConfig())
    assert isinstance(chosen, RayExecutor) and chosen.address == "other:6379"


def test_settings_reach_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    config = IndexConfig(
        executor="ray",
        device="cuda",
        workers=4,
        worker_gpus=0.5,
        worker_cpus=2.0,
        retries=7,
        straggler_factor=2.5,
        shard_timeout_s=60.0,
        plugins=("mine",),
        decode_threads=6,
        workspace="file:///data/ws",
    )
    wish = Wish("cuda", 4, 0.5, 2.0, threads=3, decode_threads=6)
    policy = Policy(retries=7, straggler_factor=2.5, shard_timeout_s=60.0)
    assert choose_executor(config) == RayExecutor(wish, policy, None, ("mine",), "/data/ws")
    remote = choose_executor(IndexConfig(executor="ray", threads=2, workspace="s3://b/ws"))
    assert isinstance(remote, RayExecutor)
    assert (remote.shared, remote.wish.threads) == (None, 2)


def test_features_at_a_url_are_no_folder_that_workers_must_see(tmp_path: Path) -> None:
    for features, shared in (("s3://b/f", None), (str(tmp_path), str(tmp_path))):
        config = EvaluateConfig(executor="ray", features=features, workspace="ws")
        chosen = choose_executor(config, _written(config))
        assert isinstance(chosen, RayExecutor) and chosen.shared == shared


def test_local_executor_is_told_the_retries() -> None:
    chosen = choose_executor(IndexConfig(retries=5))
    assert isinstance(chosen, LocalExecutor) and chosen.retries == 5


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head"])
def test_addresses_that_cannot_drive_shards_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT .*ray job submit"):
        choose_executor(IndexConfig(address=address))


def test_a_cluster_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests of the cluster may have left this process connected to one.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(StageError, match=f"no Ray cluster to use at --address {address}: .*re"):
            list(RayExecutor(address=address).map(lambda: SimpleWork(no_work), [Shard(0, 0, 1)]))


def no_work(shard: Shard) -> Commits:
    return ()


def test_ray_is_not_imported_by_choosing() -> None:
    code = (
        "import sys; from repa_pipeline.config import IndexConfig;"
        "from repa_pipeline.cluster.select import choose_executor;"
        "print(choose_executor(IndexConfig(executor='ray', device='cpu')).name,"
        " 'ray' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["ray", "False", "False"], done.stderr


@pytest.mark.parametrize(
    ("wish", "nodes", "ask", "places"),
    [
        # CPU: all cores of a node by default, the given threads otherwise.
        (Wish("cpu"), [CPU8, CPU8], Ask(8.0, 0.0, 8), 2),
        (Wish(), [CPU8], Ask(8.0, 0.0, 8), 1),
        (Wish("cpu", threads=3), [CPU8, CPU8], Ask(3.0, 0.0, 3), 4),
        (Wish("cpu", threads=2, worker_cpus=4.0), [CPU8], Ask(4.0, 0.0, 2), 2),
        # A small head beside large nodes, large nodes beside a small one.
        (Wish("cpu"), [{"CPU": 2.0}, CPU64], Ask(64.0, 0.0, 64), 1),
        (Wish("cpu"), [CPU64, *[CPU8] * 10], Ask(8.0, 0.0, 8), 18),
        # A number of workers shares the cores.
        (Wish("cpu", workers=4), [CPU8], Ask(2.0, 0.0, 2), 4),
        (Wish("cpu", workers=4), [CPU8, CPU64], Ask(16.0, 0.0, 16), 4),
        (Wish("cpu"), [], Ask(1.0, 0.0, 1), 0),
        # GPU: one a device or a share of it; cores for decoding, at most the device's share.
        (Wish("cuda", decode_threads=2), [GPU8], Ask(3.0, 1.0, 3), 8),
        (Wish("auto", decode_threads=16), [GPU8, CPU8], Ask(4.0, 1.0, 4), 8),
        (Wish("cuda", worker_gpus=0.5, decode_threads=4), [GPU8], Ask(2.0, 0.5, 2), 16),
        (Wish("cuda", worker_gpus=2, decode_threads=4), [GPU8], Ask(5.0, 2, 5), 4),
        (Wish("cuda", threads=1, worker_cpus=1.5), [GPU8], Ask(1.5, 1.0, 1), 8),
        (Wish("cuda"), [CPU8], Ask(1.0, 1.0, 1), 0),  # until the autoscaler brings one
        (Wish("auto", worker_gpus=0), [GPU8], Ask(32.0, 0.0, 32), 1),
        (Wish("cpu"), [GPU8], Ask(32.0, 0.0, 32), 1),
    ],
)
def test_what_a_worker_asks_for(
    wish: Wish, nodes: list[dict[str, float]], ask: Ask, places: int
) -> None:
    assert settle_ask(wish, nodes, can_grow=True) == ask
    assert count_places(ask, nodes) == places


def test_more_workers_than_cores_of_a_single_machine_fit_all_the_same() -> None:
    ask = settle_ask(Wish("cpu", workers=3, threads=1), [{"CPU": 2.0}], can_grow=False)
    assert ask == Ask(0.666, 0.0, 1)
    assert count_places(ask, [{"CPU": 2.0}]) == 3
    assert settle_ask(Wish("cpu", workers=3, threads=1), [{"CPU": 2.0}], can_grow=True).cpus == 1.0


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish("cuda:1"), "with Ray use --device cuda"),
        (Wish("cuda", worker_gpus=0), "--worker-gpus 0 with --device cuda"),
        (Wish("auto", worker_gpus=1.5), "above 1 it must be whole"),
    ],
)
def test_placements_that_cannot_work(wish: Wish, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settle_ask(wish, [GPU8], can_grow=True)


def test_asks_and_clusters_in_words() -> None:
    assert str(Ask(4.0, 0.5, 4)) == "4 CPU cores and 0.5 GPU"
    assert str(Ask(2.0, 0.0, 2)) == "2 CPU cores"
    assert describe([CPU8, GPU8, CPU8]) == "3 nodes: 1 x (32 CPU + 8 GPU), 2 x (8 CPU + 0 GPU)"
    assert describe([]) == "no nodes"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a plugin, what it needs, and much that it does not."""
    files = {
        "lab_plugin.py": "import json\nimport lab_helper\nLOADER = 'lab_nets:build'\n",
        "lab_helper.py": "def helped():\n    import lab_late\n    return 40\n",
        "lab_late.py": "from numpy import array\n",
        "lab_nets.py": "def build():\n    return 2\n",
        "lab_unrelated.py": "raise RuntimeError\n",
        "lab_group/__init__.py": "from lab_group.part import VALUE\n",
        "lab_group/part.py": "VALUE = 7\n",
        "lab_group/deep/__init__.py": "",
        "lab_group/deep/more.py": "X = 1\n",
        "lab_group/.ipynb_checkpoints/part-checkpoint.py": "",
        "lab_group/weights.safetensors": "large",
        "data/images/n1.jpg": "large",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plugin_travels_with_the_modules_it_names_and_nothing_else(project: Path) -> None:
    found = collect(("lab_plugin",))
    assert sorted(found) == ["lab_helper", "lab_late", "lab_nets", "lab_plugin"]
    assert found["lab_nets"] == Source(
        str(project / "lab_nets.py"), (project / "lab_nets.py").read_bytes(), False
    )
    package = collect(("lab_group.part",))
    assert {name: source.is_package for name, source in package.items()} == {
        "lab_group": True,
        "lab_group.part": False,
        "lab_group.deep": True,
        "lab_group.deep.more": False,
    }
    assert collect(("numpy", "json", "absent_module", "repa_pipeline")) == {}


def test_modules_above_the_limit_are_refused(project: Path) -> None:
    (project / "lab_late.py").write_bytes(b"#" * (17 * 2**20))
    with pytest.raises(ConfigError, match="17 MiB, at most 16 travel to workers"):
        collect(("lab_plugin",))


def test_carried_modules_are_imported_from_memory(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = {**collect(("lab_plugin",)), **collect(("lab_group",))}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "lab_nets.py").write_text("def build():\n    return 'stale'\n")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    before = set(sys.modules)
    try:
        install(carried)
        plugin = importlib.import_module("lab_plugin")
        assert plugin.lab_helper.helped() + importlib.import_module("lab_nets").build() == 42
        assert importlib.import_module("lab_group.deep.more").X == 1
        assert importlib.import_module("lab_group").VALUE == 7
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("lab_unrelated")
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("lab_"):
                del sys.modules[name]


def test_a_shared_folder_is_marked_while_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / f".shared-{socket.gethostname()}-{2**22 + 1}").touch()  # of a dead driver
    with marked(str(tmp_path / "ws")) as (path,):
        assert [Path(path)] == list((tmp_path / "ws").iterdir())
    assert list((tmp_path / "ws").iterdir()) == []
    with marked(None) as paths:
        assert paths == ()


def test_sigterm_unwinds_the_stack_and_the_handler_goes_again() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as caught, unwinding_on_sigterm():
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == EXIT_TERMINATED == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(SystemExit) as caught, unwinding_on_sigterm():
            raise SystemExit(3)
        assert caught.value.code == 3
    finally:
        signal.signal(signal.SIGTERM, before)


def test_torch_is_not_loaded_to_count_devices_without_a_driver() -> None:
    """It takes seconds, and neither indexing nor the starter of ranks has any other use for it."""
    code = (
        "import sys; from repa_pipeline.cluster import select; select._DRIVERS = ();"
        "from repa_pipeline.config import IndexConfig; from repa_pipeline.training import launch;"
        "from repa_pipeline.config_train import TrainConfig;"
        "print(select.choose_executor(IndexConfig()).name,"
        " launch.num_ranks(TrainConfig(device='cpu', ranks=3)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["local", "3", "False"], done.stderr
