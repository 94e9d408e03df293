"""What the Ray engine costs, and what a second worker brings.

    python benchmarks/engine.py [--images 768] [--rounds 3] [--json]

Images: the photos of imagenet48 over and over (REPA_SHARED, default ../shared), read from a tar in
the page cache, decoded, cropped and encoded at 256 in tiny shards of 8 rows, one compute thread and
one decode thread a worker: a case by digits-vit, as light as the engine's overhead shows best, and
a sixteenth of the images by dinov2-s (random weights), where the network is the work, as it is with
any teacher that is worth caching. Measured in turns, the fastest of each kept, from the moment all
workers are ready to the last shard:

    loop 1, loop 2   one process, two at once: each its share of the shards in a plain loop
    ray 1, ray 2     the Ray executor with one worker, with two

overhead is the time of ray 2 over that of loop 2, less one: all that the engine adds, with Ray's
own processes on the same cores; overhead_cpu the same of CPU seconds, of the driver, Ray and the
workers, which a busy machine disturbs less. scaling compares two workers with one; that of the
plain loops says what the machine itself allows. A worker decodes its next shard beside the network:
where decoding is half of the work (digits-vit) one worker has two cores busy already, and a second
one on two cores adds little; overlap is the time of loop 1 over that of ray 1. Only ratios are
kept.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from common import save
from safetensors.torch import save_file
from workers import Job, loop_part, take_turns

from repa_pipeline.cluster.session import ray_session
from repa_pipeline.config import FeaturesConfig
from repa_pipeline.device import cpu_count
from repa_pipeline.encoders import ENCODERS
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.observe import Silent
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import ImagePass, pass_ledgers
from repa_pipeline.stages.index import ensure_index

SHARD_ROWS = 8
# Encoder of a case -> which share of --images it takes.
CASES = {"digits-vit": 1.0, "dinov2-s": 1 / 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--loop", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        where, name, part, num_parts = arguments.loop
        loop_part(job_in(Path(where), name), part, num_parts)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        result = measure(folder, arguments.images, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    path = save("engine", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def measure(folder: Path, num_images: int, rounds: int) -> dict[str, Any]:
    with ray_session(None):
        cases = {
            encoder: measure_case(folder / encoder, encoder, round(share * num_images), rounds)
            for encoder, share in CASES.items()
        }
    return {"shard_rows": SHARD_ROWS, "cores_used": cpu_count(), **cases}


def measure_case(folder: Path, encoder: str, num_images: int, rounds: int) -> dict[str, Any]:
    """The ratios of one encoder."""
    folder.mkdir()
    make_tar(folder / "images.tar", num_images)
    write_weights(folder / "weights.safetensors", encoder)
    ensure_index(config_in(folder, "index"), LocalExecutor(), Silent())
    print(encoder, file=sys.stderr)
    ratios = take_turns(
        __file__, folder, rounds, job_in, lambda own: shutil.copytree(folder / "index", own)
    )
    return {"images": num_images, **ratios}


def write_weights(path: Path, encoder: str) -> None:
    """Random weights for an encoder that does not come with its own."""
    spec = ENCODERS[encoder]
    if "architecture" in spec.config:
        torch.manual_seed(0)
        network = timm.create_model(spec.config["architecture"], num_classes=0)
        save_file(network.state_dict(), path)


def job_in(folder: Path, name: str) -> Job:
    """A begun pass in a workspace of its own."""
    config = config_in(folder, name)
    index = ensure_index(config, LocalExecutor(), Silent())
    stage = ImagePass(config, features_products(config, index))
    for output in stage.outputs:
        output.begin()
    return Job(stage, pass_ledgers(stage))


def config_in(folder: Path, name: str) -> FeaturesConfig:
    weights = folder / "weights.safetensors"
    return FeaturesConfig(
        source=str(folder / "images.tar"),
        workspace=str(folder / name),
        encoder=(folder.name,),
        weights=str(weights) if weights.exists() else None,
        resolution=256,
        batch_size=SHARD_ROWS,
        shard_rows=SHARD_ROWS,
        device="cpu",
        threads=1,
        decode_threads=1,
    )


def make_tar(path: Path, num_images: int) -> None:
    """`num_images` members: the usual photos of imagenet48, repeated."""
    shared = Path(os.environ.get("REPA_SHARED", Path(__file__).parents[2] / "shared"))
    with tarfile.open(shared / "data" / "imagenet48" / "imagenet48.tar") as tar:
        files = [tar.extractfile(m) for m in tar.getmembers() if m.name.endswith(".jpg")]
        photos = [file.read() for file in files if file is not None]
    photos = [data for data in photos if len(data) < 300_000]
    with tarfile.open(path, "w") as tar:
        for number in range(num_images):
            for suffix, data in (("jpg", photos[number % len(photos)]), ("cls", b"0")):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
