"""What is known of a device without measuring it: the presets, and files of the same form that a user writes.

Owns the fields, their checks, where each number comes from, and the arithmetic from figures to the curves of a profile.
Does not own profiles (`hardware_profile`) nor measuring (`profiler/`). Peaks are those of dense operands; no achieved
rate is claimed but the link's: nominal PCIe bandwidth is never reached, so the *achievable* one of pinned copies stands
beside it and is what counts.

    GEMM       max(2*m*n*k / peak, bytes of both operands and the result / memory bandwidth)
    attention  bytes of K/V / memory bandwidth
    copies     bytes / achievable link bandwidth, no latency

A file: the fields of a preset with "schema_version", as JSON; or with "like" the name of a preset, and what differs:

    {"schema_version": 1, "like": "a100-40gb-pcie4", "price_per_hour": 1.2}

Source: the roofline model (Williams et al. 2009).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from kvoffload.errors import ConfigError, ProfileError
from kvoffload.machine.dtypes import BITS

DATASHEET_SCHEMA_VERSION = 1
PRESETS = Path(__file__).parent / "presets.json"
COPY_BYTES = (*(2**exponent for exponent in range(12, 27, 2)), 2**30)  # the sizes of a profile's curves
GEMM_ROWS = tuple(4**exponent for exponent in range(8))
GEMM_WEIGHTS = (1024, 2048, 4096, 8192)
ATTENTION_BYTES = tuple(2**exponent for exponent in range(20, 30, 2))
_PROVENANCES = ("measured", "datasheet", "assumed")
# What a number may be without being a mistake of units.
_LIMITS = {
    "peak_flops_per_s": (1e9, 1e17, "operations per second, e.g. 312e12"),
    "memory_bytes": (1e8, 1e14, "bytes, e.g. 40e9"),
    "memory_bytes_per_s": (1e9, 1e14, "bytes per second, e.g. 1555e9"),
    "link_nominal_bytes_per_s": (1e6, 1e13, "bytes per second in one direction, e.g. 32e9"),
    "link_achievable_bytes_per_s": (1e6, 1e13, "bytes per second in one direction, e.g. 25.6e9"),
    "power_w": (1, 1e5, "watts, e.g. 250"),
    "price_per_hour": (0, 1e6, "money per hour of the device"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasheet:
    """One device and its link. Bandwidths of the link are those of one direction."""

    device_name: str
    dtype: str  # of the profile made from it: half precision as the device prefers it
    peak_flops_per_s: dict[str, float]  # dense, by dtype (those of `BITS`)
    memory_bytes: int
    memory_bytes_per_s: float
    link_name: str
    link_generation: int | None  # of PCIe, None for another link
    link_lanes: int | None
    link_nominal_bytes_per_s: float
    link_achievable_bytes_per_s: float
    power_w: float  # of the board
    price_per_hour: float | None  # the user's: there is no honest default
    provenance: dict[str, str]  # "measured", "datasheet" or "assumed" by field, or by field.dtype
    source: str

    def provenance_of(self, field: str, key: str = "") -> str:
        """Where a number comes from; "assumed" where nothing is said."""
        return self.provenance.get(f"{field}.{key}", self.provenance.get(field, "assumed"))

    @classmethod
    def from_json(cls, data: Any, *, source: str) -> Datasheet:
        """Check and take over the fields of a preset or a user's file.

        Raises:
            ProfileError: a field is missing, unknown or makes no sense; names `source` and the field.
        """
        if not isinstance(data, dict):
            raise ProfileError(f"{source} must hold an object with the fields of a preset, not a {type(data).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}
        optional: dict[str, Any] = {
            "link_generation": None,
            "link_lanes": None,
            "price_per_hour": None,
            "provenance": {},
            "source": "",
        }
        values: dict[str, Any] = optional | data
        if unknown := sorted(set(values) - names):
            raise ProfileError(f"{source} has unknown fields {', '.join(unknown)}; known: {', '.join(sorted(names))}")
        if missing := sorted(names - set(values)):
            raise ProfileError(f'{source} lacks {", ".join(missing)}: add them, or "like": the name of a preset')
        for field, (low, high, unit) in _LIMITS.items():
            numbers = values[field] if field == "peak_flops_per_s" else {"": values[field]}
            if not isinstance(numbers, dict) or not numbers:
                raise ProfileError(f"{source}: {field} must give a peak by dtype, e.g. {{'float16': 312e12}}")
            for key, number in numbers.items():
                if number is None and field == "price_per_hour":
                    continue
                if not _is_number(number) or not low <= number <= high:
                    name = f"{field}.{key}" if key else field
                    raise ProfileError(f"{source}: {name} is {number!r}, but must be {unit}")
        if unknown := sorted(set(values["peak_flops_per_s"]) - set(BITS)):
            raise ProfileError(f"{source}: unknown dtypes {', '.join(unknown)}; known: {', '.join(BITS)}")
        if values["dtype"] not in values["peak_flops_per_s"]:
            raise ProfileError(f"{source}: dtype is {values['dtype']!r}, but peak_flops_per_s gives no peak for it")
        if values["link_achievable_bytes_per_s"] > values["link_nominal_bytes_per_s"]:
            raise ProfileError(
                f"{source}: link_achievable_bytes_per_s exceeds link_nominal_bytes_per_s: exchange them?"
            )
        if not isinstance(values["provenance"], dict):
            raise ProfileError(f"{source}: provenance must name one of {', '.join(_PROVENANCES)} by field")
        for field, said in values["provenance"].items():
            if said not in _PROVENANCES:
                raise ProfileError(f"{source}: provenance of {field} is {said!r}; known: {', '.join(_PROVENANCES)}")
        return cls(**values | {"memory_bytes": int(values["memory_bytes"])})

    def to_json(self) -> dict[str, Any]:
        """Plain data, as a file of a user's."""
        return {"schema_version": DATASHEET_SCHEMA_VERSION} | dataclasses.asdict(self)


