"""From "auto" to numbers: block, chunk, ring and buffer sizes, and whether they fit. Torch-free arithmetic.

Owns the sizes that do not depend on where blocks live; the planner owns that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from kvoffload.config import OffloadConfig
from kvoffload.errors import InfeasiblePlanError
from kvoffload.planning.forms import FORMS, largest_row_bytes, wanted_forms
from kvoffload.planning.geometry import TARGET_CHUNK_BYTES, Geometry
from kvoffload.planning.placement import PLAIN, FormName
from kvoffload.planning.rates import Rates
from kvoffload.planning.sizes import Sizes
from kvoffload.units import counted, gib

MIN_CHUNK_BYTES = 2**20  # K/V of a chunk: below this the host's time per chunk shows, and nothing is gained
MIN_CHUNKS_PER_LAYER = 8  # finer than this the first and last chunk of a layer no longer matter
MAX_BLOCK_TOKENS = 64
MIN_BLOCK_TOKENS = 8
LASTING_BLOCK_TOKENS = 16  # of a cache that lives on over turns, at least, where its first turn is short
MAX_SLOTS = 16
LEAST_GAP_S = 5e-3  # between two steps, that the ring of a real link covers: sampling and a user's callbacks take it
UNKNOWN_H2D_BYTES_PER_S = 50e9  # of a real link that nobody measured: PCIe 5.0 x16, a slower one's ring covers more


def choose_sizes(
    geometry: Geometry,
    config: OffloadConfig,
    *,
    forms: Collection[FormName],
    device_bytes: int | None,
    rates: Rates | None,
) -> Sizes:
    """Sizes for one generation, made smaller where the device cap asks for it.

    Args:
        geometry: the shape of the cache.
        config: what the user fixed.
        forms: that blocks may have.
        device_bytes: cap, or None.
        rates: for the length of the ring, where known.

    Raises:
        InfeasiblePlanError: the smallest sizes exceed the cap; says by how much.
    """
    sizes = _comfortable(geometry, config, forms, rates)
    if device_bytes is None:
        return sizes
    if sizes.fixed_device_bytes <= device_bytes:
        return _beside_whole_cache(sizes, geometry, config, forms, device_bytes) or sizes
    smallest = smallest_sizes(geometry, config, forms=forms)
    if smallest.fixed_device_bytes > device_bytes:
        raise InfeasiblePlanError(
            f"offloading {counted(geometry.rows, 'sequence')} of {counted(geometry.max_tokens, 'token')} needs "
            f"at least {gib(smallest.fixed_device_bytes)} on the device ({_describe(smallest)}), device_gib allows "
            f"{gib(device_bytes)}: raise device_gib, or lower the batch or max_new_tokens"
        )
    if geometry.least_gap_s:  # a real link, on which small chunks are slow: first fewer of them, then smaller ones
        for candidate in _smaller(sizes, geometry, config, forms):
            if candidate.fixed_device_bytes <= device_bytes:
                return candidate
    best = smallest
    for slots in range(smallest.num_slots, sizes.num_slots + 1):  # as much of comfort as fits
        candidate = _with(
            geometry,
            config,
            forms,
            block_tokens=smallest.block_tokens,
            chunk_blocks=smallest.chunk_blocks,
            num_slots=slots,
        )
        if candidate.fixed_device_bytes <= device_bytes:
            best = candidate
    return best


def _beside_whole_cache(
    sizes: Sizes, geometry: Geometry, config: OffloadConfig, forms: Collection[FormName], device_bytes: int
) -> Sizes | None:
    """Smaller sizes, where nothing but the ring keeps the whole cache from staying on the device; else None."""
    if not geometry.is_segmented or config.schedule != "pipelined":
        return None
    cache_bytes = geometry.num_offloaded_layers * geometry.max_tokens * geometry.kv_bytes_per_token
    if sizes.fixed_device_bytes + cache_bytes <= device_bytes:
        return None
    small = _with(
        geometry,
        config,
        forms,
        block_tokens=sizes.block_tokens,
        chunk_blocks=1 if config.chunk_blocks == "auto" else sizes.chunk_blocks,
        num_slots=1 + _at_work(geometry) if config.slots == "auto" else config.slots,
    )
    return small if small.fixed_device_bytes + cache_bytes <= device_bytes else None


def _smaller(sizes: Sizes, geometry: Geometry, config: OffloadConfig, forms: Collection[FormName]) -> Iterator[Sizes]:
    """The same blocks in ever smaller rings, then in ever smaller chunks; what the user fixed stays."""
    chunk_blocks, slots = sizes.chunk_blocks, sizes.num_slots
    fewest = 1 + _at_work(geometry)
    while True:
        if config.slots == "auto" and config.schedule == "pipelined" and slots > fewest:
            slots -= 1
        elif config.chunk_blocks == "auto" and chunk_blocks > 1:
            chunk_blocks //= 2
        else:
            return
        yield _with(
            geometry,
            config,
            forms,
            block_tokens=sizes.block_tokens,
            chunk_blocks=chunk_blocks,
            num_slots=slots,
        )


def smallest_sizes(geometry: Geometry, config: OffloadConfig, *, forms: Collection[FormName]) -> Sizes:
    """What takes least memory on the device; arguments as of `choose_sizes`."""
    comfortable = _comfortable(geometry, config, forms, None)
    return _with(
        geometry,
        config,
        forms,
        block_tokens=MIN_BLOCK_TOKENS if config.block_tokens == "auto" else config.block_tokens,
        chunk_blocks=1 if config.chunk_blocks == "auto" else comfortable.chunk_blocks,
        num_slots=1 if config.slots == "auto" else config.slots,
    )


def uncapped_sizes(geometry: Geometry, config: OffloadConfig) -> Sizes:
    """Without a cap and before any rate is known; arguments as of `choose_sizes`."""
    return _comfortable(geometry, config, planned_forms(config, geometry), None)


def _comfortable(geometry: Geometry, config: OffloadConfig, forms: Collection[FormName], rates: Rates | None) -> Sizes:
    per_token = geometry.kv_bytes_per_token
    if geometry.is_segmented:  # nothing here grows with the context, but where that is shorter than a chunk
        chunk_tokens = min(geometry.max_tokens, max(1, geometry.least_chunk_bytes // per_token))
        by_length = geometry.max_tokens // MIN_CHUNKS_PER_LAYER
    else:
        chunk_tokens = max(geometry.max_tokens // MIN_CHUNKS_PER_LAYER, MIN_CHUNK_BYTES // per_token)
        chunk_tokens = min(chunk_tokens, TARGET_CHUNK_BYTES // per_token, geometry.max_tokens)
        by_length = geometry.max_tokens // (2 * MIN_CHUNKS_PER_LAYER)
    if config.block_tokens != "auto":
        block_tokens = config.block_tokens
    else:
        by_bytes = TARGET_CHUNK_BYTES // per_token
        if geometry.lives_on:
            by_length = max(by_length, LASTING_BLOCK_TOKENS)
        block_tokens = min(MAX_BLOCK_TOKENS, max(MIN_BLOCK_TOKENS, _power_of_two(min(by_length, by_bytes))))
    if config.chunk_blocks != "auto":
        chunk_blocks = min(config.chunk_blocks, math.ceil(geometry.max_tokens / block_tokens))
    else:
        chunk_blocks = max(1, chunk_tokens // block_tokens)
    chunks_per_layer = max(1, math.ceil(geometry.max_tokens / (block_tokens * chunk_blocks)))
    if config.slots != "auto":
        num_slots = config.slots
    elif config.schedule == "kvpr":
        num_slots = chunks_per_layer  # the whole activation of a layer arrives before recomputation starts
    else:
        row_bytes = _slot_row_bytes(geometry, forms, block_tokens)
        slot_bytes = block_tokens * chunk_blocks * geometry.rows * row_bytes
        at_work = _at_work(geometry)
        num_slots = at_work + (1 if rates is None else math.ceil(_ring_bytes(geometry, rates, forms) / slot_bytes))
        num_slots = min(MAX_SLOTS, num_slots)
        if geometry.least_gap_s:  # then whatever arrives in it, which is not more than there is
            rate = UNKNOWN_H2D_BYTES_PER_S if rates is None else rates.h2d_bytes_per_s[PLAIN]
            num_slots = max(num_slots, at_work + math.ceil(rate * geometry.least_gap_s / slot_bytes))
            num_slots = min(num_slots, at_work + geometry.num_offloaded_layers * chunks_per_layer)
    return _with(
        geometry,
        config,
        forms,
        block_tokens=block_tokens,
        chunk_blocks=chunk_blocks,
        num_slots=num_slots,
    )


def _at_work(geometry: Geometry) -> int:
    """Slots that are in use, beside what arrives in the meantime: one being filled and one being recomputed.

    With kv chunks in the ring as well one more: two of a kind in a row would make the link wait where link and device
    are balanced.
    """
    return 3 if geometry.is_segmented else 2


def _ring_bytes(geometry: Geometry, rates: Rates, forms: Collection[FormName]) -> float:
    """What the link can bring while compute is busy with anything but the next layer's chunks."""
    away_s = rates.gap_s + rates.dense_s
    if not geometry.is_segmented:  # else each chunk is attended to as it arrives
        away_s += rates.attention_s_per_token * geometry.max_tokens
    by_form = rates.h2d_bytes_per_s.items()
    return min(rate for form, rate in by_form if form in forms or not FORMS[form].is_encoded) * away_s


