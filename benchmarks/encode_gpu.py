"""Encoding on a GPU: the whole pass against the network's own forward rate on resident data.

    python benchmarks/encode_gpu.py [--networks sd-vae-ft-ema,dinov2-b,dinov2-l,dinov2-g]
        [--images 8192] [--batch-size 64] [--decode-threads 0] [--device cuda] [--json]

Networks are those of the tables with random weights, in bf16 and compiled. Images are JPEGs of 256
pixels in a tar in the page cache, so that decoding seldom is the limit; its rate is given beside.
One network after another, in images a second:

    forward       the network (normalising and resizing included) on one batch that lies on the
                  device, the fastest of --rounds runs of half a second or more
    end to end    run_pass and LocalExecutor: read, check, decode, exact ADM crop, copy, encode,
                  codec, pack, checksum, fsync, done records; from the end of the first shard, in
                  which the network is compiled, to the end of the last
    decode        JPEG bytes in memory -> exact crop in memory, on the same number of threads

`share` is end to end over forward; where decoding is slower than the network, see
`share_of_smaller`. Codec: int8 of tokens, float16 of moments, as `repa encode` stores them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import save
from PIL import Image
from safetensors.torch import save_file

from repa_pipeline.autoencoders import AUTOENCODERS
from repa_pipeline.autoencoders.base import load_autoencoder
from repa_pipeline.autoencoders.kl import build_kl
from repa_pipeline.config import EncodeAllConfig
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.data.index import Index
from repa_pipeline.device import cpu_count
from repa_pipeline.encoders import ENCODERS
from repa_pipeline.encoders.base import load_encoder
from repa_pipeline.engine.local import LocalExecutor
from repa_pipeline.observe import Silent
from repa_pipeline.stages.features import features_products
from repa_pipeline.stages.images import ImagePass, Product, run_pass
from repa_pipeline.stages.index import ensure_index
from repa_pipeline.stages.latents import latents_product

NETWORKS = "sd-vae-ft-ema,dinov2-b,dinov2-l,dinov2-g"
RESOLUTION, NUM_JPEGS, SHARD_ROWS = 256, 64, 256
LEAST_S = 0.5


class Stamps(Silent):
    """Notes when each shard was done."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.times: list[float] = []

    def advance(self, count: int, **facts: float) -> None:
        self.rows.append(count)
        self.times.append(time.perf_counter())

    def rate(self) -> float:
        """Images a second behind the first shard."""
        return sum(self.rows[1:]) / (self.times[-1] - self.times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--decode-threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        jpegs = write_tar(folder / "images.tar", max(arguments.images, 3 * SHARD_ROWS))
        threads = arguments.decode_threads or cpu_count()
        decode = decode_rate(jpegs, threads)
        found = {
            name: measure(name, folder, arguments, threads, decode)
            for name in arguments.networks.split(",")
        }
    finally:
        shutil.rmtree(folder)
    result = {
        "device": device_name(arguments.device),
        "dtype": arguments.dtype,
        "batch": arguments.batch_size,
        "decode_threads": threads,
        "decode_images_per_s": round(decode, 1),
        "networks": found,
    }
    path = save("encode_gpu", result) if arguments.device.startswith("cuda") else ""
    print(json.dumps(result) if arguments.json else f"{json.dumps(result, indent=1)}\n{path}")


def measure(
    name: str, folder: Path, arguments: argparse.Namespace, threads: int, decode: float
) -> dict[str, float]:
    """A network's rates and shares; its weights and cache are removed again."""
    weights = add_random(name, folder)
    config = EncodeAllConfig(
        source=str(folder / "images.tar"),
        workspace=str(folder / "work"),
        autoencoder=f"random-{name}",
        encoder=(f"random-{name}",),
        resolution=RESOLUTION,
        batch_size=arguments.batch_size,
        shard_rows=SHARD_ROWS,
        device=arguments.device,
        dtype=arguments.dtype,
        compile=True,
        decode_threads=threads,
    )
    index, stamps = ensure_index(config, LocalExecutor(), Silent()), Stamps()
    run_pass(ImagePass(config, (product_of(name, config, index),)), index, LocalExecutor(), stamps)
    forward = forward_rate(name, config, arguments.rounds)
    weights.unlink()
    shutil.rmtree(folder / "work")
    return {
        "end_to_end_images_per_s": round(stamps.rate(), 1),
        "forward_images_per_s": round(forward, 1),
        "share": round(stamps.rate() / forward, 3),
        "share_of_smaller": round(stamps.rate() / min(forward, decode), 3),
    }


def add_random(name: str, folder: Path) -> Path:
    """Adds the table's entry again, as random-NAME, with a file of random weights."""
    path = folder / f"{name}.safetensors"
    torch.manual_seed(0)
    changed: dict[str, Any] = {"name": f"random-{name}", "weights": str(path), "hub": None}
    if name in AUTOENCODERS:
        save_file(build_kl(AUTOENCODERS[name].config, "cpu").state_dict(), path)
        AUTOENCODERS.add(dataclasses.replace(AUTOENCODERS[name], **changed))
    else:
        vit = timm.create_model(ENCODERS[name].config["architecture"], num_classes=0)
        save_file(vit.state_dict(), path)
        ENCODERS.add(dataclasses.replace(ENCODERS[name], **changed))
    return path


def product_of(name: str, config: EncodeAllConfig, index: Index) -> Product:
    if name in AUTOENCODERS:
        return latents_product(config, index)
    return features_products(config, index)[0]


def forward_rate(name: str, config: EncodeAllConfig, rounds: int) -> float:
    """Images a second of the network alone."""
    settings: dict[str, Any] = {"device": config.device, "dtype": config.dtype, "compile": True}
    if name in AUTOENCODERS:
        forward = load_autoencoder(config.autoencoder, **settings).encode
    else:
        forward = load_encoder(config.encoder[0], resolution=RESOLUTION, **settings).tokens
    shape = (config.batch_size, 3, RESOLUTION, RESOLUTION)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=config.device)
    run = functools.partial(forward, images)
    timed(run, config.device, 2)  # compiles, chooses kernels
    times = max(2, round(LEAST_S / timed(run, config.device, 1)))
    seconds = min(timed(run, config.device, times) for _ in range(rounds))
    return times * config.batch_size / seconds


def timed(run: Callable[[], object], device: str, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def write_tar(path: Path, num_images: int) -> list[bytes]:
    """`num_images` members, NUM_JPEGS different JPEGs in turn, which are returned."""
    generator = np.random.default_rng(0)
    jpegs = []
    for _ in range(NUM_JPEGS):
        coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8))
        pixels = np.asarray(coarse.resize((RESOLUTION,) * 2, Image.Resampling.BICUBIC), np.float32)
        grain = generator.normal(0, 8, (RESOLUTION, RESOLUTION, 1))
        buffer = io.BytesIO()
        picture = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
        picture.save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    with tarfile.open(path, "w") as tar:
        for number in range(num_images):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(jpegs[number % NUM_JPEGS])
            tar.addfile(member, io.BytesIO(jpegs[number % NUM_JPEGS]))
    return jpegs


def decode_rate(jpegs: list[bytes], threads: int) -> float:
    files = jpegs * max(1, 4 * threads // NUM_JPEGS + 1)

    def crop(data: bytes) -> None:
        adm_center_crop(decode_image(data).image, RESOLUTION)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(crop, jpegs))
        began = time.perf_counter()
        list(pool.map(crop, files))
        return len(files) / (time.perf_counter() - began)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
