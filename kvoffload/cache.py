"""A cache whose blocks live on the host: per layer a tail of the newest tokens, blocks behind it, and their forms.

Owns what is cached where; moves nothing itself (transfer.py does) and runs no attention (attention.py does).
Layouts are token-major: K/V `[tokens, rows, k_width + v_width]` (keys after RoPE; for equal head sizes that is
`[tokens, rows, 2, kv_heads, head_dim]`), activations `[tokens, rows, hidden]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvoffload.cost import transfer_order
from kvoffload.positions import PositionStore
from kvoffload.store import Block, Extent, HostPool, RowTable
from kvoffload.transfer import Chunk, TransferEngine
from kvoffload.types import Form

RECORDING_ROOM_TOKENS = 32  # tail room for tokens that a crop may take back


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a plan says about the blocks of every layer, in the order of the tokens."""

    block_tokens: int
    chunk_blocks: int
    resident_kv_blocks: int = 0
    resident_activation_blocks: int = 0
    activation_share: float = 0.0  # of the offloaded blocks
    may_change: bool = False  # a re-plan may ask for activations later
    max_tokens: int | None = None  # of the whole generation, if known
    prompt_tokens: int = 0  # tokens whose rows are still copies of each other, with beams

    @property
    def needs_activations(self) -> bool:
        """Whether activations of new tokens must be kept until their block has a form."""
        return self.activation_share > 0 or self.resident_activation_blocks > 0 or self.may_change


class KVShape(NamedTuple):
    """The K/V and activation of one token of one row of one layer."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def width(self) -> int:
        return self.key_width + self.value_heads * self.value_dim

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def split(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[tokens, rows, heads, dim]` as views of `[tokens, rows, width]`."""
        keys = data[..., : self.key_width].unflatten(-1, (self.key_heads, self.key_dim))
        values = data[..., self.key_width :].unflatten(-1, (self.value_heads, self.value_dim))
        return keys, values


# Recomputes K and V: (activation [tokens, rows, hidden], position embeddings, out [tokens, rows, width])
Recompute = Callable[[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor], None]


