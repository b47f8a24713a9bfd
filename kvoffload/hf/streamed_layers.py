"""Decoder layers whose weights are streamed: each layer's forward finds them on the device, and gives them back.

Owns what stands in the place of `forward` on these layers, one instance each, and the guard against two threads. The
layer is the unit, as models read weights inside one without calling the module that has them. Does not own the bytes
(`store/layer_weights.py`) nor their way (`pipeline/weights.py`).
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kvoffload.errors import KVOffloadError, UnsupportedModelError
from kvoffload.hf.row_slices import through_in_slices
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.store.layer_weights import LayerWeights


class StreamedLayers:
    """The decoder layers of one model that may be streamed.

    Args:
        engine: brings their weights.
        layers: the modules.
        weights: of each.
        is_compiled: whether the model's forward is; ours then runs between its graphs.

    Attributes:
        rows_per_slice: rows that pass a layer at once in a prefill; None: all of them.
    """

    def __init__(
        self,
        engine: TransferEngine,
        layers: Sequence[nn.Module],
        weights: Sequence[LayerWeights],
        *,
        is_compiled: bool = False,
    ) -> None:
        self._engine = engine
        self._layers = tuple(layers)
        self.rows_per_slice: int | None = None
        self._thread: int | None = None  # in the forward of a layer
        self._current: LayerWeights | None = None  # of which layer
        self._before = [vars(layer).get("forward") for layer in layers]
        stand_ins = [self._standing_in(layer, own) for layer, own in zip(layers, weights, strict=True)]
        if is_compiled:
            stand_ins = [torch.compiler.disable(stand_in) for stand_in in stand_ins]
        for layer, stand_in in zip(layers, stand_ins, strict=True):
            vars(layer)["forward"] = stand_in

    def remove(self) -> None:
        """Give the layers their own forward back."""
        for layer, before in zip(self._layers, self._before, strict=True):
            vars(layer).pop("forward", None)
            if before is not None:
                vars(layer)["forward"] = before

    def _standing_in(self, layer: nn.Module, weights: LayerWeights) -> Any:
        original: Any = layer.forward
        names = list(inspect.signature(original).parameters)

        def pass_through(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.rows_per_slice is None:
                return original(*args, **kwargs)
            return through_in_slices(original, names, weights.layer_idx, self.rows_per_slice, args, kwargs)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if weights.is_resident:
                return pass_through(args, kwargs)
            if torch.is_grad_enabled() and layer.training:
                raise UnsupportedModelError(
                    "gradients do not flow through streamed weights: use torch.no_grad() or model.eval(), or train "
                    "outside the session"
                )
            with Present(self, weights), torch.no_grad():
                return pass_through(args, kwargs)

        return forward

    def present(self, weights: LayerWeights) -> Present:
        """A context in which a layer's weights are on the device; within another of the same layer it does nothing.

        Raises:
            KVOffloadError: another thread is in a layer of this model.
        """
        return Present(self, weights)

    def enter(self, weights: LayerWeights) -> bool:
        """Have them there; whether they were not yet."""
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            raise KVOffloadError(
                "another thread is in a forward of this model, which streams its weights for one at a time: wait for it"
            )
        if self._current is weights or weights.is_resident:
            return False
        if self._current is not None:
            raise KVOffloadError(
                f"layer {self._current.layer_idx} is in its forward, and weights are streamed for one layer at a time: "
                "read what is cached between two forwards"
            )
        self._thread, self._current = thread, weights
        try:
            weights.read_from(self._engine.begin_weights(weights))
        except BaseException:
            weights.read_from_host()
            self._thread = self._current = None
            raise
        return True

    def leave(self, weights: LayerWeights) -> None:
        """All that reads them has been issued."""
        weights.read_from_host()  # first: an interrupt may come between any two of these
        self._thread = self._current = None
        self._engine.end_weights()


class Present:
    """See `StreamedLayers.present`; a class, as a generator costs more in every layer."""

    __slots__ = ("_is_first", "_layers", "_weights")

    def __init__(self, layers: StreamedLayers, weights: LayerWeights) -> None:
        self._layers, self._weights, self._is_first = layers, weights, False

    def __enter__(self) -> None:
        self._is_first = self._layers.enter(self._weights)

    def __exit__(self, *error: object) -> None:
        if self._is_first:
            self._layers.leave(self._weights)