def _with(
    geometry: Geometry,
    config: OffloadConfig,
    forms: Collection[FormName],
    *,
    block_tokens: int,
    chunk_blocks: int,
    num_slots: int,
) -> Sizes:
    parts = {FORMS[form].made_of for form in forms}
    tail_row = geometry.kv_row_bytes + (geometry.activation_row_bytes if "activation" in parts else 0)
    largest_row = largest_row_bytes(forms, geometry, block_tokens)
    is_restored = not all(FORMS[form].is_read_as_stored for form in forms)
    chunk_rows = block_tokens * chunk_blocks * geometry.rows
    num_buffers = 3 if geometry.beams > 1 else 2
    return Sizes(
        block_tokens=block_tokens,
        chunk_blocks=chunk_blocks,
        num_slots=num_slots if set(forms) != {PLAIN} or geometry.is_segmented else 0,
        slot_bytes=chunk_rows * _slot_row_bytes(geometry, forms, block_tokens),
        buffer_bytes=0 if geometry.is_segmented else geometry.max_tokens * geometry.kv_bytes_per_token,
        num_buffers=0 if geometry.is_segmented else num_buffers,
        d2h_slot_bytes=chunk_rows * largest_row,
        scratch_bytes=chunk_rows * geometry.kv_row_bytes if geometry.is_segmented and is_restored else 0,
        tail_bytes=geometry.num_offloaded_layers * (block_tokens + geometry.ahead_tokens) * geometry.rows * tail_row,
        other_device_bytes=geometry.other_device_bytes,
    )


