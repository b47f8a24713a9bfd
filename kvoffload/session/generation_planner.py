"""The choices of one generation: sizes, plan and placement, first from the profile, then checked against real steps.

Owns the path from "auto" to a `Placement`. Measured rates replace the profile's before anything irrevocable: at the
first layer of the first prefill the link and the recomputation of one chunk are timed (`measure_chunk`), and
activations are stored only if that wins. Later the decode steps themselves correct the rates (`replan`). Does not own
how much memory may be taken (`memory_limits`), the timing (`measured_rates`), nor which cache a plan is for
(`cache_plans`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvoffload.backend import Backend
from kvoffload.config import OffloadConfig
from kvoffload.errors import HostMemoryError, InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.shape import ModelShape
from kvoffload.planning import planner
from kvoffload.planning.drafts import MIN_GAIN_FRACTION, most_ahead, round_times, rows_may_differ, token_s_usually
from kvoffload.planning.forms import FORMS, SHADOW_FORM, option_name, why_no_shadow
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import PLAIN, FormName, Placement
from kvoffload.planning.plan import Plan
from kvoffload.planning.problem import does_without, host_bytes_at, may_do_without, mean_tokens, pose
from kvoffload.planning.sizing import planned_forms, split_to_plan
from kvoffload.session.generation_plan import (
    GenerationPlan,
    planned_resident,
    resident_with_room,
    stored_options,
    with_copies,
)
from kvoffload.session.measured_rates import MeasuredRates
from kvoffload.session.memory_limits import MemoryLimits

logger = logging.getLogger(__name__)
POSITION_SHARE = 0.01  # of the device budget that a table of position embeddings takes at most


class GenerationPlanner:
    """Makes the choices of a session.

    Args:
        config: the user's options.
        shape: of the model.
        backend: of the session.
        profile: asked for only when a prediction is wanted; None from it means the link has no known speed.
        stored: asked for otherwise, where the link is real: what is known of it without measuring, or None.
    """

    def __init__(
        self,
        config: OffloadConfig,
        shape: ModelShape,
        backend: Backend,
        profile: Callable[[], HardwareProfile],
        stored: Callable[[], HardwareProfile | None] = lambda: None,
    ) -> None:
        self.config = config
        self.shape = shape
        self.backend = backend
        self._profile = profile
        self._stored = (lambda: None) if backend.emulated else stored
        self.limits = MemoryLimits(config, shape, backend)
        self.measured = MeasuredRates()
        self._told: set[str] = set()

    def plan_for(self, geometry: Geometry, *, can_recompute: bool = True, **known: Any) -> GenerationPlan:
        """Sizes, plan and placement for a cache; the sizes of plain transfer where those are predicted to be faster.

        Recomputing takes memory for activations, which under a cap leaves less for resident blocks. Arguments and
        errors as of `plan_sizes_for`.
        """
        try:
            return self._with_drafts_or_not(geometry, can_recompute=can_recompute, **known)
        except (InfeasiblePlanError, HostMemoryError):
            plain = replace(geometry, may_pack=False)  # packed blocks need room to turn out not to be
            if planned_forms(self.config, plain) == planned_forms(self.config, geometry):
                raise
        return self._with_drafts_or_not(plain, can_recompute=can_recompute, **known)

    def _with_drafts_or_not(self, geometry: Geometry, **known: Any) -> GenerationPlan:
        """`plan_for`, packed where that is possible: with room for drafts where these are expected to gain."""
        if not geometry.ahead_tokens:
            return self._plan_for(geometry, **known)
        number = self.config.fixed_drafts
        try:
            drafted = self.with_best_near_cache(geometry, lambda settled: self._plan_for(settled, **known))
            if number is not None or drafted.expected_drafts:
                return self._beside_undrafted(drafted, geometry, **known)
            reason = drafted.why_no_drafts
        except (InfeasiblePlanError, HostMemoryError) as error:  # it may fit without
            if number is not None:
                raise
            reason = f"there is no room for them: {error}"
        return replace(self._plan_for(replace(geometry, ahead_tokens=0), **known), no_drafts_reason=reason)

    def _beside_undrafted(self, drafted: GenerationPlan, geometry: Geometry, **known: Any) -> GenerationPlan:
        """The same beside full transfer as it would be set up without drafts, whose memory has more room for blocks."""
        if drafted.inputs is None:
            return drafted
        try:
            plain = self._plan_for(replace(geometry, ahead_tokens=0, shadow_form=None), **known)
        except (InfeasiblePlanError, HostMemoryError):
            return drafted
        full_s = min(drafted.plan.full_transfer_step_s, plain.plan.full_transfer_step_s)
        return replace(drafted, plan=replace(drafted.plan, full_transfer_step_s=full_s))

    def with_room_ahead(self, geometry: Geometry) -> Geometry:
        """The same with room in the tail for tokens that are cached before anybody asks for them."""
        return replace(geometry, ahead_tokens=most_ahead(self.shape, geometry, self.config))

    def with_best_near_cache(self, geometry: Geometry, plan: Callable[[Geometry], GenerationPlan]) -> GenerationPlan:
        """The plan of drafts that read a window of the newest blocks, or copies of all of them.

        That with which the next token is expected sooner; where nothing can be predicted, that which was asked for.

        Args:
            geometry: of the cache.
            plan: makes a plan for it.

        Raises:
            InfeasiblePlanError, HostMemoryError: neither fits.
        """
        asked, window, shadow = self.config.draft_cache, replace(geometry, shadow_form=None), None
        if asked != "window":
            reason = why_no_shadow(self.config, geometry)
            if asked == "auto" and not self.limits.caps_device:
                reason = "as little as works is held on the device"
            try:
                if reason is None:
                    shadow = plan(replace(geometry, shadow_form=SHADOW_FORM))
            except (InfeasiblePlanError, HostMemoryError) as error:
                reason = str(error)
            if reason is not None and asked == SHADOW_FORM:
                self._tell_once(
                    f"draft_cache='{asked}': {reason}; drafts read a window of the newest tokens, if they are expected "
                    "to gain (raise device_gib, or draft_cache='window')"
                )
        if shadow is None or asked == "window":
            return plan(window)
        if asked == SHADOW_FORM:
            return shadow
        try:
            near = plan(window)
        except (InfeasiblePlanError, HostMemoryError):
            return shadow
        best, other = (shadow, near) if _is_sooner(shadow, near, self.config.fixed_drafts) else (near, shadow)
        return replace(best, other=other if _may_follow(best, other) else None)

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=2)

    def _plan_for(self, geometry: Geometry, *, can_recompute: bool = True, **known: Any) -> GenerationPlan:
        """`plan_for`, drafts or not."""
        if not can_recompute or not may_do_without(self.config, geometry):
            return self.plan_sizes_for(geometry, can_recompute=can_recompute, **known)
        found, why = [], None
        for recomputes in (True, False):
            try:
                found.append(self.plan_sizes_for(geometry, can_recompute=recomputes, **known))
            except (InfeasiblePlanError, HostMemoryError) as error:
                why = why or error.with_traceback(None)  # which would keep this frame, and those of its callers
        if not found:
            assert why is not None
            raise why
        if len(found) == 1:
            return found[0]
        free, plain = found
        if does_without(free.plan.predicted_step_s, plain.plan.predicted_step_s):
            return plain
        full_s = min(free.plan.full_transfer_step_s, plain.plan.predicted_step_s)
        return replace(free, plan=replace(free.plan, full_transfer_step_s=full_s))

    def plan_sizes_for(
        self,
        geometry: Geometry,
        *,
        prompt_tokens: int,
        knows_length: bool,
        host_held_bytes: int,
        device_held_bytes: int = 0,
        device_others_bytes: int = 0,
        can_recompute: bool = True,
    ) -> GenerationPlan:
        """Sizes, plan and placement for a cache that keeps activations or does not.

        Args:
            geometry: its shape.
            prompt_tokens: tokens of the prompt.
            knows_length: whether `geometry.max_tokens` is more than a guess.
            host_held_bytes: host memory the session holds already.
            device_held_bytes: device memory the session holds already, and will use again.
            device_others_bytes: device memory that other caches of the session hold.
            can_recompute: False where K/V of this model turned out not to follow from the activation.

        Raises:
            InfeasiblePlanError, HostMemoryError: before any token, with the numbers.
        """
        fixed_split = split_to_plan(self.config, geometry) if can_recompute else 0.0
        host_cap = self.limits.full_host_cap_bytes(geometry, prompt_tokens, host_held_bytes)
        geometry, sizes, inputs, device_bytes, has_rates = pose(
            self.shape,
            geometry,
            self.config,
            self.profile(),
            is_emulated=self.backend.emulated,
            cached_tokens=mean_tokens(prompt_tokens, geometry.max_tokens),
            device_cap_bytes=lambda settled: self.limits.device_cap_bytes(
                settled, prompt_tokens, device_held_bytes, device_others_bytes
            ),
            host_cap_bytes=host_cap,
            can_recompute=can_recompute,
            correct=lambda rates: self.measured.correct(rates, geometry.rows),
        )
        forms = planned_forms(self.config, geometry, can_recompute=can_recompute, has_rates=has_rates)
        self.limits.check_least_host(geometry, inputs, prompt_tokens, host_held_bytes)
        plan = planner.solve(inputs)
        if not has_rates:
            plan = replace(plan, predicted_step_s=0.0, full_transfer_step_s=0.0)
        shares = plan.shares if fixed_split is None else _fixed_shares(plan, fixed_split)
        if not plan.count(tier="host"):  # then of what may come beyond the mean length
            shares = shares | _coarsest_share(inputs, 1 - sum(shares.values()))
        chosen = GenerationPlan(
            device_cap_bytes=device_bytes,
            host_cap_bytes=host_cap,
            reserved_shares=shares,
            geometry=geometry,
            sizes=sizes,
            plan=plan,
            placement=Placement(
                block_tokens=sizes.block_tokens,
                chunk_blocks=sizes.chunk_blocks,
                resident=resident_with_room(plan, inputs, geometry),
                shares=shares,
                may_become=_may_become(forms, fixed_split, has_rates=has_rates),
                max_tokens=geometry.max_tokens if knows_length else None,
                prompt_tokens=prompt_tokens,
                ahead_tokens=geometry.ahead_tokens,
            ),
            inputs=inputs if has_rates else None,
        )
        chosen = self.with_fitting_share(chosen)
        chosen.check_host()
        return self.with_rounds(with_copies(chosen))

    def with_rounds(self, chosen: GenerationPlan) -> GenerationPlan:
        """The same with what rounds of drafts take, where that can be predicted."""
        profile = self.profile() if chosen.drafts and chosen.inputs is not None else None
        if profile is None or chosen.inputs is None:
            return chosen
        geometry = chosen.geometry
        own_pace = rows_may_differ(self.shape, geometry, self.config)
        times = round_times(chosen.inputs, chosen.plan, self.shape, profile, rows=geometry.rows, own_pace=own_pace)
        return replace(chosen, round_times=times)

    def with_fitting_share(self, chosen: GenerationPlan) -> GenerationPlan:
        """The same with as many activations, or blocks of few bits, as it takes to fit on the host at the full length.

        A plan is for the mean length, where a larger part of the cache is resident. Packed blocks do not help here:
        whether a block can be packed is seen when it is there.
        """
        if chosen.fits_on_host or chosen.inputs is None or not chosen.placement.may_become:
            return chosen
        there = {**chosen.inputs.stored, **stored_options({}, planned_resident(chosen.plan))}
        certain = {
            form: size
            for form, size in chosen.inputs.bytes_per_token.items()
            if not FORMS[form].needs_rates or there.keys() & {form, option_name(form, "device")}
        }
        inputs = replace(chosen.inputs, stored=there, bytes_per_token=certain)
        num_blocks = max(inputs.num_blocks, chosen.geometry.max_tokens // inputs.block_tokens)
        host_bytes = host_bytes_at(chosen.host_cap_bytes, chosen.geometry, num_blocks, inputs.block_tokens)
        # less the block of each form that `reserved_blocks` has to spare
        spare_bytes = sum(inputs.bytes_per_token.values())
        host_bytes -= chosen.geometry.num_offloaded_layers * inputs.block_tokens * spare_bytes
        try:
            longest = planner.solve(replace(inputs, num_blocks=num_blocks, host_bytes=host_bytes))
            plan = planner.solve(replace(inputs, split=longest.split_fraction))
        except InfeasiblePlanError:
            return chosen
        plan, shares = replace(plan, version=chosen.plan.version), longest.shares
        return replace(chosen, plan=plan, reserved_shares=shares, placement=replace(chosen.placement, shares=shares))

    def carries_positions(self, chosen: GenerationPlan, token_bytes: int) -> bool:
        """Whether position embeddings travel with the blocks, as their table on the device would become too large.

        Args:
            chosen: for the cache.
            token_bytes: what a token takes in the table.
        """
        table_bytes = chosen.geometry.max_tokens * token_bytes
        return chosen.placement.keeps_activations and table_bytes > POSITION_SHARE * chosen.device_budget_bytes

    def profile(self) -> HardwareProfile | None:
        """Of the machine, as far as a prediction needs it; None where nothing is known."""
        return self._profile() if self._wants_profile else self._stored()

    @property
    def _wants_profile(self) -> bool:
        """Whether a prediction decides something (a free split over a link with a speed), or was paid for already."""
        if not self.backend.has_speed:
            return False
        return self.config.fixed_split is None or self.config.profile != "auto"

    # ---- checked, not believed -----------------------------------------------------------------------------------

    def measure_chunk(
        self,
        chosen: GenerationPlan,
        prepare: Callable[[int], Callable[[], None]],
        ring: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> GenerationPlan:
        """Time one chunk both ways and plan again with what was measured.

        Args:
            chosen: made from the profile.
            prepare: returns the recomputation of that many tokens of all rows of one layer.
            ring: returns slots that lie idle.
        """
        is_free = any(FORMS[form].is_recomputed for form in chosen.placement.may_become)
        if chosen.inputs is None or not is_free or self.config.deterministic:
            return chosen
        self.measured.time_chunk(self.backend, self.shape, chosen.geometry, chosen.sizes, prepare, ring)
        rates = self.measured.correct(chosen.inputs.rates, chosen.geometry.rows)
        inputs = replace(chosen.inputs, rates=rates)
        plan = planner.solve(inputs)
        logger.info(
            "one layer checked: %.3g s per token recomputed, plan stores %.2f of the offloaded tokens as activations",
            rates.restore_s_per_token["activation"],
            plan.split_fraction,
        )
        placement = replace(
            chosen.placement, resident=resident_with_room(plan, inputs, chosen.geometry), shares=plan.shares
        )
        corrected = replace(chosen, inputs=inputs, plan=plan, placement=placement, reserved_shares=plan.shares)
        corrected = with_copies(corrected)
        if corrected.other is not None and not _may_follow(corrected, corrected.other):
            corrected = replace(corrected, other=None)
        # The plan is for the mean length; at the full one only the form that was asked for first may fit.
        return corrected if corrected.fits_on_host else replace(chosen, inputs=inputs)

    def note_gap(self, chosen: GenerationPlan, between_steps_s: float | None) -> None:
        """What passed between the attention of two real steps corrects the gap that was assumed.

        Where the device is the CPU the gap is part of its work, and is left as it is.
        """
        if chosen.inputs is not None and not self.backend.emulated and not self.config.deterministic:
            self.measured.take_gap(between_steps_s, chosen.inputs.rates)


def _may_follow(one: GenerationPlan, other: GenerationPlan) -> bool:
    """Whether the second plan can take the place of the first while tokens are decoded: no block has to move."""
    same = one.sizes.block_tokens == other.sizes.block_tokens and one.placement.resident == other.placement.resident
    # room on the host is made for both
    together = replace(other, reserved_shares=one.placement.shares)
    return same and together.fits_on_host and replace(one, reserved_shares=other.placement.shares).fits_on_host


def _is_sooner(one: GenerationPlan, other: GenerationPlan, drafts: int | None) -> bool:
    """Whether the first plan usually gives the next token sooner, by a margin, or alone is expected to gain by drafts.

    False where nothing is known.
    """
    if one.round_times is None or other.round_times is None:
        return False
    if drafts is None and bool(one.expected_drafts) != bool(other.expected_drafts):
        return one.expected_drafts > 0
    rows = one.geometry.rows
    mine_s, others_s = (token_s_usually(times, rows, drafts) for times in (one.round_times, other.round_times))
    return mine_s * (1 + MIN_GAIN_FRACTION) < others_s


def _may_become(forms: frozenset[FormName], fixed_split: float | None, *, has_rates: bool) -> tuple[FormName, ...]:
    """Forms that a later plan may choose for blocks to come: all where it is free, else those of few bits."""
    found = sorted(forms - {PLAIN})
    if fixed_split is None and has_rates:
        return tuple(found)
    return () if fixed_split else tuple(form for form in found if not FORMS[form].is_exact)


def _coarsest_share(inputs: PlanInputs, share: float) -> dict[FormName, float]:
    """That share of the blocks on the host in the smallest form with loss; nothing where none is allowed."""
    lossy = {form: size for form, size in inputs.bytes_per_token.items() if not FORMS[form].is_exact}
    return {min(lossy, key=lossy.__getitem__): share} if lossy else {}


def _fixed_shares(plan: Plan, split: float) -> dict[FormName, float]:
    """A share that the user fixed, of the form that is recomputed; the others as planned among themselves."""
    kept = 1 - plan.split_fraction
    return {
        form: split if FORMS[form].is_recomputed else share * (1 - split) / kept if kept else 0.0
        for form, share in plan.shares.items()
    }
