"""The names under which transformers hands a cache around, in the releases that we know.

Owns these names, so that a release which renames one is met here. Up to 5.23 a cache is `past_key_values` to
`generate()`, to models and to most attention modules, and `layer_past` to some; from 5.24 it is `cache`, and a caller
may still write the old name. Whatever sees a call before transformers has renamed anything accepts any of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import GenerationMixin

CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def name_of_cache(function: Callable[..., Any]) -> str | None:
    """The name that a function or method has for its cache; None where it takes none by name.

    Args:
        function: `generate`'s parts, a model's `forward`, that of an attention module.
    """
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def generation_name() -> str:
    """The name that `generate()` of the installed release has for the cache, in `model_kwargs` and in its outputs."""
    return name_of_cache(GenerationMixin.prepare_inputs_for_generation) or CACHE_NAMES[0]


def given_cache(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str] = ()) -> Any:
    """The cache that a call was given under any of the names, else None.

    Args:
        args: positional arguments of the call.
        kwargs: named ones.
        names: of the parameters in their order, where a cache may be given by position.
    """
    for name in CACHE_NAMES:
        value = argument(name, args, kwargs, names)
        if value is not None:
            return value
    return None


def argument(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> Any:
    """One argument of a call, by name or by position; None if it was not given."""
    if name in kwargs:
        return kwargs[name]
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else None


def returned_cache(output: Any) -> Any:
    """The cache in what `generate()` returned, None where it returned tokens alone."""
    return getattr(output, generation_name(), None)
