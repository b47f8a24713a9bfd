"""What the value of an option must be: checked under the option's own name, before anything is loaded.

Owns the rules and the message of each. Does not own the options (`options`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from kvoffload.errors import ConfigError
from kvoffload.machine.datasheet import link_named
from kvoffload.units import count

LARGEST = 10**9  # of anything counted
Rule = Callable[[Any], bool]


def checked(rule: Rule, wanted: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """A callback that lets a value pass, or says what the option must be; an option that is left out is fine."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not rule(value):
            raise ConfigError(f"{'/'.join(param.opts)} must be {wanted}, got {value}")
        return value

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def whole_number(least: int = 1, most: int = LARGEST) -> Callable[[typer.CallbackParam, Any], Any]:
    """A count."""
    return checked(
        lambda value: isinstance(value, int) and least <= value <= most,
        f"a whole number from {least} to {count(most)}",
    )


def within(low: float, high: float, what: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """A number from `low` to `high`."""
    return checked(lambda value: _is_number(value) and low <= value <= high, f"{what} from {low:g} to {high:g}")


def above_zero(unit: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """A positive number."""
    return checked(lambda value: _is_number(value) and value > 0, f"a number above zero ({unit})")


def one_of(*words: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """One of a few words."""
    return checked(lambda value: value in words, _listed(words))


def number_or(*words: str, wanted: str, rule: Rule) -> Callable[[typer.CallbackParam, Any], Any]:
    """One of a few words, or a number."""
    return checked(
        lambda value: value in words if isinstance(value, str) else _is_number(value) and rule(value),
        f"{_listed(words)} or {wanted}",
    )


def a_link(param: typer.CallbackParam, value: str | None) -> str | None:
    """A link by its name, or by its bandwidth."""
    if value is not None:
        try:
            link_named(value)
        except ConfigError as error:
            raise ConfigError(f"{param.opts[0]}: {error}") from error
    return value


def a_file_to_write(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """A file that can be written, or "-": asked before the work of which it will hold the result."""
    if value is not None and str(value) != "-":
        is_new = not value.exists()
        try:
            value.open("a").close()
        except OSError as error:
            why = error.strerror if value.parent.is_dir() else f"there is no folder {value.parent}"
            raise ConfigError(f"{param.opts[0]}: cannot write {value}: {why}; choose another file") from error
        if is_new:
            value.unlink()
    return value


def _listed(words: tuple[str, ...]) -> str:
    return " or ".join(f"'{word}'" for word in words)


def tokens(text: str | int) -> Any:
    """A count of tokens: 4096, "128k", "1m"; else the text, which the callback refuses."""
    match = re.fullmatch(r"(-?\d+)\s*([km]?)", str(text).strip().lower().replace(",", ""))
    if match is None:
        return text
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]]


def number_or_word(text: str) -> Any:
    """What an option holds that takes either."""
    try:
        return float(text)
    except ValueError:
        return text
