"""How fast a run is and what holds it up: rates since the last line, and memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

# Dense peaks in bf16 with float32 sums, FLOP/s, by what torch.cuda.get_device_name says. Sources:
# NVIDIA's data sheets of H100, H200, GH200, A100, L40S, L40, L4, A40, A10 and A30, the HGX B200
# data sheet, and the tables of the white papers "Ada GPU architecture" (RTX 4090: 165.2, RTX 6000
# Ada: 364.2) and "Ampere GA102" (RTX 3090: 71, RTX A6000: 154.8). Where a sheet states sparse
# figures alone (H100 SXM: 1,979), this is half of them. Slices of a device (MIG) and laptops' are
# not in it.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250e12),
    (r"(H100|H800) PCIe", 756e12),
    (r"(H100|H200) NVL", 835e12),
    (r"(H100|H200|H800|GH200)( SXM5?)?( \d+GB)?( HBM3e?)?", 989e12),
    (r"A(100|800)[ -](SXM4?|PCIE?)-\d+GB", 312e12),
    (r"A(100|800)( \d+GB)?( PCIe)?", 312e12),
    (r"A100-PG\d+-\d+", 312e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"A40", 149.7e12),
    (r"A30", 165e12),
    (r"A10", 125e12),
    (r"RTX 6000 Ada Generation", 364.2e12),
    (r"RTX A6000", 154.8e12),
    (r"GeForce RTX 4090", 165.2e12),
    (r"GeForce RTX 3090", 71e12),
)


def known_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device by its name; None for one that is not in the table."""
    name = device_name.removeprefix("NVIDIA ")
    for pattern, peak in _PEAKS:
        if re.fullmatch(pattern, name, flags=re.IGNORECASE):
            return peak
    return None


def peak_flops(device: str, peak_tflops: float = 0.0) -> float | None:
    """FLOP/s of `device` at its dense bf16 peak: as given (0: not), or by name; None if unknown."""
    if peak_tflops:
        return peak_tflops * 1e12
    if not device.startswith("cuda"):
        return None
    import torch

    return known_peak(torch.cuda.get_device_name(device))


def resident_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Resident memory of this process; None where the system has no such file."""
    try:
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class Speed:
    """Rates since the last reading; nothing waits for the device.

    flops_per_image: of a training step, 6 x the forward pass's multiply-adds of the model alone:
    no encoder, no projector, nothing that is computed twice to save memory. peak: FLOP/s of one
    device; without either there is no "mfu".
    """

    def __init__(
        self,
        flops_per_image: float | None = None,
        peak: float | None = None,
        world_size: int = 1,
        device: str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops = flops_per_image
        self._peak = peak
        self._world_size = world_size
        self._device = device
        self._clock = clock
        self.restart()

    def restart(self, wait_s: float = 0.0, num_bytes: int = 0) -> None:
        """Leaves out the time up to now; a new reader's counters start at 0."""
        self._began, self._wait_s, self._num_bytes = self._clock(), wait_s, num_bytes

    def read(self, num_images: int, wait_s: float, num_bytes: int) -> dict[str, float]:
        """What one log line says.

        num_images: of all ranks since the last reading; wait_s, num_bytes: the reader's counters,
        which only grow. images_per_s is of all ranks, mfu a share of the peak of all devices;
        data_wait (a share of the time), bytes_per_s, rss_bytes and peak_device_bytes (allocated by
        torch, since the last reading) are of this rank.
        """
        elapsed = max(self._clock() - self._began, 1e-9)
        rate = num_images / elapsed
        values = {
            "images_per_s": rate,
            "data_wait": (wait_s - self._wait_s) / elapsed,
            "bytes_per_s": (num_bytes - self._num_bytes) / elapsed,
        }
        if self._flops and self._peak:
            values["mfu"] = self._flops * rate / (self._peak * self._world_size)
        values.update(self._memory())
        self.restart(wait_s, num_bytes)
        return values

    def _memory(self) -> dict[str, float]:
        values = {}
        resident = resident_bytes()
        if resident is not None:
            values["rss_bytes"] = float(resident)
        if self._device.startswith("cuda"):
            import torch

            values["peak_device_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        return values
