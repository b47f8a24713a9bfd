"""The planning problem of one generation: sizes and inputs, made here for the runtime, the advice and the benchmarks.

Owns at which sizes rates are read, for which length a plan is made, which part of a cap on the full cache holds for a
shorter one, and how much faster a plan without recomputation must be to be taken. Does not own the caps (measured by
`kvoffload/session/`, worked out by `kvoffload/advise/`), the sizes (`sizing`) or the choice (`planner`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

from kvoffload.config import OffloadConfig
from kvoffload.errors import InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.shape import ModelShape
from kvoffload.planning.forms import FORMS
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import FormName
from kvoffload.planning.rates import Rates, decode_quantity, least_chunk_bytes, rates_from_profile
from kvoffload.planning.sizes import Sizes
from kvoffload.planning.sizing import (
    LEAST_GAP_S,
    choose_sizes,
    chunks_may_be_recomputed,
    planned_forms,
    smallest_sizes,
    split_to_plan,
    uncapped_sizes,
)
from kvoffload.units import gib

MIN_GAIN_FRACTION = 0.01  # a plan without recomputation, which could not be corrected later, has to win by more
MIN_SEGMENT_ROWS, MIN_SEGMENT_BYTES = 1024, 2**16  # of a chunk on an emulated link that nobody measured
# Stands in where the link has no known speed: only memory decides, and the prediction is not shown.
UNKNOWN_RATES = Rates(
    h2d_bytes_per_s=dict.fromkeys(FORMS, 1e9),
    restore_s_per_token=dict.fromkeys(FORMS, 0.0),
    attention_s_per_token=0.0,
    dense_s=0.0,
)


class Problem(NamedTuple):
    """What is planned, and with which sizes."""

    geometry: Geometry
    sizes: Sizes
    inputs: PlanInputs
    device_cap_bytes: int | None  # None: as little as works
    has_rates: bool  # False: the link has no known speed, and only memory decides


def _is_measured(profile: HardwareProfile | None) -> bool:
    """Whether it is known what decoding packed blocks takes: an estimate is not enough to do it unasked."""
    return profile is not None and all(
        decode_quantity(name) in profile.quantities for name, form in FORMS.items() if form.needs_rates
    )


def mean_tokens(prompt_tokens: int, max_tokens: int) -> int:
    """Tokens in the cache of one sequence halfway through the decoding, for which plans are made; 0: unknown prompt."""
    return (prompt_tokens + max_tokens) // 2 if prompt_tokens else max_tokens


def pose(
    shape: ModelShape,
    geometry: Geometry,
    config: OffloadConfig,
    profile: HardwareProfile | None,
    *,
    is_emulated: bool,
    cached_tokens: int,
    device_cap_bytes: Callable[[Geometry], int | None],
    host_cap_bytes: int,
    can_recompute: bool = True,
    must_predict: bool = False,
    correct: Callable[[Rates], Rates] = lambda rates: rates,
) -> Problem:
    """Sizes and inputs for a cache.

    Args:
        shape: the model.
        geometry: of the cache, at its full length.
        config: what the user fixed.
        profile: the machine; None where nothing is known of it.
        is_emulated: whether the link is.
        cached_tokens: of each sequence, for which the blocks are placed.
        device_cap_bytes: the cap on device memory, given the geometry with its chunk sizes; None: as little as works.
        host_cap_bytes: the cap on host memory at the full length.
        can_recompute: False where K/V do not follow from the activation.
        must_predict: refuse a link without a known speed, instead of planning by memory alone.
        correct: puts measured rates in the place of the profile's.

    Raises:
        InfeasiblePlanError: the smallest sizes exceed the cap on device memory.
        ProfileError: a prediction must be made, and the link has no bandwidth.
    """
    fixed_split = split_to_plan(config, geometry) if can_recompute else 0.0
    geometry = with_chunk_sizes(shape, geometry, config, profile, is_emulated=is_emulated, can_recompute=can_recompute)
    rates: Rates | None = None
    if profile is not None and (must_predict or profile.h2d is not None):
        rates = correct(_rates(shape, geometry, config, profile))
    device_bytes = device_cap_bytes(geometry)
    may_recompute = fixed_split != 0 and (fixed_split is not None or rates is not None)
    forms = planned_forms(
        config,
        geometry,
        can_recompute=may_recompute,
        has_rates=rates is not None and (must_predict or _is_measured(profile)),
    )
    room_bytes = _beside_copies(geometry, config, forms, device_bytes)
    sizes = choose_sizes(geometry, config, forms=forms, device_bytes=room_bytes, rates=rates)
    copies_bytes = shadow_bytes(geometry, sizes.block_tokens)
    least_bytes = sizes.fixed_device_bytes + copies_bytes
    if copies_bytes and device_bytes is not None and least_bytes > device_bytes:  # in shorter blocks than was thought
        raise _no_room(geometry, copies_bytes, sizes.fixed_device_bytes, device_bytes)
    inputs = make_inputs(
        shape,
        geometry,
        sizes,
        rates or UNKNOWN_RATES,
        num_blocks=max(1, cached_tokens // sizes.block_tokens),
        device_bytes=least_bytes if device_bytes is None else device_bytes,
        host_cap_bytes=host_cap_bytes,
        split=fixed_split if rates is not None else fixed_split or 0.0,
        config=config,
        forms=forms,
    )
    return Problem(geometry, sizes, inputs, device_bytes, rates is not None)


def make_inputs(
    shape: ModelShape,
    geometry: Geometry,
    sizes: Sizes,
    rates: Rates,
    *,
    num_blocks: int,
    device_bytes: int,
    host_cap_bytes: int,
    split: float | None,
    config: OffloadConfig,
    forms: Collection[FormName] = (),
) -> PlanInputs:
    """The inputs for `num_blocks` cached blocks of `planned_forms`; `host_cap_bytes` is at the full length."""
    return PlanInputs(
        num_layers=shape.num_layers,
        num_offloaded_layers=geometry.num_offloaded_layers,
        num_blocks=num_blocks,
        block_tokens=sizes.block_tokens,
        bytes_per_token=bytes_per_token(geometry, sizes.block_tokens, forms),
        rates=rates,
        chunk_blocks=sizes.chunk_blocks,
        num_slots=max(2, sizes.num_slots),
        device_bytes=device_bytes,
        fixed_device_bytes=sizes.fixed_device_bytes,
        host_bytes=host_bytes_at(host_cap_bytes, geometry, num_blocks, sizes.block_tokens),
        split=split,
        schedule=config.schedule,
        weight_bytes_per_step=geometry.weight_bytes,
        weight_device_bytes=geometry.weight_device_bytes,
        is_plain_on_device=geometry.ahead_tokens > 0 and geometry.shadow_form is None,
        shadow_form=geometry.shadow_form,
        shadow_bytes_per_token=_shadow_bytes_per_token(geometry, sizes.block_tokens),
        most_blocks=geometry.max_tokens // sizes.block_tokens,
        is_segmented=geometry.is_segmented,
    )


def bytes_per_token(
    geometry: Geometry, block_tokens: int, forms: Collection[FormName] | None = None
) -> dict[FormName, int]:
    """beta: of the whole batch, in one layer, by form; with `forms` of those, and of what `split` says."""
    return {
        name: geometry.rows * form.row_bytes(geometry, block_tokens)
        for name, form in FORMS.items()
        if forms is None or name in forms or form.is_wanted is None
    }


def _shadow_bytes_per_token(geometry: Geometry, block_tokens: int) -> int:
    """Of the copies for drafts: of the whole batch, in one layer; 0 without any."""
    form = geometry.shadow_form
    return 0 if form is None else geometry.rows * FORMS[form].row_bytes(geometry, block_tokens)


def shadow_bytes(geometry: Geometry, block_tokens: int) -> int:
    """Device memory for copies of all blocks at the full length."""
    tokens = geometry.max_tokens // block_tokens * block_tokens
    return geometry.num_offloaded_layers * tokens * _shadow_bytes_per_token(geometry, block_tokens)


def _beside_copies(
    geometry: Geometry, config: OffloadConfig, forms: Collection[FormName], device_bytes: int | None
) -> int | None:
    """What copies of all blocks leave of the cap on device memory; None: as little as works.

    Raises:
        InfeasiblePlanError: less than working buffers take; says by how much.
    """
    if device_bytes is None or geometry.shadow_form is None:
        return device_bytes
    copies_bytes = shadow_bytes(geometry, uncapped_sizes(geometry, config).block_tokens)
    least_bytes = smallest_sizes(geometry, config, forms=forms).fixed_device_bytes
    if copies_bytes + least_bytes > device_bytes:
        raise _no_room(geometry, copies_bytes, least_bytes, device_bytes)
    return device_bytes - copies_bytes


def _no_room(geometry: Geometry, copies_bytes: int, least_bytes: int, device_bytes: int) -> InfeasiblePlanError:
    assert geometry.shadow_form is not None
    return InfeasiblePlanError(
        f"copies for drafts as {FORMS[geometry.shadow_form].label} take {gib(copies_bytes)} on the device beside "
        f"{gib(least_bytes)} of working buffers, and it has {gib(device_bytes)}: "
        f"{gib(copies_bytes + least_bytes - device_bytes)} are missing"
    )


def host_bytes_at(cap_bytes: int, geometry: Geometry, num_blocks: int, block_tokens: int) -> int:
    """The part of a cap on the full length that so many blocks may take; no more than they could in both forms."""
    part = int(cap_bytes * min(1.0, num_blocks / max(1, geometry.max_tokens // block_tokens)))
    per_token = sum(bytes_per_token(geometry, block_tokens, ()).values())
    return min(part, geometry.num_offloaded_layers * num_blocks * block_tokens * per_token)


def may_do_without(config: OffloadConfig, geometry: Geometry) -> bool:
    """Whether a plan without recomputation is worth a look beside the free one.

    Recomputing takes memory for activations, which under a cap leaves less for resident blocks.
    """
    return split_to_plan(config, geometry) is None and config.schedule == "pipelined"


def does_without(free_step_s: float, plain_step_s: float) -> bool:
    """Whether the plan without recomputation is taken; the free one can be corrected later, so only for a real gain."""
    return plain_step_s < (1 - MIN_GAIN_FRACTION) * free_step_s


def with_chunk_sizes(
    shape: ModelShape,
    geometry: Geometry,
    config: OffloadConfig,
    profile: HardwareProfile | None,
    *,
    is_emulated: bool,
    can_recompute: bool = True,
) -> Geometry:
    """The same with the sizes of chunks and of the ring that the link asks for; arguments as of `pose`."""
    recomputes = can_recompute and split_to_plan(config, geometry) != 0
    if not is_emulated:
        geometry = replace(geometry, least_gap_s=LEAST_GAP_S)
        recomputes = chunks_may_be_recomputed(config, geometry)
    if profile is not None:
        return replace(geometry, least_chunk_bytes=least_chunk_bytes(profile, shape, recomputes=recomputes))
    if is_emulated:  # no copy is too small, only the host's time per chunk counts
        least = max(MIN_SEGMENT_BYTES, MIN_SEGMENT_ROWS * geometry.kv_row_bytes)
        return replace(geometry, least_chunk_bytes=least)
    return geometry


def _rates(shape: ModelShape, geometry: Geometry, config: OffloadConfig, profile: HardwareProfile) -> Rates:
    """At the sizes that are chosen without a cap, and at the full length."""
    sizes = uncapped_sizes(geometry, config)
    return rates_from_profile(
        profile,
        shape,
        batch=geometry.rows,
        block_tokens=sizes.block_tokens,
        chunk_blocks=sizes.chunk_blocks,
        cached_tokens=geometry.max_tokens,
        row_bytes={
            name: form.row_bytes(geometry, sizes.block_tokens) for name, form in FORMS.items() if form.is_encoded
        },
        weights_are_pinned=geometry.weights_are_pinned,
    )
