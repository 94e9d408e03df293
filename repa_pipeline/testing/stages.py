"""A small real stage for tests of executors: an array of computed rows, with faults on order.

Importable by its name on every worker. What happens is left behind as files in `marks`, so that a
fault can strike once, and a test can see which process did what.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.array import ArraySpec, write_shard
from repa_pipeline.data.shards import RecordLayout
from repa_pipeline.engine.contracts import Commit, Commits, Shard, Wanted, Work
from repa_pipeline.errors import DataError, MissingError
from repa_pipeline.stages.array_stage import ArrayOutput

NAME = "latents.toy.8"


@dataclasses.dataclass(frozen=True)
class ToyStage:
    """Row i holds the numbers of a generator seeded by i.

    faults: shard index -> name of a fault of FAULTS ("once NAME": at its first attempt alone).
    open_fault: the same, when the stage is opened. plugin: a module to load, whose encoder "mine"
    makes the rows instead.
    """

    url: str
    marks: str
    num_rows: int = 40
    shard_rows: int = 4
    work_s: float = 0.0
    faults: Mapping[int, str] = dataclasses.field(default_factory=dict)
    open_fault: str = ""
    plugin: str = ""

    @property
    def name(self) -> str:
        return NAME

    @property
    def outputs(self) -> tuple[ArrayOutput, ...]:
        layout = RecordLayout((3, 4, 4), "float16", self.shard_rows)
        return (ArrayOutput(self.url, ArraySpec(NAME, self.num_rows, layout, {"toy": 1})),)

    def open(self, wanted: Wanted) -> Work:
        Path(self.marks).mkdir(parents=True, exist_ok=True)
        _mark(self.marks, f"opened-{os.getpid()}", worker_facts())
        strike(self.open_fault, self.marks, "open")
        return _ToyWork(self, _plugin_rows(self.plugin) if self.plugin else _seeded_rows)


@dataclasses.dataclass(frozen=True)
class _ToyWork:
    stage: ToyStage
    make: Callable[[Shard], npt.NDArray[np.float16]]

    def load(self, shard: Shard) -> Shard:
        return shard

    def compute(self, shard: Shard, loaded: Shard) -> npt.NDArray[np.float16]:
        _mark(self.stage.marks, f"shard-{shard.index}-{os.getpid()}", {})
        strike(self.stage.faults.get(shard.index, ""), self.stage.marks, str(shard.index))
        time.sleep(self.stage.work_s)
        return self.make(loaded)

    def store(self, shard: Shard, computed: npt.NDArray[np.float16]) -> Commits:
        output = self.stage.outputs[0]
        stored = write_shard(output.store, output.spec, shard.index, computed)
        return (Commit(shard.index, shard.num_rows, *stored, {"encode": 0.0}, NAME),)


def worker_facts() -> dict[str, Any]:
    """What a test may ask about the process that it runs in."""
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {"pid": os.getpid(), "folder": os.getcwd(), **{n: os.environ.get(n) for n in names}}


def read_marks(marks: str | Path, prefix: str) -> list[dict[str, Any]]:
    """What marks of that prefix hold, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(Path(marks).glob(f"{prefix}*"))]


def strike(fault: str, marks: str, what: str) -> None:
    """Lets a fault happen; "once NAME" only the first time that `what` meets it."""
    kind = fault.removeprefix("once ")
    if kind and (kind == fault or _mark(marks, f"struck-{what}", {})):
        FAULTS[kind]()


def _raise(error: Exception) -> None:
    raise error


def _exit() -> None:
    os._exit(17)


FAULTS: Mapping[str, Callable[[], None]] = {
    "data": lambda: _raise(DataError("image n7.jpg cannot be used")),
    "passing": lambda: _raise(ConnectionResetError("the network hiccuped")),
    "bug": lambda: _raise(ZeroDivisionError("a bug")),
    "missing": lambda: _raise(MissingError("no weights at teacher.pth")),
    "exit": _exit,
    "hang": lambda: time.sleep(3600),
}


def _seeded_rows(shard: Shard) -> npt.NDArray[np.float16]:
    rows = range(shard.start, shard.stop)
    made = [np.random.default_rng(row).standard_normal((3, 4, 4)) for row in rows]
    return np.stack(made).astype(np.float16)


def _plugin_rows(plugin: str) -> Callable[[Shard], npt.NDArray[np.float16]]:
    """Rows by the encoder "mine" of a plugin, [T, D] tokens of an image cut to the row's shape."""
    import torch

    from repa_pipeline.encoders import ENCODERS
    from repa_pipeline.encoders.base import load_encoder
    from repa_pipeline.registry import load_plugins

    load_plugins((plugin,))
    encoder = load_encoder(ENCODERS["mine"], resolution=32)

    def make(shard: Shard) -> npt.NDArray[np.float16]:
        generators = [torch.Generator().manual_seed(row) for row in range(shard.start, shard.stop)]
        images = torch.stack(
            [torch.randint(0, 256, (3, 32, 32), generator=g, dtype=torch.uint8) for g in generators]
        )
        tokens = encoder.tokens(images).reshape(shard.num_rows, -1)[:, :48]
        made: npt.NDArray[np.float16] = tokens.reshape(-1, 3, 4, 4).half().numpy()
        return made

    return make


def _mark(marks: str, name: str, facts: Mapping[str, Any]) -> bool:
    """Leaves a file behind, whole at once; False when it stood there."""
    path = Path(marks) / name
    temporary = path.with_name(f".{name}-{os.getpid()}")
    temporary.write_text(json.dumps(facts))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True
