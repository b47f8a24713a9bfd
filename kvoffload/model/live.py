"""The shape of a model that is loaded, without running it.

Owns the twin: a model of the same class and configuration on the meta device, which has no memory and no hooks of a
user, looked at in place of the model. Where there is none, the model's own projections are read. Does not own what is
looked at (`learn`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import warnings
from typing import Any

from kvoffload.errors import UnsupportedModelError
from kvoffload.machine.dtypes import ITEMSIZE_BYTES
from kvoffload.model.facts import Facts
from kvoffload.model.fields import dtype_name, dtype_of, itemsize_bytes, reader
from kvoffload.model.guess import guessed
from kvoffload.model.kv_widths import projected_widths
from kvoffload.model.learn import facts_of_model, without_memory
from kvoffload.model.shape import ModelShape, shape_of

logger = logging.getLogger(__name__)


def shape_of_model(model: Any) -> ModelShape:
    """Layers and widths of its class, bytes of its own parameters as they are.

    Raises:
        UnsupportedModelError: it is an encoder-decoder.
    """
    if getattr(_unwrapped(model).config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models are planned"
        )
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    shape = shape_of(facts_of_live(model))
    shape = shape.with_layer_bytes(weight_bytes / max(1, shape.weight_bytes))
    return dataclasses.replace(shape, weight_bytes=weight_bytes)


def facts_of_live(model: Any) -> Facts:
    """The facts of a model's class and configuration, in the model's dtype; its weights count as not quantised."""
    inner = _unwrapped(model)
    name = dtype_name(inner.dtype)
    name = name if name in ITEMSIZE_BYTES else dtype_name(dtype_of(reader(inner.config.to_dict())))
    itemsize = itemsize_bytes(name)
    if type(inner).__module__.startswith("transformers."):  # another's class might do anything when it is made
        try:
            return _of_twin(_Key(type(inner), inner.config)).in_dtype(itemsize, name)
        except Exception as error:  # whatever a class makes of a configuration that was changed since
            logger.debug("no twin of %s without memory: %r", type(inner).__name__, error)
    try:
        return facts_of_model(inner, itemsize=itemsize, widths=projected_widths).in_dtype(itemsize, name)
    except Exception as error:  # a model of a kind that is not laid out like those of transformers
        logger.debug("the modules of %s say too little: %r", type(inner).__name__, error)
        doubt = f"{type(inner).__name__} says its sizes only by the keys of its configuration"
        return guessed(inner.config.to_dict(), doubt).in_dtype(itemsize, name)


class _Key:
    """A class and a configuration, the same if they say the same."""

    def __init__(self, cls: Any, config: Any) -> None:
        self.cls, self.config = cls, config
        self._said = (cls, config.to_json_string())

    def __hash__(self) -> int:
        return hash(self._said)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._said == other._said


@functools.lru_cache(maxsize=128)
def _of_twin(key: _Key) -> Facts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were told when the model itself was made
        twin = without_memory(key.cls, copy.deepcopy(key.config))
        return facts_of_model(twin, itemsize=2)


def _unwrapped(model: Any) -> Any:
    """The model inside of compiled and adapter wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
