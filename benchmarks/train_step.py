"""One training step, three ways: from the cache, with the teacher online, from memory.

    python benchmarks/train_step.py --model SiT-S/2 --encoder dinov2-b --json
    python benchmarks/train_step.py --suite gpu      under 10 minutes on an H100; needs of the
                                                     package's libraries torch, numpy, timm,
                                                     safetensors, pyarrow, google-crc32c alone

    cached   int8 tokens and latents of a synthetic sealed cache on local disk, in the page cache,
             through the trainer's Reader: checksums verified, rows shuffled, decoded on the device
    online   latents from the same cache, tokens from the teacher with random weights inside the
             step, on images that lie decoded on the device: reading, decoding, cropping and
             uploading images are left out, so a real run with the teacher online is slower
    memory   the whole micro-batch, noise included, made once and used again every step

The step is the trainer's: BatchMaker, `method.loss` under its autocast, backward, Meter,
`optimiser_step` (clip, fused AdamW, EMA), `torch.compile` of the blocks where the trainer has it.
One model serves all ways. They take turns of --steps steps, --rounds times; the fastest turn of
each is kept (the median is given too). On CUDA the device is waited for at the ends of a turn; on
the CPU there are also the ratios of CPU seconds, the reader's threads included, which other
processes disturb less: most of all with OMP_NUM_THREADS=1, where no thread spins for another.

online_over_cached and cached_over_memory are ratios of seconds. MFU = 6 x the forward pass's
multiply-adds of the model alone x images/s / the device's dense bf16 peak; without a known peak
there is none. Peak memory of a way on CUDA is torch's, of one warm step, before the teacher is
loaded for `cached` and `memory`; on the CPU it is the process's, of all ways together.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import RESULTS, command, save

from repa_pipeline.config_train import TrainConfig
from repa_pipeline.data.codec import CODECS
from repa_pipeline.data.objects import get_json, open_store
from repa_pipeline.data.reader import Reader
from repa_pipeline.device import choose_device, cpu_count, prepare_compute
from repa_pipeline.encoders import ENCODERS
from repa_pipeline.encoders.randomised import RANDOM
from repa_pipeline.stages.flops import latent_training_flops
from repa_pipeline.stages.train import TrainPlan, plan_training
from repa_pipeline.testing.caches import ToyLatents, write_array, write_toy_cache
from repa_pipeline.training.batches import BatchMaker, Micro, Online
from repa_pipeline.training.inputs import CacheInputs, OnlineTeacher, read_options
from repa_pipeline.training.parallel import prepare_blocks, shared_loss
from repa_pipeline.training.speed import peak_flops
from repa_pipeline.training.state import new_state, optimiser_step
from repa_pipeline.training.world import World

RESOLUTION = 256
WAYS = ("cached", "online", "memory")
# The most telling first: a run that is cut off has them.
GPU_SUITE = "SiT-XL/2:dinov2-b,SiT-B/2:dinov2-b,SiT-XL/2:dinov2-g,SiT-L/2:dinov2-b"
GPU_BATCH, CPU_BATCH = 256, 8
# Of a cache: as many shards as keep the reader at work all the time, one read a step.
NUM_SHARDS, WINDOW = 16, 2
NO_END = 10**9
PROFILED_STEPS, PROFILE = 3, "train_step.profile.txt"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, with what teacher, and how."""

    model: str
    encoder: str
    batch: int
    device: str
    dtype: str
    compile: bool
    compile_teacher: bool
    steps: int
    rounds: int

    def config(self, workspace: Path) -> TrainConfig:
        return TrainConfig(
            workspace=str(workspace),
            preset="imagenet",
            model=self.model,
            encoder=(self.encoder,),
            batch_size=self.batch,
            device=self.device,
            dtype=self.dtype,
            compile=self.compile,
            window=WINDOW,
        )


class Took(NamedTuple):
    """Seconds of the wall's clock, and of all threads of this process."""

    wall: float
    cpu: float


