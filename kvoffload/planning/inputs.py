"""One instance of the planning problem. Plain data; symbols of the cost model (`step_time`) stand behind the fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvoffload.config import Schedule
from kvoffload.planning.placement import PLAIN, FormName
from kvoffload.planning.plan import Objective
from kvoffload.planning.rates import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """One instance of the planning problem. All token counts are in blocks of `block_tokens`."""

    num_layers: int  # N
    num_offloaded_layers: int  # L
    num_blocks: int  # s: cached blocks to place (the tail is not among them)
    block_tokens: int
    bytes_per_token: Mapping[FormName, int]  # beta: whole batch, one layer; the forms that blocks may have
    rates: Rates
    chunk_blocks: int
    num_slots: int
    device_bytes: int  # cap on everything held on the device
    fixed_device_bytes: int  # `Sizes.fixed_device_bytes`: tails, ring, D2H slots, scratch, layer buffers, other layers
    host_bytes: int  # cap on host memory for the cache
    stored: Mapping[str, int] = field(default_factory=dict)  # blocks by option, when re-planning: lower bounds
    split: float | None = None  # None: free; else the share of recomputed blocks on the host, none on the device
    schedule: Schedule = "pipelined"
    weight_bytes_per_step: int = 0  # streamed weights, over the same link
    weight_device_bytes: int = 0  # of layers that stay and slabs for those that do not; no part of `device_bytes`
    num_micro_batches: int = 1
    objective: Objective = "latency"
    is_plain_on_device: bool = False  # new blocks on the device are K and V, which a window holds as well
    shadow_form: FormName | None = None  # of a copy on the device of each block on the host; None: there are none
    shadow_bytes_per_token: int = 0  # of these: whole batch, one layer
    most_blocks: int = 0  # at the full length, for which copies have room; 0: no more than there are
    is_segmented: bool = False  # attention takes chunks one by one, so kv chunks use the ring as well

    def __hash__(self) -> int:
        """Of what tells most instances apart; equal ones are compared whole."""
        return hash((self.num_blocks, self.block_tokens, self.device_bytes, self.host_bytes, self.rates))

    @property
    def reserved_bytes(self) -> int:
        """Device memory for the copies of blocks to come."""
        to_come = max(0, self.most_blocks - self.num_blocks)
        return self.num_offloaded_layers * to_come * self.block_tokens * self.shadow_bytes_per_token

    @property
    def ring_bytes(self) -> int:
        """Bytes that can be on the device before they are needed; slots have room for whichever form uses them."""
        sizes = [size for form, size in self.bytes_per_token.items() if self.is_segmented or form != PLAIN]
        return self.num_slots * self.chunk_blocks * self.block_tokens * max(sizes, default=0)
