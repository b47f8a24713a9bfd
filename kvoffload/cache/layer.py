"""One offloaded layer: a tail of the newest tokens, and the blocks behind it in their forms.

Owns which token is cached where, and when full blocks leave the tail. The memory of blocks is in block_memory.py.
Moves nothing itself (engine and write-back do) and runs no attention (`attention` and `whole_layer` do). Layouts are
token-major: K/V `[tokens, rows, k_width + v_width]` (keys after RoPE; for equal head sizes that is
`[tokens, rows, 2, kv_heads, head_dim]`), activations `[tokens, rows, hidden]`, in blocks with their position embeddings
behind them where these are carried (carried.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

import torch

from kvoffload.cache.verification import Probe, Recompute, reproduces, sampled
from kvoffload.pipeline.chunks import Chunk, chunks_of, resident_runs
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.pipeline.write_back import WriteBack
from kvoffload.planning.placement import BlockKind, BlockRun, Form, Placement, next_runs
from kvoffload.store.block import Block
from kvoffload.store.block_memory import BlockMemory
from kvoffload.store.carried import CarriedPositions, PositionLayout
from kvoffload.store.pool import HostPool
from kvoffload.store.positions import PositionTable
from kvoffload.store.row_table import RowTable
from kvoffload.store.tail import KVShape, NewTokens, RowShape, Tail

RECORDING_ROOM_TOKENS = 32  # tail room for tokens that a crop may take back
_FORMS: tuple[Form, Form] = ("activation", "kv")


class OwningCore(Protocol):
    """What a layer asks of the cache it belongs to."""

    engine: TransferEngine
    pool: HostPool
    placement: Placement
    positions: PositionTable | CarriedPositions
    row_table: RowTable
    rows: int
    prompt_copies: int
    is_recording: bool
    recomputed_tokens: int

    @property
    def sources(self) -> Sequence[CacheLayer]: ...
    def account(self) -> None: ...
    def claim_blocks(self, num_blocks: int, new: NewTokens) -> int: ...
    def logical_rows(self, block: int) -> torch.Tensor | None: ...
    def gather_index(self, layer: CacheLayer) -> torch.Tensor | None: ...
    def warn_not_recomputable(self, position: int) -> None: ...


class CacheLayer:
    """One offloaded layer.

    Args:
        cache: the cache it belongs to.
        position: its index among the offloaded layers.
    """

    def __init__(self, cache: OwningCore, position: int) -> None:
        self.cache = cache
        self.position = position
        self.version = 0
        self.blocks: list[Block] = []
        self.shape: KVShape | None = None
        self.recompute: Recompute | None = None
        self.probe: Probe | None = None  # of the way to recompute
        self.is_full_precision = True  # K, V and their recomputation in float32 or better
        self.streams: tuple[int, ...] = ()  # position embeddings, see PositionStore
        self.layout: PositionLayout | None = None  # of its activation blocks, where these carry them
        self.awaits_crop = False
        self.is_segmented = False  # attention runs over its chunks one by one
        self.tail: Tail | None = None
        self.row_shapes: dict[Form, RowShape] = {}  # of one token in a block, per form
        self._memory = BlockMemory(cache.pool)
        self._reopened: BlockKind | None = None  # what the block was that a crop made partial
        self._chunks: tuple[int, Sequence[Chunk]] = (-1, ())
        self._resident_runs: tuple[int, Sequence[int]] = (-1, ())

    # ---- what is cached ------------------------------------------------------------------------------------------

    @property
    def tail_tokens(self) -> int:
        """Cached tokens that are not in blocks."""
        return 0 if self.tail is None else self.tail.num_tokens

    @property
    def num_stored_tokens(self) -> int:
        """Cached tokens that are in blocks."""
        return len(self.blocks) * self.cache.placement.block_tokens

    @property
    def num_tokens(self) -> int:
        """Cached tokens."""
        return self.num_stored_tokens + self.tail_tokens

    @property
    def stored_kv_bytes(self) -> int:
        """Bytes the stored blocks need in a layer buffer."""
        assert self.shape is not None
        return sum(block.rows for block in self.blocks) * self.cache.placement.block_tokens * self.shape.row_bytes

    def count(self, form: Form, *, resident: bool) -> int:
        """Blocks of a form, on the device or on the host."""
        return sum(block.form == form and (block.resident is not None) == resident for block in self.blocks)

    def expects_another_step(self) -> bool:
        """Whether it makes sense to prefetch this layer now."""
        limit, lives_on = self.cache.placement.max_tokens, self.cache.placement.lives_on
        # Beyond what was planned a loop of the user's own goes on.
        goes_on = limit is None or self.num_tokens < limit or (lives_on and self.num_tokens > limit)
        return bool(self.blocks) and not self.awaits_crop and goes_on

    def chunks(self) -> Sequence[Chunk]:
        """The host blocks in order of transfer."""
        if self._chunks[0] != self.version:
            assert self.shape is not None
            placement = self.cache.placement
            chunks = chunks_of(
                self.blocks,
                chunk_blocks=placement.chunk_blocks,
                kv_bytes_per_row=placement.block_tokens * self.shape.row_bytes,
                schedule=self.cache.engine.schedule,
            )
            self._chunks = (self.version, chunks)
        return self._chunks[1]

    def resident_runs(self) -> Sequence[int]:
        """Of each block on the device (the first ones), how many from it on are of one form and contiguous."""
        if self._resident_runs[0] != self.version:
            self._resident_runs = (self.version, resident_runs(self.blocks))
        return self._resident_runs[1]

    # ---- growing -------------------------------------------------------------------------------------------------

    def bind(self, keys: torch.Tensor, values: torch.Tensor, activation: torch.Tensor | None) -> None:
        """Learn the shapes from the first K/V and make room for the tail and the resident blocks.

        Args:
            keys: [rows, heads, tokens, dim]; values likewise, with their own heads and dim.
            activation: [rows, tokens, hidden] or None.
        """
        placement, rows = self.cache.placement, self.cache.rows
        self.shape = KVShape.of(keys, values)
        self.row_shapes["kv"] = RowShape(self.shape.width, keys.dtype)
        tail_x = None
        if activation is not None:
            tail_x = RowShape(activation.shape[2], activation.dtype)
            width = tail_x.width if self.layout is None else self.layout.row_width
            self.row_shapes["activation"] = RowShape(width, activation.dtype)
        keeps_activations = self.recompute is not None and placement.needs_activations
        room = placement.block_tokens + (RECORDING_ROOM_TOKENS if self.cache.is_recording else 0)
        self.tail = Tail(self.cache.engine.backend, self.shape, tail_x if keeps_activations else None, rows, room)
        shapes = {form: row for form, row in self.row_shapes.items() if form == "kv" or self.recompute is not None}
        self._memory.make_resident(self.cache.engine.backend, placement, shapes, rows)
        self.cache.account()
        self._memory.reserve(placement, shapes, rows, self.cache.prompt_copies)

    def reserve(self) -> None:
        """Room on the host for all blocks that the placement foresees; nothing before the first K/V."""
        if self.shape is not None:
            shapes = {form: row for form, row in self.row_shapes.items() if form == "kv" or self.recompute is not None}
            self._memory.reserve(self.cache.placement, shapes, self.cache.rows, self.cache.prompt_copies)

    @property
    def device_bytes(self) -> int:
        """Device memory of the tail and the resident blocks."""
        return self._memory.device_bytes + (0 if self.tail is None else self.tail.device_bytes)

    def append(self, keys: torch.Tensor, values: torch.Tensor, activation: torch.Tensor | None) -> None:
        """Cache new tokens; full blocks leave for the host (or wait for a crop while past recording is active).

        Args:
            keys: [rows, heads, tokens, dim]; values likewise.
            activation: [rows, tokens, hidden] or None.
        """
        placement, total = self.cache.placement, self.tail_tokens + keys.shape[2]
        new = NewTokens(keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3))
        if activation is not None and self.tail is not None and self.tail.keeps_activations:
            new = new._replace(activation=activation.transpose(0, 1))
        if self.cache.is_recording:
            self.awaits_crop = True
            keep = placement.block_tokens + RECORDING_ROOM_TOKENS
            num_full = max(0, -(-(total - keep) // placement.block_tokens))
        else:
            num_full = total // placement.block_tokens
        self._flush(num_full, new)

    def remove(self, tokens: int) -> None:
        """Remove the newest `tokens` tokens; a block that becomes partial returns to the tail."""
        self.awaits_crop = False
        if self.tail is None:
            return
        bt = self.cache.placement.block_tokens
        if tokens > self.tail_tokens:
            remaining = self.num_tokens - tokens
            guard = self.cache.engine.last_h2d
            self._reopened = None
            if remaining % bt:
                self._reopen(self.blocks[remaining // bt], remaining // bt)
            for block in reversed(self.blocks[remaining // bt :]):
                if block.host is not None:
                    self._memory.extents[block.form].pop(block.num_bytes, guard)
            del self.blocks[remaining // bt :]
            self.tail.num_tokens = remaining % bt
            self.version += 1
        else:
            self.tail.num_tokens -= tokens

    def store_full_blocks(self) -> None:
        """Turn what the tail holds in full blocks into blocks."""
        self._flush(self.tail_tokens // self.cache.placement.block_tokens, NewTokens())

    def _reopen(self, block: Block, index: int) -> None:
        """Bring a block's tokens back to the tail."""
        assert self.shape is not None and self.tail is not None
        bt = self.cache.placement.block_tokens
        if block.resident is not None:
            data = block.resident
        else:
            data = self.row_shapes[block.form].view(self.cache.engine.fetch(block), bt, block.rows)
        logical = self.cache.logical_rows(index)
        self._reopened = BlockKind(block.form, block.resident is not None)
        kv = data
        if block.form == "activation":
            kv = torch.empty(bt, block.rows, self.shape.width, dtype=self.shape.dtype, device=data.device)
            self.recompute_into(index, block, data, kv)
            if self.layout is not None:
                assert isinstance(self.cache.positions, CarriedPositions)
                self.cache.positions.reopen(self.streams, index * bt, self.layout.read(data))
                data = self.layout.activation(data)
            self.tail.restore("activation", data if logical is None else data.index_select(1, logical))
        self.tail.restore("kv", kv if logical is None else kv.index_select(1, logical))

    def recompute_into(self, first_block: int, block: Block, stored: torch.Tensor, out: torch.Tensor) -> None:
        """K and V of consecutive blocks stored as activations.

        Args:
            first_block: index of the first.
            block: the first; the others have the same rows.
            stored: [tokens, rows, width] as their row shape says.
            out: [tokens, rows, width].
        """
        assert self.recompute is not None
        activation, embeddings = stored, tuple[torch.Tensor, ...]()
        if self.layout is not None:
            activation, embeddings = self.layout.activation(stored), self.layout.read(stored)
        elif self.streams:
            assert isinstance(self.cache.positions, PositionTable)
            start = first_block * self.cache.placement.block_tokens
            stop = start + stored.shape[0]
            embeddings = self.cache.positions.read(self.streams, start, stop, block.rows, block.row_step)
        span = self.cache.engine.backend.start_span("recompute")
        self.recompute(activation, embeddings, out)
        row_tokens = stored.shape[0] * block.rows
        self.cache.engine.backend.end_span(span, row_tokens)
        self.cache.recomputed_tokens += row_tokens

    # ---- from the tail to blocks ---------------------------------------------------------------------------------

    def _flush(self, num_full: int, new: NewTokens) -> None:
        """Turn the oldest `num_full` blocks of tail + new tokens into blocks; the rest becomes the tail."""
        if self.tail is None:
            return
        bt = self.cache.placement.block_tokens
        if num_full:
            copies = self.cache.claim_blocks(len(self.blocks) + num_full, new)
            runs = self._next_runs(num_full, copies, new)
            stored = (bt * run.num_blocks * self.row_shapes[run.form].num_bytes for run in runs if not run.is_resident)
            to_host = self.cache.engine.start_layer_write_back(sum(stored) * (self.cache.rows // copies))
            start = 0
            for form, is_resident, count in runs:
                if is_resident:
                    self._keep(form, start, count, copies, new)
                else:
                    self._write_back(to_host, form, start, count, copies, new)
                start += count
            self.version += 1
        if self.tail.grow(self.tail_tokens + new.num_tokens - num_full * bt):
            self.cache.account()
        self.tail.advance(num_full * bt, new)

    def _next_runs(self, num_full: int, copies: int, new: NewTokens) -> list[BlockRun]:
        assert self.tail is not None
        first, self._reopened = self._reopened, None
        runs = functools.partial(
            next_runs,
            self.cache.placement,
            num_full,
            num_blocks=len(self.blocks),
            stored_kv_blocks=self.count("kv", resident=False),
            stored_activation_blocks=self.count("activation", resident=False),
            has_resident_room=self._memory.has_resident_room(self.cache.rows),
            first=first,
        )
        can_recompute = self.tail.keeps_activations and self._can_carry_positions(self.cache.rows // copies)
        found = runs(can_recompute=can_recompute)
        if not self._agrees(found, copies, new):
            self.cache.warn_not_recomputable(self.position)
            found = runs(can_recompute=False)
        return found

    def _agrees(self, runs: Sequence[BlockRun], copies: int, new: NewTokens) -> bool:
        """Whether K and V of what is to be stored as activations follow from these, as those of the first tokens did.

        A few tokens of many are compared; waits for the device.
        """
        bt, rows = self.cache.placement.block_tokens, self.cache.rows // copies
        ends = [end * bt for end in itertools.accumulate(run.num_blocks for run in runs)]
        spans = [range(end - run.num_blocks * bt, end) for run, end in zip(runs, ends, strict=True)]
        tokens = [token for run, span in zip(runs, spans, strict=True) if run.form == "activation" for token in span]
        if not tokens:
            return True
        assert self.tail is not None and self.recompute is not None and self.shape is not None
        index = [tokens[idx] for idx in sampled(len(tokens), rows)]
        # Backwards, so that what depends on a token's place in a call is found out.
        x, kv = (self.tail.sample(form, index, copies, new).flip(0) for form in _FORMS)
        embeddings: tuple[torch.Tensor, ...] = ()
        if self.streams:
            positions = [self.num_stored_tokens + idx for idx in index]
            sample = self.cache.positions.sample(self.streams, positions, rows, copies)
            embeddings = tuple(part.flip(1) for part in sample)
        return reproduces(self.recompute, x, embeddings, kv, self.shape)

    @property
    def is_as_it_was(self) -> bool:
        """Whether what was stored as activations still gives the K and V that it gave; waits for the device."""
        if self.recompute is None or self.probe is None or not any(b.form == "activation" for b in self.blocks):
            return True
        assert self.shape is not None
        return self.probe.agrees(self.recompute, self.shape, self.cache.engine.backend.device)

    def _can_carry_positions(self, stored_rows: int) -> bool:
        """Whether new blocks of activations have room for their position embeddings, and one set of these is right."""
        if self.layout is None:
            return True
        assert isinstance(self.cache.positions, CarriedPositions)
        return stored_rows >= self.layout.num_shares and self.cache.positions.have_equal_rows(self.streams)

    def _pack(self, form: Form, data: torch.Tensor, begin: int, end: int, copies: int, new: NewTokens) -> None:
        """Tokens `begin..end` of tail + new, the first of which is the next to be stored, into a block's place."""
        assert self.tail is not None
        if form == "kv" or self.layout is None:
            self.tail.copy(form, data, begin, end, copies, new)
            return
        assert isinstance(self.cache.positions, CarriedPositions)
        self.tail.copy(form, self.layout.activation(data), begin, end, copies, new)
        first = self.num_stored_tokens
        self.layout.write(data, self.cache.positions.read(self.streams, first, first + end - begin))

    def _keep(self, form: Form, start: int, count: int, copies: int, new: NewTokens) -> None:
        """Store blocks on the device."""
        bt, rows = self.cache.placement.block_tokens, self.cache.rows // copies
        first = self.count(form, resident=True)
        for idx in range(count):
            data = self._memory.resident_place(form, first + idx, bt, rows)
            self._pack(form, data, (start + idx) * bt, (start + idx + 1) * bt, copies, new)
            self.blocks.append(Block(form, rows, data.numel() * data.element_size(), copies, resident=data))

    def _write_back(self, to_host: WriteBack, form: Form, start: int, count: int, copies: int, new: NewTokens) -> None:
        """Store blocks on the host, as many per copy as a D2H slot holds."""
        bt, rows, row = self.cache.placement.block_tokens, self.cache.rows // copies, self.row_shapes[form]
        num_bytes = bt * rows * row.num_bytes
        done = 0
        while done < count:
            per_copy = max(1, to_host.room_bytes // num_bytes)
            blocks = [Block(form, rows, num_bytes, copies) for _ in range(min(per_copy, count - done))]
            begin = (start + done) * bt
            end = begin + len(blocks) * bt
            done += len(blocks)

            def pack(data: torch.Tensor, begin: int = begin, end: int = end) -> None:
                self._pack(form, row.view(data, end - begin, rows), begin, end, copies, new)

            to_host.store(self._memory.extents[form], blocks, pack)
            self.blocks += blocks

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close(self.cache.engine.last_h2d)
        self.blocks, self.tail = [], None
        self.shape, self.recompute, self.probe, self.layout, self._reopened = None, None, None, None, None
        self.awaits_crop, self.streams = False, ()
        self._chunks = (-1, ())
        self.version += 1