def preset_names() -> list[str]:
    """All presets, sorted."""
    return sorted(_presets())


def preset(name: str) -> Datasheet:
    """A preset by its name.

    Raises:
        ProfileError: there is none of that name; lists the near ones, then all.
    """
    presets = _presets()
    if name not in presets:
        near = [known for known in sorted(presets) if name.lower() in known]
        near += [known for known in difflib.get_close_matches(name.lower(), presets, cutoff=0.5) if known not in near]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ProfileError(
            f"unknown hardware preset {name!r}{hint}; known: {', '.join(preset_names())}; "
            "or the path of a file with the fields of a preset"
        )
    return Datasheet.from_json(presets[name], source=f"preset {name}")


def preset_named(text: str) -> str:
    """The name of the preset that a person means: a part of it that no other has, such as "4090" or "H100 PCIe".

    Each word must be one of the name's, or the beginning or the end of one where digits meet letters there: "4090" and
    "rtx" are parts of "rtx4090", "l4" is none of "l40s". A name of which all words are whole goes first.

    Raises:
        ProfileError: there is none of that name, or there are several; lists the near ones, else all.
    """
    presets = _presets()
    if text in presets:
        return text
    words = [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _MAKERS]
    parts = {name: name.split("-") for name in preset_names()}
    whole = [name for name in parts if words and all(word in parts[name] for word in words)]
    partly = [name for name in parts if words and all(any(_is_part(word, of) for of in parts[name]) for word in words)]
    found = whole or partly
    if len(found) == 1:
        return found[0]
    if found:
        raise ProfileError(f"there are several presets like {text!r}; near: {', '.join(found)}: name one of these")
    near = difflib.get_close_matches("-".join(words), presets, cutoff=0.5)
    hint = f"near: {', '.join(near)}" if near else f"known: {', '.join(preset_names())}"
    raise ProfileError(
        f"unknown hardware preset {text!r}; {hint}; `kvoffload hardware` lists them all; or the path of a file with "
        "the fields of a preset"
    )


_MAKERS = ("nvidia", "geforce", "tesla", "amd", "instinct")


def _is_part(word: str, of: str) -> bool:
    """Whether it is a word, or the beginning or the end of one that is not cut between two digits or two letters."""
    if word == of:
        return True
    if of.startswith(word):
        return word[-1].isdigit() != of[len(word)].isdigit()
    return of.endswith(word) and word[0].isdigit() != of[-len(word) - 1].isdigit()


class LinkSpec(NamedTuple):
    """A link between host and device: bytes/s in each direction as copies achieve them, and latency of each copy."""

    link_name: str
    bytes_per_s: float
    latency_s: float
    provenance: str


def link_named(text: str) -> LinkSpec:
    """The link that a short text stands for.

    Args:
        text: "pcie4", "pcie5x8" (another number of lanes), "nvlink-c2c", "cxl", or a bandwidth with a latency for
            whatever else, such as storage in a network: "3GB/s+100us".

    Raises:
        ConfigError: none of these; lists them.
    """
    links: dict[str, Any] = _file()["links"]
    named = re.fullmatch(r"(.+?)(?:x(1|2|4|8|16))?", text.strip().lower())
    link = links.get(named[1]) if named else None
    if link and named and (link["lanes"] or not named[2]):
        lanes = int(named[2] or link["lanes"] or 0)
        share = lanes / link["lanes"] if lanes else 1.0
        name = f"{link['link_name']} x{lanes}" if lanes else link["link_name"]
        return LinkSpec(name, link["achievable_bytes_per_s"] * share, link["latency_s"], link["provenance"])
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gb/s(?:\s*\+\s*(\d+(?:\.\d+)?)\s*(us|ms))?", text.strip().lower())
    if match and float(match[1]) > 0:
        latency_s = float(match[2] or 0) * (1e-3 if match[3] == "ms" else 1e-6)
        return LinkSpec(text, float(match[1]) * 1e9, latency_s, "assumed")
    raise ConfigError(
        f"unknown link {text!r}; known: {', '.join(links)}, with lanes such as pcie5x8 (1, 2, 4, 8 or 16), or a "
        "bandwidth such as 3GB/s+100us"
    )


