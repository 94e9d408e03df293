"""Ranges of numbers on the command line."""

from __future__ import annotations

import pytest

from repa_pipeline.ranges import check_intervals, check_numbers, intervals, numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.8", (1.8,)),
        ("1,1.4:1.6:0.1", (1.0, 1.4, 1.5, 1.6)),
        ("1:2:0.4", (1.0, 1.4, 1.8)),
        ("1, 1:1.2:0.1", (1.0, 1.1, 1.2)),
        ("3:3:1", (3.0,)),
    ],
)
def test_numbers(text: str, expected: tuple[float, ...]) -> None:
    assert numbers(text) == expected


def test_a_range_has_the_numbers_one_reads() -> None:
    found = numbers("1.0:2.5:0.1")
    assert found == tuple(round(1 + i / 10, 1) for i in range(16))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,1", ((0.0, 1.0),)),
        ("0,0.6:0.8:0.1", ((0.0, 0.6), (0.0, 0.7), (0.0, 0.8))),
        ("0:0.5:0.5,0.2:0.7:0.5", ((0.0, 0.2), (0.0, 0.7), (0.5, 0.7))),
    ],
)
def test_intervals(text: str, expected: tuple[tuple[float, float], ...]) -> None:
    assert intervals(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "1:2", "1:2:0", "2:1:0.5", "1:2:-1", "nan", "inf", "0:1:1e-9", "1:2:3:4"]
)
def test_what_is_no_range_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ValueError, match="numbers"):
        numbers(text)
    assert "numbers" in (check_numbers(text) or "")


def test_negative_scales_are_refused() -> None:
    assert check_numbers("-1:1:0.5") == "numbers of 0 or more"
    assert check_numbers("0:1:0.5") is None


@pytest.mark.parametrize("text", ["0.5", "0,1,2", "0.8,0.2", "0,1.2", "-0.1,1", "0,x"])
def test_what_is_no_interval_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ValueError, match="LOW|numbers"):
        intervals(text)
    assert check_intervals(text) and not check_intervals("0,0.6:0.8:0.1")
