"""Options that several commands share, checked under their own name and in their own unit before anything is loaded.

Owns names, help and the range of each value. Does not own what is done with them: the configuration and the workload
check again what they are given from Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvoffload.config import EmulatedLink
from kvoffload.errors import ConfigError
from kvoffload.machine.datasheet import link_named
from kvoffload.units import count

LARGEST = 10**9  # of anything counted
Rule = Callable[[Any], bool]


def _checked(rule: Rule, wanted: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """A callback that lets a value pass, or says what the option must be; an option that is left out is fine."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not rule(value):
            raise ConfigError(f"{'/'.join(param.opts)} must be {wanted}, got {value}")
        return value

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def whole_number(least: int = 1) -> Callable[[typer.CallbackParam, Any], Any]:
    """A count."""
    return _checked(
        lambda value: isinstance(value, int) and least <= value <= LARGEST,
        f"a whole number from {least} to {count(LARGEST)}",
    )


def within(low: float, high: float, what: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """A number from `low` to `high`."""
    return _checked(lambda value: _is_number(value) and low <= value <= high, f"{what} from {low:g} to {high:g}")


def above_zero(unit: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """A positive number."""
    return _checked(lambda value: _is_number(value) and value > 0, f"a number above zero ({unit})")


def one_of(*words: str) -> Callable[[typer.CallbackParam, Any], Any]:
    """One of a few words."""
    return _checked(lambda value: value in words, _listed(words))


def number_or(*words: str, wanted: str, rule: Rule) -> Callable[[typer.CallbackParam, Any], Any]:
    """One of a few words, or a number."""
    return _checked(
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


def _tokens(text: str | int) -> Any:
    """A count of tokens: 4096, "128k", "1m"; else the text, which the callback refuses."""
    match = re.fullmatch(r"(-?\d+)\s*([km]?)", str(text).strip().lower())
    if match is None:
        return text
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]]


def _number_or_word(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ModelConfig = Annotated[
    str,
    typer.Option(
        "--config",
        "--model",
        help="A config.json or its folder, OWNER/NAME on the hub, or a size by name such as llama-3.1-8b.",
    ),
]
Hardware = Annotated[
    str,
    typer.Option(
        help="A device by name such as 4090 (kvoffload hardware lists them), a profile, or 'auto': this machine."
    ),
]
ManyHardware = Annotated[
    str,
    typer.Option(
        help="A device by name such as 4090, several as l4,4090,h200, 'all' (kvoffload hardware lists them), a "
        "profile, or 'auto' for this machine."
    ),
]
Batch = Annotated[int, typer.Option(callback=whole_number(), help="Sequences.")]
PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt-tokens",
        "--seq",
        parser=_tokens,
        metavar="TOKENS",
        callback=whole_number(),
        help="Tokens of each prompt, such as 4096 or 128k (of 1024); --seq is the same.",
    ),
]
NumNewTokens = Annotated[
    int,
    typer.Option(
        parser=_tokens, metavar="TOKENS", callback=whole_number(), help="Tokens to generate for each sequence."
    ),
]
LinkSpeed = Annotated[
    float | None,
    typer.Option(
        "--link-gb-per-s", callback=above_zero("GB/s"), help="Speed of an emulated link, where there is no GPU."
    ),
]
LatencyUs = Annotated[
    float,
    typer.Option(
        callback=within(0, 1e6, "a number of microseconds"),
        help="Latency of each copy over the emulated link, in microseconds.",
    ),
]
Acceptance = Annotated[
    float | None,
    typer.Option(
        callback=within(0, 1, "a share"),
        help="Of verified drafts, the share that is assumed to be right, 0..1; default: 0.7 where they read the newest "
        "tokens, 0.9 where they read 4-bit copies of all.",
    ),
]
Split = Annotated[
    Any,
    typer.Option(
        parser=_number_or_word,
        metavar="WORD|SHARE",
        callback=number_or(
            *("auto", "transfer", "recompute"), wanted="a share from 0 to 1", rule=lambda value: 0 <= value <= 1
        ),
        help="'auto', 'transfer', 'recompute', or the share 0..1 of offloaded tokens stored as activations.",
    ),
]
DeviceGib = Annotated[
    Any,
    typer.Option(
        parser=_number_or_word,
        metavar="WORD|GIB",
        callback=number_or("auto", "min", wanted="a number of GiB above zero", rule=lambda value: value > 0),
        help="Cap in GiB on device memory for the cache; 'auto', or 'min' for as little as works.",
    ),
]
HostGib = Annotated[
    Any,
    typer.Option(
        parser=_number_or_word,
        metavar="WORD|GIB",
        callback=number_or("auto", wanted="a number of GiB above zero", rule=lambda value: value > 0),
        help="Cap in GiB on host memory for the cache, or 'auto'.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        callback=_checked(
            lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None, "'cpu', 'cuda' or 'cuda:N'"
        ),
        help="Where the model runs, loaded into host memory: 'cuda' or 'cuda:N'; layers that do not fit are streamed.",
    ),
]
DeviceWeightsGib = Annotated[
    Any,
    typer.Option(
        parser=_number_or_word,
        metavar="WORD|GIB",
        callback=number_or("auto", "all", wanted="a number of GiB above zero", rule=lambda value: value > 0),
        help="Device memory in GiB for weights, layers beyond it are streamed; 'auto', or 'all' for every weight.",
    ),
]
DraftCache = Annotated[
    Any,
    typer.Option(
        callback=one_of("auto", "window", "int4"),
        help="What verified drafts read: exact copies of the newest tokens, or 4-bit copies of all.",
    ),
]
KvDtype = Annotated[
    Any,
    typer.Option(
        callback=one_of("model", "int8", "int4", "int2"),
        help="'model' is exact; 'int8', 'int4' or 'int2': K/V in so many bits, with loss (kvoffload quality).",
    ),
]


def bits(of: str) -> Any:
    """An option for a width in bits."""
    return typer.Option(callback=within(1, 64, "a number of bits"), help=of)


WeightBits = Annotated[
    float | None, bits("Bits per weight of the layers, such as 8 or 4.5 with scales; default: the model's own.")
]


def share(of: str) -> Any:
    """An option for a share."""
    return typer.Option(callback=within(0, 1, "a share"), help=of)


def emulated_link(gb_per_s: float | None, latency_us: float = 0.0) -> EmulatedLink | None:
    """The emulated link that `--link-gb-per-s` and `--latency-us` ask for.

    Raises:
        ConfigError: a latency without a speed.
    """
    if gb_per_s is None:
        if latency_us:
            raise ConfigError(
                f"--latency-us {latency_us:g} needs --link-gb-per-s: an unpaced link has no time to add it to"
            )
        return None
    return EmulatedLink(h2d_gb_per_s=gb_per_s, latency_s=latency_us * 1e-6)
