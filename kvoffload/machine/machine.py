"""A device as predictions see it, whether it was measured or is known from a preset or a user's file only.

Owns the choice of numbers: peaks by the width of the operands, bandwidths, price and power. Does not own
presets and their files (`datasheet`) nor profiles (`hardware_profile`). Torch-free.

Of a measured profile the best measured rates stand for the peaks, and the fitted formula goes with them; of a datasheet
there are peaks alone, so that a time made from them is a lower bound.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvoffload.errors import ConfigError, ProfileError
from kvoffload.machine import datasheet
from kvoffload.machine.datasheet import Datasheet
from kvoffload.machine.dtypes import BITS
from kvoffload.machine.fit import Fit
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import given_curve

ASSUMED_HOST_BYTES = 256 * 10**9  # of a machine whose host memory is not known
LINK_BYTES = 2**26  # the copy whose rate is taken for the link's


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One device, its memory and its link."""

    device_name: str
    link_name: str
    peak_flops_per_s: dict[int, float]  # by the bits of the wider operand
    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float  # host to device, as copies achieve it; infinite for an unpaced link
    power_w: float | None = None
    price_per_hour: float | None = None
    fits: dict[str, Fit] = field(default_factory=dict)  # empty: the peaks are all that is known
    provenance: dict[str, str] = field(default_factory=dict)

    def flops_per_s(self, bits: int) -> float:
        """The peak for operands of `bits`: of the next wider ones where the device has no units for these."""
        return self.peak_flops_per_s[self.compute_bits(bits)]

    def compute_bits(self, bits: int) -> int:
        """The narrowest width of at least `bits` that the device computes in; the widest it has where none is."""
        widths = sorted(self.peak_flops_per_s)
        return next((width for width in widths if width >= bits), widths[-1])


def find_machine(name_or_path: str | Path) -> Machine:
    """A preset by its name; or a file: a measured profile, or one with the fields of a preset.

    Raises:
        ProfileError: neither, or the file is damaged or of another schema version; names it.
    """
    found = _find(name_or_path)
    return machine_of(found) if isinstance(found, HardwareProfile) else _from_datasheet(found)


def find_profile(name_or_path: str | Path) -> HardwareProfile:
    """As `find_machine`, as the profile that plans are made with."""
    found = _find(name_or_path)
    if isinstance(found, HardwareProfile):
        return found
    return HardwareProfile.from_json(datasheet.profile_data(found), source=str(name_or_path))


def machine_of(profile: HardwareProfile) -> Machine:
    """The machine of a profile, measured or made from a datasheet."""
    if "datasheet" in profile.extra:
        return _from_datasheet(datasheet.read(profile.extra["datasheet"], source=profile.device_name))
    from kvoffload.machine.fitting import fit_profile  # with numpy, which datasheets do without

    fits = fit_profile(profile)
    best = max(2 * math.prod(point.x) / point.seconds for point in profile.gemm.points)  # multiply-add
    read = [point.x[0] / point.seconds for point in profile.attention.points]
    return Machine(
        device_name=profile.device_name,
        link_name=profile.link_name,
        peak_flops_per_s={BITS.get(profile.dtype, 16): best},
        memory_bytes=profile.device_memory_bytes,
        memory_bytes_per_s=max(profile.device_copy_bytes_per_s, *read),
        link_bytes_per_s=profile.h2d.rate(LINK_BYTES) if profile.h2d else math.inf,
        fits={str(name): fitted for name, fitted in fits.items()},
        provenance={
            "peak_flops_per_s": profile.gemm.provenance,
            "memory_bytes_per_s": profile.quantity("device_copy_bytes_per_s").provenance,
            "link_bytes_per_s": profile.h2d.provenance if profile.h2d else "assumed",
        },
    )


def what_if(
    profile: HardwareProfile,
    *,
    link: str | None = None,
    device_memory_bytes: float | None = None,
    host_memory_bytes: float | None = None,
) -> HardwareProfile:
    """The same machine behind another link or with another size of memory.

    Args:
        profile: the machine.
        link: "pcie5", "pcie4x8", "nvlink-c2c", "3GB/s+100us" and the like (`datasheet.link_named`).
        device_memory_bytes: of the device.
        host_memory_bytes: of the host; None: as it is known, else `ASSUMED_HOST_BYTES`, marked as assumed.

    Raises:
        ConfigError: unknown link, or a size that no device has.
    """
    if link is not None:
        spec = datasheet.link_named(link)
        curve = given_curve(spec.bytes_per_s, spec.latency_s)
        profile = profile.behind(spec.link_name, curve, curve)
    if device_memory_bytes is not None:
        if not 1e8 <= device_memory_bytes <= 1e14:
            raise ConfigError(f"a device with {device_memory_bytes:g} bytes of memory makes no sense: give GB, e.g. 24")
        profile = dataclasses.replace(profile, device_memory_bytes=int(device_memory_bytes))
    is_known = isinstance(profile.extra.get("host_memory_bytes"), int)
    if host_memory_bytes is None and is_known:
        return profile
    host = {"host_memory_bytes": int(host_memory_bytes or ASSUMED_HOST_BYTES)}
    assumed = {"host_memory_is_assumed": host_memory_bytes is None}
    return dataclasses.replace(profile, extra=profile.extra | host | assumed)


def _from_datasheet(sheet: Datasheet) -> Machine:
    peaks: dict[int, float] = {}
    for dtype, peak in sheet.peak_flops_per_s.items():
        peaks[BITS[dtype]] = max(peak, peaks.get(BITS[dtype], 0.0))
    return Machine(
        device_name=sheet.device_name,
        link_name=sheet.link_name,
        peak_flops_per_s=peaks,
        memory_bytes=sheet.memory_bytes,
        memory_bytes_per_s=sheet.memory_bytes_per_s,
        link_bytes_per_s=sheet.link_achievable_bytes_per_s,
        power_w=sheet.power_w,
        price_per_hour=sheet.price_per_hour,
        provenance={
            "peak_flops_per_s": sheet.provenance_of("peak_flops_per_s"),
            "memory_bytes_per_s": sheet.provenance_of("memory_bytes_per_s"),
            "link_bytes_per_s": sheet.provenance_of("link_achievable_bytes_per_s"),
        },
    )


def _find(name_or_path: str | Path) -> HardwareProfile | Datasheet:
    path = Path(name_or_path)
    if path.is_file():
        data = _read(path)
        if isinstance(data, dict) and ({"peak_flops_per_s", "like"} & set(data)):
            return datasheet.read(data, source=str(path))
        if isinstance(data, dict) and ({"gemm", "schema_version"} & set(data)):
            return HardwareProfile.from_json(data, source=str(path))
        raise ProfileError(
            f"{path} is neither a profile of `kvoffload profile --output` nor a file with the fields of a preset "
            '(at least "schema_version" and "like")'
        )
    if path.suffix == ".json" or len(path.parts) > 1:
        raise ProfileError(f"there is no profile file {path}; create one with `kvoffload profile --output {path}`")
    return datasheet.preset(str(name_or_path))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfileError(
            f"cannot read the hardware profile {path}: {error}; measure again with `kvoffload profile`"
        ) from error
