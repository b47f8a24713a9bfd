"""Position embeddings of cached tokens, kept so that keys can be recomputed with the rotation they were written with.

Owns one growing device tensor per distinct captured tensor (gemma3 passes one pair per layer type), stored with one
row where all rows are equal. Dynamic RoPE variants change their frequencies during a generation, so the embeddings
cannot be rebuilt from positions later.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvoffload.errors import UnsupportedModelError


@dataclass(slots=True)
class _Stream:
    """One captured tensor over all tokens: `data` [capacity, rows or 1, width], and what has not been stored yet."""

    data: torch.Tensor | None = None
    num_stored: int = 0
    pending: list[torch.Tensor] = field(default_factory=list)  # [rows or 1, tokens, width]
    num_pending: int = 0

    def append(self, embedding: torch.Tensor) -> None:
        self.pending.append(embedding.detach())
        self.num_pending += embedding.shape[1]

    def store(self, capacity_tokens: int) -> None:
        """Move what is pending into `data`; the only place where rows are compared."""
        if not self.pending:
            return
        rows = max(part.shape[0] for part in self.pending)
        new = torch.cat([part.expand(rows, -1, -1) for part in self.pending], dim=1).transpose(0, 1)
        if rows > 1 and bool((new == new[:, :1]).all()):
            new = new[:, :1]
        self.pending, self.num_pending = [], 0
        end = self.num_stored + new.shape[0]
        old = self.data
        rows = new.shape[1] if old is None else max(old.shape[1], new.shape[1])
        if old is None or old.shape[0] < end or old.shape[1] < rows:
            capacity = max(capacity_tokens, end if old is None else max(old.shape[0], 2 * self.num_stored, end))
            with torch.inference_mode(False):
                self.data = torch.empty(capacity, rows, new.shape[2], dtype=new.dtype, device=new.device)
            if old is not None:
                self.data[: self.num_stored] = old[: self.num_stored]
        assert self.data is not None
        written = rows if new.shape[1] == 1 else new.shape[1]
        self.data[self.num_stored : end, :written] = new
        self.num_stored = end


class PositionStore:
    """The captured tensors of one cache.

    Args:
        capacity_tokens: how many tokens to make room for at once (0 if unknown).
    """

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._streams: list[_Stream] = []
        self._captured: dict[int, torch.Tensor] = {}  # stream -> what it got in this forward
        self._captured_by: dict[int, int] = {}  # the inverse, by identity
        self._assigned: dict[tuple[int, int], int] = {}  # (layer, index in its tuple) -> stream
        self._forward = -1

    def capture(self, forward: int, layer: int, embeddings: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
        """Remember the embeddings of this forward's tokens, each distinct tensor once; returns their streams.

        Args:
            forward: number of the forward pass; tensors are told apart by identity within one.
            layer: the layer they were given to.
            embeddings: each [rows or 1, tokens, width].
        """
        if forward != self._forward:
            self._forward = forward
            self._captured.clear()
            self._captured_by.clear()
        streams = []
        for index, tensor in enumerate(embeddings):
            stream = self._assigned.get((layer, index))
            if stream is None:
                stream = self._captured_by.get(id(tensor))
                if stream is None:
                    stream = len(self._streams)
                    self._streams.append(_Stream())
                self._assigned[layer, index] = stream
            previous = self._captured.get(stream)
            if previous is None:
                self._streams[stream].append(tensor)
                self._captured[stream] = tensor  # also keeps its id valid for the length of the forward
                self._captured_by[id(tensor)] = stream
            elif previous is not tensor:
                raise UnsupportedModelError(
                    f"layer {layer} shared its position embeddings with another layer in an earlier forward and does "
                    "not any more; offload this model with split='transfer'"
                )
            streams.append(stream)
        return tuple(streams)

    def read(
        self, streams: tuple[int, ...], start: int, stop: int, rows: int, row_step: int
    ) -> tuple[torch.Tensor, ...]:
        """Embeddings of tokens `start..stop`, each [rows or 1, tokens, width]; every `row_step`-th logical row."""
        result = []
        for idx in streams:
            stream = self._streams[idx]
            if stream.num_stored < stop:
                stream.store(self._capacity_tokens)
            assert stream.data is not None
            data = stream.data[start:stop]
            result.append((data if data.shape[1] == 1 else data[:, : rows * row_step : row_step]).transpose(0, 1))
        return tuple(result)

    def truncate(self, num_tokens: int) -> None:
        """Forget the tokens behind the first `num_tokens`."""
        for stream in self._streams:
            if stream.num_stored + stream.num_pending > num_tokens:
                stream.store(self._capacity_tokens)
                stream.num_stored = num_tokens

    def select(self, indices: torch.Tensor, first_token: int) -> None:
        """Rows of the tokens from `first_token` on (those in no block yet) follow the logical rows."""
        for stream in self._streams:
            stream.store(self._capacity_tokens)
            data = stream.data
            if data is None or data.shape[1] == 1 or first_token >= stream.num_stored:
                continue
            moved = data[first_token : stream.num_stored].index_select(1, indices.to(data.device))
            stream.num_stored, stream.pending = first_token, [moved.transpose(0, 1)]
            stream.num_pending = moved.shape[0]

    @property
    def device_bytes(self) -> int:
        """Device memory held."""
        return sum(s.data.numel() * s.data.element_size() for s in self._streams if s.data is not None)
