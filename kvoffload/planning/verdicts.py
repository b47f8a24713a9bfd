"""How a step that offloads compares, in words: beside plain generation, and beside full transfer.

Owns the one wording of statistics, plans and recommendations. Does not own what is compared: seconds are measured or
predicted elsewhere.
"""

from __future__ import annotations

from kvoffload.units import count, duration

SAME_FRACTION = 0.05  # predictions are not better than that


def beside_plain(step_s: float, plain_s: float, *, is_measured: bool = False, fits: bool = True) -> str:
    """Offloading beside plain generation on the device.

    Args:
        step_s: seconds with offloading: of a step, or for the next token of each sequence, or of everything.
        plain_s: of the same without.
        is_measured: both were; else the cost model predicts both.
        fits: whether weights and cache are known to fit on the device.
    """
    how = "measured" if is_measured else "predicted"
    where = ", weights and cache fit on the device" if fits else ""
    slower = step_s / plain_s
    if slower >= 1 + SAME_FRACTION:
        return f"do not offload: {how} {times(slower)} slower than without{where}"
    if slower > 1 / (1 + SAME_FRACTION):
        return f"do not offload: {how} no faster than without{where}"
    return f"offload: {how} {times(1 / slower)} as fast as without{', though' + where[1:] if where else ''}"


def beside_full_transfer(step_s: float, full_s: float) -> str:
    """Offloading beside full transfer, whose step is predicted; seconds as of `beside_plain`."""
    ratio, full = full_s / step_s, f"the predicted full transfer ({duration(full_s)} a step)"
    return f"{ratio:.2f}x as fast as {full}" if ratio >= 0.995 else f"{times(1 / ratio)} slower than {full}"


def times(ratio: float) -> str:
    """How many times: "1.84x", "8.6x", "120x"."""
    if ratio >= 99.5:
        return f"{count(round(ratio))}x"
    return f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"