def split_to_plan(config: OffloadConfig, geometry: Geometry) -> float | None:
    """The share of activations that is fixed, None where the planner is free.

    An activation that is no smaller than its K and V (grouped-query attention) can only cost: then "auto" is transfer,
    and no memory is set aside for recomputing.
    """
    is_smaller = geometry.stored_activation_row_bytes < geometry.kv_row_bytes
    return config.fixed_split if is_smaller or config.fixed_split is not None else 0.0


def chunks_may_be_recomputed(config: OffloadConfig, geometry: Geometry) -> bool:
    """Whether chunks are made large enough to recompute fast.

    Over a real link as a free split's are, whatever the split: so that figures of different splits compare, and a small
    chunk is slow there in any case. On an emulated link where some are.
    """
    split = split_to_plan(config, geometry)
    if geometry.least_gap_s:
        split = split_to_plan(replace(config, split="auto"), geometry)
    return split != 0


def planned_forms(
    config: OffloadConfig, geometry: Geometry, *, can_recompute: bool = True, has_rates: bool = True
) -> frozenset[FormName]:
    """The forms that blocks may be given.

    Args:
        config: what the user fixed.
        geometry: of the cache.
        can_recompute: False where K/V do not follow from the activation, or nothing is known to decide by.
        has_rates: whether the machine's rates are known, without which nothing is packed.
    """
    recomputes = can_recompute and split_to_plan(config, geometry) != 0
    by_split = {name for name, form in FORMS.items() if form.is_recomputed and recomputes}
    return wanted_forms(config, geometry, has_rates=has_rates) | by_split | {PLAIN}


def _slot_row_bytes(geometry: Geometry, forms: Collection[FormName], block_tokens: int) -> int:
    """The largest form that travels through the ring."""
    if not geometry.is_segmented:  # plain chunks land in a layer buffer
        forms = set(forms) - {PLAIN} or {"activation"}
    return largest_row_bytes(forms, geometry, block_tokens)


def _describe(sizes: Sizes) -> str:
    parts = [f"tails {gib(sizes.tail_bytes)}"]
    if sizes.num_buffers:
        parts.insert(0, f"{sizes.num_buffers} layer buffers of {gib(sizes.buffer_bytes)}")
    else:
        parts.insert(0, f"{sizes.num_slots} slots of {gib(sizes.slot_bytes)}")
    if sizes.other_device_bytes:
        parts.append(f"layers that are not offloaded {gib(sizes.other_device_bytes)}")
    return ", ".join(parts)


def _power_of_two(value: int) -> int:
    """The largest power of two that is at most `value` (at least 1)."""
    return 1 << max(0, value.bit_length() - 1)
