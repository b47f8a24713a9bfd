"""A cache whose blocks live on the host: its layers, the row table they share, and what happens to all of them at once.

Owns reordering, cropping and counting over layers; a layer itself is in layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvoffload.cache.layer import CacheLayer
from kvoffload.cache.verification import rows_are_alike
from kvoffload.errors import UnsupportedModelError
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.placement import Placement
from kvoffload.store.carried import CarriedPositions
from kvoffload.store.pool import HostPool
from kvoffload.store.positions import PositionTable
from kvoffload.store.row_table import RowTable
from kvoffload.store.tail import NewTokens


class CacheCore:
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
        self.engine = engine
        self.pool = pool
        self.placement = placement
        self.rows = rows
        self.prompt_copies = prompt_copies
        self.is_recording = False
        self.before_blocks: Callable[[], None] | None = None  # may change `placement` before new blocks get a form
        self.not_recomputable: Callable[[int], None] | None = None  # told of a layer whose later tokens are transferred
        self.recomputed_tokens = 0  # counted per layer and row
        self.positions: PositionTable | CarriedPositions = PositionTable(placement.max_tokens or 0)
        self.row_table = RowTable(engine.backend.device)
        self.layers = [CacheLayer(self, position) for position in range(num_layers)]
        self._claimed_copies = 1  # of the blocks added last
        self._gather: tuple[tuple[int, int], torch.Tensor] | None = None

    @property
    def sources(self) -> Sequence[CacheLayer]:
        """The layers, in the order of their jobs."""
        return self.layers

    def account(self) -> None:
        """Tell the engine how much device memory the layers hold."""
        layers = sum(layer.device_bytes for layer in self.layers)
        self.engine.account(f"cache {id(self)}", layers + self.positions.device_bytes)

    def carry_positions(self, is_wanted: bool) -> None:
        """Whether position embeddings travel with the blocks stored as activations; called before any are captured."""
        self.positions = CarriedPositions() if is_wanted else PositionTable(self.placement.max_tokens or 0)

    def drop_stored_positions(self) -> None:
        """Called when all layers have stored the same blocks: those carry their position embeddings now."""
        num_stored = self.layers[0].num_stored_tokens
        if isinstance(self.positions, CarriedPositions) and self.positions.drop_stored(num_stored):
            self.account()

    def reserve(self) -> None:
        """Room on the host for all blocks that the placement foresees.

        Raises:
            HostMemoryError: the pool may not grow that much.
        """
        for layer in self.layers:
            layer.reserve()

    def regroup(self) -> None:
        """Chunks have another number of blocks from now on; nothing may be in flight."""
        for layer in self.layers:
            layer.version += 1

    def claim_blocks(self, num_blocks: int, new: NewTokens) -> int:
        """Called by each layer before it stores blocks up to `num_blocks`; the first one extends the row table.

        Returns:
            How many consecutive logical rows each stored row stands for: more than 1 for prompt blocks of beams,
            whose rows hold equal bits until the first reorder.

        Raises:
            UnsupportedModelError: the rows of a later layer differ, though those of the first do not.
        """
        missing = num_blocks - self.row_table.num_blocks
        if missing > 0:
            copies = self.prompt_copies
            if num_blocks * self.placement.block_tokens > self.placement.prompt_tokens:
                copies = 1
            if copies > 1 and not new.rows_are_copies(copies):
                self.prompt_copies = copies = 1
            if self.before_blocks is not None:
                self.before_blocks()
            self.row_table.extend(missing, self.rows, copies)
            self._claimed_copies = copies
            self.account()
        elif self._claimed_copies > 1 and not rows_are_alike(new, self._claimed_copies):
            raise UnsupportedModelError(
                "sequences of one prompt are stored once, but a layer has other K and V for each: give generate() a "
                "session.new_cache(), which stores all of them"
            )
        return self._claimed_copies

    def warn_not_recomputable(self, position: int) -> None:
        """New blocks of a layer are stored as K and V, though its first tokens could be recomputed."""
        if self.not_recomputable is not None:
            self.not_recomputable(position)

    def select_rows(self, indices: torch.Tensor) -> None:
        """Logical row i becomes what row `indices[i]` was; no stored byte moves."""
        indices = indices.to(self.engine.backend.device)
        for layer in self.layers:
            if layer.tail is not None:
                layer.tail.select_rows(indices)
        self.positions.select(indices, self.row_table.num_blocks * self.placement.block_tokens, self.rows)
        self.row_table.select(indices)
        self.rows = indices.numel()

    def crop(self, tokens: int) -> None:
        """Remove the newest `tokens` tokens of every layer, store full blocks, and prefetch the next step."""
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

    def logical_rows(self, block: int) -> torch.Tensor | None:
        """Stored row of each logical row in a block; None if they are the same."""
        table = self.row_table.table
        return None if table is None else table[block]

    def gather_index(self, layer: CacheLayer) -> torch.Tensor | None:
        """For each (token, logical row) of a layer's stored blocks the row of the layer buffer it is in, flattened.

        None while these are the same. Computed once per step and shared by the layers (twice where a block filled:
        the first layers have stored it while the others have not).
        """
        table, blocks = self.row_table.table, layer.blocks
        if table is None or not blocks:
            return None
        key = (self.row_table.version, len(blocks))
        if self._gather is None or self._gather[0] != key:
            bt, device = self.placement.block_tokens, table.device
            stored_rows = [block.rows for block in blocks]
            first = [0]
            for rows in stored_rows[:-1]:
                first.append(first[-1] + rows * bt)
            first_row = torch.tensor(first, device=device).view(-1, 1, 1)
            step = torch.tensor(stored_rows, device=device).view(-1, 1, 1)
            token = torch.arange(bt, device=device).view(1, -1, 1)
            index = first_row + token * step + table[: len(blocks)].unsqueeze(1)
            self._gather = (key, index.reshape(-1))
        return self._gather[1]

    def reset(self) -> None:
        """Forget all tokens and give their memory back; the cache can be used again."""
        self.engine.forget(self)
        for layer in self.layers:
            layer.close()
        self.row_table = RowTable(self.engine.backend.device)
        self._gather = None  # of the table before, whose versions begin anew
        self.positions = PositionTable(self.placement.max_tokens or 0)
        self.rows, self.prompt_copies = 0, 1
        self.account()