class Trainer:
    """The model, and the trainer's step on micro-batches."""

    def __init__(self, plan: TrainPlan):
        self.plan = plan
        self._state = new_state(plan.config, plan.method, plan.device)
        prepare_blocks(plan.config, self._state.model, plan.compile)
        ema = self._state.ema.module
        self._loss_of = shared_loss(plan.method, self._state.model, ema, World(), False)
        kind = plan.device.split(":")[0]
        self._autocast = torch.autocast(kind, torch.bfloat16, plan.dtype == "bf16")

    def step(self, micros: Iterable[Micro]) -> None:
        meter = self._state.meter
        for micro in micros:
            with self._autocast:
                losses = self._loss_of(micro.batch, micro.t, micro.noise)
            (losses["loss"] * micro.share).backward()
            meter.add(losses, micro.t, micro.share)
        meter.end_step(*optimiser_step(self.plan.config, self._state))

    def time(self, batches: Iterator[Iterable[Micro]], steps: int) -> Took:
        """A step's, on average over the next `steps`."""
        self.wait()
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step(next(batches))
        self.wait()
        return Took((time.perf_counter() - began) / steps, (time.process_time() - cpu) / steps)

    def wait(self) -> None:
        if self.plan.device.startswith("cuda"):
            torch.cuda.synchronize(self.plan.device)

    def means(self) -> dict[str, float]:
        return self._state.meter.read()


def main() -> None:
    arguments = parse()
    cases = [make_case(arguments, text) for text in arguments.cases.split(",")]
    began, results = time.perf_counter(), {}
    for case in cases:
        name = f"{case.model} {case.encoder}"
        if results and time.perf_counter() - began > arguments.budget_s:
            print(f"no time left for {name}", file=sys.stderr)
            continue
        profiled = arguments.profile and not results
        results[name] = measure(case, arguments.out / PROFILE if profiled else None)
        print(json.dumps({name: results[name]}), file=sys.stderr)
        # After each case: what was measured stays when a time limit ends the run.
        whole = {"command": command(), "cases": results}
        path = save(arguments.name, whole, arguments.out)
    result = next(iter(results.values())) if len(cases) == 1 else results
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--encoder", default="dinov2-b")
    parser.add_argument("--cases", default="", help="MODEL:ENCODER,... instead of one")
    parser.add_argument("--suite", choices=("gpu",), help=f"the cases {GPU_SUITE}, and a profile")
    parser.add_argument("--batch", type=int, default=0, help="0: 256 on CUDA, 8 on the CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bf16"))
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=flag, help="the blocks (default: on CUDA)")
    parser.add_argument("--compile-teacher", action=flag, help="default: as --compile")
    parser.add_argument("--steps", type=int, default=0, help="of a turn; 0: 10 on CUDA, 1 on CPU")
    parser.add_argument("--rounds", type=int, default=0, help="0: 3 on CUDA, 6 on the CPU")
    parser.add_argument("--profile", action="store_true", help=f"of the first case, in {PROFILE}")
    parser.add_argument("--budget-s", type=float, default=420, help="start no case after this")
    parser.add_argument("--name", default="", help="of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is written")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.suite:
        arguments.cases = arguments.cases or GPU_SUITE
        arguments.profile = True
    arguments.cases = arguments.cases or f"{arguments.model}:{arguments.encoder}"
    if not arguments.name:
        model = arguments.model.lower().replace("/", "-")
        arguments.name = "train_gpu" if arguments.suite else f"train_step.{model}"
    return arguments


def make_case(arguments: argparse.Namespace, text: str) -> Case:
    model, _, encoder = text.partition(":")
    device = choose_device(arguments.device)
    on_cuda = device.startswith("cuda")
    compiles = on_cuda if arguments.compile is None else arguments.compile
    compiles_teacher = arguments.compile_teacher
    return Case(
        model=model,
        encoder=encoder,
        batch=arguments.batch or (GPU_BATCH if on_cuda else CPU_BATCH),
        device=device,
        dtype=arguments.dtype,
        compile=compiles,
        compile_teacher=compiles if compiles_teacher is None else compiles_teacher,
        steps=arguments.steps or (10 if on_cuda else 1),
        rounds=arguments.rounds or (3 if on_cuda else 6),
    )


