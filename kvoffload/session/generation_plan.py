"""Everything chosen for one generation: sizes, plan and placement, and whether it fits on the host to its end."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import Placement, reserved_blocks
from kvoffload.planning.plan import Plan
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
    stage_limit_bytes: int | None  # what the cap on device memory leaves for staging a prefill's blocks
    host_cap_bytes: int  # on the host at the full length, as if every row stored every block
    reserved_share: float  # of activations, that room on the host was made for

    @property
    def device_budget_bytes(self) -> int:
        """The cap on device memory; without one, what the plan takes."""
        return self.plan.device_bytes + (self.stage_limit_bytes or 0)

    @property
    def full_host_bytes(self) -> int:
        """What the cache takes on the host at its full length, as if every row stored every block.

        With what was reserved for the form that it turned out to need less of.
        """
        placement, geometry, share = self.placement, self.geometry, self.placement.activation_share
        resident = placement.resident_kv_blocks + placement.resident_activation_blocks
        num_blocks = max(0, geometry.max_tokens // placement.block_tokens - resident)
        reserved = reserved_blocks(num_blocks, self.reserved_share)
        x, t = (max(pair) for pair in zip(reserved, reserved_blocks(num_blocks, share), strict=True))
        token_bytes = x * geometry.activation_bytes_per_token + t * geometry.kv_bytes_per_token
        return geometry.num_offloaded_layers * placement.block_tokens * token_bytes

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
