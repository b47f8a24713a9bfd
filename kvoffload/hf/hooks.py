"""Hooks that see each attention layer's input; they sit on the modules of one model and come off again."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvoffload.errors import UnsupportedModelError
from kvoffload.hf.arguments import argument, given_cache
from kvoffload.hf.models import is_compiled
from kvoffload.hf.offloaded_cache import OffloadedHFCache
from kvoffload.hf.offloaded_layer import OffloadedLayer
from kvoffload.model.self_attention import attention_modules


class ModelHooks:
    """Hooks on the attention modules and the model itself, and their removal.

    Args:
        model: the model.
        layer_indices: of its offloaded layers.
        on_any: called before each forward of the model.
        on_forward: called before each of them with a cache of ours.
        on_layers: called when such a forward, or one of the decoder alone, comes to the first offloaded layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer_indices: Sequence[int],
        *,
        on_any: Callable[[], None],
        on_forward: Callable[[OffloadedHFCache], None],
        on_layers: Callable[[], None],
    ) -> None:
        modules = attention_modules(model)
        self.modules = {idx: modules[idx] for idx in layer_indices if idx in modules}
        self._on_any, self._on_forward = on_any, on_forward
        self._on_layers = on_layers
        self._handles: list[Any] = []
        self._model_names = list(inspect.signature(model.forward).parameters)
        # threads in a forward of the model that was given a cache of ours, and which
        self._with_ours: dict[int, weakref.ref[OffloadedHFCache]] = {}
        # Attention modules in a forward, per thread (others may run the model without us), and the layer each feeds.
        self._running: dict[tuple[int, nn.Module], weakref.ref[OffloadedLayer]] = {}
        self.is_compiled = is_compiled(model)
        if self.is_compiled:
            warnings.warn(
                f"{type(model).__name__} is compiled: its offloaded cache runs between the compiled graphs, one break "
                "per layer, so little of the gain is left",
                stacklevel=4,
            )
        wrap: Callable[[Any], Any] = torch.compiler.disable if self.is_compiled else lambda function: function
        try:
            for idx, module in self.modules.items():
                names = list(inspect.signature(module.forward).parameters)
                before, after = self._make_hooks(idx, names)
                self._handles.append(module.register_forward_pre_hook(wrap(before), with_kwargs=True))
                self._handles.append(module.register_forward_hook(wrap(after), with_kwargs=True))
            self._handles.append(model.register_forward_pre_hook(wrap(self._before_model), with_kwargs=True))
            self._handles.append(model.register_forward_hook(wrap(self._after_model), always_call=True))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    def are_alone(self, model: PreTrainedModel) -> bool:
        """Whether nobody else has hooks on the model, which would see drafts as well; transformers' own see nothing."""
        ours = {handle.id for handle in self._handles}
        others = (
            hook
            for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
            for number, hook in hooks.items()
            if number not in ours
        )
        return all(getattr(hook, "__module__", "").split(".")[0] == "transformers" for hook in others)

    def layer_of(self, module: nn.Module) -> OffloadedLayer | None:
        """The layer that an attention module feeds in the forward which this thread is in."""
        reference = self._running.get((threading.get_ident(), module))
        return None if reference is None else reference()

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._on_any()
        cache = given_cache(args, kwargs, self._model_names)
        if isinstance(cache, OffloadedHFCache):
            self._with_ours[threading.get_ident()] = weakref.ref(cache)
            cache.is_torn = True
            self._on_forward(cache)

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """Also after an exception, which leaves attention modules in the middle of theirs."""
        thread = threading.get_ident()
        reference = self._with_ours.pop(thread, None)
        if output is not None and reference is not None and (cache := reference()) is not None:
            cache.is_torn = False
        for key in [key for key in self._running if key[0] == thread]:
            layer = self._running.pop(key)()
            if layer is not None:
                layer.abandon()

    def _make_hooks(self, layer_idx: int, names: list[str]) -> tuple[Any, Any]:
        def our_layer(args: Any, kwargs: Any) -> OffloadedLayer | None:
            cache = given_cache(args, kwargs, names)
            if not isinstance(cache, OffloadedHFCache):
                if threading.get_ident() in self._with_ours:
                    raise UnsupportedModelError(
                        f"the model was given an offloaded cache, but {type(self.modules[layer_idx]).__name__} of "
                        f"layer {layer_idx} was not: its forward drops or copies the cache; use plain generate()"
                    )
                return None  # a forward of its own, with a cache of transformers or none
            if layer_idx >= len(cache.layers):
                return None  # it reads what an earlier layer cached, and has no cache of its own
            layer = cache.layers[layer_idx]
            return layer if isinstance(layer, OffloadedLayer) else None

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.pop((threading.get_ident(), module), None)  # of a forward that an exception ended
            layer = our_layer(args, kwargs)
            if layer is not None:
                if layer.core.position == 0:
                    self._on_layers()
                activation = kwargs.get("hidden_states", args[0] if args else None)
                layer.capture(
                    activation,
                    argument("position_embeddings", args, kwargs, names),
                    argument("attention_mask", args, kwargs, names),
                )
                self._running[threading.get_ident(), module] = weakref.ref(layer)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            layer = self.layer_of(module)
            self._running.pop((threading.get_ident(), module), None)
            if layer is not None:
                layer.finish()

        return before, after
