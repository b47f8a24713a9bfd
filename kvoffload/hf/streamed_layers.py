"""Decoder layers whose weights are streamed: each layer's forward finds them on the device, and gives them back.

Owns what stands in the place of `forward` on these layers, one instance each, and the guard against two threads. The
layer is the unit, as models read weights inside one without calling the module that has them. Does not own the bytes
(`store/layer_weights.py`) nor their way (`pipeline/weights.py`).
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from kvoffload.errors import KVOffloadError, UnsupportedModelError
from kvoffload.hf.row_slices import goes_by_rows, through_in_slices
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.store.layer_weights import LayerWeights, absorb
from kvoffload.units import gib

_NO_GRADIENTS = (
    "gradients do not flow through streamed weights: use torch.no_grad() or model.eval(), or train outside the session"
)


class _Inside(NamedTuple):
    """A layer whose weights are on the device now."""

    weights: LayerWeights
    thread: int
    frame: FrameType  # whose `with` has them there

    @property
    def is_over(self) -> bool:
        """Whether that has ended without giving them back: an interrupt came in the middle of it."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is None


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
        self._weights = tuple(weights)
        self.rows_per_slice: int | None = None
        self._inside: _Inside | None = None
        self._newest: int | None = None  # layer of the model's forward that goes on; None: layers are called alone
        self._is_removed = False
        self._before = [vars(layer).get("forward") for layer in layers]
        stand_ins = [self._standing_in(*one) for one in enumerate(zip(layers, weights, strict=True))]
        self._stand_ins = [torch.compiler.disable(one) for one in stand_ins] if is_compiled else stand_ins

    def install(self) -> None:
        """Stand in for the layers' forward, until `remove`."""
        for layer, stand_in in zip(self._layers, self._stand_ins, strict=True):
            vars(layer)["forward"] = stand_in

    @property
    def go_by_rows(self) -> bool:
        """Whether rows may pass these layers in slices now."""
        return all(map(self._goes_by_rows, range(len(self._layers))))

    def _goes_by_rows(self, idx: int) -> bool:
        return self._before[idx] is None and goes_by_rows(self._layers[idx], self._stand_ins[idx])

    def remove(self) -> None:
        """Give the layers their own forward back; one that somebody holds is as theirs from then on."""
        self._is_removed = True
        for layer, before in zip(self._layers, self._before, strict=True):
            vars(layer).pop("forward", None)
            if before is not None:
                vars(layer)["forward"] = before

    def _standing_in(self, idx: int, own: tuple[nn.Module, LayerWeights]) -> Any:
        layer, weights = own
        original: Any = layer.forward
        names = list(inspect.signature(original).parameters)

        def pass_through(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.rows_per_slice is None:
                return original(*args, **kwargs)
            rows, may = self.rows_per_slice, functools.partial(self._goes_by_rows, idx)
            return through_in_slices(original, names, weights.layer_idx, rows, args, kwargs, may=may)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._is_removed:
                return original(*args, **kwargs)
            if weights.is_resident:
                return pass_through(args, kwargs)
            if torch.is_grad_enabled() and layer.training:
                raise UnsupportedModelError(_NO_GRADIENTS)
            has_gradients = torch.is_grad_enabled() and any(map(_requires_grad, (*args, *kwargs.values(), layer)))
            with Present(self, weights), torch.no_grad():
                found = pass_through(args, kwargs)
            return _refusing_backward(found) if has_gradients else found

        return forward

    def present(self, weights: LayerWeights) -> Present:
        """A context in which a layer's weights are on the device; within another of the same layer it does nothing.

        Raises:
            KVOffloadError: another thread is in a layer of this model.
        """
        return Present(self, weights)

    def begin_forward(self) -> None:
        """A forward of the model begins: until it is over nobody changes weights."""
        self._newest = -1

    def enter(self, weights: LayerWeights, frame: FrameType) -> bool:
        """Have them there; whether they were not yet."""
        thread, inside = threading.get_ident(), self._inside
        if inside is not None and inside.is_over:
            self._inside = inside = None
            absorb(self._weights)
        if inside is not None and inside.thread != thread:
            raise KVOffloadError(
                "another thread is in a forward of this model, which streams its weights for one at a time: wait for it"
            )
        if weights.is_resident or (inside is not None and inside.weights is weights):
            return False
        if inside is not None:
            raise KVOffloadError(
                f"layer {inside.weights.layer_idx} is in its forward, and weights are streamed for one layer at a "
                "time: read what is cached between two forwards"
            )
        if self._engine.weights is None:
            raise KVOffloadError(
                f"device memory was too full for two slabs of {gib(weights.num_bytes)} when layers changed places: "
                "make room and call generate() again, or close() the session"
            )
        self._settle_order(weights)
        self._inside = _Inside(weights, thread, frame)
        try:
            weights.read_from(self._engine.begin_weights(weights))
        except BaseException:
            weights.read_from_host()
            self._inside = self._newest = None
            raise
        return True

    def leave(self, weights: LayerWeights, *, has_failed: bool) -> None:
        """All that reads them has been issued."""
        if has_failed:
            self._newest = None
        weights.read_from_host()
        self._inside = None  # an interrupt before this is noticed by the next to enter
        self._engine.end_weights()

    def _settle_order(self, weights: LayerWeights) -> None:
        """Whether weights may be brought ahead of need; where they may not, see those that were changed."""
        newest, self._newest = self._newest, None
        if not self._engine.is_generating and newest is not None and newest < weights.layer_idx:
            self._newest = weights.layer_idx
        self._engine.brings_weights_ahead = self._engine.is_generating or self._newest is not None
        if not self._engine.brings_weights_ahead:  # anything may have happened since the layer before
            self._engine.drop_weights()
            if weights.is_replaced:
                absorb(self._weights)


class _NoBackward(torch.autograd.Function):
    """The same values, through which no gradients flow: an error, where they would be left out of the sum unseen."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedModelError(_NO_GRADIENTS)


def _refusing_backward(found: Any) -> Any:
    """What a layer gives, with the error for who asks for gradients."""
    if isinstance(found, torch.Tensor) and found.is_floating_point():
        return _NoBackward.apply(torch.empty(0, requires_grad=True), found)  # type: ignore[no-untyped-call]
    if type(found) in (tuple, list):
        return type(found)(map(_refusing_backward, found))
    return found


def _requires_grad(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return any(parameter.requires_grad for parameter in value.parameters())
    return isinstance(value, torch.Tensor) and value.requires_grad


class Present:
    """See `StreamedLayers.present`; a class, as a generator costs more in every layer. For a `with` statement alone."""

    __slots__ = ("_is_first", "_layers", "_weights")

    def __init__(self, layers: StreamedLayers, weights: LayerWeights) -> None:
        self._layers, self._weights, self._is_first = layers, weights, False

    def __enter__(self) -> None:
        self._is_first = self._layers.enter(self._weights, sys._getframe(1))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._is_first:
            self._layers.leave(self._weights, has_failed=kind is not None)
