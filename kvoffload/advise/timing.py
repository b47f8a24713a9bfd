"""The time of one operation on one machine, what decides it, and what would change that.

Owns the setting that is evaluated, the time and bound of an operation, and the remedies. Does not own which operations
there are (`operations`), their sums (`roofline`), the machine (`machine`) or the fitted formula (`fit`).

    device   the longer of F / peak and B / bandwidth; the fitted formula where the machine was measured
    link     bytes of K/V and weights that live on the host, over the achievable bandwidth

Source: the roofline model (Williams et al. 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.machine.fit import Fit, Work
from kvoffload.machine.machine import Machine
from kvoffload.model.operations import CONVENTIONS, AttentionConvention, Operation, Precision

Bound = Literal["compute", "memory", "link", "launch"]
MIN_GAIN = 1.02  # of an operation; a smaller one is no remedy
NARROWER: dict[float, int] = {32: 16, 16: 8, 8: 4}  # bits


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineSetting:
    """What is evaluated."""

    batch: int = 1
    seq: int = 1024  # tokens of each prompt, and the context of the decode phase
    new_tokens: int = 128
    precision: Precision = field(default_factory=Precision)
    convention: AttentionConvention = "fused"
    kv_on_host: float = 0.0  # share of the cached K and V that lives on the host
    weights_on_host: float = 0.0  # share of the weights that is streamed in every forward

    def __post_init__(self) -> None:
        for name in ("batch", "seq", "new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("kv_on_host", "weights_on_host"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a share from 0 to 1, got {value!r}")
        if self.convention not in CONVENTIONS:
            raise ConfigError(f"unknown attention convention {self.convention!r}; known: {', '.join(CONVENTIONS)}")


class TimedOperation(NamedTuple):
    """One operation, and what one of its layers takes."""

    operation: Operation
    seconds: float
    link_bytes: float
    link_s: float
    bound: Bound


class Timer:
    """Seconds of operations on one machine; with `reads_cache` attention reads K/V from where it lives."""

    def __init__(self, machine: Machine, setting: RooflineSetting, reads_cache: bool) -> None:
        self.machine = machine
        self.setting = setting
        self.reads_cache = reads_cache
        self._peaks: dict[float, float] = {}

    def peak(self, bits: float) -> float:
        """Of operands of that many bits, computed in whole ones."""
        if bits not in self._peaks:
            self._peaks[bits] = self.machine.flops_per_s(math.ceil(bits))
        return self._peaks[bits]

    def fit(self, one: Operation) -> Fit | None:
        """The formula of its class; of matrix products for what was not measured by itself."""
        fits = self.machine.fits
        return (fits.get(one.kind) or fits.get("gemm")) if fits else None

    def time(self, one: Operation) -> TimedOperation:
        """What one layer takes, and what decides it."""
        fitted = self.fit(one)
        if fitted is None:
            compute_s = one.flops / self.peak(one.bits)
            memory_s = one.memory_bytes / self.machine.memory_bytes_per_s
            launch_s, seconds = 0.0, max(compute_s, memory_s)
        else:
            compute_s, memory_s = one.flops / fitted.flops_per_s, one.memory_bytes / fitted.bytes_per_s
            launch_s, seconds = max(fitted.overhead_s, fitted.host_s), fitted.seconds(work_of(one))
        read_bytes = one.kv_read_bytes if self.reads_cache else 0.0
        crossing = (read_bytes + one.kv_written_bytes) * self.setting.kv_on_host
        crossing += one.weight_bytes * self.setting.weights_on_host
        link_s = crossing / self.machine.link_bytes_per_s
        bound: Bound = "compute" if compute_s > memory_s else "memory"
        if launch_s > max(compute_s, memory_s):
            bound = "launch"
        return TimedOperation(one, seconds, crossing, link_s, "link" if link_s > seconds else bound)


def work_of(one: Operation) -> Work:
    """As the fitted formula takes it."""
    written = one.written_bytes + one.kv_written_bytes
    return Work(one.flops, one.memory_bytes - written, written)


class Remedy(NamedTuple):
    """A change that moves the bound of an operation."""

    change: str
    gain: float  # seconds of the operation before over after, per token
    phase_gain: float  # the same of the whole phase, if nothing else changes


def remedies_of(
    timer: Timer, timed: TimedOperation, twice: Operation, device_s: float, link_s: float
) -> tuple[Remedy, ...]:
    """What would make this operation faster, by how much, best first."""
    one, precision, bound = timed.operation, timer.setting.precision, timed.bound
    found = []

    def consider(change: str, then_s: float, then_link_s: float) -> None:
        gain = max(timed.seconds, timed.link_s) / max(then_s, then_link_s, 1e-30)
        if gain >= MIN_GAIN:
            device = device_s + one.layers * (then_s - timed.seconds)
            link = link_s + one.layers * (then_link_s - timed.link_s)
            found.append(Remedy(change, gain, max(device_s, link_s) / max(device, link)))

    def changed(change: str, other: Operation, batches: int = 1) -> None:
        then = timer.time(other)
        consider(change, then.seconds / batches, then.link_s / batches)

    stored_bits = precision.weight_bits or 0.0  # quantised weights are narrow already
    weight_bits, kv_bits = NARROWER.get(stored_bits), NARROWER.get(precision.kv_bits)
    if bound in ("memory", "link") and weight_bits and one.weight_bytes:
        share = weight_bits / stored_bits
        changed(f"weights in {weight_bits} bits", one._replace(weight_bytes=one.weight_bytes * share))
    if bound in ("memory", "link") and kv_bits and one.kv_read_bytes + one.kv_written_bytes:
        share = kv_bits / precision.kv_bits
        narrow_kv = one._replace(kv_read_bytes=one.kv_read_bytes * share, kv_written_bytes=one.kv_written_bytes * share)
        changed(f"K/V in {kv_bits} bits", narrow_kv)
    if (bound == "memory" and one.weight_bytes) or bound == "launch":
        changed("twice the batch", twice, 2)
    narrow_bits = NARROWER.get(one.bits)
    if bound == "compute" and narrow_bits:
        share = narrow_bits / one.bits
        changed(
            f"{narrow_bits}-bit compute",
            one._replace(bits=narrow_bits, weight_bytes=one.weight_bytes * share, read_bytes=one.read_bytes * share),
        )
    if bound == "link":
        consider("its host share on the device", timed.seconds, 0.0)
    return tuple(sorted(found, key=lambda remedy: -remedy.gain))
