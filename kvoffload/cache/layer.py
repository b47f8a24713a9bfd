"""One offloaded layer: a tail of the newest tokens, and the blocks behind it in their forms.

Owns which token is cached where, and when full blocks leave the tail. The memory of blocks is in block_memory.py, how
their bytes are made and read in `store/forms/`. Moves nothing itself (engine and write-back do) and runs no attention
(`attention` and `whole_layer` do). K/V are token-major, `[tokens, rows, k_width + v_width]` (keys after RoPE; for equal
head sizes that is `[tokens, rows, 2, kv_heads, head_dim]`), activations `[tokens, rows, hidden]`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from kvoffload.cache.copied_blocks import CopiedBlocks
from kvoffload.cache.state import CacheState
from kvoffload.pipeline.cargo import Cargo
from kvoffload.pipeline.write_back import ALIGNMENT, WriteBack
from kvoffload.planning.forms import FORMS
from kvoffload.planning.placement import PLAIN, BlockRun, FormName, Kind, next_runs, runs_of
from kvoffload.store import forms
from kvoffload.store.block import Block, Place
from kvoffload.store.block_memory import BlockMemory
from kvoffload.store.forms.form import Leaving
from kvoffload.store.tail import KVShape, NewTokens, RowShape, Tail

RECORDING_ROOM_TOKENS = 32  # tail room for tokens that a crop may take back


class CacheLayer(CopiedBlocks):
    """One offloaded layer.

    Args:
        cache: what it shares with the other layers.
        position: its index among the offloaded layers.
    """

    def __init__(self, cache: CacheState, position: int) -> None:
        super().__init__(cache)
        self.position = position
        self.is_full_precision = True  # K, V and whatever gives them back in float32 or better
        self.awaits_crop = False
        self.is_segmented = False  # attention runs over its chunks one by one
        self.tail: Tail | None = None
        self._memory = BlockMemory(cache.pool)
        self._reopened: Kind | None = None  # what the block was that a crop made partial

    # ---- what is cached ------------------------------------------------------------------------------------------

    @property
    def tail_tokens(self) -> int:
        """Cached tokens that are not in blocks."""
        return 0 if self.tail is None else self.tail.num_tokens

    @property
    def num_tokens(self) -> int:
        """Cached tokens."""
        return self.num_stored_tokens + self.tail_tokens

    @property
    def resident_places(self) -> dict[FormName, int]:
        """Blocks that there are on the device or that can come there, by form; exact copies are not among them."""
        return self._memory.resident_places(self.cache.rows)

    @property
    def goes_on(self) -> bool:
        """Whether more tokens are expected; beyond what was planned a loop of the user's own goes on."""
        limit, lives_on = self.cache.placement.max_tokens, self.cache.placement.lives_on
        return limit is None or self.num_tokens < limit or (lives_on and self.num_tokens > limit)

    def expects_another_step(self) -> bool:
        """Whether it makes sense to prefetch this layer now."""
        return bool(self.blocks) and not self.awaits_crop and self.goes_on

    # ---- growing -------------------------------------------------------------------------------------------------

    def bind(self, keys: torch.Tensor, values: torch.Tensor, activation: torch.Tensor | None) -> None:
        """Learn the shapes from the first K/V and make room for the tail and the resident blocks.

        Forms that are made of more than K and V are in `forms` by then.

        Args:
            keys: [rows, heads, tokens, dim]; values likewise, with their own heads and dim.
            activation: [rows, tokens, hidden] or None.
        """
        placement, rows = self.cache.placement, self.cache.rows
        self.shape = KVShape.of(keys, values)
        self.forms |= forms.made_of_kv(placement.forms - self.forms.keys(), self.shape, placement.block_tokens)
        parts = {FORMS[name].made_of for name in placement.forms & self.forms.keys()}
        hidden = None
        if activation is not None and "activation" in parts:
            hidden = RowShape(activation.shape[2], activation.dtype)
        ahead = max(placement.ahead_tokens, RECORDING_ROOM_TOKENS if self.cache.is_recording else 0)
        room = placement.block_tokens + ahead
        self.tail = Tail(self.cache.engine.backend, self.shape, hidden, rows, room)
        self.grow_resident()
        self.reserve()

    def grow_resident(self) -> None:
        """Room on the device for the resident blocks that the placement foresees; nothing before the first K/V."""
        if self.shape is not None:
            self._memory.make_resident(self.cache.engine.backend, self.cache.placement, self.forms, self.cache.rows)
            self.make_copies()
            self.account()

    def reserve(self) -> None:
        """Room on the host for all blocks that the placement foresees; nothing before the first K/V."""
        if self.shape is not None:
            self._memory.reserve(self.cache.placement, self.forms, self.cache.rows, self.cache.prompt_copies)

    @property
    def host_bytes(self) -> int:
        """Host memory there is for its blocks, used or not."""
        return sum(self._memory.reserved_bytes.values())

    @property
    def device_bytes(self) -> int:
        """Device memory of the tail, the resident blocks and the copies of others."""
        near_bytes = sum(near.num_bytes for near in self._near)
        return self._memory.device_bytes + near_bytes + (0 if self.tail is None else self.tail.device_bytes)

    def account(self) -> None:
        """Tell how much device memory it holds."""
        self.cache.account(self.position, self.device_bytes)

    def append(self, keys: torch.Tensor, values: torch.Tensor, activation: torch.Tensor | None) -> None:
        """Cache new tokens; full blocks leave for the host (or wait for a crop while past recording is active).

        Args:
            keys: [rows, heads, tokens, dim]; values likewise.
            activation: [rows, tokens, hidden] or None.
        """
        placement, total = self.cache.placement, self.tail_tokens + keys.shape[2]
        new = NewTokens(keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3))
        if activation is not None and self.tail is not None and "activation" in self.tail.parts:
            new = new._replace(activation=activation.transpose(0, 1))
        if self.cache.is_recording:
            self.awaits_crop = True
            keep = placement.block_tokens + RECORDING_ROOM_TOKENS
            num_full = max(0, -(-(total - keep) // placement.block_tokens))
            assert not (num_full and self.cache.unused), "blocks have the same tokens of all rows"
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
                self._reopen(remaining // bt)
            self._memory.drop(reversed(self.blocks[remaining // bt :]), guard)
            del self.blocks[remaining // bt :]
            for near in self._near:
                near.forget(remaining // bt)
            self.tail.num_tokens = remaining % bt
            self.version += 1
        else:
            self.tail.num_tokens -= tokens

    def store_full_blocks(self, most: int | None = None) -> None:
        """Turn what the tail holds in full blocks into blocks, at most so many."""
        full = self.tail_tokens // self.cache.placement.block_tokens
        self._flush(full if most is None else min(full, most), NewTokens())

    def _reopen(self, index: int) -> None:
        """Bring a block's tokens back to the tail."""
        assert self.tail is not None
        block, span = self.blocks[index], self.span(index, 1)
        if self.nearest[index].is_resident and self.nearest[index].form == block.form:
            stored = self.resident(span)
        else:
            stored = self.cache.engine.fetch(Cargo(source=block.bytes, after=block.written))
        logical = self.cache.logical_rows(index)
        if FORMS[block.form].is_exact:
            self._reopened = Kind(block.form, "device" if block.is_resident else "host")
        else:  # its tokens stay as they were read back: they are not rounded twice
            self._reopened = Kind(PLAIN, "host")
        for part, data in self.forms[block.form].reopened(stored, span).items():
            self.tail.restore(part, data if logical is None else data.index_select(1, logical))

    # ---- from the tail to blocks ---------------------------------------------------------------------------------

    def _flush(self, num_full: int, new: NewTokens) -> None:
        """Turn the oldest `num_full` blocks of tail + new tokens into blocks; the rest becomes the tail."""
        if self.tail is None:
            return
        bt = self.cache.placement.block_tokens
        if num_full:
            copies = self.cache.claim_blocks(len(self.blocks) + num_full, self.tail, new)
            leaving = Leaving(self.tail, new, self.num_stored_tokens, 0, num_full * bt, copies)
            rows = self.cache.rows // copies
            runs = self._next_runs(num_full, rows, leaving)
            self.cache.lossy_forms |= {run.form for run in runs if not FORMS[run.form].is_exact}
            to_write = (run.num_blocks * self.forms[run.form].num_bytes(bt, rows) for run in runs if run.tier == "host")
            to_host = self.cache.engine.start_layer_write_back(sum(to_write) + ALIGNMENT * (len(runs) - 1))
            start = 0
            for form, tier, count in runs:
                end = start + count * bt
                part = leaving.between(start, end)
                if tier == "device":
                    self._keep(form, count, rows, part)
                else:
                    self._write_back(to_host, form, count, rows, part)
                start = end
            self.copy_newest(num_full, leaving)
            self.version += 1
        needed = self.tail_tokens + new.num_tokens - num_full * bt
        grew = self.tail.grow(max(needed, bt + self.cache.placement.ahead_tokens))
        if grew or num_full:
            self.account()
        self.tail.advance(num_full * bt, new)

    def _next_runs(self, num_full: int, rows: int, leaving: Leaving) -> list[BlockRun]:
        """Which blocks become what: as the placement says, in forms that hold these tokens."""
        first, self._reopened = self._reopened, None
        runs = functools.partial(
            next_runs,
            self.cache.placement,
            num_full,
            on_device=self.count("device"),
            on_host=self.count("host"),
            resident_room=self._memory.resident_room(self.cache.rows),
            first=first,
        )
        kept = leaving.tail.parts
        possible = {name for name, form in self.forms.items() if FORMS[name].made_of in kept and form.accepts(rows)}
        found = runs(possible=possible)
        while others := self._that_disagree(found, leaving):
            self.cache.warn_of_disagreement(self.position)
            possible -= others
            found = runs(possible=possible)
        return self._that_are_held(found, leaving)

    def _that_are_held(self, runs: list[BlockRun], leaving: Leaving) -> list[BlockRun]:
        """The same, with blocks as K and V on the host that their form cannot hold; waits for the device once."""
        bt, start = self.cache.placement.block_tokens, 0
        found: list[torch.Tensor | None] = []
        for run in runs:
            stop = start + run.num_blocks * bt
            found.append(self.forms[run.form].holds(leaving.between(start, stop)))
            start = stop
        if all(one is None for one in found):
            return runs
        all_held = functools.partial(torch.ones, dtype=torch.bool, device=leaving.tail.kv.device)
        held = [all_held(run.num_blocks) if one is None else one for run, one in zip(runs, found, strict=True)]
        kinds = [Kind(run.form, run.tier) for run in runs for _ in range(run.num_blocks)]
        for idx, is_held in enumerate(torch.cat(held).tolist()):
            if not is_held:
                self.cache.kept_plain[kinds[idx].form] += 1
                kinds[idx] = Kind(PLAIN, "host")
        return runs_of(kinds)

    def _that_disagree(self, runs: Sequence[BlockRun], leaving: Leaving) -> set[FormName]:
        """Forms from which K and V of these tokens would not come back."""
        bt, start = self.cache.placement.block_tokens, 0
        tokens: dict[FormName, list[int]] = {}
        for run in runs:
            tokens.setdefault(run.form, []).extend(range(start, start + run.num_blocks * bt))
            start += run.num_blocks * bt
        return {form for form, index in tokens.items() if not self.forms[form].agrees(index, leaving)}

    def is_as_it_was(self) -> bool:
        """Whether what is stored still gives the K and V that it gave; waits for the device."""
        return all(self.forms[name].is_as_it_was() for name in {block.form for block in self.blocks})

    def _keep(self, form: FormName, count: int, rows: int, leaving: Leaving) -> None:
        """Store blocks on the device."""
        bt = self.cache.placement.block_tokens
        num_bytes = self.forms[form].num_bytes(bt, rows)
        for idx in range(count):
            data = self._memory.keep(form, num_bytes, self.cache.rows)
            self.forms[form].pack(data, leaving.between(idx * bt, (idx + 1) * bt))
            self.blocks.append(Block(form, rows, num_bytes, Place("device", data), leaving.row_step))

    def _write_back(self, to_host: WriteBack, form: FormName, count: int, rows: int, leaving: Leaving) -> None:
        """Store blocks on the host, as many per copy as a D2H slot holds."""
        bt = self.cache.placement.block_tokens
        num_bytes = self.forms[form].num_bytes(bt, rows)
        done = 0
        while done < count:
            per_copy = max(1, to_host.room_bytes // num_bytes)
            blocks = [
                Block(form, rows, num_bytes, row_step=leaving.row_step) for _ in range(min(per_copy, count - done))
            ]
            part = leaving.between(done * bt, (done + len(blocks)) * bt)
            to_host.store(self._memory.extent(form), blocks, functools.partial(self.forms[form].pack, leaving=part))
            self.blocks += blocks
            done += len(blocks)

    # ---- its end, and copies -------------------------------------------------------------------------------------

    def fork(self, cache: CacheState) -> CacheLayer:
        """The same for a copy of the cache: blocks are shared, the tail is copied.

        Args:
            cache: what the copy's layers share.
        """
        other = CacheLayer(cache, self.position)
        other.blocks, other.shape, other._reopened = list(self.blocks), self.shape, self._reopened
        other.tail = None if self.tail is None else self.tail.fork()  # before anything is shared: it takes memory
        other.forms = {name: form.fork(cache.positions, cache.work) for name, form in self.forms.items()}
        other.is_full_precision, other.is_segmented = self.is_full_precision, self.is_segmented
        other.awaits_crop = self.awaits_crop
        other._memory = self._memory.fork()
        other.account()
        return other

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close(self.cache.engine.last_h2d)
        for near in self._near:
            near.close()
        self.blocks, self.tail, self._near = [], None, ()
        self.shape, self.forms, self._reopened = None, {}, None
        self.awaits_crop = False
        self._forget_views()
        self.version += 1
        self.account()
