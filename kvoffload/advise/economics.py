"""The price, the power and the CO2 of an hour of the device."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.errors import ConfigError
from kvoffload.machine.hardware_profile import HardwareProfile

MILLION = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Economics:
    """What the device's time is worth, all of it a user's number; None leaves out what follows from it.

    Args:
        price_per_hour: money per hour of the device.
        power_w: what the board draws while it works.
        grid_g_per_kwh: grams of CO2 per kilowatt-hour of the electricity used.
    """

    price_per_hour: float | None = None
    power_w: float | None = None
    grid_g_per_kwh: float | None = None

    def __post_init__(self) -> None:
        for name, highest in (("price_per_hour", 1e6), ("power_w", 1e5), ("grid_g_per_kwh", 5000.0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
                raise ConfigError(f"{name} must be a number from 0 to {highest:g}, got {value!r}")

    @classmethod
    def of(cls, profile: HardwareProfile, price_per_hour: float | None, grid_g_per_kwh: float | None) -> Economics:
        """With power, and the price where none is given, from the profile's datasheet."""
        sheet = profile.extra.get("datasheet", {})
        price = sheet.get("price_per_hour") if price_per_hour is None else price_per_hour
        return cls(price_per_hour=price, power_w=sheet.get("power_w"), grid_g_per_kwh=grid_g_per_kwh)
