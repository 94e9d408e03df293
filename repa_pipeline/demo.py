"""`repa demo`: the whole chain on the embedded digits, as the commands a user would type.

Every step is the public command in a process of its own; nothing here is special to the demo but
the choice of settings and the judge. A finished step does nothing when the demo is run again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from repa_pipeline.config import EMBEDDED
from repa_pipeline.data.objects import LocalStore, json_bytes
from repa_pipeline.errors import StageError
from repa_pipeline.resolve import resolve
from repa_pipeline.training.checkpoint import checkpoint_path
from repa_pipeline.training.runs import Run

GUIDANCE = ("--cfg", "1.8", "--interval", "0,0.7")
RUNS = {"repa": (), "vanilla": ("--encoder", "none")}


def demo_steps(workspace: str, seed: int) -> list[list[list[str]]]:
    """The demo's commands: steps in order, the commands of one step run side by side.

    REPA and its vanilla twin with the same seed: cache, train, sample and score at several
    checkpoints, so that the page can show distances against steps, report.
    """
    training = resolve("train", {"source": EMBEDDED}, environment={}).config
    every = training.checkpoint_every
    seeded = ["--seed", str(seed)]
    steps = [[["encode-latents"]], [["cache-features"]]]
    steps += [[["train", name, *extra, *seeded] for name, extra in RUNS.items()]]
    for done in range(every, training.steps + 1, every):
        samples, scores = [], []
        for name in RUNS:
            run = Run(Path(workspace) / "runs" / name)
            output = str(_samples(run, done))
            checkpoint = str(checkpoint_path(run.checkpoints, done))
            sample = ["sample", "--checkpoint", checkpoint, *GUIDANCE, *seeded]
            samples.append([*sample, "--output", output])
            scores.append(["evaluate", "--samples", output])
        steps += [samples, scores]
    return [*steps, [["report"]]]


def run_demo(workspace: str, seed: int, dry_run: bool = False) -> None:
    """Runs the demo's commands and judges the samples; raises StageError when one fails."""
    began = time.monotonic()
    print("REPA on scikit-learn's handwritten digits, with the vanilla twin beside it.", flush=True)
    for commands in demo_steps(workspace, seed):
        shared = ["--threads", "1"] if len(commands) > 1 else []
        for arguments in commands:
            print(f"$ repa {' '.join([*arguments, *shared])}", flush=True)
        if dry_run:
            continue
        if commands == [["report"]]:
            _judge_all(workspace)
        _together(workspace, [[*arguments, *shared] for arguments in commands])
    if not dry_run:
        took = time.monotonic() - began
        print(f"demo finished in {took:.0f} s; open {workspace}/report.html", flush=True)


def _samples(run: Run, step: int) -> Path:
    return run.folder / "samples" / f"step{step}"


def _judge_all(workspace: str) -> None:
    for name in RUNS:
        for folder in sorted((Path(workspace) / "runs" / name / "samples").iterdir()):
            print(f"{name} {folder.name}: {judge_samples(folder)}", flush=True)


def judge_samples(folder: Path) -> str:
    """Writes judge.json: how often a classifier that saw no sample agrees with the asked class.

    The judge is neither the scoring network nor the teacher: a support vector machine on 8x8
    pixels, fitted on the training digits. Returns one line.
    """
    from repa_pipeline.metrics.digits_judge import fit_judge
    from repa_pipeline.stages.sample import open_samples, sample_blocks
    from repa_pipeline.stages.sample_labels import labels_of

    array = open_samples(str(folder))
    images = np.concatenate(list(sample_blocks(array)))
    labels = labels_of(array.spec.manifest, len(images), LocalStore(str(folder)))
    judge = fit_judge()
    agreement = float((judge.predict(images) == labels).mean())
    verdict = {
        "judge": "support vector machine on 8x8 pixels",
        "agreement": agreement,
        "held_out_accuracy": judge.held_out_accuracy,
        "num_samples": len(images),
    }
    LocalStore(str(folder)).put("judge.json", json_bytes(verdict))
    return (
        f"the judge agrees with {agreement:.1%} of {len(images):,} labels "
        f"({judge.held_out_accuracy:.1%} on held-out digits)"
    )


def _together(workspace: str, commands: list[list[str]]) -> None:
    """Runs commands side by side, their lines marked; one alone has the terminal to itself."""
    # What a repa.toml here or REPA_ variables say must not change what the demo shows.
    shared = ["--workspace", workspace, "--source", EMBEDDED, "--config", os.devnull]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("REPA_")}
    alone = len(commands) == 1
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "repa_pipeline", *arguments, *shared],
            stdout=None if alone else subprocess.PIPE,
            stderr=None if alone else subprocess.STDOUT,
            env=environment,
            text=True,
        )
        for arguments in commands
    ]
    with ThreadPoolExecutor(len(processes)) as pool:
        list(pool.map(_relay, processes, RUNS))
    for process, arguments in zip(processes, commands, strict=True):
        if process.returncode:
            raise StageError(
                f"`repa {' '.join(arguments)}` ended with exit code {process.returncode}: see above"
            )


def _relay(process: subprocess.Popen[str], name: str) -> None:
    """Prints a process's lines as they come, marked with the run's name, until it ends."""
    for line in process.stdout or ():
        print(f"[{name}] {line.rstrip()}", flush=True)
    process.wait()
