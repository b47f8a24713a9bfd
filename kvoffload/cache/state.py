"""What the layers of one cache share: the engine and the pool, what the plan says, rows, positions, and the row table.

Layers read it and report to it; it calls none of them. The cache itself (cache.py) is this and its layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from kvoffload.errors import UnsupportedModelError
from kvoffload.pipeline.cargo import Cargo
from kvoffload.pipeline.engine import LayerSource, TransferEngine
from kvoffload.planning.placement import FormName, Placement
from kvoffload.store.block import Block
from kvoffload.store.carried import CarriedPositions
from kvoffload.store.pool import HostPool
from kvoffload.store.positions import PositionTable
from kvoffload.store.row_table import RowTable
from kvoffload.store.tail import NewTokens, Tail
from kvoffload.store.verification import rows_are_alike

CACHE_ACCOUNT = "cache "  # how the accounts of device memory of caches begin


class CacheState:
    """Of one cache.

    Args:
        engine: moves its bytes.
        pool: host memory.
        placement: what the plan says; one for all layers in a forward.
        rows: logical rows (sequences, beams included).
        prompt_copies: consecutive rows that hold the same prompt (beams), stored once.
    """

    def __init__(
        self, engine: TransferEngine, pool: HostPool, placement: Placement, *, rows: int, prompt_copies: int = 1
    ) -> None:
        self.engine = engine
        self.pool = pool
        self.placement = placement
        self.rows = rows
        self.prompt_copies = prompt_copies
        self.is_recording = False  # a crop follows each forward
        self.is_drafting = False  # attention sees what is on the device alone
        # Rows that go at their own pace: slots of the tail that a row does not use, in front of its tokens; (): none.
        self.unused: tuple[int, ...] = ()
        self.sources: Sequence[LayerSource[Cargo]] = ()  # the layers, in the order of their jobs
        self.work: Counter[str] = Counter()  # what forms did, in tokens of rows: "recomputed"
        self.lossy_forms: set[FormName] = set()  # that tokens are or were stored in, as long as any are cached
        self.kept_plain: Counter[FormName] = Counter()  # blocks of any layer that a form could not hold
        self.on_disagreement: Callable[[int], None] | None = None  # told of a layer, see `warn_of_disagreement`
        self.positions: PositionTable | CarriedPositions = PositionTable(placement.max_tokens or 0)
        self.row_table = RowTable(engine.backend.device)
        self._claimed_copies = 1  # of the blocks added last
        self._gather: tuple[tuple[int, int], torch.Tensor] | None = None
        self._layer_bytes: dict[int, int] = {}  # on the device, by layer

    def account(self, layer: int, num_bytes: int) -> None:
        """Tell the engine how much device memory a layer holds now."""
        self._layer_bytes[layer] = num_bytes
        self.engine.account.note(self.account_name, sum(self._layer_bytes.values()) + self.positions.device_bytes)

    @property
    def account_name(self) -> str:
        """Of its device memory."""
        return f"{CACHE_ACCOUNT}{id(self)}"

    def claim_blocks(self, num_blocks: int, tail: Tail, new: NewTokens) -> int:
        """Called by each layer before it stores blocks up to `num_blocks`; the first one extends the row table.

        Args:
            num_blocks: with what is stored now.
            tail: of the layer, which with `new` has the tokens to be stored.
            new: tokens of this forward.

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
            if copies > 1 and not (tail.rows_are_copies(copies) and new.rows_are_copies(copies)):
                self.prompt_copies = copies = 1
            self.row_table.extend(missing, self.rows, copies)
            self._claimed_copies = copies
        elif self._claimed_copies > 1 and not rows_are_alike(new, self._claimed_copies):
            raise UnsupportedModelError(
                "sequences of one prompt are stored once, but a layer has other K and V for each: give generate() a "
                "session.new_cache(), which stores all of them"
            )
        return self._claimed_copies

    def warn_of_disagreement(self, layer: int) -> None:
        """New blocks of a layer are stored as K and V, though a form that was to be theirs could hold its first tokens.

        Args:
            layer: its position.
        """
        if self.on_disagreement is not None:
            self.on_disagreement(layer)

    def logical_rows(self, block: int) -> torch.Tensor | None:
        """Stored row of each logical row in a block; None if they are the same."""
        table = self.row_table.table
        return None if table is None else table[block]

    def gather_index(self, blocks: Sequence[Block]) -> torch.Tensor | None:
        """For each (token, logical row) of a layer's blocks the row of the layer buffer it is in, flattened.

        None while these are the same. Computed once per step and shared by the layers (twice where a block filled:
        the first layers have stored it while the others have not).
        """
        table = self.row_table.table
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

    def forget_rows(self) -> None:
        """All tokens are gone; the next ones may have other rows."""
        self.row_table = RowTable(self.engine.backend.device)
        self._gather = None  # of the table before, whose versions begin anew
        self.positions = PositionTable(self.placement.max_tokens or 0)
        self.rows, self.prompt_copies, self.unused = 0, 1, ()
        self._layer_bytes.clear()
        self.lossy_forms.clear()
        self.kept_plain.clear()
        self.engine.account.note(self.account_name, 0)
