"""Rows, and clocks for processes: what benchmarks/reader.py and reader_rivals.py share.

Needs numpy alone: it also runs in the virtual environment of the others.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, LATENTS = (256, 768), (8, 32, 32)
BATCH, SHARD_ROWS, EPOCHS = 256, 256, 3
_LIBC = ctypes.CDLL(None, use_errno=True)
Batches = Iterable[tuple[Any, Any]]


def make_row(row: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int8 whose first bytes are the row's number, and latents float16; seeded."""
    generator = np.random.default_rng(row)
    tokens = np.frombuffer(generator.bytes(256 * 768), np.int8).reshape(TOKENS).copy()
    tokens[0, :4] = np.array([row], np.int32).view(np.int8)
    latents = generator.standard_normal(LATENTS, np.float32).astype(np.float16)
    return tokens, latents


# Page cache, CPU time, memory.


def drop(files: list[Path]) -> float:
    """Drops files from the page cache; returns the share of their pages that stayed."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return resident_share(files)


def resident_share(files: list[Path]) -> float:
    """The share of the files' pages that are in the page cache, by mincore(2)."""
    resident = total = 0
    for path in files:
        if path.stat().st_size:
            with open(path, "rb") as file:
                memory = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
            view = np.frombuffer(memory, np.uint8)
            pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
            size, address = ctypes.c_size_t(len(view)), ctypes.c_void_p(view.ctypes.data)
            if _LIBC.mincore(address, size, ctypes.c_void_p(pages.ctypes.data)):
                raise OSError(ctypes.get_errno(), "mincore")
            resident, total = resident + int((pages & 1).sum()), total + len(pages)
    return resident / total


def processes() -> list[int]:
    """This process and all that came from it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_s() -> float:
    """CPU time of this process, its descendants, and those of them that have ended."""
    ticks = 0
    for pid in processes():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes() -> int:
    """Proportional resident memory of this process and its descendants, page cache left out."""
    total = 0
    for pid in processes():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        pss = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
        total += 1024 * (pss["Pss_Anon:"] + pss["Pss_Shmem:"])
    return total


def busy_s() -> float:
    """Seconds that the machine's cores have worked, stolen ones included."""
    user, nice, system, _, _, irq, soft, stolen = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


def measure(
    epoch: Callable[[int], Batches], num_rows: int, before: Callable[[], float]
) -> dict[str, float]:
    """Takes EPOCHS epochs, the first to warm up; `before` each other: what stayed in the cache."""
    rows = np.concatenate([row_ids(tokens) for tokens, _ in epoch(0)])
    if len(np.unique(rows)) != len(rows) or len(rows) < num_rows - 2 * BATCH:
        raise AssertionError(f"{len(rows)} rows, {len(np.unique(rows))} different ones")
    if np.abs(np.diff(rows)).mean() < BATCH / 4:
        raise AssertionError("the rows are not shuffled")
    stayed, count, seconds, cpu, others = 0.0, 0, 0.0, 0.0, 0.0
    for number in range(1, EPOCHS):
        gc.collect()
        stayed = max(stayed, before())
        began, own, busy = time.perf_counter(), cpu_s(), busy_s()
        for tokens, _ in epoch(number):
            count += len(tokens)
        seconds += time.perf_counter() - began
        own = cpu_s() - own
        cpu, others = cpu + own, others + max(0.0, busy_s() - busy - own)
    return {
        "images_per_s": count / seconds,
        "cpu_us_an_image": 1e6 * cpu / count,
        "memory_MB": memory_bytes() / 1e6,
        "stayed_in_cache": stayed,
        "other_processes": others / seconds / (os.cpu_count() or 1),
    }


def row_ids(tokens: Any) -> np.ndarray:
    first = np.ascontiguousarray(np.asarray(tokens)[:, 0, :4])
    return first.view(np.int32)[:, 0].copy()
