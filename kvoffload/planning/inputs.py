"""One instance of the planning problem. Plain data; symbols of the cost model (`step_time`) stand behind the fields."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.config import Schedule
from kvoffload.planning.plan import Objective
from kvoffload.planning.rates import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """One instance of the planning problem. All token counts are in blocks of `block_tokens`."""

    num_layers: int  # N
    num_offloaded_layers: int  # L
    num_blocks: int  # s: cached blocks to place (the tail is not among them)
    block_tokens: int
    kv_bytes_per_token: int  # beta_kv, whole batch, one layer
    activation_bytes_per_token: int  # beta_x, whole batch, one layer; with the position embeddings that blocks carry
    rates: Rates
    chunk_blocks: int
    num_slots: int
    device_bytes: int  # cap on everything held on the device
    fixed_device_bytes: int  # `Sizes.fixed_device_bytes`: tails, ring, D2H slots, scratch, layer buffers, other layers
    host_bytes: int  # cap on host memory for the cache
    stored_activation_blocks: int = 0  # x >= x_stored when re-planning
    stored_kv_blocks: int = 0  # t >= t_stored when re-planning
    stored_resident_blocks: int = 0  # r >= r_stored when re-planning
    stored_resident_activation_blocks: int = 0
    split: float | None = None  # None: free; else x is this share of x + t (rounded to a block), and r_x = 0
    schedule: Schedule = "pipelined"
    weight_bytes_per_step: int = 0  # streamed weights, over the same link
    num_micro_batches: int = 1
    objective: Objective = "latency"
    is_segmented: bool = False  # attention takes chunks one by one, so kv chunks use the ring as well

    @property
    def ring_bytes(self) -> int:
        """Bytes of K/V or activation that can be on the device before they are needed."""
        token_bytes = self.activation_bytes_per_token
        if self.is_segmented:  # slots have room for either form
            token_bytes = max(token_bytes, self.kv_bytes_per_token)
        return self.num_slots * self.chunk_blocks * self.block_tokens * token_bytes