def read(data: Any, *, source: str) -> Datasheet:
    """The device a user's file describes.

    Raises:
        ProfileError: of another schema version, or a field is wrong; names `source`.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != DATASHEET_SCHEMA_VERSION:
        raise ProfileError(
            f"{source} has schema version {version!r}, this release reads {DATASHEET_SCHEMA_VERSION}: compare it with "
            f"the presets in {PRESETS}"
        )
    values = {name: value for name, value in data.items() if name != "schema_version"}
    if "like" in values:
        base = dataclasses.asdict(preset(str(values.pop("like"))))
        told = values.get("provenance", {})
        if isinstance(told, dict):
            told = base["provenance"] | dict.fromkeys(values, "assumed") | told
        values = base | values | {"provenance": told}
    return Datasheet.from_json(values, source=source)


def profile_data(sheet: Datasheet) -> dict[str, Any]:
    """The profile of a machine that does what its datasheet says, as plain data for `HardwareProfile.from_json`."""
    peak, itemsize_bytes = sheet.peak_flops_per_s[sheet.dtype], BITS[sheet.dtype] // 8

    def gemm_s(m: int, size: int) -> float:
        moved_bytes = (2 * m * size + size * size) * itemsize_bytes
        return max(2 * m * size * size / peak, moved_bytes / sheet.memory_bytes_per_s)  # multiply-add

    def curve(unit: str, points: list[tuple[list[float], float]], provenance: str) -> dict[str, Any]:
        return {"unit": unit, "points": [[x, seconds, 0.0] for x, seconds in points], "provenance": provenance}

    def copies(sizes: tuple[int, ...], bytes_per_s: float, provenance: str) -> dict[str, Any]:
        return curve("bytes", [([float(size)], size / bytes_per_s) for size in sizes], provenance)

    def figure(value: float, unit: str, field: str) -> dict[str, Any]:
        return {"value": value, "unit": unit, "spread_fraction": None, "provenance": sheet.provenance_of(field)}

    link_provenance = sheet.provenance_of("link_achievable_bytes_per_s")
    if link_provenance == "measured":  # elsewhere: of the machine that this stands for it is an assumption
        link_provenance = "assumed"
    memory_provenance = sheet.provenance_of("memory_bytes_per_s")
    link = copies(COPY_BYTES, sheet.link_achievable_bytes_per_s, link_provenance)
    products = [([float(m), float(size), float(size)], gemm_s(m, size)) for size in GEMM_WEIGHTS for m in GEMM_ROWS]
    return {
        "schema_version": 1,
        "device_name": sheet.device_name,
        "link_name": sheet.link_name,
        "emulated_link": False,
        "key": f"{sheet.device_name} | datasheet",
        "h2d": link,
        "d2h": link,
        "gemm": curve("m,n,k", products, sheet.provenance_of("peak_flops_per_s", sheet.dtype)),
        "attention": copies(ATTENTION_BYTES, sheet.memory_bytes_per_s, memory_provenance),
        "device_copy_bytes_per_s": sheet.memory_bytes_per_s,
        "device_memory_bytes": sheet.memory_bytes,
        "dtype": sheet.dtype,
        "quantities": {
            "device_copy_bytes_per_s": figure(sheet.memory_bytes_per_s, "bytes/s", "memory_bytes_per_s"),
            "device_memory_bytes": figure(sheet.memory_bytes, "bytes", "memory_bytes"),
        },
        "extra": {
            "peak_flops_per_s": peak,
            "peak_bytes_per_s": sheet.memory_bytes_per_s,
            "note": "peaks are the datasheet's; the link curve is the bandwidth that pinned copies achieve "
            f"({sheet.link_achievable_bytes_per_s / 1e9:g} GB/s of {sheet.link_nominal_bytes_per_s / 1e9:g} nominal)",
            "source": sheet.source,
            "datasheet": sheet.to_json(),
        },
    }


@lru_cache(maxsize=1)
def _file() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(PRESETS.read_text(encoding="utf-8"))
    assert data["schema_version"] == DATASHEET_SCHEMA_VERSION, "presets.json and this file go together"
    return data


def _presets() -> dict[str, Any]:
    presets: dict[str, Any] = _file()["presets"]
    return presets


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
