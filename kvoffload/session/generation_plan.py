"""Everything chosen for one generation: sizes, plan and placement, and whether it fits on the host to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvoffload.planning.drafts import ExpectedRounds, RoundTimes, expected_rounds, why_none
from kvoffload.planning.forms import FORMS, option_name
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import PLAIN, FormName, Placement, reserved_blocks
from kvoffload.planning.plan import Plan
from kvoffload.planning.problem import bytes_per_token
from kvoffload.planning.sizes import Sizes
from kvoffload.session.memory_limits import check_full_host


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """Everything chosen for one generation."""

    geometry: Geometry
    sizes: Sizes
    plan: Plan
    placement: Placement
    inputs: PlanInputs | None  # None where nothing could be predicted
    device_cap_bytes: int | None  # on all that is held on the device; None: what the plan takes
    host_cap_bytes: int  # on the host at the full length, as if every row stored every block
    reserved_shares: Mapping[FormName, float]  # that room on the host was made for
    round_times: RoundTimes | None = None  # of verified drafts; None where there are none, or no prediction
    other: GenerationPlan | None = None  # for drafts that read the other near cache, where that can follow
    no_drafts_reason: str = ""  # why tokens are not drafted, though they might have been

    @property
    def drafts(self) -> bool:
        """Whether tokens are drafted on what is on the device."""
        return self.geometry.ahead_tokens > 0

    def expected_rounds(self, drafts: int | None = None) -> ExpectedRounds | None:
        """Rounds of drafts, as many as gain most or so many; None where nothing can be predicted."""
        return (
            None if self.round_times is None else expected_rounds(self.round_times, self.geometry.rows, drafts=drafts)
        )

    @property
    def expected_drafts(self) -> int:
        """Tokens that rounds are expected to draft; 0 where that gains too little, or cannot be predicted."""
        rounds = self.expected_rounds()
        return 0 if rounds is None else rounds.drafts

    @property
    def why_no_drafts(self) -> str:
        """Why rounds are not expected to draft, in words; "" where nothing can be predicted."""
        if self.round_times is None:
            return ""
        return why_none(self.round_times, self.geometry.rows, num_on_host=self.plan.count(tier="host"))

    @property
    def device_budget_bytes(self) -> int:
        """The cap on device memory; without one, what the plan takes."""
        return self.plan.device_bytes if self.device_cap_bytes is None else self.device_cap_bytes

    @property
    def resident_bytes(self) -> int:
        """Device memory of the resident blocks and of copies of others, at the full length."""
        token_bytes = bytes_per_token(self.geometry, self.placement.block_tokens)
        per_layer = sum(n * token_bytes[form] for form, n in self.placement.resident.items())
        per_layer += self.placement.window_blocks * token_bytes[PLAIN]
        per_layer += self.placement.shadow_blocks * token_bytes[self.placement.shadow_form]
        return self.geometry.num_offloaded_layers * self.placement.block_tokens * per_layer

    @property
    def stage_limit_bytes(self) -> int | None:
        """What the cap leaves for staging a prefill's blocks; None: anything."""
        if self.device_cap_bytes is None:
            return None
        return max(0, self.device_cap_bytes - self.sizes.fixed_device_bytes - self.resident_bytes)

    @property
    def full_host_bytes(self) -> int:
        """What the cache takes on the host at its full length, as if every row stored every block.

        With what was reserved for the form that it turned out to need less of, and room to store as K and V what is
        planned to be packed: whether a block can be is seen when it is there.
        """
        placement, geometry = self.placement, self.geometry
        num_blocks = max(0, geometry.max_tokens // placement.block_tokens - placement.num_resident)
        token_bytes = bytes_per_token(geometry, placement.block_tokens)
        token_bytes = {
            form: num_bytes + (token_bytes[PLAIN] if FORMS[form].needs_rates else 0)
            for form, num_bytes in token_bytes.items()
        }
        counts = [reserved_blocks(num_blocks, shares) for shares in (self.reserved_shares, placement.shares)]
        most = {form: max(count.get(form, 0) for count in counts) for form in token_bytes}
        per_layer = sum(n * token_bytes[form] for form, n in most.items())
        return geometry.num_offloaded_layers * placement.block_tokens * per_layer

    @property
    def fits_on_host(self) -> bool:
        """Whether it does at its full length."""
        return self.full_host_bytes <= self.host_cap_bytes

    def check_host(self) -> None:
        """Refuse before any token if the cache cannot fit on the host at its full length.

        Raises:
            HostMemoryError: with the numbers.
        """
        check_full_host(self.geometry, self.placement.prompt_tokens, self.full_host_bytes, self.host_cap_bytes)


def planned_resident(plan: Plan) -> dict[FormName, int]:
    """Blocks on the device, by form."""
    return {kind.form: n for kind, n in plan.placed.items() if kind.tier == "device" and n}


def resident_with_room(plan: Plan, inputs: PlanInputs, geometry: Geometry) -> dict[FormName, int]:
    """Blocks on the device, by form: those of the plan, and of those that come after it as many as there is room for.

    A plan is for the mean length.
    """
    found = planned_resident(plan)
    block_bytes = inputs.num_offloaded_layers * inputs.block_tokens * inputs.bytes_per_token[PLAIN]
    to_come = max(0, geometry.max_tokens // inputs.block_tokens - inputs.num_blocks)
    more = min(to_come, max(0, inputs.device_bytes - plan.device_bytes) // max(1, block_bytes))
    return found | ({PLAIN: found.get(PLAIN, 0) + more} if more else {})


def with_copies(chosen: GenerationPlan, places: int = 0) -> GenerationPlan:
    """The same with what drafts read: the first block of a layer and the newest, or copies of all of them.

    Blocks of K and V on the device are stored on the host as well and have exact copies in the place of residents, so
    that others can take their place. Where the host has no room for that, they stay where they were put.

    Args:
        chosen: with all K and V on the device as residents.
        places: for residents of K and V that there are already; what is in them does not move.
    """
    if not chosen.drafts:
        return chosen
    assert places >= 0
    before, shadow = chosen.placement, chosen.geometry.shadow_form
    plain = before.resident.get(PLAIN, 0)
    stay = min(plain, places)
    most = chosen.geometry.max_tokens // before.block_tokens if shadow is not None else 0
    fixed = replace(
        before, window_blocks=0, shadow_blocks=max(0, most - before.num_resident), shadow_form=shadow or PLAIN
    )
    rolling = replace(fixed, resident={**before.resident, PLAIN: stay}, window_blocks=plain - stay)
    found = replace(chosen, placement=rolling)
    return found if before.window_blocks or found.fits_on_host else replace(chosen, placement=fixed)


def without_packing(chosen: GenerationPlan) -> GenerationPlan | None:
    """The same with no more blocks packed; None where none would be."""
    shares = {form: n for form, n in chosen.placement.shares.items() if not FORMS[form].needs_rates}
    if shares == chosen.placement.shares:
        return None
    placement = replace(chosen.placement, shares=shares)
    return replace(
        chosen, geometry=replace(chosen.geometry, may_pack=False), placement=placement, reserved_shares=shares
    )


def stored_options(on_host: Mapping[FormName, int], resident: Mapping[FormName, int]) -> dict[str, int]:
    """Blocks that there are, by option."""
    found = {option_name(form, "host"): n for form, n in on_host.items()}
    return found | {option_name(form, "device"): n for form, n in resident.items()}