def measure(case: Case, profile_path: Path | None) -> dict[str, Any]:
    """A case's numbers, with half the batch as often as the device's memory wants it."""
    while True:
        try:
            with tempfile.TemporaryDirectory() as folder:
                return measure_batch(case, Path(folder), profile_path)
        except torch.cuda.OutOfMemoryError:
            if case.batch == 1:
                raise
            case = dataclasses.replace(case, batch=case.batch // 2)
            print(f"{case.model}: trying a batch of {case.batch}", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()


def measure_batch(case: Case, folder: Path, profile_path: Path | None) -> dict[str, Any]:
    # Blocks of another model would be compiled for sizes that vary.
    torch.compiler.reset()
    write_cache(folder, case)
    plan = plan_training(case.config(folder))
    prepare_compute(plan.config.threads, plan.config.tf32)
    with contextlib.ExitStack() as stack:
        trainer, peaks = Trainer(plan), {}
        batches = {"cached": cached(plan, plan.inputs, None, stack)}
        batches["memory"] = repeated(list(next(batches["cached"])))
        for way in ("cached", "memory"):
            peaks[way] = warm_up(trainer, batches[way])
        teacher = online_teacher(case, plan)
        batches["online"] = cached(plan, online_inputs(plan, case), teacher, stack)
        peaks["online"] = warm_up(trainer, batches["online"])
        trainer.means()
        turns = {way: [] for way in WAYS}
        for _ in range(case.rounds):
            for way in WAYS:
                turns[way].append(trainer.time(batches[way], case.steps))
                print(f"{case.model} {way}: {turns[way][-1].wall:.3f} s a step", file=sys.stderr)
        means = trainer.means()
        if means["skipped_steps"]:
            raise SystemExit(f"{means['skipped_steps']:.0f} steps were skipped: not a fair step")
        if profile_path:
            profile(trainer, batches["cached"], profile_path)
    return describe(case, plan, turns, peaks)


def describe(
    case: Case,
    plan: TrainPlan,
    turns: dict[str, list[Took]],
    peaks: dict[str, int | None],
) -> dict[str, Any]:
    best = {way: min(took.wall for took in found) for way, found in turns.items()}
    middle = {way: statistics.median(t.wall for t in found) for way, found in turns.items()}
    cpu = {way: min(took.cpu for took in found) for way, found in turns.items()}
    rates = {way: case.batch / seconds for way, seconds in best.items()}
    inputs = plan.inputs.describe()
    flops = latent_training_flops(plan.model, inputs.latent_channels, inputs.latent_size)
    peak = peak_flops(plan.device)
    on_cuda = plan.device.startswith("cuda")
    return {
        **ratios(best),
        "of_medians": ratios(middle),
        "of_cpu_seconds": None if on_cuda else ratios(cpu),
        "images_per_s": {way: round(rate, 3) for way, rate in rates.items()},
        "mfu": {w: round(flops * r / peak, 4) for w, r in rates.items()} if peak else None,
        "peak_bytes": peaks if on_cuda else process_peak_bytes(),
        "seconds": {way: [round(took.wall, 4) for took in found] for way, found in turns.items()},
        "training_flops_per_image": flops,
        **dataclasses.asdict(case),
        "dtype": plan.dtype,
        "device_name": torch.cuda.get_device_name(plan.device) if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "cores_used": cpu_count(),
        "image_decode": "left out",
    }


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    return {
        "online_over_cached": round(seconds["online"] / seconds["cached"], 3),
        "cached_over_memory": round(seconds["cached"] / seconds["memory"], 3),
    }


def write_cache(folder: Path, case: Case) -> None:
    """Latents float16 [N, 8, 32, 32] and tokens int8 [N, T, D] of random numbers, sealed."""
    num_rows = NUM_SHARDS * case.batch
    latents = ToyLatents("sd-vae-ft-ema", size=32, scale=(0.18215,), shift=(0.0,))
    write_toy_cache(
        folder, num_rows=num_rows, num_classes=min(1000, num_rows), shard_rows=case.batch,
        resolution=RESOLUTION, latents=latents, teachers=(),
    )  # fmt: skip
    store = open_store(str(folder)).child("cache")
    known = get_json(store, f"latents.{latents.name}.{RESOLUTION}/seal.json")["manifest"]
    spec = ENCODERS[case.encoder]
    manifest = {
        "kind": "features",
        "encoder": spec.name,
        "weights_sha256": RANDOM,
        "width": spec.width,
        "grid": list(spec.grid(RESOLUTION)),
        "tokens": spec.tokens,
        "codec": CODECS["int8"].manifest(spec.width),
        "resolution": RESOLUTION,
        "prepare": known["prepare"],
    }
    shape = (num_rows, spec.num_tokens(RESOLUTION), spec.width)
    records = np.random.default_rng(0).integers(-128, 128, shape, np.int8)
    write_array(store, f"features.{spec.name}.{RESOLUTION}", records, case.batch, manifest)


def cached(
    plan: TrainPlan, inputs: CacheInputs, online: Online | None, stack: contextlib.ExitStack
) -> Iterator[Iterable[Micro]]:
    """Every step's micro-batches, of what the cache has of `inputs`."""
    reader = Reader(
        inputs.arrays, plan.order, first_step=0, last_step=NO_END,
        **read_options(plan.config, plan.device),
    )  # fmt: skip
    stack.enter_context(reader)
    maker = BatchMaker(plan.config, inputs, plan.method, plan.device, online=online)
    return (maker.micro_batches(records) for records in reader)


def repeated(micros: list[Micro]) -> Iterator[Iterable[Micro]]:
    while True:
        yield micros


def online_inputs(plan: TrainPlan, case: Case) -> CacheInputs:
    """The latents of the cache alone, and the teacher itself."""
    teacher = OnlineTeacher(ENCODERS[case.encoder], RESOLUTION, RANDOM)
    return dataclasses.replace(plan.inputs, teachers=(teacher,))


def online_teacher(case: Case, plan: TrainPlan) -> Callable[[int], tuple[torch.Tensor, ...]]:
    from repa_pipeline.encoders.base import load_random_encoder

    encoder = load_random_encoder(
        ENCODERS[case.encoder], resolution=RESOLUTION, device=plan.device, dtype=plan.dtype,
        compile=case.compile_teacher,
    )  # fmt: skip
    shape = (case.batch, 3, RESOLUTION, RESOLUTION)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=plan.device)
    return lambda step: (encoder.tokens(images),)


def warm_up(trainer: Trainer, batches: Iterator[Iterable[Micro]]) -> int | None:
    """Compiles and chooses kernels; the peak memory of a warm step on CUDA."""
    device = trainer.plan.device
    trainer.step(next(batches))
    if not device.startswith("cuda"):
        return None
    trainer.step(next(batches))
    trainer.wait()
    torch.cuda.reset_peak_memory_stats(device)
    trainer.step(next(batches))
    trainer.wait()
    return torch.cuda.max_memory_allocated(device)


def process_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def profile(trainer: Trainer, batches: Iterator[Iterable[Micro]], path: Path) -> None:
    """Writes what the time of PROFILED_STEPS steps goes to, by operation, kernels on CUDA."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if trainer.plan.device.startswith("cuda"):
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=kinds) as found:
        trainer.time(batches, PROFILED_STEPS)
    table = found.key_averages().table(sort_by=order, row_limit=50, max_name_column_width=90)
    what = f"{trainer.plan.config.model}, batch {trainer.plan.config.batch_size}, "
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{what}{PROFILED_STEPS} cached steps on {trainer.plan.device}\n{table}\n")


if __name__ == "__main__":
    main()
