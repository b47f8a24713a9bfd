"""Options that several commands share, checked under their own name and in their own unit before anything is loaded.

Owns names, help and panels. Does not own the range of each value (`rules`) nor what is done with them: the
configuration and the workload check again what they are given from Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvoffload.cli.rules import (
    a_file_to_write,
    a_link,
    above_zero,
    checked,
    number_or,
    number_or_word,
    one_of,
    tokens,
    whole_number,
    within,
)
from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.machine.datasheet import preset_names
from kvoffload.model.known_models import known_models

__all__ = ["a_file_to_write", "a_link", "above_zero", "number_or", "one_of", "whole_number", "within"]  # of the rules

WORKLOAD, MACHINE, COST, OFFLOADING = "Workload", "Machine", "Cost", "Offloading"  # panels of `--help`
PRECISION = "Bits and places"
DRAFT_CACHES = ("auto", "window", "int4")
KV_DTYPES = ("model", "int8", "int4", "int2")


def completed(*words: str) -> Callable[[str], list[str]]:
    """What a shell offers for an option."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print a line of JSON for each answer.")]
Model = Annotated[str | None, typer.Option(help="Folder, hub id or GGUF file; default: the demo's small model.")]
System = Annotated[str | None, typer.Option(help="A system's message before the first one.")]
MaxNewTokens = Annotated[int, typer.Option(callback=whole_number(), help="Tokens of an answer at most.")]
ModelConfig = Annotated[
    str,
    typer.Option(
        "--config",
        "--model",
        autocompletion=lambda incomplete: completed(*known_models())(incomplete),
        help="A config.json or its folder, OWNER/NAME on the hub, or a size by name such as llama-3.1-8b.",
    ),
]
Hardware = Annotated[
    str,
    typer.Option(
        autocompletion=lambda incomplete: completed("auto", *preset_names())(incomplete),
        rich_help_panel=MACHINE,
        help="A device by name such as 4090 (kvoffload hardware lists them), a profile, or 'auto': this machine.",
    ),
]
ManyHardware = Annotated[
    str,
    typer.Option(
        autocompletion=lambda incomplete: completed("auto", "all", *preset_names())(incomplete),
        rich_help_panel=MACHINE,
        help="A device by name such as 4090, several as l4,4090,h200, 'all' (kvoffload hardware lists them), a "
        "profile, or 'auto' for this machine.",
    ),
]
Batch = Annotated[int, typer.Option(callback=whole_number(), rich_help_panel=WORKLOAD, help="Sequences.")]
PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt-tokens",
        "--seq",
        parser=tokens,
        metavar="TOKENS",
        callback=whole_number(),
        rich_help_panel=WORKLOAD,
        help="Tokens of each prompt, such as 4096 or 128k (of 1024); --seq is the same.",
    ),
]
NumNewTokens = Annotated[
    int,
    typer.Option(
        parser=tokens,
        metavar="TOKENS",
        callback=whole_number(),
        rich_help_panel=WORKLOAD,
        help="Tokens to generate for each sequence.",
    ),
]
LinkSpeed = Annotated[
    float | None,
    typer.Option(
        "--link-gb-per-s",
        callback=above_zero("GB/s"),
        rich_help_panel=MACHINE,
        help="Speed of an emulated link, where there is no GPU.",
    ),
]
LatencyUs = Annotated[
    float,
    typer.Option(
        callback=within(0, 1e6, "a number of microseconds"),
        rich_help_panel=MACHINE,
        help="Latency of each copy over the emulated link, in microseconds.",
    ),
]
Acceptance = Annotated[
    float | None,
    typer.Option(
        callback=within(0, 1, "a share"),
        rich_help_panel=OFFLOADING,
        help="The chance with which a verified draft is assumed to be right, 0..1; default: 0.7 where they read the "
        "newest tokens, 0.9 where they read 4-bit copies of all.",
    ),
]
Split = Annotated[
    Any,
    typer.Option(
        parser=number_or_word,
        metavar="WORD|SHARE",
        callback=number_or(
            *("auto", "transfer", "recompute"), wanted="a share from 0 to 1", rule=lambda value: 0 <= value <= 1
        ),
        rich_help_panel=OFFLOADING,
        help="'auto', 'transfer', 'recompute', or the share 0..1 of offloaded tokens stored as activations.",
    ),
]
DeviceGib = Annotated[
    Any,
    typer.Option(
        parser=number_or_word,
        metavar="WORD|GIB",
        callback=number_or("auto", "min", wanted="a number of GiB above zero", rule=lambda value: value > 0),
        rich_help_panel=OFFLOADING,
        help="Cap in GiB on device memory for the cache; 'auto', or 'min' for as little as works.",
    ),
]
HostGib = Annotated[
    Any,
    typer.Option(
        parser=number_or_word,
        metavar="WORD|GIB",
        callback=number_or("auto", wanted="a number of GiB above zero", rule=lambda value: value > 0),
        rich_help_panel=OFFLOADING,
        help="Cap in GiB on host memory for the cache, or 'auto'.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        callback=checked(
            lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None, "'cpu', 'cuda' or 'cuda:N'"
        ),
        rich_help_panel=OFFLOADING,
        help="Where the model runs, loaded into host memory: 'cuda' or 'cuda:N'; layers that do not fit are streamed.",
    ),
]
DeviceWeightsGib = Annotated[
    Any,
    typer.Option(
        parser=number_or_word,
        metavar="WORD|GIB",
        callback=number_or("auto", "all", wanted="a number of GiB above zero", rule=lambda value: value > 0),
        rich_help_panel=OFFLOADING,
        help="Device memory in GiB for weights, layers beyond it are streamed; 'auto', or 'all' for every weight.",
    ),
]
DraftCache = Annotated[
    Any,
    typer.Option(
        metavar="|".join(DRAFT_CACHES),
        autocompletion=completed(*DRAFT_CACHES),
        callback=one_of(*DRAFT_CACHES),
        rich_help_panel=OFFLOADING,
        help="What verified drafts read: exact copies of the newest tokens, or 4-bit copies of all.",
    ),
]
KvDtype = Annotated[
    Any,
    typer.Option(
        metavar="|".join(KV_DTYPES),
        autocompletion=completed(*KV_DTYPES),
        callback=one_of(*KV_DTYPES),
        rich_help_panel=OFFLOADING,
        help="'model' is exact; 'int8', 'int4' or 'int2': K/V in so many bits, with loss (kvoffload quality).",
    ),
]


def bits(of: str) -> Any:
    """An option for a width in bits."""
    return typer.Option(callback=within(1, 64, "a number of bits"), rich_help_panel=PRECISION, help=of)


WeightBits = Annotated[
    float | None, bits("Bits per weight of the layers, such as 8 or 4.5 with scales; default: the model's own.")
]


def share(of: str) -> Any:
    """An option for a share."""
    return typer.Option(callback=within(0, 1, "a share"), rich_help_panel=PRECISION, help=of)


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


def config_of(
    split: Any,
    kv_dtype: Any,
    draft_cache: Any,
    device: str | None,
    device_weights_gib: Any,
    device_gib: Any,
    host_gib: Any,
    link_gb_per_s: float | None,
) -> OffloadConfig:
    """The configuration that the options of a command that generates stand for."""
    return OffloadConfig(
        split=split,
        kv_dtype=kv_dtype,
        draft_cache=draft_cache,
        device=device,
        device_weights_gib=device_weights_gib,
        device_gib=device_gib,
        host_gib=host_gib,
        link=emulated_link(link_gb_per_s) or "auto",
    )