class CacheLayer:
    """One offloaded layer.

    Args:
        cache: the cache it belongs to.
        position: its index among the offloaded layers.
    """

    def __init__(self, cache: OffloadedCache, position: int) -> None:
        self.cache = cache
        self.position = position
        self.version = 0
        self.blocks: list[Block] = []
        self.tail_tokens = 0
        self.shape: KVShape | None = None
        self.hidden_size = 0
        self.activation_dtype = torch.float32
        self.recompute: Recompute | None = None
        self.is_full_precision = True  # K, V and their recomputation in float32 or better
        self.streams: tuple[int, ...] = ()  # position embeddings, see PositionStore
        self.awaits_crop = False
        self._extents: dict[Form, Extent] = {"kv": Extent(cache.pool), "activation": Extent(cache.pool)}
        self._tail_kv: torch.Tensor | None = None  # [capacity, rows, width]
        self._tail_x: torch.Tensor | None = None  # [capacity, rows, hidden]
        self._reopened: tuple[Form, bool] | None = None  # form and residency of the block a crop made partial
        self._resident: dict[Form, torch.Tensor] = {}
        self._chunks: tuple[int, Sequence[Chunk]] = (-1, ())

    # ---- what is cached ------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Cached tokens."""
        return len(self.blocks) * self.cache.placement.block_tokens + self.tail_tokens

    @property
    def num_stored_tokens(self) -> int:
        """Cached tokens that are in blocks."""
        return len(self.blocks) * self.cache.placement.block_tokens

    @property
    def tail(self) -> torch.Tensor:
        """K/V of the tail, [tail_tokens, rows, width]."""
        assert self._tail_kv is not None
        return self._tail_kv[: self.tail_tokens]

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
        limit = self.cache.placement.max_tokens
        return bool(self.blocks) and not self.awaits_crop and (limit is None or self.num_tokens < limit)

    def chunks(self) -> Sequence[Chunk]:
        """The host blocks in order of transfer."""
        if self._chunks[0] != self.version:
            self._chunks = (self.version, self._make_chunks())
        return self._chunks[1]

    def _make_chunks(self) -> Sequence[Chunk]:
        assert self.shape is not None
        runs: list[tuple[int, int, list[Block]]] = []  # first block, landing offset, blocks
        offset = 0
        for idx, block in enumerate(self.blocks):
            if block.host is not None:
                last = runs[-1] if runs else None
                if (
                    last is not None
                    and last[0] + len(last[2]) == idx
                    and len(last[2]) < self.cache.placement.chunk_blocks
                    and _follows(last[2][-1], block)
                ):
                    last[2].append(block)
                else:
                    runs.append((idx, offset, [block]))
            offset += block.rows * self.cache.placement.block_tokens * self.shape.row_bytes
        chunks = [
            Chunk(blocks[0].form, first, tuple(blocks), _span(blocks), landing) for first, landing, blocks in runs
        ]
        by_form = {
            True: iter([chunk for chunk in chunks if chunk.form == "activation"]),
            False: iter([chunk for chunk in chunks if chunk.form == "kv"]),
        }
        num_activation = sum(chunk.form == "activation" for chunk in chunks)
        order = transfer_order(num_activation, len(chunks) - num_activation, self.cache.engine.schedule)
        return [next(by_form[is_activation]) for is_activation in order]

    # ---- growing -------------------------------------------------------------------------------------------------

    def bind(self, keys: torch.Tensor, values: torch.Tensor, activation: torch.Tensor | None) -> None:
        """Learn the shapes from the first K/V and make room for the tail and the resident blocks.

        Args:
            keys: [rows, heads, tokens, dim]; values likewise, with their own heads and dim.
            activation: [rows, tokens, hidden] or None.
        """
        placement = self.cache.placement
        self.shape = KVShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype)
        if activation is not None:
            self.hidden_size, self.activation_dtype = activation.shape[2], activation.dtype
        self._grow_tail(placement.block_tokens + (RECORDING_ROOM_TOKENS if self.cache.is_recording else 0))
        bt, rows = placement.block_tokens, self.cache.rows
        if placement.resident_kv_blocks:
            self._resident["kv"] = self._empty(placement.resident_kv_blocks * bt, rows, self.shape.width)
        if placement.resident_activation_blocks and self.recompute is not None:
            self._resident["activation"] = self._empty_x(placement.resident_activation_blocks * bt, rows)
        for extent in self._extents.values():
            extent.doubles = placement.max_tokens is None
        if placement.max_tokens is not None:
            resident = placement.resident_kv_blocks + placement.resident_activation_blocks
            num_blocks = max(0, placement.max_tokens // bt - resident)
            share = placement.activation_share if self.recompute is not None else 0.0
            margin = 1 if 0 < share < 1 else 0  # forms follow the share to within a block
            x = min(num_blocks, round(share * num_blocks) + margin)
            t = min(num_blocks, num_blocks - round(share * num_blocks) + margin)
            prompt_blocks = placement.prompt_tokens // bt if self.cache.prompt_copies > 1 else 0
            saved = min(prompt_blocks, num_blocks) * (rows - rows // self.cache.prompt_copies) * bt
            full = max(1, num_blocks * rows * bt)
            for form, blocks, row_bytes in (
                ("activation", x, self.activation_row_bytes),
                ("kv", t, self.shape.row_bytes),
            ):
                if blocks:
                    needed = blocks * bt * rows * row_bytes * (full - saved) // full
                    self._extents[form].reserve(needed)  # type: ignore[index]

    @property
    def activation_row_bytes(self) -> int:
        return self.hidden_size * self.activation_dtype.itemsize

    def _empty(self, tokens: int, rows: int, width: int) -> torch.Tensor:
        assert self.shape is not None
        data = self.cache.engine.backend.allocate_device(tokens * rows * width * self.shape.dtype.itemsize)
        with torch.inference_mode(False):  # else the view could not be written outside of inference mode
            return data.view(self.shape.dtype).view(tokens, rows, width)

    def _empty_x(self, tokens: int, rows: int) -> torch.Tensor:
        data = self.cache.engine.backend.allocate_device(tokens * rows * self.activation_row_bytes)
        with torch.inference_mode(False):
            return data.view(self.activation_dtype).view(tokens, rows, self.hidden_size)

    def _grow_tail(self, tokens: int) -> None:
        assert self.shape is not None
        if self._tail_kv is not None and self._tail_kv.shape[0] >= tokens:
            return
        old_kv, old_x = self._tail_kv, self._tail_x
        self._tail_kv = self._empty(tokens, self.cache.rows, self.shape.width)
        if self.recompute is not None and self.cache.placement.needs_activations:
            self._tail_x = self._empty_x(tokens, self.cache.rows)
        if old_kv is not None:
            self._tail_kv[: self.tail_tokens] = old_kv[: self.tail_tokens]
            if old_x is not None and self._tail_x is not None:
                self._tail_x[: self.tail_tokens] = old_x[: self.tail_tokens]
        self.cache.account()

    @property
    def device_bytes(self) -> int:
        """Device memory of the tail and the resident blocks."""
        held: Iterable[torch.Tensor | None] = (self._tail_kv, self._tail_x, *self._resident.values())
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def append(self, keys: torch.Tensor, values: torch.Tensor, activation: torch.Tensor | None) -> None:
        """Cache new tokens; full blocks leave for the host (or wait for a crop while past recording is active).

        Args:
            keys: [rows, heads, tokens, dim]; values likewise.
            activation: [rows, tokens, hidden] or None.
        """
        placement, total = self.cache.placement, self.tail_tokens + keys.shape[2]
        new = _NewTokens(keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3), None)
        if activation is not None and self._tail_x is not None:
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
        bt = self.cache.placement.block_tokens
        if tokens > self.tail_tokens:
            remaining = self.num_tokens - tokens
            guard = self.cache.engine.last_h2d
            self._reopened = None
            if remaining % bt:
                self._reopen(self.blocks[remaining // bt], remaining // bt)
            for block in reversed(self.blocks[remaining // bt :]):
                if block.host is not None:
                    self._extents[block.form].pop(block.num_bytes, guard)
            del self.blocks[remaining // bt :]
            self.tail_tokens = remaining % bt
            self.version += 1
        else:
            self.tail_tokens -= tokens

    def store_full_blocks(self) -> None:
        """Turn what the tail holds in full blocks into blocks."""
        if self._tail_kv is not None:
            self._flush(self.tail_tokens // self.cache.placement.block_tokens, _NewTokens(None, None, None))

    def _reopen(self, block: Block, index: int) -> None:
        """Bring a block's tokens back to the tail."""
        assert self.shape is not None and self._tail_kv is not None
        bt = self.cache.placement.block_tokens
        if block.resident is not None:
            data = block.resident
        else:
            width = self.shape.width if block.form == "kv" else self.hidden_size
            dtype = self.shape.dtype if block.form == "kv" else self.activation_dtype
            data = self.cache.engine.fetch(block).view(dtype).view(bt, block.rows, width)
        logical = self.cache.logical_rows(index)
        self._reopened = (block.form, block.resident is not None)
        if block.form == "activation":
            assert self._tail_x is not None
            kv = torch.empty(bt, block.rows, self.shape.width, dtype=self.shape.dtype, device=data.device)
            self.recompute_into(index, block, data, kv)
            self._tail_x[:bt] = data if logical is None else data.index_select(1, logical)
        else:
            kv = data
        self._tail_kv[:bt] = kv if logical is None else kv.index_select(1, logical)

    def recompute_into(self, first_block: int, block: Block, activation: torch.Tensor, out: torch.Tensor) -> None:
        """K and V of consecutive stored blocks from their activation.

        Args:
            first_block: index of the first.
            block: the first; the others have the same rows.
            activation: [tokens, rows, hidden].
            out: [tokens, rows, width].
        """
        assert self.recompute is not None
        start = first_block * self.cache.placement.block_tokens
        stop = start + activation.shape[0]
        embeddings = self.cache.positions.read(self.streams, start, stop, block.rows, block.row_step)
        span = self.cache.engine.backend.start_span("recompute")
        self.recompute(activation, embeddings, out)
        self.cache.engine.backend.end_span(span)
        self.cache.recomputed_tokens += activation.shape[0] * block.rows

    # ---- from the tail to blocks ---------------------------------------------------------------------------------

    def _flush(self, num_full: int, new: _NewTokens) -> None:
        """Turn the oldest `num_full` blocks of tail + new tokens into blocks; the rest becomes the tail."""
        bt = self.cache.placement.block_tokens
        if num_full:
            copies = self.cache.claim_blocks(len(self.blocks) + num_full, new)
            self.cache.engine.start_layer_write_back()
            start = 0
            for form, resident, count in self._forms(num_full):
                if resident:
                    self._keep(form, start, count, copies, new)
                else:
                    self._write_back(form, start, count, copies, new)
                start += count
            self.version += 1
        rest = self.tail_tokens + new.num_tokens - num_full * bt
        self._grow_tail(rest)
        if num_full and self.tail_tokens > num_full * bt:
            old = slice(num_full * bt, self.tail_tokens)
            self._shift_tail(old)
        elif num_full:
            new = new.behind(num_full * bt - self.tail_tokens)
            self.tail_tokens = 0
        if new.num_tokens:
            target = slice(self.tail_tokens, self.tail_tokens + new.num_tokens)
            assert self._tail_kv is not None
            self._copy_kv(self._tail_kv[target], self.tail_tokens, target.stop, 1, new)
            if self._tail_x is not None:
                self._copy_x(self._tail_x[target], self.tail_tokens, target.stop, 1, new)
        self.tail_tokens = rest

    def _shift_tail(self, kept: slice) -> None:
        count = kept.stop - kept.start
        for tail in (self._tail_kv, self._tail_x):
            if tail is not None:
                tail[:count] = tail[kept].clone()
        self.tail_tokens = count

    def _forms(self, num_full: int) -> list[tuple[Form, bool, int]]:
        """(form, resident, number of blocks) of the next blocks, in order."""
        placement = self.cache.placement
        r, r_x = placement.resident_kv_blocks, placement.resident_activation_blocks
        if any(data.shape[1] < self.cache.rows for data in self._resident.values()):
            r = r_x = 0  # rows were repeated since that memory was made
        can_recompute = self._tail_x is not None
        forms: list[tuple[Form, bool]] = []
        idx = len(self.blocks)
        if self._reopened is not None:
            forms.append(self._reopened)
            self._reopened = None
        while len(forms) < num_full and idx + len(forms) < r:
            forms.append(("kv", True))
        while len(forms) < num_full and idx + len(forms) < r + r_x and can_recompute:
            forms.append(("activation", True))
        left = num_full - len(forms)
        stored_x = self.count("activation", resident=False)
        stored_t = self.count("kv", resident=False)
        target = round(placement.activation_share * (stored_x + stored_t + left)) if can_recompute else 0
        new_x = min(left, max(0, target - stored_x))
        forms.extend(("activation", False) for _ in range(new_x))
        forms.extend(("kv", False) for _ in range(left - new_x))
        runs: list[tuple[Form, bool, int]] = []
        for form, resident in forms:
            if runs and runs[-1][:2] == (form, resident):
                runs[-1] = (form, resident, runs[-1][2] + 1)
            else:
                runs.append((form, resident, 1))
        return runs

    def _keep(self, form: Form, start: int, count: int, copies: int, new: _NewTokens) -> None:
        """Store blocks on the device."""
        bt, rows = self.cache.placement.block_tokens, self.cache.rows // copies
        first = self.count(form, resident=True)
        for idx in range(count):
            data = self._resident[form][(first + idx) * bt : (first + idx + 1) * bt]
            data = data.reshape(-1)[: bt * rows * data.shape[2]].view(bt, rows, data.shape[2])
            self._copy(form, data, (start + idx) * bt, (start + idx + 1) * bt, copies, new)
            self.blocks.append(Block(form, rows, data.numel() * data.element_size(), copies, resident=data))

    def _write_back(self, form: Form, start: int, count: int, copies: int, new: _NewTokens) -> None:
        """Store blocks on the host, as many per copy as a D2H slot holds."""
        assert self.shape is not None
        bt, rows = self.cache.placement.block_tokens, self.cache.rows // copies
        width = self.shape.width if form == "kv" else self.hidden_size
        dtype = self.shape.dtype if form == "kv" else self.activation_dtype
        num_bytes = bt * rows * width * dtype.itemsize
        done = 0
        while done < count:
            per_copy = max(1, self.cache.engine.write_back_bytes // num_bytes)
            blocks = [Block(form, rows, num_bytes, copies) for _ in range(min(per_copy, count - done))]
            begin = (start + done) * bt
            end = begin + len(blocks) * bt
            done += len(blocks)

            def pack(data: torch.Tensor, begin: int = begin, end: int = end) -> None:
                self._copy(form, data.view(dtype).view(end - begin, rows, width), begin, end, copies, new)

            self.cache.engine.write_back(self._extents[form], blocks, pack)
            self.blocks += blocks

    def _copy(self, form: Form, out: torch.Tensor, start: int, stop: int, step: int, new: _NewTokens) -> None:
        if form == "kv":
            self._copy_kv(out, start, stop, step, new)
        else:
            self._copy_x(out, start, stop, step, new)

    def _copy_kv(self, out: torch.Tensor, start: int, stop: int, step: int, new: _NewTokens) -> None:
        """Tokens `start..stop` of tail + new, every `step`-th row, into `out` [tokens, rows, width]."""
        assert self.shape is not None and self._tail_kv is not None
        from_tail = max(0, min(stop, self.tail_tokens) - start)
        if from_tail:
            out[:from_tail] = self._tail_kv[start : start + from_tail, ::step]
        if stop > self.tail_tokens and new.keys is not None and new.values is not None:
            source = slice(start + from_tail - self.tail_tokens, stop - self.tail_tokens)
            keys, values = self.shape.split(out[from_tail:])
            keys.copy_(new.keys[source, ::step])
            values.copy_(new.values[source, ::step])

    def _copy_x(self, out: torch.Tensor, start: int, stop: int, step: int, new: _NewTokens) -> None:
        """The same of the activations, into `out` [tokens, rows, hidden]."""
        assert self._tail_x is not None
        from_tail = max(0, min(stop, self.tail_tokens) - start)
        if from_tail:
            out[:from_tail] = self._tail_x[start : start + from_tail, ::step]
        if stop > self.tail_tokens and new.activation is not None:
            out[from_tail:] = new.activation[start + from_tail - self.tail_tokens : stop - self.tail_tokens, ::step]

    def select_rows(self, indices: torch.Tensor) -> None:
        """The tail's logical row i becomes what row `indices[i]` was."""
        old_kv, old_x, used = self._tail_kv, self._tail_x, self.tail_tokens
        if old_kv is None:
            return
        capacity, rows = old_kv.shape[0], indices.numel()
        if rows != old_kv.shape[1]:
            assert self.shape is not None
            self._tail_kv = self._empty(capacity, rows, self.shape.width)
            self._tail_x = None if old_x is None else self._empty_x(capacity, rows)
        for old, new in ((old_kv, self._tail_kv), (old_x, self._tail_x)):
            if old is not None and new is not None:
                new[:used] = old[:used].index_select(1, indices)

    def close(self) -> None:
        """Give the memory back."""
        guard = self.cache.engine.last_h2d
        for extent in self._extents.values():
            extent.close(guard)
        self.blocks, self.tail_tokens = [], 0
        self.shape, self.recompute, self._reopened = None, None, None
        self.awaits_crop = False
        self._tail_kv = self._tail_x = None
        self._resident.clear()
        self._chunks = (-1, ())
        self.version += 1


class _NewTokens(NamedTuple):
    """Tokens of this forward, token-major: K and V [tokens, rows, heads, dim], activation [tokens, rows, hidden]."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    activation: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    def behind(self, tokens: int) -> _NewTokens:
        """Without the first `tokens` tokens."""
        return _NewTokens(*(None if part is None else part[tokens:] for part in self))


class OffloadedCache:
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
        self.recomputed_tokens = 0  # counted per layer and row
        self.positions = PositionStore(placement.max_tokens or 0)
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

    def claim_blocks(self, num_blocks: int, new: _NewTokens) -> int:
        """Called by each layer before it stores blocks up to `num_blocks`; the first one extends the row table.

        Returns:
            How many consecutive logical rows each stored row stands for: more than 1 for prompt blocks of beams,
            whose rows hold equal bits until the first reorder.
        """
        missing = num_blocks - self.row_table.num_blocks
        if missing > 0:
            copies = self.prompt_copies
            if num_blocks * self.placement.block_tokens > self.placement.prompt_tokens:
                copies = 1
            if copies > 1 and not _rows_are_copies(new, copies):
                self.prompt_copies = copies = 1
            if self.before_blocks is not None:
                self.before_blocks()
            self.row_table.extend(missing, self.rows, copies)
            self._claimed_copies = copies
            self.account()
        return self._claimed_copies

    def select_rows(self, indices: torch.Tensor) -> None:
        """Logical row i becomes what row `indices[i]` was; no stored byte moves."""
        indices = indices.to(self.engine.backend.device)
        for layer in self.layers:
            layer.select_rows(indices)
        self.positions.select(indices, self.row_table.num_blocks * self.placement.block_tokens)
        self.row_table.select(indices)
        self.rows = indices.numel()

    def crop(self, tokens: int) -> None:
        """Remove the newest `tokens` tokens of every layer, store full blocks, and prefetch the next step."""
        for layer in self.layers:
            layer.remove(tokens)
        self.row_table.truncate(len(self.layers[0].blocks))
        self.positions.truncate(self.layers[0].num_tokens)
        for layer in self.layers:
            layer.store_full_blocks()
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
        self.positions = PositionStore(self.placement.max_tokens or 0)
        self.account()


def _rows_are_copies(new: _NewTokens, copies: int) -> bool:
    """Whether each group of `copies` consecutive rows holds the same bits (its GEMM rows may differ in the last)."""
    for part in new:
        if part is not None:
            groups = part.unflatten(1, (-1, copies))
            if not bool((groups == groups[:, :, :1]).all()):
                return False
    return True


def _follows(block: Block, next_block: Block) -> bool:
    """Whether the second block's bytes start where the first one's end."""
    assert block.host is not None and next_block.host is not None
    return (
        block.form == next_block.form
        and block.rows == next_block.rows
        and block.host.untyped_storage().data_ptr() == next_block.host.untyped_storage().data_ptr()
        and block.host.data_ptr() + block.num_bytes == next_block.host.data_ptr()
    )


def _span(blocks: Sequence[Block]) -> torch.Tensor:
    """The bytes of contiguous blocks as one tensor."""
    first = blocks[0].host
    assert first is not None
    return first.as_strided((sum(block.num_bytes for block in blocks),), (1,))
