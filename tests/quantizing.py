"""K and V stored with loss, in plain torch: what forms of fewer bits mean, and a cache of transformers that has them.

Not a test module. Written for one key or value at a time where the product works on blocks, in another layout and with
other operations, but rounds where it rounds: in float32, scales and least values in float16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from modes import given, plain_cache
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

LEVELS = {"int4": 15, "int2": 3}
GROUP = 32


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Vectors [..., n] rotated in blocks of powers of two, the largest first; its own inverse."""
    columns, start, size = list(x.float().unbind(-1)), 0, 1
    while size * 2 <= len(columns):
        size *= 2
    while start < len(columns):
        while start + size > len(columns):
            size //= 2
        half = 1
        while half < size:
            for idx in range(start, start + size):
                if not (idx - start) & half:
                    a, b = columns[idx], columns[idx + half]
                    columns[idx], columns[idx + half] = a + b, a - b
            half *= 2
        for idx in range(start, start + size):
            columns[idx] = columns[idx] * size**-0.5
        start += size
    return torch.stack(columns, -1)


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """Vectors [..., n] through 8 bits."""
    scale = int8_scale(x)
    return torch.where(scale > 0, torch.clamp(torch.round(x / scale), -127, 127), 0.0).nan_to_num() * scale


def int8_scale(x: torch.Tensor) -> torch.Tensor:
    return (x.abs().amax(-1, keepdim=True) / 127).half().float()


def group_scale(group: torch.Tensor, levels: int) -> torch.Tensor:
    return ((group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)) / levels).half().float()


def in_groups(x: torch.Tensor, levels: int) -> torch.Tensor:
    """Vectors [..., n] through codes of groups of neighbours."""
    found = []
    for group in x.split(GROUP, -1):
        scale, least = group_scale(group, levels), group.amin(-1, keepdim=True).half().float()
        steps = (group - least) / torch.where(scale > 0, scale, torch.ones_like(scale))
        found.append(torch.clamp(torch.round(steps), 0, levels) * scale + least)
    return torch.cat(found, -1)


def keys_through(form: str, keys: torch.Tensor) -> torch.Tensor:
    """Keys of a block, [rows, heads, tokens, head_dim], as attention sees them."""
    if form == "int2":  # each channel over tokens
        return in_groups(keys.float().transpose(-1, -2), LEVELS[form]).transpose(-1, -2)
    rotated = hadamard(keys)
    mean = rotated.double().mean(-2, keepdim=True).half().float()
    centred = rotated - mean
    if form == "int8":
        is_less = int8_scale(centred) < int8_scale(rotated)
        return hadamard(torch.where(is_less, to_int8(centred) + mean, to_int8(rotated)))
    found = []
    for own, less, middle in zip(
        rotated.split(GROUP, -1), centred.split(GROUP, -1), mean.split(GROUP, -1), strict=True
    ):
        is_less = group_scale(less, LEVELS[form]) < group_scale(own, LEVELS[form])
        found.append(torch.where(is_less, in_groups(less, LEVELS[form]) + middle, in_groups(own, LEVELS[form])))
    return hadamard(torch.cat(found, -1))


def values_through(form: str, values: torch.Tensor) -> torch.Tensor:
    """Values of a block, likewise."""
    return to_int8(values.float()) if form == "int8" else in_groups(values.float(), LEVELS[form])


class QuantizingLayer(DynamicLayer):
    """A layer of a plain cache whose full blocks went through a form; the newest tokens are exact."""

    form_of: Callable[[int], str]  # of a block; "kv" and "activation" change nothing
    block_tokens: int
    num_blocks = 0  # that have been through it

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_initialized:
            self._quantize()
        return super().update(key_states, value_states, *args, **kwargs)

    def _quantize(self) -> None:
        full = self.keys.shape[-2] // self.block_tokens
        self.num_blocks = min(self.num_blocks, full)
        for block in range(self.num_blocks, full):
            part, form = slice(block * self.block_tokens, (block + 1) * self.block_tokens), self.form_of(block)
            if form not in ("kv", "activation"):
                self.keys[:, :, part] = keys_through(form, self.keys[:, :, part])
                self.values[:, :, part] = values_through(form, self.values[:, :, part])
        self.num_blocks = full

    def crop(self, max_length: int) -> None:
        super().crop(max_length)
        if self.is_initialized:
            self.num_blocks = min(self.num_blocks, self.keys.shape[-2] // self.block_tokens)


def quantizing_cache(model: PreTrainedModel, form_of: Callable[[int, int], str], block_tokens: int) -> Any:
    """A plain cache whose layers of unbounded length store their blocks in forms, by layer (among these) and block."""
    cache = plain_cache(model)
    growing = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    for idx, layer in enumerate(growing):
        layer.__class__ = QuantizingLayer
        layer.form_of, layer.block_tokens = functools.partial(form_of, idx), block_tokens
    return cache


def generating_with(model: PreTrainedModel, new_cache: Callable[[], Any]) -> Callable[..., Any]:
    """The model's `generate`, with such a cache where the caller gives none."""
    original = model.generate
    name = next(iter(given(None)))

    def generate(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **({} if kwargs.get(name) is not None else given(new_cache())), **kwargs)

    return generate
