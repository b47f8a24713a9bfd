"""Attention over segments as transformers calls it: registered under a name of its own, selected, and taken out again.

A model's attention modules look their function up by the name in its configuration. Ours takes over for offloaded
layers with cached tokens; the first prefill, sliding layers and anybody else who shares the configuration go to the
function that was selected before. Masks are made as before, too.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvoffload.hf.attention_call import takes_names_for_meanings
from kvoffload.hf.hooks import ModelHooks

TAKES_OVER_FROM = ("sdpa", "eager")  # others ask for a kernel by name


class _AsBefore:
    """What a name of ours means once its session is over, for configurations that were copied meanwhile."""

    def __init__(self, original: str) -> None:
        self._original = original

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The attention function that was selected before ours."""
        function = _function(module, self._original)
        assert function is not None
        return function(module, *args, **kwargs)


class SegmentAttention:
    """One model's attention function; see `install`."""

    def __init__(self, model: PreTrainedModel, hooks: ModelHooks, original: str) -> None:
        self._hooks, self._original = hooks, original
        self._configs = _configs(model, original)
        self.name = _free_name(original)
        ALL_ATTENTION_FUNCTIONS.register(self.name, self)
        ALL_MASK_ATTENTION_FUNCTIONS.register(self.name, ALL_MASK_ATTENTION_FUNCTIONS[original])
        for config in self._configs:
            config._attn_implementation_internal = self.name

    @classmethod
    def install(cls, model: PreTrainedModel, hooks: ModelHooks) -> SegmentAttention | None:
        """Select it on a model; None where the model's attention is not looked up by name, or is a special one."""
        text_config = model.config.get_text_config(decoder=True)
        original = text_config._attn_implementation
        if original not in TAKES_OVER_FROM or hooks.is_compiled or not model._can_set_attn_implementation():
            return None
        if any(map(takes_names_for_meanings, hooks.modules.values())):
            return None
        if original == "eager" and not all(_eager(module) for module in hooks.modules.values()):
            return None
        return cls(model, hooks, original)

    def remove(self) -> None:
        """Select what was selected before; the name stays as another one for that, until the next session takes it."""
        for config in self._configs:
            if config._attn_implementation_internal == self.name:
                config._attn_implementation_internal = self._original
        ALL_ATTENTION_FUNCTIONS.register(self.name, _AsBefore(self._original))

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """As transformers defines attention functions: query, key, value [rows, heads, tokens, head_dim]."""
        original = _function(module, self._original)
        assert original is not None
        layer = self._hooks.layer_of(module)
        if layer is None or not layer.awaits_attention:
            if layer is not None:
                layer.refuse_more_attention(module)
            return original(module, query, key, value, attention_mask, **kwargs)
        return layer.attend(original, module, query, key, value, attention_mask, kwargs)


def _free_name(original: str) -> str:
    """A name of ours that no session uses; one that stays behind is taken again."""
    for number in itertools.count():
        name = f"kvoffload_{number}_{original}"
        if not isinstance(ALL_ATTENTION_FUNCTIONS.get(name), SegmentAttention):
            return name
    raise AssertionError  # there is always a next number


def _function(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The function of a name, for a module."""
    return _eager(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def _eager(module: nn.Module) -> Callable[..., Any] | None:
    """The plain function that a model's own file has for its attention."""
    function: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return function


def _configs(model: PreTrainedModel, original: str) -> list[Any]:
    """The configurations of the decoder, where that function is selected."""
    found: dict[int, Any] = {}
    candidates = [model.config, model.config.get_text_config(decoder=True)]
    candidates += [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in candidates:
        if config._attn_implementation_internal == original:
            found[id(config)] = config
    return list(found.values())
