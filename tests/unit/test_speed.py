"""Rates are plain arithmetic on a clock; peaks are those of the table."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from repa_pipeline.autoencoders import AUTOENCODERS
from repa_pipeline.models import MODELS, ModelSpec
from repa_pipeline.stages.flops import (
    countable_training_flops,
    latent_training_flops,
    training_flops,
)
from repa_pipeline.training.speed import Speed, known_peak, peak_flops, resident_bytes


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def rates(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "rss_bytes"}


def test_rates_are_those_since_the_last_reading() -> None:
    clock = Clock()
    speed = Speed(7e11, 1e15, world_size=4, clock=clock)
    clock.now += 8.0
    assert rates(speed.read(6400, wait_s=0.4, num_bytes=16_000)) == pytest.approx(
        {
            "images_per_s": 800.0,
            "data_wait": 0.05,
            "bytes_per_s": 2000.0,
            "mfu": 7e11 * 800 / 4e15,
        }
    )
    clock.now += 2.0
    assert rates(speed.read(200, wait_s=1.4, num_bytes=20_000)) == pytest.approx(
        {"images_per_s": 100.0, "data_wait": 0.5, "bytes_per_s": 2000.0, "mfu": 7e11 * 100 / 4e15}
    )
    clock.now += 50.0  # compiling again, say
    speed.restart()
    clock.now += 1.0
    found = speed.read(10, wait_s=0.25, num_bytes=7)
    assert (found["images_per_s"], found["data_wait"], found["bytes_per_s"]) == (10.0, 0.25, 7.0)
    assert speed.read(0, 0.25, 7)["images_per_s"] == 0.0  # no time, no images, no error


@pytest.mark.parametrize(("flops", "peak"), [(None, 1e15), (7e11, None)])
def test_without_operations_or_peak_there_is_no_utilisation(
    flops: float | None, peak: float | None
) -> None:
    assert "mfu" not in Speed(flops, peak).read(1, 0.0, 0)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_device_name(name: str, tflops: float | None) -> None:
    assert known_peak(name) == (None if tflops is None else tflops * 1e12)


def test_a_given_peak_counts_and_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops("cpu") is None and peak_flops("cpu", 1.5) == 1.5e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops("cuda:1") == 989e12 and peak_flops("cuda", 500.0) == 500e12


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  999 kB\nVmRSS:\t   512 kB\nThreads:\t1\n")
    assert resident_bytes(status) == 512 * 1024
    assert resident_bytes(tmp_path / "absent") is None
    # Of this process: it holds torch, and more once it holds more.
    before = Speed().read(1, 0.0, 0)["rss_bytes"]
    with mmap.mmap(-1, 64 << 20) as held:  # fresh pages, whatever the allocator has to spare
        held.write(b"x" * len(held))
        after = Speed().read(1, 0.0, 0)["rss_bytes"]
        assert before > 50e6 and after - before > 0.9 * len(held)

    peaks = iter([3e9, 2e9])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    reset: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    speed = Speed(device="cuda:1")
    assert [speed.read(1, 0.0, 0)["peak_device_bytes"] for _ in range(2)] == [3e9, 2e9]
    assert reset == ["cuda:1", "cuda:1"]


def test_operations_need_no_autoencoder_entry() -> None:
    spec, latents = MODELS["SiT-B/2"], AUTOENCODERS["sd-vae"]
    counted = latent_training_flops(spec, 4, 32)
    assert counted == training_flops(spec, latents, 256) == pytest.approx(138e9, rel=0.03)
    assert countable_training_flops(spec, 4, 32) == counted
    # XL/2 at 555 images/s is 40 % of an H200.
    mfu = latent_training_flops(MODELS["SiT-XL/2"], 4, 32) * 555 / 989e12
    assert mfu == pytest.approx(0.40, abs=0.005)


def build_uncountable(spec: ModelSpec, **sizes: int) -> torch.nn.Module:
    raise RuntimeError("needs a device")


def test_a_model_that_cannot_be_counted_has_no_operations() -> None:
    spec = ModelSpec("mine", 1, 8, 1, 2, 1, loader=f"{__name__}:build_uncountable")
    assert countable_training_flops(spec, 4, 32) is None
