"""The same shards by plain loops and by Ray workers, timed from everybody being ready.

What benchmarks/engine.py and benchmarks/farm.py share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from repa_pipeline.cluster.executor import RayExecutor
from repa_pipeline.cluster.placement import Wish
from repa_pipeline.engine.contracts import Shard, Stage, Wanted, Work, run_phases
from repa_pipeline.engine.ledger import Ledger


@dataclasses.dataclass(frozen=True)
class Job:
    """A begun stage, its ledgers, and all its shards, of which everything is wanted."""

    stage: Stage
    ledgers: Mapping[str, Ledger]

    @property
    def shards(self) -> list[Shard]:
        return list(self.stage.outputs[0].plan().shards)

    @property
    def wanted(self) -> Wanted:
        names = frozenset(output.name for output in self.stage.outputs)
        return {shard.index: names for shard in self.shards}


@dataclasses.dataclass(frozen=True)
class Took:
    """Wall and CPU seconds, the latter of all processes that took part."""

    wall: float
    cpu: float

    def least(self, other: Took) -> Took:
        return Took(min(self.wall, other.wall), min(self.cpu, other.cpu))


def time_loops(script: str, folder: Path, name: str, num_loops: int) -> Took:
    """`num_loops` plain loops at once, from the moment all have loaded.

    Each is `script --loop FOLDER NAME PART PARTS`, which calls `loop_part`.
    """
    command = [sys.executable, script, "--loop", str(folder), name]
    loops = [
        subprocess.Popen(
            [*command, str(part), str(num_loops)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for part in range(num_loops)
    ]
    for loop in loops:
        assert loop.stdout and loop.stdout.readline() == "ready\n"
    began = time.perf_counter()
    for loop in loops:
        assert loop.stdin
        loop.stdin.write("go\n")
        loop.stdin.flush()
    cpu = [float(loop.stdout.readline()) for loop in loops if loop.stdout]
    took = Took(time.perf_counter() - began, sum(cpu))
    for loop in loops:
        loop.communicate()
    return took


def loop_part(job: Job, part: str, num_parts: str) -> None:
    """One plain loop: every num_parts-th shard, one phase after another."""
    work = job.stage.open(job.wanted)
    print("ready", flush=True)
    sys.stdin.readline()
    cpu_before = time.process_time()
    for shard in job.shards[int(part) :: int(num_parts)]:
        for commit in run_phases(work, shard):
            job.ledgers[commit.output].record(commit)
    print(time.process_time() - cpu_before, flush=True)


def time_ray(job: Job, gate: Path, workers: int) -> Took:
    """The Ray executor, from all workers being ready to the last done record.

    gate: a folder that this makes, where workers wait for each other.
    """
    gate.mkdir()
    begun: list[Took] = []

    def watch() -> None:
        while len(os.listdir(gate)) <= workers:
            time.sleep(0.01)
        begun.append(Took(time.perf_counter(), cpu_of_tree()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    executor = RayExecutor(Wish("cpu", workers=workers, threads=1))
    results = executor.map(
        functools.partial(open_together, job.stage, job.wanted, str(gate), workers), job.shards
    )
    for number, commits in enumerate(results, 1):
        for commit in commits:
            job.ledgers[commit.output].record(commit)
        if number == len(job.shards):  # before the workers are ended: their CPU time goes with them
            ended = Took(time.perf_counter(), cpu_of_tree())
    watcher.join()
    return Took(ended.wall - begun[0].wall, ended.cpu - begun[0].cpu)


def open_together(stage: Stage, wanted: Wanted, gate: str, workers: int) -> Work:
    """Opens the stage in a worker and waits for the others, so that they start at once."""
    work = stage.open(wanted)
    Path(gate, str(os.getpid())).touch()
    while len(os.listdir(gate)) < workers:
        time.sleep(0.01)
    Path(gate, "open").touch()
    return work


def cpu_of_tree() -> float:
    """CPU seconds so far of this process and all below it: driver, Ray's own, workers."""
    ticks: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            ticks[int(path.parent.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    found, level = 0, [os.getpid()]
    while level:
        found += sum(ticks[pid][1] for pid in level)
        level = [pid for pid, (parent, _) in ticks.items() if parent in level]
    return found / os.sysconf("SC_CLK_TCK")


def take_turns(
    script: str,
    folder: Path,
    rounds: int,
    job_in: Callable[[Path, str], Job],
    begin: Callable[[Path], object] = lambda _: None,
) -> dict[str, float]:
    """The ratios of one and two loops and workers, in turns, the fastest of each kept.

    begin: what is done to a turn's own folder first, which is not timed; `job_in` opens it.
    """
    best: dict[str, Took] = {}
    for number in range(rounds):
        for way, workers in (("loop", 1), ("ray", 1), ("loop", 2), ("ray", 2)):
            name = f"{way}-{workers}-{number}"
            begin(folder / name)
            if way == "loop":
                took = time_loops(script, folder, name, workers)
            else:
                took = time_ray(job_in(folder, name), folder / f"{name}-ready", workers)
            key = f"{way} {workers}"
            best[key] = took.least(best.get(key, took))
            print(f"{key}: {took.wall:.2f} s, CPU {took.cpu:.2f} s", file=sys.stderr)
    return _ratios(best)


def _ratios(best: Mapping[str, Took]) -> dict[str, float]:
    """What stands in the results, of the least times of "loop 1", "loop 2", "ray 1", "ray 2"."""
    return {
        "overhead": round(best["ray 2"].wall / best["loop 2"].wall - 1, 3),
        "overhead_cpu": round(best["ray 2"].cpu / best["loop 2"].cpu - 1, 3),
        "overhead_of_one": round(best["ray 1"].wall / best["loop 1"].wall - 1, 3),
        "scaling": round(best["ray 1"].wall / best["ray 2"].wall, 2),
        "scaling_of_plain_loops": round(best["loop 1"].wall / best["loop 2"].wall, 2),
        "overlap": round(best["loop 1"].wall / best["ray 1"].wall, 2),
    }
