"""Whole numbers that launches are made of.

In plain Python: Triton's own `cdiv` and `next_power_of_2` can be called inside of kernels as well, and take some ten
microseconds outside, at every launch.
"""

from __future__ import annotations


def divided_up(number: int, by: int) -> int:
    """The least whole number of `by` that holds `number`."""
    return -(-number // by)


def power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, at least 1."""
    return 1 << max(0, number - 1).bit_length()
