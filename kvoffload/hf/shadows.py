"""Methods of one model object that stand in for those of its class, until they are taken off again.

Owns how methods are replaced, and that the model is afterwards what it was. Does not own what the session does in them
(`kvoffload/session/generate_calls.py`):

    generate                        timing, clean-up, the guard
    _prepare_cache_for_generation   is told the maximum length, the batch and the beams
    prepare_inputs_for_generation   where some models drop the cache they were given
    generate_batch and its like     continuous batching has a paged cache of its own
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Shadows:
    """Stand-ins on a model object.

    Args:
        model: the object.
        methods: by name; each is called as the original is, and has its signature.
    """

    def __init__(self, model: PreTrainedModel, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._model, self._names = model, tuple(methods)
        self._before = {name: vars(model)[name] for name in methods if name in vars(model)}
        self.originals: dict[str, Callable[..., Any]] = {name: getattr(model, name) for name in methods}
        vars(model).update({name: _as(self.originals[name], method) for name, method in methods.items()})

    def remove(self) -> None:
        """Leave the object as it was."""
        for name in self._names:
            vars(self._model).pop(name, None)
        vars(self._model).update(self._before)


def _as(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `method` and looks like `original` to who asks for its signature."""

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return stand_in
