"""Numbers with units, as people read them: in tables, messages and recommendations.

Owns prefixes, digits and plurals, so that a small number never reads 0.00 and no run has "1 steps". Does not own what
is shown. GB is 1e9 bytes, GiB is 2**30 bytes: what is computed stays in bytes and seconds, and is converted here.
"""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_BINARY_PREFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def gb(num_bytes: float) -> str:
    """Bytes in the decimal unit that suits them: "41.23 GB", "3.15 MB", "512 B"."""
    return _scaled(num_bytes, 1000, _PREFIXES)


def gib(num_bytes: float) -> str:
    """Bytes in the binary unit that suits them, as memory is sold and capped: "2.94 GiB"."""
    return _scaled(num_bytes, 1024, _BINARY_PREFIXES)


def duration(value_s: float) -> str:
    """Seconds in the unit that suits them: "29,420 s", "1.50 s", "12.30 ms", "8.00 us"."""
    if value_s >= 999.995:
        return f"{count(round(value_s))} s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if round(value_s * factor, 2) >= 1:
            return f"{value_s * factor:.2f} {unit}"
    return f"{value_s * 1e9:.0f} ns" if value_s else "0 s"


def rate(per_s: float) -> str:
    """Of things per second, with three digits: "0.295", "38.2", "1,005"."""
    return count(round(per_s)) if per_s >= 99.95 else f"{per_s:.3g}"


def count(number: int) -> str:
    """A number of things, grouped where it is long: "4096", "16,777,216"."""
    return f"{number:,}" if abs(number) >= 10_000 else str(number)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with what it counts: "1 step", "0 steps", "131,072 tokens"; `many` where an s is not enough."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def _scaled(num_bytes: float, base: int, prefixes: tuple[str, ...]) -> str:
    value, power = float(num_bytes), 0
    while round(abs(value), 2) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{value:.2f} {prefixes[power]}B" if power else f"{value:.0f} B"
