"""Numbers as people read them."""

from __future__ import annotations

import math


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


def number(value: float) -> str:
    """Three digits at the least, no exponent: '1,234', '56.7', '0.0891'."""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def hours(value: float) -> str:
    """Hours in the unit that suits: '7.11 h', '35.6 min', '2.10 s'."""
    if abs(value) >= 1:
        return f"{number(value)} h"
    return f"{number(value * 60)} min" if abs(value) >= 1 / 60 else f"{number(value * 3600)} s"
