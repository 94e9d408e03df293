"""Numbers written as ranges, for commands that try many: `1.0:2.5:0.1`, `0,0.6:0.8:0.05`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

MAX_NUMBERS = 10_000


def numbers(text: str) -> tuple[float, ...]:
    """`1,1.4:1.6:0.1` -> (1.0, 1.4, 1.5, 1.6): FROM:TO:STEP has both ends, as far as steps meet it.

    Counted in decimals, so 1.0:2.5:0.1 has exactly the numbers one reads. Raises ValueError that
    says what is expected.
    """
    found = [number for part in text.split(",") for number in _range(part.strip())]
    return tuple(dict.fromkeys(found))


def intervals(text: str) -> tuple[tuple[float, float], ...]:
    """`0,0.6:0.8:0.1` -> ((0, 0.6), (0, 0.7), (0, 0.8)): every low end with every high end.

    Pairs with LOW above HIGH are left out. Raises ValueError where none is left, an end is not in
    [0, 1], or there are not two parts.
    """
    ends = text.split(",")
    if len(ends) != 2:
        raise ValueError("LOW,HIGH, each a number or FROM:TO:STEP")
    lows, highs = (tuple(_range(end.strip())) for end in ends)
    pairs = tuple(pair for pair in itertools.product(lows, highs) if pair[0] <= pair[1])
    if not pairs or min(lows) < 0 or max(highs) > 1:
        raise ValueError("LOW,HIGH with 0 <= LOW <= HIGH <= 1")
    return pairs


def check_numbers(text: str) -> str | None:
    """A check of a setting of numbers, 0 or more: what is expected of it, None when it is right."""
    expected = _expected(numbers, text)
    return expected or ("numbers of 0 or more" if min(numbers(text)) < 0 else None)


def check_intervals(text: str) -> str | None:
    """The same for intervals."""
    return _expected(intervals, text)


def _expected(read: Callable[[str], object], text: str) -> str | None:
    try:
        read(text)
    except ValueError as error:
        return str(error)
    return None


def _range(part: str) -> list[float]:
    try:
        ends = [Decimal(end) for end in part.split(":")]
    except InvalidOperation:
        ends = []
    if len(ends) not in (1, 3) or not all(end.is_finite() for end in ends):
        raise ValueError("numbers and FROM:TO:STEP, with commas between")
    if len(ends) == 1:
        return [float(ends[0])]
    first, last, step = ends
    if step <= 0 or last < first or (last - first) / step >= MAX_NUMBERS:
        raise ValueError(f"FROM <= TO, STEP above 0, at most {MAX_NUMBERS:,} numbers")
    return [float(first + i * step) for i in range(int((last - first) / step) + 1)]
