"""The newest tokens of one layer, on the device until their block is full.

Owns the two buffers of a tail, K/V and (where blocks may be stored as activations) the activation, and the gathering
of tokens that lie partly in the tail and partly in this forward. Does not know blocks. Everything is token-major.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from kvoffload.backend import Backend
from kvoffload.planning.placement import Part


class KVShape(NamedTuple):
    """The K/V of one token of one row of one layer."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> KVShape:
        """The shape of keys [rows, heads, tokens, dim] and values likewise."""
        return cls(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype)

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
        values = data[..., self.key_width :].view(*data.shape[:-1], self.value_heads, self.value_dim)
        return self.keys_of(data), values

    def keys_of(self, data: torch.Tensor) -> torch.Tensor:
        """The K of `split`."""
        return data[..., : self.key_width].view(*data.shape[:-1], self.key_heads, self.key_dim)


class RowShape(NamedTuple):
    """One token of one row."""

    width: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def view(self, data: torch.Tensor, tokens: int, rows: int) -> torch.Tensor:
        """Bytes as [tokens, rows, width]."""
        with torch.inference_mode(False):  # else the view could not be written outside of inference mode
            return data.view(self.dtype).view(tokens, rows, self.width)


class NewTokens(NamedTuple):
    """Tokens of this forward, token-major: K and V [tokens, rows, heads, dim], activation [tokens, rows, hidden]."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    activation: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    def behind(self, tokens: int) -> NewTokens:
        """Without the first `tokens` tokens."""
        return NewTokens(*(None if part is None else part[tokens:] for part in self))

    def rows_are_copies(self, copies: int) -> bool:
        """Whether each group of `copies` consecutive rows holds the same bits (GEMM rows may differ in the last)."""
        return all(_are_copies(part, copies) for part in self if part is not None)


class Tail:
    """Buffers of the newest tokens.

    Args:
        backend: gives the memory.
        kv_shape: of the layer.
        activation_shape: of the layer's activation; None keeps none.
        rows: logical rows.
        capacity_tokens: how many tokens it holds before it must grow.
    """

    def __init__(
        self, backend: Backend, kv_shape: KVShape, activation_shape: RowShape | None, rows: int, capacity_tokens: int
    ) -> None:
        self._backend = backend
        self._kv_shape = kv_shape
        self._shapes: dict[Part, RowShape] = {"kv": RowShape(kv_shape.width, kv_shape.dtype)}
        if activation_shape is not None:
            self._shapes["activation"] = activation_shape
        self.num_tokens = 0
        self._data = self._allocate(capacity_tokens, rows)

    def _allocate(self, tokens: int, rows: int) -> dict[Part, torch.Tensor]:
        """Buffers [tokens, rows, width] per part."""
        allocate = self._backend.allocate_device
        return {
            part: shape.view(allocate(tokens * rows * shape.num_bytes), tokens, rows)
            for part, shape in self._shapes.items()
        }

    @property
    def kv(self) -> torch.Tensor:
        """K/V of the tail, [num_tokens, rows, width]."""
        return self._data["kv"][: self.num_tokens]

    @property
    def rows(self) -> int:
        """Logical rows."""
        return self._data["kv"].shape[1]

    @property
    def parts(self) -> Collection[Part]:
        """What is kept of each token."""
        return self._data.keys()

    @property
    def device_bytes(self) -> int:
        return sum(data.numel() * data.element_size() for data in self._data.values())

    def rows_are_copies(self, copies: int) -> bool:
        """Whether each group of `copies` consecutive rows holds the same bits; waits for the device."""
        return not self.num_tokens or all(_are_copies(data[: self.num_tokens], copies) for data in self._data.values())

    def grow(self, tokens: int) -> bool:
        """Make room for that many tokens; whether the buffers are new."""
        capacity, rows = self._data["kv"].shape[:2]
        if capacity >= tokens:
            return False
        old, self._data = self._data, self._allocate(tokens, rows)
        for part, data in old.items():
            self._data[part][: self.num_tokens] = data[: self.num_tokens]
        return True

    def copy(self, part: Part, out: torch.Tensor, start: int, stop: int, step: int, new: NewTokens) -> None:
        """Tokens `start..stop` of tail + new, every `step`-th row, into `out` [tokens, rows, width]."""
        from_tail = max(0, min(stop, self.num_tokens) - start)
        if from_tail:
            out[:from_tail] = self._data[part][start : start + from_tail, ::step]
        if stop <= self.num_tokens:
            return
        source = slice(start + from_tail - self.num_tokens, stop - self.num_tokens)
        if part == "kv" and new.keys is not None and new.values is not None:
            keys, values = self._kv_shape.split(out[from_tail:])
            keys.copy_(new.keys[source, ::step])
            values.copy_(new.values[source, ::step])
        elif part == "activation" and new.activation is not None:
            out[from_tail:] = new.activation[source, ::step]

    def sample(self, part: Part, index: Sequence[int], step: int, new: NewTokens) -> torch.Tensor:
        """Some tokens of tail + new in ascending order, every `step`-th row, [tokens, rows, width]."""
        shape, found = self._shapes[part], [self._data[part][[i for i in index if i < self.num_tokens], ::step]]
        later = [i - self.num_tokens for i in index if i >= self.num_tokens]
        if part == "kv" and new.keys is not None and new.values is not None:
            found += [torch.cat([half[later, ::step].flatten(2) for half in (new.keys, new.values)], dim=2)]
        elif part == "activation" and new.activation is not None:
            found += [new.activation[later, ::step]]
        return torch.cat([tokens.to(shape.dtype) for tokens in found])

    def with_new(self, new: NewTokens) -> torch.Tensor:
        """K/V of the tail and the new tokens, [num_tokens + new, rows, width]; these are not cached by that.

        In the tail's own buffer if there is room, as there always is for one token.
        """
        data, stop = self._data["kv"], self.num_tokens + new.num_tokens
        if data.shape[0] < stop:
            data = data.new_empty(stop, *data.shape[1:])
            data[: self.num_tokens] = self.kv
        self.copy("kv", data[self.num_tokens : stop], self.num_tokens, stop, 1, new)
        return data[:stop]

    def advance(self, gone: int, new: NewTokens) -> None:
        """The oldest `gone` tokens of tail + new are in blocks now; the rest is the tail (and has room)."""
        kept = max(0, self.num_tokens - gone)
        if gone and kept:
            for data in self._data.values():
                data[:kept] = data[gone : gone + kept].clone()
        new = new.behind(max(0, gone - self.num_tokens))
        self.num_tokens = kept
        if new.num_tokens:
            stop = kept + new.num_tokens
            for part, data in self._data.items():
                self.copy(part, data[kept:stop], kept, stop, 1, new)
            self.num_tokens = stop

    def restore(self, part: Part, data: torch.Tensor) -> None:
        """Put a block's tokens back at the front; `data` [tokens, rows, width]."""
        self._data[part][: data.shape[0]] = data

    def fork(self) -> Tail:
        """A copy of the buffers, for a copy of the cache."""
        capacity, rows = self._data["kv"].shape[:2]
        other = Tail(self._backend, self._kv_shape, self._shapes.get("activation"), rows, capacity)
        other.num_tokens = self.num_tokens
        for part, data in self._data.items():
            other._data[part][: self.num_tokens] = data[: self.num_tokens]
        return other

    def rearrange(self, index: torch.Tensor) -> None:
        """Token j of row i becomes what token `index[j, i]` was, [tokens, rows], no more than there are."""
        for data in self._data.values():
            found = data[: self.num_tokens].gather(0, index.unsqueeze(-1).expand(*index.shape, data.shape[2]))
            data[: index.shape[0]] = found
        self.num_tokens = index.shape[0]

    def select_rows(self, indices: torch.Tensor) -> None:
        """Logical row i becomes what row `indices[i]` was."""
        capacity, rows = self._data["kv"].shape[:2]
        old = self._data
        if indices.numel() != rows:
            self._data = self._allocate(capacity, indices.numel())
        for part, data in old.items():
            self._data[part][: self.num_tokens] = data[: self.num_tokens].index_select(1, indices)


def _are_copies(part: torch.Tensor, copies: int) -> bool:
    """Whether each group of `copies` consecutive rows of [tokens, rows, ...] holds the same bits."""
    groups = part.unflatten(1, (-1, copies))
    return bool((groups == groups[:, :, :1]).all())
