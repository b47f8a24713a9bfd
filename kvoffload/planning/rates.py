"""The rates of one model at one batch, and the sizes of chunks they ask for, read from the profile of a machine.

Owns at which size each curve is read, and to which rate the host's time is charged. Does not own the curves
(`hardware_profile`), what a step costs at these rates (`step_time`), nor what was measured since (`measured_rates`).
Plain numbers, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvoffload.errors import ConfigError, ProfileError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.shape import ModelShape
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import PLAIN, FormName

CHUNK_SPEED_FRACTION = 0.95
HOST_TIME_FRACTION = 0.25  # of a chunk's copy, that the host may take to issue the chunk
LARGEST_CHUNK_BYTES = 32 * 2**20
MANY_ROWS = 4096  # of a product that is bound by computing
WEIGHT_PIECE_BYTES = 16 * 2**20  # in one copy, so that chunks of a cache never wait long behind weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine does with one layer of one model at one batch: the coefficients of the cost model.

    "Token" means one position of the whole batch.
    """

    h2d_bytes_per_s: Mapping[FormName, float]  # B, by the form of a chunk, at its size
    restore_s_per_token: Mapping[FormName, float]  # gamma_r: K and V of what attention cannot read; missing: no time
    attention_s_per_token: float  # gamma_a
    dense_s: float  # t_dense: the rest of one layer
    weights_bytes_per_s: float | None = None  # B of weights; None: that of K and V
    head_s: float = 0.0  # t_head: final norm, LM head and sampling on the device
    gap_s: float = 0.0  # t_gap: host time between the last attention of a step and the first of the next
    host_s_per_layer: float = 0.0  # o_layer
    host_s_per_chunk: float = 0.0  # o_chunk

    def __post_init__(self) -> None:
        times = {name: getattr(self, name) for name in _TIMES}
        times |= {f"restore_s_per_token[{form}]": value for form, value in self.restore_s_per_token.items()}
        for name, value in times.items():
            if not value >= 0 or math.isinf(value):
                raise ConfigError(f"Rates.{name} must be finite and not negative, got {value!r}")
        for form, value in self.h2d_bytes_per_s.items():
            if not value > 0 or math.isinf(value):
                raise ConfigError(
                    f"link bandwidth must be above zero: an unpaced link has none (Rates.h2d_bytes_per_s[{form}] is "
                    f"{value!r})"
                )

    def weights_s(self, num_bytes: float) -> float:
        """Seconds that so many bytes of weights take on the link."""
        return num_bytes / (self.weights_bytes_per_s or self.h2d_bytes_per_s[PLAIN])

    def mean_with(self, other: Rates) -> Rates:
        """Halfway between two measurements."""
        found: dict[str, Any] = {name: (getattr(self, name) + getattr(other, name)) / 2 for name in _TIMES}
        for name in ("h2d_bytes_per_s", "restore_s_per_token"):
            mine, theirs = getattr(self, name), getattr(other, name)
            found[name] = {form: (value + theirs[form]) / 2 for form, value in mine.items()}
        found["weights_bytes_per_s"] = self.weights_bytes_per_s
        return Rates(**found)

    def __hash__(self) -> int:
        """Of what tells most rates apart; equal ones are compared whole."""
        return hash((self.attention_s_per_token, self.dense_s, *self.h2d_bytes_per_s.values()))


_TIMES = ("attention_s_per_token", "dense_s", "head_s", "gap_s", "host_s_per_layer", "host_s_per_chunk")


