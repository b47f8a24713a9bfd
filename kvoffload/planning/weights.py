"""Which decoder layers' weights stay on the device: arithmetic over their bytes. Torch-free.

Owns how many layers stay within so many bytes, which ones, and what is said where not even the least fits. Does not own
the tensors (`session/model_weights.py`) nor what streaming costs a step (`options`).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.units import gib

NUM_SLABS = 2  # on the device, that streamed layers take turns in


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """The weights of a model, in bytes."""

    outside: int  # of what is no decoder layer, or cannot be streamed: embeddings, head, norms
    layers: tuple[int, ...]  # of each decoder layer that can be streamed, in order

    @property
    def total(self) -> int:
        return self.outside + sum(self.layers)

    @property
    def slab(self) -> int:
        """The largest layer."""
        return max(self.layers, default=0)

    @property
    def least(self) -> int:
        """On the device, where every layer is streamed."""
        return min(self.total, self.device_bytes(0))

    def num_resident(self, device_bytes: int) -> int:
        """The most layers that can stay within so many bytes, beside everything else; negative: not even none."""
        numbers = range(len(self.layers), -1, -1)
        return next((number for number in numbers if self.device_bytes(number) <= device_bytes), -1)

    def resident(self, number: int) -> tuple[int, ...]:
        """Which layers stay, where so many do: spread evenly, so that the link is needed evenly as well."""
        count = len(self.layers)
        return tuple(idx * count // number for idx in range(number))

    def device_bytes(self, number: int) -> int:
        """On the device, where so many layers stay."""
        stay = set(self.resident(number))
        slab = max((size for idx, size in enumerate(self.layers) if idx not in stay), default=0)
        return self.outside + sum(self.layers[idx] for idx in stay) + NUM_SLABS * slab

    def streamed_bytes(self, number: int) -> int:
        """Over the link in every forward, where so many layers stay."""
        return sum(self.layers) - sum(self.layers[idx] for idx in self.resident(number))

    def say_least(self) -> str:
        """What has to be on the device, in words."""
        return (
            f"{gib(self.least)} ({gib(self.outside)} outside the decoder layers and two slabs of {gib(self.slab)} for "
            f"one layer each)"
        )
