"""A decoder's layers as modules, and whose tensors are whose.

Owns the search for them, and which parameters and buffers belong to one layer alone. Does not own what is done with
these (`hf/streamed_layers.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kvoffload.model.self_attention import decoder_of

_KEYS_AND_VALUES = re.compile(r"(^|[._])(k|v|kv|qkv|key|value|query_key_value|c_attn|att_proj)(_|\.|$)")


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of the decoder, in order: the list as long as the configuration says, with the most parameters."""
    number = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = [one for one in decoder_of(model).modules() if isinstance(one, nn.ModuleList) and len(one) == number]
    largest = max(lists, key=lambda one: sum(tensor.numel() for tensor in one.parameters()), default=None)
    return [] if largest is None else list(largest)


def own_tensors(model: Any, layers: list[nn.Module]) -> list[list[torch.Tensor]]:
    """Of each layer its parameters and buffers, those that keys and values are made with first.

    What another layer or another part of the model has as well is left out: it is read there, too. So are tensors that
    lie in the same memory, each of which would get memory of its own.
    """
    named = [{id(tensor): (name, tensor) for name, tensor in _tensors(layer)} for layer in layers]
    lying = Counter(map(_place, (*model.parameters(), *model.buffers())))
    uses = Counter(number for one in named for number in one)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            uses.update(id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()))
    found = []
    for one in named:
        mine = [(name, tensor) for number, (name, tensor) in one.items() if uses[number] == 1 == lying[_place(tensor)]]
        found.append([tensor for _, tensor in sorted(mine, key=lambda item: not _KEYS_AND_VALUES.search(item[0]))])
    return found


def _place(tensor: torch.Tensor) -> tuple[str, int]:
    """Where a tensor begins in memory; of one that has none of its own, which it is."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter)
    address = tensor.data_ptr() if is_plain else 0
    return ("memory", address) if address else ("object", id(tensor))


def _tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()
