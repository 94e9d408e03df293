"""`repa demo`: the whole chain on the embedded digits, as the commands a user would type.

Every step is the public command in a process of its own; nothing here is special to the demo but
the choice of settings and the judge. A finished step is skipped when the demo is run again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from repa_pipeline.data.objects import LocalStore, json_bytes
from repa_pipeline.errors import StageError
from repa_pipeline.training.checkpoint import checkpoint_path, complete_steps
from repa_pipeline.training.runs import Run

GUIDANCE = ("--cfg", "1.8", "--interval", "0,0.7")
RUNS = {"repa": (), "vanilla": ("--encoder", "none")}


def run_demo(workspace: str, seed: int) -> None:
    """REPA and its vanilla twin with the same seed: cache, train, sample, score, judge, report.

    Raises StageError when a step fails.
    """
    began = time.monotonic()
    _say("REPA on scikit-learn's handwritten digits, with the vanilla twin beside it.")
    _run(workspace, ["encode-latents"])
    _run(workspace, ["cache-features"])
    seeded = ["--seed", str(seed)]
    _together(workspace, [["train", name, *extra, *seeded] for name, extra in RUNS.items()])
    for checkpoints in zip(*(_checkpoints(workspace, name) for name in RUNS), strict=True):
        _together(
            workspace,
            [["sample", "--checkpoint", str(c), *GUIDANCE, *seeded] for c in checkpoints],
        )
    for folders in zip(*(_samples(workspace, name) for name in RUNS), strict=True):
        _together(workspace, [["evaluate", "--samples", str(folder)] for folder in folders])
        for name, folder in zip(RUNS, folders, strict=True):
            _say(f"{name}: {judge_samples(folder)}")
    _run(workspace, ["report"])
    _say(f"demo finished in {time.monotonic() - began:.0f} s; open {workspace}/report.html")


def _checkpoints(workspace: str, name: str) -> list[Path]:
    """The run's checkpoints, so that the page can show distances against steps."""
    run = Run(Path(workspace) / "runs" / name)
    return [checkpoint_path(run.checkpoints, step) for step in complete_steps(run.checkpoints)]


def _samples(workspace: str, name: str) -> list[Path]:
    """The run's sample folders, by step."""
    folders = (Path(workspace) / "runs" / name / "samples").iterdir()
    return sorted(folders, key=lambda folder: int(folder.name.split(".")[0].removeprefix("step")))


def judge_samples(folder: Path) -> str:
    """Writes judge.json: how often a classifier that saw no sample agrees with the asked class.

    The judge is neither the scoring network nor the teacher: a support vector machine on 8x8
    pixels, fitted on the training digits. Returns one line.
    """
    from repa_pipeline.metrics.digits_judge import fit_judge
    from repa_pipeline.stages.sample import labels_of, open_samples, sample_blocks

    array = open_samples(str(folder))
    images = np.concatenate(list(sample_blocks(array)))
    labels = labels_of(array.spec.manifest, len(images))
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


def _command(workspace: str, arguments: list[str]) -> list[str]:
    # A new folder's repa.toml, or REPA_ variables, must not change what the demo shows.
    program = [sys.executable, "-m", "repa_pipeline"]
    return [*program, *arguments, "--workspace", workspace, "--source", "embedded:digits"]


def _run(workspace: str, arguments: list[str]) -> None:
    _say(f"$ repa {' '.join(arguments)}")
    code = subprocess.run(_command(workspace, arguments)).returncode
    if code:
        raise StageError(f"`repa {' '.join(arguments)}` ended with exit code {code}: see above")


def _together(workspace: str, commands: list[list[str]]) -> None:
    """Runs commands side by side, one compute thread each: small models gain little from two."""
    processes = []
    for arguments in commands:
        _say(f"$ repa {' '.join(arguments)} --threads 1")
        command = [*_command(workspace, arguments), "--threads", "1"]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process, arguments in zip(processes, commands, strict=True):
        output, _ = process.communicate()
        _say(output.rstrip())
        if process.returncode:
            raise StageError(
                f"`repa {' '.join(arguments)}` ended with exit code {process.returncode}: see above"
            )


def _say(line: str) -> None:
    print(line, flush=True)
