"""What the sampling farm costs, and what a second worker brings.

    python benchmarks/farm.py [--model SiT-S/2] [--shards 12] [--steps 5] [--rounds 2] [--json]

Samples of random weights in a file of the reference's layout, latents [4, 32, 32] written to a
sealed array, two a shard, one compute thread a worker; decoding is left out. Measured in turns as
in engine.py, the fastest of each kept, from the moment all workers have loaded the model to the
last done record: plain loops in one and two processes, and the Ray executor with one and two
workers. overhead is the time of two workers over that of two plain loops, less one;
overhead_of_one the same of one; scaling compares two workers with one, beside what plain loops
reach on this machine. Only ratios are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from common import command, save
from workers import Job, loop_part, take_turns

from repa_pipeline.cluster.session import ray_session
from repa_pipeline.config_sample import SampleConfig
from repa_pipeline.device import cpu_count
from repa_pipeline.models import MODELS, build_model
from repa_pipeline.stages.sample import sample_ledgers
from repa_pipeline.stages.sample_plan import sample_stage

SHARD_ROWS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--loop", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        where, name, part, num_parts = arguments.loop
        loop_part(job_in(Path(where), name), part, num_parts)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        result = measure(folder, arguments)
    finally:
        shutil.rmtree(folder)
    path = save("farm", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def measure(folder: Path, arguments: Namespace) -> dict[str, Any]:
    write_checkpoint(folder / "theirs.pt", arguments.model)
    told = {"num_images": SHARD_ROWS * arguments.shards, "num_steps": arguments.steps}
    (folder / "told.json").write_text(json.dumps(told))
    with ray_session(None):
        ratios = take_turns(__file__, folder, arguments.rounds, job_in)
    return {
        "command": command(),
        "model": arguments.model,
        **told,
        "shard_rows": SHARD_ROWS,
        "cores_used": cpu_count(),
        **ratios,
    }


def write_checkpoint(path: Path, model: str) -> None:
    """Random weights as the reference keeps them."""
    torch.manual_seed(0)
    network = build_model(MODELS[model], input_size=32, in_channels=4, num_classes=1000)
    state = network.state_dict()
    args = Namespace(model=model, num_classes=1000)
    torch.save({"model": state, "ema": state, "opt": {}, "args": args, "steps": 1}, path)


def job_in(folder: Path, name: str) -> Job:
    """A begun sampling in a folder of its own."""
    config = SampleConfig(
        **json.loads((folder / "told.json").read_text()),
        checkpoint=str(folder / "theirs.pt"),
        workspace=str(folder),
        output=str(folder / name),
        outputs=("latents",),
        decoder="taesd",
        decoder_weights=str(folder / "theirs.pt"),  # its digest alone is read
        cfg=1.8,
        interval=(0.0, 0.7),
        batch_size=SHARD_ROWS,
        shard_rows=SHARD_ROWS,
        device="cpu",
        threads=1,
        grid=0,
    )
    stage = sample_stage(config)
    for output in stage.outputs:
        output.begin()
    return Job(stage, sample_ledgers(stage))


if __name__ == "__main__":
    main()
