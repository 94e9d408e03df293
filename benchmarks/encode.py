"""Encoding end to end, from JPEG files to a sealed cache, against what its parts can do alone.

    python benchmarks/encode.py [--images 1024] [--rounds 3] [--json]

Images: the 48 photos of imagenet48 over and over (REPA_SHARED, default ../shared), or without them
generated JPEGs of ImageNet's sizes; a tar in the page cache. Networks have random weights, on the
CPU. Measured in turns, the fastest of each kept, in images a second:

    end to end          run_pass and LocalExecutor: read, check, decode, exact ADM crop, encode,
                        codec, pack, checksum, fsync, done records, seal; from loaded weights on
    decode alone        JPEG bytes in memory -> exact crop in memory, on the case's threads
    forward alone       the networks, same batch and compute threads, images resident in memory
    forward and codec   the same with the codec of the cache
    reference           one process, an image at a time: open, crop, batch of 1, np.save of float32

Where decoding and the networks share the cores, no scheme can reach the smaller of the two rates:
the most is 1 / (1 / decode + 1 / forward), given beside it. In the case "a core each" the network
has one core and decoding the other, as they have with a GPU; there the smaller is the limit.
`other_processes` is the share of the cores that the rest of the machine took from the runs kept:
where it is not near zero, the rates are too low.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import save
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file

from repa_pipeline.autoencoders import AUTOENCODERS
from repa_pipeline.autoencoders.base import load_autoencoder
from repa_pipeline.config import EncodeAllConfig
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.data.index import Index
from repa_pipeline.device import cpu_count, prepare_compute
from repa_pipeline.encoders import ENCODERS
from repa_pipeline.encoders.base import load_encoder
from repa_pipeline.engine.contracts import Wanted, Work
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.observe import Silent
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import ImagePass, Product, run_pass
from repa_pipeline.stages.index import ensure_index
from repa_pipeline.stages.latents import latents_product
from repa_pipeline.testing.parts import tiny_autoencoder, write_weights

RESOLUTION, BATCH = 256, 32
VAE, TEACHER, TINY = "taesd-random", "dinov2-s-random", "one-convolution"
# Sides of ImageNet files: most have 500 on the long side, some are small, a few large.
SIZES = (
    *[(500, 375)] * 10,
    *[(500, 333)] * 5,
    *[(375, 500)] * 4,
    *[(333, 500), (500, 500), (300, 225), (640, 480), (1600, 1200)],
)
# Seconds of a run, and the share of the cores that other processes took meanwhile.
Timing = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is encoded, with `share` of --images, on how many threads (0: all cores)."""

    name: str
    share: float
    autoencoder: str | None = None
    encoder: str | None = None
    threads: int = 0
    decode_threads: int = 4
    shard_rows: int = 64

    @property
    def is_shared(self) -> bool:
        """Whether decoding and the networks use the same cores."""
        return self.threads == 0

    def config(self, folder: Path) -> EncodeAllConfig:
        return EncodeAllConfig(
            source=str(folder / "images.tar"),
            workspace=str(folder / "work"),
            autoencoder=self.autoencoder or "",
            encoder=(self.encoder,) if self.encoder else (),
            resolution=RESOLUTION,
            batch_size=BATCH,
            shard_rows=self.shard_rows,
            device="cpu",
            threads=self.threads,
            decode_threads=self.decode_threads,
        )

    def products(self, config: EncodeAllConfig, index: Index) -> tuple[Product, ...]:
        latents = [latents_product(config, index)] if self.autoencoder else []
        return (*latents, *features_products(config, index))

    def forwards(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Each network: images uint8 [b, 3, R, R] -> float32."""
        found = []
        if self.autoencoder:
            found.append(load_autoencoder(self.autoencoder).encode)
        if self.encoder:
            found.append(load_encoder(self.encoder, resolution=RESOLUTION).tokens)
        return found


CASES = (
    Case("one convolution", 1, autoencoder=TINY),
    # Small shards: the first load and the last store, which nothing overlaps, are 3% of the run.
    Case("digits-vit, a core each", 1, None, "digits-vit", 1, decode_threads=1, shard_rows=32),
    Case("dinov2-s, int8", 1 / 16, encoder=TEACHER),
    Case("taesd", 1 / 16, autoencoder=VAE),
    Case("taesd and dinov2-s in one pass", 1 / 16, autoencoder=VAE, encoder=TEACHER),
)


@dataclasses.dataclass(frozen=True)
class TimedPass(ImagePass):
    """Notes when the weights are loaded and the first shard may begin."""

    opened: list[float] = dataclasses.field(default_factory=list)

    def open(self, wanted: Wanted) -> Work:
        work = super().open(wanted)
        self.opened.append(time.perf_counter())
        return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name holds this; saves nothing")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    photos, origin = read_photos()
    folder = Path(tempfile.mkdtemp())
    try:
        add_networks(folder)
        cases = {
            case.name: measure(case, folder / "case", photos, arguments.images, arguments.rounds)
            for case in CASES
            if arguments.only in case.name
        }
    finally:
        shutil.rmtree(folder)
    result = {"images": origin, "resolution": RESOLUTION, "batch": BATCH, "cases": cases}
    path = "" if arguments.only else save("encode", result)
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def measure(
    case: Case, folder: Path, photos: Sequence[bytes], num_images: int, rounds: int
) -> dict[str, Any]:
    """A case's rates, each the best of `rounds`, and their ratios."""
    rows = max(1, round(case.share * num_images / case.shard_rows)) * case.shard_rows
    files = list(itertools.islice(itertools.cycle(photos), rows))
    write_tar(folder / "images.tar", files)
    config = case.config(folder)
    index = ensure_index(config, LocalExecutor(), Silent())
    stage = TimedPass(config, case.products(config, index))
    prepare_compute(case.threads)
    crops = np.stack([crop(data) for data in files[:BATCH]])
    pixels, forwards = torch.from_numpy(crops).permute(0, 3, 1, 2), case.forwards()
    encodes = [product.load("cpu") for product in stage.products]
    num_batches = rows // BATCH
    ways = {
        "end_to_end": lambda: encode_all(stage, index, folder / "work/cache"),
        "decode": lambda: decode_all(files, case.decode_threads),
        "forward": lambda: repeat(num_batches, [lambda f=f: f(pixels) for f in forwards]),
        "forward_and_codec": lambda: repeat(
            num_batches, [lambda e=e: e(crops, BATCH) for e in encodes]
        ),
        "reference": lambda: encode_plainly(files, folder, forwards),
    }
    timings = in_turns(ways, rounds)
    shutil.rmtree(folder)
    return {
        "num_images": rows,
        **compare(case, {name: rows / seconds for name, (seconds, _) in timings.items()}),
        "other_processes": {name: round(share, 3) for name, (_, share) in timings.items()},
    }


def compare(case: Case, rates: dict[str, float]) -> dict[str, Any]:
    decode, forward, reached = rates["decode"], rates["forward"], rates["end_to_end"]
    smaller = min(decode, forward)
    limit = 1 / (1 / decode + 1 / forward) if case.is_shared else smaller
    ratios = {
        "end_to_end_over_smaller_of_decode_and_forward": reached / smaller,
        "most_the_cores_allow_over_smaller": limit / smaller,
        "end_to_end_over_most_the_cores_allow": reached / limit,
        "end_to_end_over_reference": reached / rates["reference"],
    }
    return {
        "compute_threads": case.threads or cpu_count(),
        "decode_threads": case.decode_threads,
        "smaller": "decode" if decode < forward else "forward",
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "images_per_s": {name: round(rate, 2) for name, rate in rates.items()},
    }


def in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """The fastest run of each way."""
    ways["forward"]()  # first calls choose kernels
    timings: dict[str, Timing] = dict.fromkeys(ways, (float("inf"), 0.0))
    for _ in range(rounds):
        for name, run in ways.items():
            timings[name] = min(timings[name], timed(run))
    return timings


def timed(run: Callable[[], float]) -> Timing:
    began, busy, own = time.perf_counter(), busy_s(), sum(os.times()[:2])
    seconds = run()
    others = busy_s() - busy - (sum(os.times()[:2]) - own)
    return seconds, max(0.0, others) / (time.perf_counter() - began) / cpu_count()


def busy_s() -> float:
    """Seconds that the machine's cores have worked, stolen ones included."""
    user, nice, system, _, _, irq, soft, stolen = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


def encode_all(stage: TimedPass, index: Index, cache: Path) -> float:
    """Seconds from loaded weights to the seal, into a cache that has the index alone."""
    for child in cache.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
    os.sync()
    run_pass(stage, index, LocalExecutor(), Silent())
    return time.perf_counter() - stage.opened[-1]


def decode_all(files: Sequence[bytes], threads: int) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(crop, files):
            pass
    return time.perf_counter() - began


def repeat(times: int, runs: Sequence[Callable[[], object]]) -> float:
    began = time.perf_counter()
    for _ in range(times):
        for run in runs:
            run()
    return time.perf_counter() - began


def crop(data: bytes) -> np.ndarray:
    return adm_center_crop(decode_image(data).image, RESOLUTION)


def encode_plainly(
    files: Sequence[bytes],
    folder: Path,
    forwards: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> float:
    """Seconds of the reference's way: one image after another, a .npy each."""
    (folder / "plain").mkdir()
    paths = [folder / f"plain/{number:06d}.jpg" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    os.sync()
    began = time.perf_counter()
    for path in paths:
        image = adm_crop_plainly(Image.open(path).convert("RGB"), RESOLUTION)
        pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        for number, forward in enumerate(forwards):
            np.save(path.with_suffix(f".{number}.npy"), forward(pixels)[0].numpy())
    seconds = time.perf_counter() - began
    shutil.rmtree(folder / "plain")
    return seconds


def adm_crop_plainly(image: Image.Image, size: int) -> np.ndarray:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(sides, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def add_networks(folder: Path) -> None:
    """Adds the table entries of the cases, with weights files of random numbers."""
    torch.manual_seed(0)
    vae, teacher = AUTOENCODERS["taesd"], ENCODERS["dinov2-s"]
    network: Any = AutoencoderTiny
    save_file(network(**vae.config).state_dict(), folder / "vae.safetensors")
    vit = timm.create_model(teacher.config["architecture"], num_classes=0)
    save_file(vit.state_dict(), folder / "teacher.safetensors")
    weights = {name: str(folder / f"{name}.safetensors") for name in ("vae", "teacher", "tiny")}
    AUTOENCODERS.add(dataclasses.replace(vae, name=VAE, weights=weights["vae"]))
    ENCODERS.add(dataclasses.replace(teacher, name=TEACHER, weights=weights["teacher"]))
    tiny = tiny_autoencoder(TINY, weights=weights["tiny"])
    write_weights(tiny)
    AUTOENCODERS.add(tiny)


def read_photos() -> tuple[list[bytes], dict[str, Any]]:
    """JPEG files, and what they are."""
    shared = Path(os.environ.get("REPA_SHARED", Path(__file__).parents[2] / "shared"))
    path = shared / "data/imagenet48/imagenet48.tar"
    if path.exists():
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar if m.name.endswith(".jpg")}
            photos = [
                tar.extractfile(member).read()  # type: ignore[union-attr]
                for name, member in members.items()
                if not name.startswith("synthetic")
            ]
    else:
        photos = [generate_photo(number, size) for number, size in enumerate(SIZES)]
    sides = [Image.open(io.BytesIO(data)).size for data in photos]
    return photos, {
        "origin": "imagenet48" if path.exists() else "generated",
        "num_files": len(photos),
        "mean_megapixels": round(float(np.mean([w * h for w, h in sides])) / 1e6, 3),
        "mean_KiB": round(float(np.mean([len(data) for data in photos])) / 2**10, 1),
    }


def generate_photo(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG about as rich in detail as a photo: coarse colours, fine grain."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    grain = generator.normal(0, 8, (size[1], size[0], 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=92
    )
    return buffer.getvalue()


def write_tar(path: Path, files: Sequence[bytes]) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(files):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