def rates_from_profile(
    profile: HardwareProfile,
    shape: ModelShape,
    *,
    batch: int,
    block_tokens: int,
    chunk_blocks: int,
    cached_tokens: int | None = None,
    row_bytes: Mapping[FormName, int] | None = None,
    weights_are_pinned: bool = True,
) -> Rates:
    """The rates of one model at one batch on the profiled machine.

    Every curve is read at the size the runtime will use: copies and recomputation at a full chunk, the dense part at
    the batch. The dense part and the head take the longer of computing and of reading their weights, in the bits they
    are stored in; what it costs to make quantised weights wider is not known and not counted. Where the device is the
    CPU the host's time is its own, and part of both.

    Args:
        profile: the machine; GEMM and attention curves are taken as measured, whatever their dtype.
        shape: the model.
        batch: sequences decoded at once (`Workload.rows`).
        block_tokens: tokens per block.
        chunk_blocks: blocks per chunk.
        cached_tokens: tokens attended per sequence; None takes the attention rate of the largest measured size, and
            one chunk per layer.
        row_bytes: of a token of one stored row, by form; those that are missing are as large as K and V.
        weights_are_pinned: whether streamed weights cross the link at its full speed.

    Raises:
        ProfileError: the profile holds no link bandwidth (an unpaced emulated link).
    """
    if profile.h2d is None:
        raise ProfileError(
            f"this machine's link is {profile.link_name}, which has no bandwidth to plan with: give it one "
            "(OffloadConfig(link=EmulatedLink(h2d_gb_per_s=...)), --link-gb-per-s), or name the hardware to plan for, "
            "a preset or a profile (profile=..., --hardware)"
        )
    chunk_rows = chunk_blocks * block_tokens * batch  # tokens of all sequences in one chunk
    kv_token_bytes = batch * shape.kv_row_bytes
    kv_width = shape.num_kv_heads * shape.head_dim
    recompute_flops_per_s = profile.gemm_flops_per_s(chunk_rows, kv_width, shape.hidden_size)
    attended_bytes = profile.attention.points[-1].x[0] if profile.attention.points else 0.0
    if cached_tokens is not None:
        attended_bytes = cached_tokens * kv_token_bytes

    def product_s(num_weights: int, n: int, read_bytes: float) -> float:
        """Seconds of products with so many weights for each token, of which so many bytes are read."""
        k, flops = shape.hidden_size, 2 * batch * num_weights  # multiply-add
        measured_s = flops / profile.gemm_flops_per_s(batch, n, k)  # which reads them once, not quantised
        spared_bytes = num_weights * shape.activation_itemsize_bytes - read_bytes
        computing_s = flops / profile.gemm_flops_per_s(MANY_ROWS, n, k)
        read_s = read_bytes / profile.device_copy_bytes_per_s
        return max(min(computing_s, measured_s), read_s, measured_s - spared_bytes / profile.device_copy_bytes_per_s)

    dense_s = product_s(shape.layer_weights, shape.dense_width, shape.layer_read_bytes(batch))
    head_s = product_s(shape.head_weights, shape.vocab_size, shape.head_read_bytes)
    if profile.emulated_link:  # nothing is issued ahead of a CPU
        num_chunks = max(1, math.ceil((cached_tokens or 0) / (chunk_blocks * block_tokens)))
        dense_s += profile.host_s_per_layer + num_chunks * profile.host_s_per_chunk
        head_s += profile.gap_s
    sizes = (
        dict.fromkeys(FORMS, shape.kv_row_bytes) | {"activation": shape.activation_row_bytes} | dict(row_bytes or {})
    )
    return Rates(
        h2d_bytes_per_s={form: profile.h2d.rate(chunk_rows * max(1, size)) for form, size in sizes.items()},
        restore_s_per_token={
            form: batch * decode_s(profile, form, kv_token_bytes / batch, shape.kv_itemsize_bytes)
            for form, row in FORMS.items()
            if row.is_encoded
        }
        | {"activation": batch * shape.recompute_flops / recompute_flops_per_s},
        weights_bytes_per_s=_weights_bytes_per_s(profile, is_pinned=weights_are_pinned),
        attention_s_per_token=kv_token_bytes / profile.attention.rate(attended_bytes),
        dense_s=dense_s,
        head_s=head_s,
        gap_s=profile.gap_s,
        host_s_per_layer=profile.host_s_per_layer,
        host_s_per_chunk=profile.host_s_per_chunk,
    )


def _weights_bytes_per_s(profile: HardwareProfile, *, is_pinned: bool) -> float | None:
    """The link's rate for pieces of weights from pageable memory, as measured; None: that of K and V."""
    pageable = profile.curves.get("h2d_pageable")
    return None if is_pinned or pageable is None else pageable.rate(WEIGHT_PIECE_BYTES)


def decode_s(profile: HardwareProfile, form: FormName, kv_bytes: float, itemsize_bytes: int) -> float:
    """Seconds by which attention takes longer where it decodes K and V of so many bytes from a form.

    As measured; where it was not, what reading and writing them takes within the device.
    """
    measured = profile.quantities.get(decode_quantity(form))
    if measured is not None:
        return kv_bytes / itemsize_bytes * measured.value
    return 2 * kv_bytes / profile.device_copy_bytes_per_s


def decode_quantity(form: FormName) -> str:
    """What a profile calls the seconds of one value."""
    return f"decode_{form}_s_per_value"


def least_chunk_bytes(profile: HardwareProfile, shape: ModelShape, *, recomputes: bool) -> int:
    """K/V bytes of the smallest chunk that keeps link, recomputation and host out of each other's way.

    That is a power of two at which the link and the GEMM of recomputation reach `CHUNK_SPEED_FRACTION` of their speed
    at `LARGEST_CHUNK_BYTES`, and the host's time for a chunk of either form is at most `HOST_TIME_FRACTION` of that
    form's copy; where the device is the CPU, and has to do both, at most what the fraction leaves of the copy of K/V.

    Args:
        profile: the machine.
        shape: the model.
        recomputes: whether activations may be stored at all.
    """

    host_fraction = 1 - CHUNK_SPEED_FRACTION if profile.emulated_link else HOST_TIME_FRACTION
    row_bytes: dict[FormName, int] = {PLAIN: shape.kv_row_bytes}
    if recomputes and not profile.emulated_link:
        row_bytes["activation"] = shape.activation_row_bytes

    def is_fast(num_bytes: int) -> bool:
        for form, form_bytes in row_bytes.items():
            copied_bytes = num_bytes * form_bytes / shape.kv_row_bytes
            copy_s = math.inf if profile.h2d is None else profile.h2d.seconds(copied_bytes)
            if profile.host_s_per_chunk_of(form) > host_fraction * copy_s:
                return False
        rates = [] if profile.h2d is None else [profile.h2d.rate]
        if recomputes:
            n, k = shape.num_kv_heads * shape.head_dim, shape.hidden_size
            rates.append(lambda size: profile.gemm_flops_per_s(max(1, int(size // shape.kv_row_bytes)), n, k))
        return all(rate(num_bytes) >= CHUNK_SPEED_FRACTION * rate(LARGEST_CHUNK_BYTES) for rate in rates)

    sizes = (2**exponent for exponent in range(16, LARGEST_CHUNK_BYTES.bit_length()))
    return next((num_bytes for num_bytes in sizes if is_fast(num_bytes)), LARGEST_CHUNK_BYTES)
