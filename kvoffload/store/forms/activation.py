"""The activation: a layer's input, from which K and V are computed anew (KVPR, arXiv 2411.17089, section 3).

Owns how blocks of it lie (with the position embeddings of their tokens behind them where these travel along,
`carried`), which embeddings their keys are rotated by, and the comparison before tokens are stored: whether what a
module computes from these still is what it computed. How K and V are computed is in `kvoffload/store/recompute.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from kvoffload.backend import Backend
from kvoffload.planning.placement import Part
from kvoffload.store.block import Span
from kvoffload.store.carried import CarriedPositions, PositionLayout
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms.form import Form, Leaving, attention_layout
from kvoffload.store.positions import PositionStore, PositionTable
from kvoffload.store.tail import KVShape, RowShape
from kvoffload.store.verification import Probe, Recompute, reproduces, sampled


class Stored(Form):
    """Blocks of activations, [tokens, rows, hidden] (and more, see `layout`).

    Args:
        backend: that times recomputation.
        shape: of the layer's K and V.
        hidden: the shape of an activation.
        recompute: gives K and V.
        probe: shows later whether it still gives the same.
        positions: of the cache.
        layout: where blocks carry their position embeddings; None: they do not.
        work: counts what is recomputed, in tokens of rows.
    """

    name = "activation"

    def __init__(
        self,
        backend: Backend,
        shape: KVShape,
        hidden: RowShape,
        recompute: Recompute,
        *,
        probe: Probe | None = None,
        positions: PositionStore,
        layout: PositionLayout | None = None,
        work: Counter[str],
    ) -> None:
        self._backend = backend
        self.shape = shape
        self.row = hidden if layout is None else RowShape(layout.row_width, hidden.dtype)
        self.recompute = recompute
        self.layout = layout
        self.streams: tuple[int, ...] = ()  # of position embeddings, see PositionStore
        self._probe = probe
        self._positions = positions
        self._work = work

    def fork(self, positions: PositionStore, work: Counter[str]) -> Stored:
        other = Stored(
            self._backend,
            self.shape,
            self.row,
            self.recompute,
            probe=self._probe,
            positions=positions,
            layout=self.layout,
            work=work,
        )
        other.streams = self.streams
        return other

    def capture(self, forward: int, layer: int, embeddings: tuple[torch.Tensor, ...], cached_tokens: int) -> None:
        """The position embeddings of this forward's tokens, each [rows or 1, tokens, width]."""
        self.streams = self._positions.capture(forward, layer, embeddings, cached_tokens)

    def accepts(self, rows: int) -> bool:
        """Whether there is room for the position embeddings, and one set of these is right for all rows."""
        if self.layout is None:
            return True
        assert isinstance(self._positions, CarriedPositions)
        return rows >= self.layout.num_shares and self._positions.have_equal_rows(self.streams)

    def agrees(self, tokens: Sequence[int], leaving: Leaving) -> bool:
        """Whether K and V of what is to be stored follow from it, as those of the first tokens did.

        A few tokens of many are compared; waits for the device.
        """
        rows = leaving.tail.rows // leaving.row_step
        index = [tokens[idx] for idx in sampled(len(tokens), rows)]
        # Backwards, so that what depends on a token's place in a call is found out.
        x, kv = (leaving.sample(part, index).flip(0) for part in ("activation", "kv"))
        embeddings: tuple[torch.Tensor, ...] = ()
        if self.streams:
            places = [leaving.first_token + idx for idx in index]
            sample = self._positions.sample(self.streams, places, rows, leaving.row_step)
            embeddings = tuple(part.flip(1) for part in sample)
        return reproduces(self.recompute, x, embeddings, kv, self.shape)

    def is_as_it_was(self) -> bool:
        return self._probe is None or self._probe.agrees(self.recompute, self.shape, self._backend.device)

    def pack(self, out: torch.Tensor, leaving: Leaving) -> None:
        tokens = leaving.stop - leaving.start
        stored = self.row.view(out, tokens, out.numel() // tokens // self.row.num_bytes)
        if self.layout is None:
            leaving.copy("activation", stored)
            return
        assert isinstance(self._positions, CarriedPositions)
        leaving.copy("activation", self.layout.activation(stored))
        first = leaving.first_token
        self.layout.write(stored, self._positions.read(self.streams, first, first + tokens))

    def restore(self, stored: DeviceMemory, span: Span, out: torch.Tensor) -> None:
        activation = stored.view(self.row.dtype, (span.num_tokens, span.rows, self.row.width))
        embeddings: tuple[torch.Tensor, ...] = ()
        if self.layout is not None:
            activation, embeddings = self.layout.activation(activation), self.layout.read(activation)
        elif self.streams:
            assert isinstance(self._positions, PositionTable)
            first = span.first_token
            stop = first + span.num_tokens
            embeddings = self._positions.read(self.streams, first, stop, span.rows, span.row_step)
        timed = self._backend.start_span("recompute")
        self.recompute(activation, embeddings, out)
        row_tokens = span.num_tokens * span.rows
        self._backend.end_span(timed, row_tokens)
        self._work["recomputed"] += row_tokens

    def segment(self, stored: DeviceMemory, span: Span, scratch: DeviceMemory) -> torch.Tensor:
        kv = scratch.view(self.shape.dtype, (span.num_tokens, span.rows, self.shape.width))
        self._backend.compute(writes=(kv,))
        self.restore(stored, span, kv)
        self._backend.compute(reads=(kv,))
        return scratch.view(*attention_layout(self.shape, span))

    def reopened(self, stored: DeviceMemory, span: Span) -> Mapping[Part, torch.Tensor]:
        found = dict(super().reopened(stored, span))
        activation = stored.view(self.row.dtype, (span.num_tokens, span.rows, self.row.width))
        if self.layout is not None:
            assert isinstance(self._positions, CarriedPositions)
            self._positions.reopen(self.streams, span.first_token, self.layout.read(activation))
            activation = self.layout.activation(activation)
        return found | {"activation": activation}
