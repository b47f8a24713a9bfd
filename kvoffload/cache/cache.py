"""A cache whose blocks live on the host: its layers, and what happens to all of them at once.

Owns reordering, cropping and copying over layers; a layer itself is in layer.py, what they share in state.py.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence

import torch

from kvoffload.cache.layer import CacheLayer
from kvoffload.cache.state import CacheState
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.placement import FormName, Placement
from kvoffload.store.carried import CarriedPositions
from kvoffload.store.pool import HostPool
from kvoffload.store.positions import PositionTable


class CacheCore(CacheState):
    """The offloaded layers of one generation.

    Args:
        engine: moves their bytes.
        pool: host memory.
        placement: what the plan says.
        num_layers: offloaded layers.
        rows: logical rows (sequences, beams included).
        prompt_copies: consecutive rows that hold the same prompt (beams), stored once.
    """

    def __init__(
        self,
        engine: TransferEngine,
        pool: HostPool,
        placement: Placement,
        *,
        num_layers: int,
        rows: int,
        prompt_copies: int = 1,
    ) -> None:
        super().__init__(engine, pool, placement, rows=rows, prompt_copies=prompt_copies)
        self.layers = [CacheLayer(self, position) for position in range(num_layers)]
        self.sources = self.layers
        self._family: weakref.WeakSet[CacheCore] = weakref.WeakSet([self])  # copies, which share device memory

    @property
    def recomputed_tokens(self) -> int:
        """Counted per layer and row."""
        return self.work["recomputed"]

    def count_blocks(self) -> Counter[FormName]:
        """Stored blocks of all layers, by form."""
        return Counter(block.form for layer in self.layers for block in layer.blocks)

    @property
    def host_bytes(self) -> int:
        """Host memory of all layers; what copies of a cache share counts for each of them."""
        return sum(layer.host_bytes for layer in self.layers)

    def account_all(self) -> None:
        """Tell the engine how much device memory each layer holds."""
        for layer in self.layers:
            layer.account()

    def carry_positions(self, is_wanted: bool) -> None:
        """Whether position embeddings travel with the blocks stored as activations; called before any are captured."""
        self.positions = CarriedPositions() if is_wanted else PositionTable(self.placement.max_tokens or 0)

    def drop_stored_positions(self) -> None:
        """Called when all layers have stored the same blocks: those carry their position embeddings now."""
        num_stored = self.layers[0].num_stored_tokens
        if isinstance(self.positions, CarriedPositions) and self.positions.drop_stored(num_stored):
            self.layers[0].account()

    def make_room(self) -> None:
        """Room for all blocks that the placement foresees.

        Raises:
            HostMemoryError: the pool may not grow that much.
        """
        for layer in self.layers:
            layer.grow_resident()
            layer.reserve()

    def regroup(self) -> None:
        """Chunks have another number of blocks from now on; nothing may be in flight."""
        for layer in self.layers:
            layer.version += 1

    def select_rows(self, indices: torch.Tensor) -> None:
        """Logical row i becomes what row `indices[i]` was; no stored byte moves."""
        indices = indices.to(self.engine.backend.device)
        for layer in self.layers:
            if layer.tail is not None:
                layer.tail.select_rows(indices)
        self.positions.select(indices, self.row_table.num_blocks * self.placement.block_tokens, self.rows)
        self.row_table.select(indices)
        if indices.numel() != self.rows:
            self.prompt_copies = 1  # groups of rows may be cut
        self.rows = indices.numel()

    def crop(self, tokens: int) -> None:
        """Remove the newest `tokens` tokens of every layer, store full blocks, and prefetch the next step."""
        if self.unused:  # rows have different tokens there
            for layer in self.layers:
                assert tokens <= layer.tail_tokens
                layer.remove(tokens)
            return
        block_tokens = self.placement.block_tokens
        first_gone, left = divmod(self.layers[0].num_tokens - tokens, block_tokens)
        is_reopened = left > 0 and tokens > self.layers[0].tail_tokens
        block = self.layers[0].blocks[first_gone] if is_reopened else None
        for layer in self.layers:
            layer.remove(tokens)
        table = self.logical_rows(first_gone) if is_reopened else None
        if table is not None:
            assert block is not None
            first, step = first_gone * block_tokens, block.row_step
            self.positions.restore(first, first + block_tokens, table * step, block.rows * step)
        self.row_table.truncate(len(self.layers[0].blocks))
        self.positions.truncate(self.layers[0].num_tokens)
        for layer in self.layers:
            layer.store_full_blocks()
        self.drop_stored_positions()
        if self.layers[0].blocks:
            self.engine.prefetch(self)

    def keep(self, lengths: Sequence[int]) -> None:
        """Each row keeps the oldest of its tokens that are not in blocks; blocks that all rows can fill are stored.

        Tokens of the shorter rows end where those of the longest one do, so that the next token of every row has the
        same slot, and a mask hides the slots in front of them.

        Args:
            lengths: tokens that each row keeps, no more than it has.
        """
        before, full = self.unused or (0,) * len(lengths), min(lengths) // self.placement.block_tokens
        if full:
            self._align(before, (0,) * len(lengths), max(lengths))
            self.unused = ()
            for layer in self.layers:
                layer.store_full_blocks(full)
            before = (0,) * len(lengths)
            lengths = [length - full * self.placement.block_tokens for length in lengths]
        unused = tuple(max(lengths) - length for length in lengths)
        self._align(before, unused, max(lengths))
        self.unused = unused if any(unused) else ()
        for layer in self.layers:
            layer.awaits_crop = False
        if self.layers[0].blocks:
            self.engine.prefetch(self)

    def _align(self, before: Sequence[int], unused: Sequence[int], num_tokens: int) -> None:
        """Tokens of each row begin behind other numbers of unused slots, and there are that many slots."""
        there = self.layers[0].tail_tokens
        if not there or (tuple(before) == tuple(unused) and num_tokens == there):
            return
        device = self.engine.backend.device
        moved = torch.tensor([old - new for old, new in zip(before, unused, strict=True)], device=device)
        index = (torch.arange(num_tokens, device=device).unsqueeze(1) + moved).clamp_(0, there - 1)
        for layer in self.layers:
            if layer.tail is not None:
                layer.tail.rearrange(index)

    def fork(self) -> CacheCore:
        """A copy, between two forwards: it shares all blocks with this one, and from now on each goes its own way.

        Whatever interrupts it, nothing of the copy is left.
        """
        other = CacheCore(
            self.engine, self.pool, self.placement, num_layers=0, rows=self.rows, prompt_copies=self.prompt_copies
        )
        other.is_recording = self.is_recording
        other.positions, other.row_table = self.positions.fork(), self.row_table.fork()
        other._claimed_copies = self._claimed_copies
        other.lossy_forms, other.kept_plain = set(self.lossy_forms), self.kept_plain.copy()
        other.sources, other._family = other.layers, self._family
        try:
            for layer in self.layers:
                other.layers.append(layer.fork(other))
        except BaseException:
            other.reset()
            raise
        self._family.add(other)
        return other

    def reset(self) -> None:
        """Forget all tokens and give their memory back; the cache can be used again."""
        self.engine.forget(self)
        for layer in self.layers:
            layer.close()
        self.forget_rows()
        for other in self._family:  # what was shared counts for another one now
            if other is not self:
                other.account_all()
