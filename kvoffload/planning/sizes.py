"""Every size the engine and the layers need, and the same for more rows, wider layers or a longer cache. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvoffload.planning.geometry import Geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Every size the engine and the layers need."""

    block_tokens: int
    chunk_blocks: int
    num_slots: int
    slot_bytes: int
    buffer_bytes: int
    num_buffers: int
    d2h_slot_bytes: int
    scratch_bytes: int  # K/V of a recomputed chunk
    tail_bytes: int  # all layers
    other_device_bytes: int

    @property
    def fixed_device_bytes(self) -> int:
        """Device memory held whatever the plan is."""
        return (
            self.num_slots * self.slot_bytes
            + self.num_buffers * self.buffer_bytes
            + 2 * self.d2h_slot_bytes  # one being filled, one being written
            + self.scratch_bytes
            + self.tail_bytes
            + self.other_device_bytes
        )


def widened(sizes: Sizes, rows_before: int, rows: int) -> Sizes:
    """The same sizes for more rows, where a cache had its rows repeated."""
    return replace(
        sizes,
        slot_bytes=sizes.slot_bytes // rows_before * rows,
        buffer_bytes=sizes.buffer_bytes // rows_before * rows,
        scratch_bytes=sizes.scratch_bytes // rows_before * rows,
        d2h_slot_bytes=sizes.d2h_slot_bytes // rows_before * rows,
        tail_bytes=sizes.tail_bytes // rows_before * rows,
    )


def with_kv_rows(sizes: Sizes, geometry: Geometry, kv_row_bytes: int) -> Sizes:
    """The same sizes with chunks that can have K and V so wide, where layers differ."""
    chunk_bytes = sizes.block_tokens * sizes.chunk_blocks * geometry.rows * kv_row_bytes
    return replace(
        sizes,
        slot_bytes=max(sizes.slot_bytes, chunk_bytes) if geometry.is_segmented else sizes.slot_bytes,
        scratch_bytes=max(sizes.scratch_bytes, chunk_bytes) if sizes.scratch_bytes else 0,
        d2h_slot_bytes=max(sizes.d2h_slot_bytes, chunk_bytes),
    )


def grown(sizes: Sizes, geometry: Geometry) -> Sizes:
    """The same sizes with layer buffers for a longer cache."""
    if geometry.is_segmented:
        return sizes
    return replace(sizes, buffer_bytes=max(sizes.buffer_bytes, geometry.max_tokens * geometry.kv_bytes_per_token))
