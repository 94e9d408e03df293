"""Numbers as people read them."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Bytes in decimal units: '25.2 GB'."""
    value = float(num_bytes)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def count(number: int, noun: str) -> str:
    """'1 shard', '2,503 shards'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
