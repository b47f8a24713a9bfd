"""Hooks that see each attention layer's input; they sit on the modules of one model and come off again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvoffload.errors import UnsupportedModelError
from kvoffload.hf.cache import OffloadedHFCache
from kvoffload.hf.layer import OffloadedLayer
from kvoffload.hf.models import attention_modules, is_compiled


class ModelHooks:
    """Hooks on the attention modules and the model itself, and their removal.

    Args:
        model: the model.
        is_foreign_forward_allowed: whether a forward with another cache is fine now.
        on_forward: called before each forward of the model with a cache of ours.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        is_foreign_forward_allowed: Callable[[], bool],
        on_forward: Callable[[OffloadedHFCache], None],
    ) -> None:
        self.modules = attention_modules(model)
        self._allowed = is_foreign_forward_allowed
        self._on_forward = on_forward
        self._handles: list[Any] = []
        self.running: dict[nn.Module, OffloadedLayer] = {}  # attention modules in a forward, and the layer each feeds
        self.is_compiled = is_compiled(model)
        if self.is_compiled:
            warnings.warn(
                f"{type(model).__name__} is compiled: its offloaded cache runs between the compiled graphs, one break "
                "per layer, so little of the gain is left",
                stacklevel=4,
            )
        wrap: Callable[[Any], Any] = torch.compiler.disable if self.is_compiled else lambda function: function
        for idx, module in self.modules.items():
            names = list(inspect.signature(module.forward).parameters)
            before, after = self._make_hooks(idx, names)
            self._handles.append(module.register_forward_pre_hook(wrap(before), with_kwargs=True))
            self._handles.append(module.register_forward_hook(wrap(after), with_kwargs=True))
        self._handles.append(model.register_forward_pre_hook(wrap(self._before_model), with_kwargs=True))

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.running.clear()

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, OffloadedHFCache):
            self._on_forward(cache)

    def _make_hooks(self, layer_idx: int, names: list[str]) -> tuple[Any, Any]:
        def argument(name: str, args: Any, kwargs: Any) -> Any:
            if name in kwargs:
                return kwargs[name]
            position = names.index(name) if name in names else len(args)
            return args[position] if position < len(args) else None

        def our_layer(args: Any, kwargs: Any) -> OffloadedLayer | None:
            cache = argument("past_key_values", args, kwargs)
            if cache is None:
                cache = argument("layer_past", args, kwargs)
            if not isinstance(cache, OffloadedHFCache):
                if not self._allowed():
                    raise UnsupportedModelError(
                        f"the model ran layer {layer_idx} without the offloaded cache it was given (some models drop "
                        "their cache when a context grows past a limit); use plain generate() for this call"
                    )
                return None
            if layer_idx >= len(cache.layers):
                return None  # it reads what an earlier layer cached, and has no cache of its own
            layer = cache.layers[layer_idx]
            return layer if isinstance(layer, OffloadedLayer) else None

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            layer = our_layer(args, kwargs)
            if layer is not None:
                activation = kwargs.get("hidden_states", args[0] if args else None)
                layer.capture(activation, argument("position_embeddings", args, kwargs))
                self.running[module] = layer

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            layer = self.running.pop(module, None)
            if layer is not None:
                layer.finish()

        return before, after
