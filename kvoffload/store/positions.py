"""Position embeddings of cached tokens, kept so that keys can be recomputed with the rotation they were written with.

Owns which captured tensors are one and the same (gemma3 passes one pair per layer type), and per distinct one a table
of its distinct vectors and an index [tokens, rows] into it. Rows of a batch differ by their padding only, so a vector
is stored about once however many rows there are, and the whole table stays on the device where it is small next to what
else is there; where it is not, see carried.py. Dynamic RoPE variants change their frequencies during a generation, so
the embeddings cannot be rebuilt from positions later.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from kvoffload.errors import UnsupportedModelError

INDEX_BYTES = 4  # int32


@dataclass(slots=True)
class _Stream:
    """One captured tensor over all tokens.

    `table` [capacity, width] holds vectors, `index` [capacity, rows or 1] says which one a token of a row has;
    `pending` holds what has not been stored yet, each [rows or 1, tokens, width]. While rows were alike the vectors are
    those of the tokens in their order (`is_sequence`), and are read as they lie.
    """

    table: torch.Tensor | None = None
    index: torch.Tensor | None = None
    num_vectors: int = 0
    num_stored: int = 0
    is_sequence: bool = True
    pending: list[torch.Tensor] = field(default_factory=list)
    num_pending: int = 0

    def append(self, embedding: torch.Tensor) -> None:
        self.pending.append(embedding.detach())
        self.num_pending += embedding.shape[1]

    def store(self, capacity_tokens: int) -> None:
        """Move what is pending into the table; the only place where rows are compared."""
        if not self.pending:
            return
        rows = max(part.shape[0] for part in self.pending)
        new = torch.cat([part.expand(rows, -1, -1) for part in self.pending], dim=1).transpose(0, 1)
        self.pending, self.num_pending = [], 0
        tokens = new.shape[0]
        if rows == 1 or bool((new == new[:, :1]).all()):
            vectors = new[:, 0]
            index = torch.arange(tokens, device=new.device).unsqueeze(1)
            self.is_sequence = self.is_sequence and self.num_vectors == self.num_stored
        else:
            self.is_sequence = False
            vectors, flat = new.reshape(tokens * rows, -1).unique(dim=0, return_inverse=True)
            index = flat.view(tokens, rows)
        self.table = _with_room(self.table, self.num_vectors, vectors, vectors.shape[1], capacity_tokens)
        self.table[self.num_vectors : self.num_vectors + vectors.shape[0]] = vectors
        index = (index + self.num_vectors).to(torch.int32)
        width = index.shape[1] if self.index is None else max(index.shape[1], self.index.shape[1])
        self.index = _with_room(self.index, self.num_stored, index, width, capacity_tokens)
        written = width if index.shape[1] == 1 else index.shape[1]
        self.index[self.num_stored : self.num_stored + tokens, :written] = index
        self.num_vectors += vectors.shape[0]
        self.num_stored += tokens

    def permute(self, start: int, stop: int, columns: torch.Tensor, rows: int) -> None:
        """Row i of some stored tokens becomes what was in column `columns[i]` of `rows`."""
        if self.index is None or self.index.shape[1] == 1 or start >= self.num_stored:
            return
        if self.index.shape[1] < rows:
            return  # as in `read`
        moved = self.index[start:stop].index_select(1, columns)
        self.index = _with_room(self.index, self.num_stored, moved[:0], max(self.index.shape[1], moved.shape[1]), 0)
        self.index[start:stop, : moved.shape[1]] = moved

    def read(self, tokens: slice | Sequence[int], rows: int, row_step: int) -> torch.Tensor:
        """[rows or 1, tokens, width] of stored tokens; every `row_step`-th logical row."""
        assert self.table is not None and self.index is not None
        if self.is_sequence and isinstance(tokens, slice):
            return self.table[tokens].unsqueeze(0)
        index = self.index[tokens]
        if index.shape[1] < rows * row_step:
            index = index[:, :1]  # rows were alike when there were fewer, and are since
        elif index.shape[1] > 1:
            index = index[:, : rows * row_step : row_step]
        index = index.t()  # [rows or 1, tokens]
        return self.table.index_select(0, index.reshape(-1).long()).view(*index.shape, -1)

    def keep_pending(self, tokens: int) -> None:
        """Of those that are not stored yet the first so many stay; the others never were."""
        parts, self.pending, self.num_pending = self.pending, [], max(0, tokens)
        for part in parts:
            if tokens > 0:
                self.pending.append(part[:, :tokens])
                tokens -= part.shape[1]

    def fork(self) -> _Stream:
        """The same, for a copy of the cache: what either writes behind it is its own."""
        with torch.inference_mode(False):  # else the copy could not be written outside of inference mode
            table, index = (None if data is None else data.clone() for data in (self.table, self.index))
        return replace(self, table=table, index=index, pending=list(self.pending))


def _with_room(old: torch.Tensor | None, used: int, new: torch.Tensor, width: int, capacity: int) -> torch.Tensor:
    """`old` [.., width] if `new` fits behind its first `used` rows, else a larger copy of it."""
    needed = used + new.shape[0]
    if old is not None and old.shape[0] >= needed and old.shape[1] == width:
        return old
    if old is not None and old.shape[0] < needed:
        capacity = 2 * needed
    with torch.inference_mode(False):
        grown = torch.empty(max(capacity, needed), width, dtype=new.dtype, device=new.device)
    if old is not None:
        # One row per token serves all where there is only one; else tokens keep the rows they were stored with.
        columns = width if old.shape[1] == 1 else old.shape[1]
        grown[:used, :columns] = old[:used]
        grown[:used, columns:] = old[:used, :1]  # of tokens whose rows are alike; of others nobody reads these
    return grown


class PositionStore(ABC):
    """What becomes of the tensors that the layers of one cache are given, each distinct one a stream."""

    def __init__(self) -> None:
        self._num_streams = 0
        self._captured: dict[int, torch.Tensor] = {}  # stream -> what it got in this forward
        self._captured_by: dict[int, int] = {}  # the inverse, by identity
        self._assigned: dict[tuple[int, int], int] = {}  # (layer, index in its tuple) -> stream
        self._forward = -1

    def capture(
        self, forward: int, layer: int, embeddings: tuple[torch.Tensor, ...], cached_tokens: int
    ) -> tuple[int, ...]:
        """Remember the embeddings of this forward's tokens, each distinct tensor once; returns their streams.

        Args:
            forward: number of the forward pass; tensors are told apart by identity within one.
            layer: the layer they were given to.
            embeddings: each [rows or 1, tokens, width].
            cached_tokens: tokens before these. What a forward left behind that failed before it cached its own goes.

        Raises:
            UnsupportedModelError: layers that shared a tensor in one forward have different ones in another.
        """
        if forward != self._forward:
            self._forward = forward
            self._forget_captured()
            self.truncate(cached_tokens)
        streams = []
        for index, tensor in enumerate(embeddings):
            stream = self._assigned.get((layer, index))
            if stream is None:
                stream = self._captured_by.get(id(tensor))
                if stream is None:
                    stream = self._num_streams
                    self._num_streams += 1
                self._assigned[layer, index] = stream
            previous = self._captured.get(stream)
            if previous is None:
                self._append(stream, tensor, cached_tokens)
                self._captured[stream] = tensor  # also keeps its id valid for the length of the forward
                self._captured_by[id(tensor)] = stream
            elif previous is not tensor:
                raise UnsupportedModelError(
                    f"layer {layer} shared its position embeddings with another layer in an earlier forward and does "
                    "not any more; offload this model with split='transfer'"
                )
            streams.append(stream)
        return tuple(streams)

    def fork(self) -> Self:
        """The same, for a copy of the cache, between two forwards."""
        other = copy.copy(self)
        other._captured, other._captured_by, other._assigned = {}, {}, dict(self._assigned)
        other._forward = -1
        return other

    def _forget_captured(self) -> None:
        self._captured.clear()
        self._captured_by.clear()

    @abstractmethod
    def _append(self, stream: int, embedding: torch.Tensor, cached_tokens: int) -> None:
        """Take the embeddings [rows or 1, tokens, width] of the tokens behind `cached_tokens`; a new stream's, too."""

    @abstractmethod
    def sample(
        self, streams: tuple[int, ...], tokens: Sequence[int], rows: int, row_step: int
    ) -> tuple[torch.Tensor, ...]:
        """Embeddings of some tokens that are in no block yet, each [rows or 1, tokens, width]; as for `read`."""

    @abstractmethod
    def truncate(self, num_tokens: int) -> None:
        """Forget the tokens behind the first `num_tokens`."""

    @abstractmethod
    def restore(self, start: int, stop: int, columns: torch.Tensor, rows: int) -> None:
        """Tokens of a block are in logical order again: row i is what was stored in column `columns[i]` of `rows`."""

    @abstractmethod
    def select(self, indices: torch.Tensor, first_token: int, rows: int) -> None:
        """Rows of the tokens from `first_token` on (those in no block yet) follow the `rows` logical rows."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """Device memory held."""


class PositionTable(PositionStore):
    """All of them on the device.

    Args:
        capacity_tokens: how many tokens to make room for at once (0 if unknown).
    """

    def __init__(self, capacity_tokens: int) -> None:
        super().__init__()
        self._capacity_tokens = capacity_tokens
        self._streams: list[_Stream] = []

    def fork(self) -> Self:
        other = super().fork()
        other._streams = [stream.fork() for stream in self._streams]
        return other

    def _append(self, stream: int, embedding: torch.Tensor, cached_tokens: int) -> None:
        if stream == len(self._streams):
            self._streams.append(_Stream())
        self._streams[stream].append(embedding)

    def read(
        self, streams: tuple[int, ...], start: int, stop: int, rows: int, row_step: int
    ) -> tuple[torch.Tensor, ...]:
        """Embeddings of tokens `start..stop`, each [rows or 1, tokens, width]; every `row_step`-th logical row."""
        for idx in streams:
            if self._streams[idx].num_stored < stop:
                self._streams[idx].store(self._capacity_tokens)
        return tuple(self._streams[idx].read(slice(start, stop), rows, row_step) for idx in streams)

    def sample(
        self, streams: tuple[int, ...], tokens: Sequence[int], rows: int, row_step: int
    ) -> tuple[torch.Tensor, ...]:
        for idx in streams:
            self._streams[idx].store(self._capacity_tokens)
        return tuple(self._streams[idx].read(tokens, rows, row_step) for idx in streams)

    def truncate(self, num_tokens: int) -> None:
        for stream in self._streams:
            if stream.num_stored + stream.num_pending > num_tokens:
                stream.keep_pending(num_tokens - stream.num_stored)
                stream.num_stored = min(stream.num_stored, num_tokens)
                if stream.is_sequence:
                    stream.num_vectors = min(stream.num_vectors, num_tokens)

    def restore(self, start: int, stop: int, columns: torch.Tensor, rows: int) -> None:
        for stream in self._streams:
            stream.store(self._capacity_tokens)
            stream.permute(start, stop, columns, rows)

    def select(self, indices: torch.Tensor, first_token: int, rows: int) -> None:
        for stream in self._streams:
            stream.store(self._capacity_tokens)
            index = stream.index
            if index is None or index.shape[1] == 1 or first_token >= stream.num_stored:
                continue
            indices = indices.to(index.device)
            if index.shape[1] < rows:
                continue  # as in `read`
            if indices.numel() == rows:
                tail = index[first_token : stream.num_stored, :rows]
                tail.copy_(tail.index_select(1, indices))
                continue
            moved = stream.read(slice(first_token, stream.num_stored), rows, 1).index_select(0, indices)
            stream.num_stored, stream.pending, stream.num_pending = first_token, [moved], moved.shape[1]

    @property
    def device_bytes(self) -> int:
        held = (tensor for stream in self._streams for tensor in (stream.table, stream.index))
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)
