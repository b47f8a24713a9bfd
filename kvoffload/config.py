"""What a user may choose, checked when it is chosen. Frozen; "auto" is resolved where the facts are known."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvoffload.errors import ConfigError, UnknownOptionError
from kvoffload.machine.hardware_profile import HardwareProfile

GIB = 2**30
MOST_DRAFTS = 15  # in a round: 16 tokens are checked together
Auto = Literal["auto"]
Schedule = Literal["pipelined", "kvpr"]
KindT = TypeVar("KindT")


def check_options(kind: type[Any], values: Mapping[str, Any], *, says: str = "has no option") -> None:
    """Every key is a field of the dataclass.

    Raises:
        UnknownOptionError: one is not; with the nearest name.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise UnknownOptionError(f"{kind.__name__} {says} {key!r}; {hint}")


def _names_the_nearest(kind: type[KindT]) -> type[KindT]:
    """The dataclass, which refuses an unknown argument with the nearest name."""
    made = kind.__init__

    @functools.wraps(made)
    def checked(self: KindT, *args: Any, **options: Any) -> None:
        check_options(kind, options, says="got an unexpected keyword argument")
        made(self, *args, **options)

    kind.__init__ = checked  # type: ignore[assignment, method-assign]
    return kind


def _positive(name: str, value: float, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be a number above zero ({unit}), got {value!r}")


@_names_the_nearest
@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedLink:
    """A host-device link emulated by a paced copy thread, for machines without a GPU.

    Args:
        h2d_gb_per_s: host to device bandwidth in GB/s (1e9 bytes); None copies unpaced.
        d2h_gb_per_s: device to host bandwidth in GB/s; None means the same as `h2d_gb_per_s`.
        latency_s: seconds added to each copy.

    Raises:
        ConfigError: a value outside its range, or an argument that does not exist (with the nearest one).
    """

    h2d_gb_per_s: float | None = None
    d2h_gb_per_s: float | None = None
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("h2d_gb_per_s", "d2h_gb_per_s"):
            value = getattr(self, name)
            if value is not None:
                _positive(f"EmulatedLink.{name}", value, "GB/s; None for an unpaced link")
        if isinstance(self.latency_s, bool) or not math.isfinite(self.latency_s) or self.latency_s < 0:
            raise ConfigError(f"EmulatedLink.latency_s must be zero or more seconds, got {self.latency_s!r}")


@_names_the_nearest
@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadConfig:
    """Options of `kvoffload.offload`. Every "auto" is decided from the machine, the model and the call.

    Args:
        split: "auto" plans; "transfer" moves K/V bit for bit; "recompute" stores activations only; a number
            is the share (0..1) of the offloaded tokens stored as activations.
        device_gib: cap in GiB on everything held on the device; "min" as little as works; "auto" what is free
            after weights and the prefill peak ("min" on an emulated link).
        host_gib: cap in GiB on host memory for the cache.
        block_tokens: tokens per block, the unit of storage.
        chunk_blocks: blocks per chunk, the unit of transfer and recomputation.
        slots: staging buffers on the device, one chunk each, at least 1.
        overlap: False copies, waits, then computes (for ablation).
        schedule: "pipelined", or "kvpr" for the paper's schedule.
        attention: "auto" attends to each chunk where it arrives (device memory does not grow with the context) where
            the model and the call allow it and the link has a speed; "whole_layer" puts a layer's K/V together first.
        speculate: verified drafts, several tokens for one pass over the link (docs/drafts.md). "auto" where greedy
            decoding gains by them; a number (1..15) drafts that many, in sampling too; "off" (or 0) never.
        draft_cache: what drafts read of the blocks on the host. "window": exact copies of the newest; "int4": copies of
            4 bits of all, where these fit on the device (else the window); "auto": what the plan predicts to be faster.
        kv_dtype: "model" stores K and V exactly; "int8", "int4" or "int2" allows forms of that many bits and more, with
            loss (docs/quality.md): plans take the coarsest only where a step gets shorter by it.
        device: where the model runs, such as "cuda" for a model in host memory: what fits goes there, decoder layers
            beyond that are streamed (docs/weights.md). None: where the model is.
        device_weights_gib: device memory for weights, in GiB: decoder layers beyond it stay in host memory and cross
            the link in every forward. "auto": as much as the cache leaves; "all": every weight.
        packing: "auto" packs blocks of bfloat16 without loss where the plan predicts that it is faster (a given split
            without a profile predicts nothing); "off" never.
        deterministic: True fixes split, shares and the number of drafts by the first plan, from the profile alone: no
            timing of a run changes them, so that runs in half precision are alike. A profile is still measured once.
        profile: a HardwareProfile, a path to one, or "auto" (stored for this machine, else measured once).
        link: "auto" (CUDA, else an unpaced emulated link) or an EmulatedLink.

    Raises:
        ConfigError: a value outside its range, naming the option and what it accepts, or an option that does not exist
            (with the nearest one; a TypeError as well).
    """

    split: Literal["auto", "transfer", "recompute"] | float = "auto"
    device_gib: Literal["auto", "min"] | float = "auto"
    host_gib: Auto | float = "auto"
    block_tokens: Auto | int = "auto"
    chunk_blocks: Auto | int = "auto"
    slots: Auto | int = "auto"
    overlap: bool = True
    schedule: Schedule = "pipelined"
    attention: Literal["auto", "whole_layer"] = "auto"
    speculate: Literal["auto", "off"] | int = "auto"
    draft_cache: Literal["auto", "window", "int4"] = "auto"
    kv_dtype: Literal["model", "int8", "int4", "int2"] = "model"
    packing: Literal["auto", "off"] = "auto"
    device: str | None = None
    device_weights_gib: Literal["auto", "all"] | float = "auto"
    deterministic: bool = False
    profile: HardwareProfile | str | Path = "auto"
    link: Auto | EmulatedLink = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.split, str):
            if self.split not in ("auto", "transfer", "recompute"):
                raise ConfigError(
                    f"split must be 'auto', 'transfer', 'recompute' or a number from 0 to 1, got {self.split!r}"
                )
        elif isinstance(self.split, bool) or not isinstance(self.split, (int, float)) or not 0 <= self.split <= 1:
            raise ConfigError(f"split is a share and must lie in 0..1, got {self.split!r}")
        for name, words in (
            ("device_gib", ("auto", "min")),
            ("host_gib", ("auto",)),
            ("device_weights_gib", ("auto", "all")),
        ):
            value = getattr(self, name)
            if isinstance(value, str):
                if value not in words:
                    raise ConfigError(f"{name} must be one of {words} or a number of GiB, got {value!r}")
            else:
                _positive(name, value, "GiB")
        for name in ("block_tokens", "chunk_blocks", "slots"):
            value = getattr(self, name)
            if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be 'auto' or a whole number of at least 1, got {value!r}")
        for name in ("overlap", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.schedule not in ("pipelined", "kvpr"):
            raise ConfigError(f"schedule must be 'pipelined' or 'kvpr', got {self.schedule!r}")
        for name, choices in (
            ("draft_cache", ("auto", "window", "int4")),
            ("kv_dtype", ("model", "int8", "int4", "int2")),
            ("packing", ("auto", "off")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.attention not in ("auto", "whole_layer"):
            raise ConfigError(f"attention must be 'auto' or 'whole_layer', got {self.attention!r}")
        is_number = isinstance(self.speculate, int) and not isinstance(self.speculate, bool)
        if self.speculate not in ("auto", "off") and not (is_number and 0 <= int(self.speculate) <= MOST_DRAFTS):
            raise ConfigError(
                f"speculate must be 'auto', 'off' or a whole number of drafts from 1 to {MOST_DRAFTS}, "
                f"got {self.speculate!r}"
            )
        if self.device is not None and not (isinstance(self.device, str) and self.device):
            raise ConfigError(f"device must be a name such as 'cuda' or 'cuda:1', or None, got {self.device!r}")
        if not isinstance(self.profile, (HardwareProfile, str, Path)):
            raise ConfigError(f"profile must be 'auto', a path or a HardwareProfile, got {self.profile!r}")
        if self.link != "auto" and not isinstance(self.link, EmulatedLink):
            raise ConfigError(f"link must be 'auto' or a kvoffload.EmulatedLink, got {self.link!r}")

    def to_json(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON can hold them; `from_json` reads them back.

        Returns:
            Names and values.

        Raises:
            ConfigError: a profile that is not a name or a path.
        """
        if isinstance(self.profile, HardwareProfile):
            raise ConfigError("a HardwareProfile is no text: save() it and give the path as profile=")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["profile"] = str(self.profile)
        changed = {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}
        if isinstance(self.link, EmulatedLink):
            changed["link"] = {name: value for name, value in dataclasses.asdict(self.link).items() if value}
        return changed

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> OffloadConfig:
        """A configuration from option names and values, as `to_json` gives them.

        Args:
            options: by name; `link` may be a mapping with those of `EmulatedLink`.

        Raises:
            ConfigError: an unknown option (with the nearest one), or a value outside its range.
        """
        values = dict(options)
        link = values.get("link")
        if isinstance(link, Mapping):
            check_options(EmulatedLink, link)
            values["link"] = EmulatedLink(**link)
        check_options(cls, values)
        return cls(**values)

    @property
    def fixed_drafts(self) -> int | None:
        """The number of drafts the user asked for, 0 for none, or None for "auto"."""
        if isinstance(self.speculate, str):
            return {"auto": None, "off": 0}[self.speculate]
        return self.speculate

    @property
    def fixed_split(self) -> float | None:
        """The share of activations the user asked for, or None for "auto"."""
        if isinstance(self.split, str):
            return {"auto": None, "transfer": 0.0, "recompute": 1.0}[self.split]
        return float(self.split)


_DEFAULTS = OffloadConfig()
