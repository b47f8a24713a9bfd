"""Numbers as people read them: nothing small is rounded away, nothing large runs out of units."""

from __future__ import annotations

import pytest

from kvoffload.units import count, counted, duration, gb, gib


@pytest.mark.parametrize(
    ("num_bytes", "decimal", "binary"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1000, "1.00 kB", "1000 B"),
        (1023.99, "1.02 kB", "1024 B"),
        (1024, "1.02 kB", "1.00 KiB"),
        (350_000, "350.00 kB", "341.80 KiB"),
        (999_999_999, "1.00 GB", "953.67 MiB"),
        (40 * 10**9, "40.00 GB", "37.25 GiB"),
        (2 * 10**14, "200.00 TB", "181.90 TiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_suits_them(num_bytes: float, decimal: str, binary: str) -> None:
    assert gb(num_bytes) == decimal
    assert gib(num_bytes) == binary


@pytest.mark.parametrize(
    ("value_s", "text"),
    [
        (0.0, "0 s"),
        (29419.72, "29,420 s"),
        (999.996, "1000 s"),
        (75.0, "75.00 s"),
        (0.99, "990.00 ms"),
        (0.999999, "1.00 s"),
        (0.0123, "12.30 ms"),
        (8e-6, "8.00 us"),
        (3e-8, "30 ns"),
    ],
)
def test_durations_are_shown_in_the_unit_that_suits_them(value_s: float, text: str) -> None:
    assert duration(value_s) == text


def test_long_numbers_are_grouped_and_one_thing_is_no_plural() -> None:
    assert [count(number) for number in (0, 1024, 9999, 10_000, 2**24)] == ["0", "1024", "9999", "10,000", "16,777,216"]
    assert [counted(number, "step") for number in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(number, "is", "are") for number in (1, 131_072)] == ["1 is", "131,072 are"]
