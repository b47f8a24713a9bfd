"""The weights of a built model: every parameter that activations are multiplied with, whatever holds it.

Owns what a parameter of two dimensions or more is. Does not own what it is used for (`decoder`) nor the bits it is
stored in (`quantization`).

A matrix is the weight of a linear layer, or a parameter of two dimensions that a module multiplies with itself (many
routers), or of three (experts side by side; some families put them below one another in two).
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from kvoffload.model.matrix import Weight

_NUM_EXPERTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
_DOWN = re.compile(r"down|w2|output|fc2|c_proj|wo$")


def weights_of(model: Any) -> list[Weight]:
    """Every parameter of two dimensions or more, tied ones once; those of towers as well."""
    text = model.config.get_text_config(decoder=True)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    head = model.get_output_embeddings()
    found, seen = [], set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found.append(_weight(path, module, name, tuple(parameter.shape), hidden, module is head))
    return found


def _weight(path: str, module: nn.Module, name: str, shape: tuple[int, ...], hidden: int, is_head: bool) -> Weight:
    """What one parameter is."""
    has_bias = getattr(module, "bias" if name == "weight" else f"{name}_bias", None) is not None
    if isinstance(module, nn.Embedding):
        return Weight(path, name, "embedding", shape[1], shape[0])
    if isinstance(module, nn.Linear):
        return Weight(path, name, "head" if is_head else "linear", shape[1], shape[0], has_bias=has_bias)
    if type(module).__name__ == "Conv1D":  # of transformers: a linear layer whose weight lies the other way around
        return Weight(path, name, "linear", shape[0], shape[1], has_bias=has_bias)
    is_expert = "expert" in f"{path} {type(module).__name__}".lower()
    if len(shape) == 3 and is_expert and shape[0] > 1:
        inputs, outputs = _oriented(name if name != "weight" else path.rpartition(".")[2], shape[1:], hidden)
        return Weight(path, name, "experts", inputs, outputs, shape[0], has_bias)
    if len(shape) == 2:
        copies = _num_experts(module) if is_expert else 1
        if copies > 1 and shape[0] % copies == 0 and shape[0] > copies:
            inputs, outputs = _oriented(name, (shape[0] // copies, shape[1]), hidden)
            return Weight(path, name, "experts", inputs, outputs, copies, has_bias)
        if name == "weight":
            return Weight(path, name, "matrix", shape[1], shape[0], has_bias=has_bias)
    return Weight(path, name, "other", 1, math.prod(shape))


def _oriented(name: str, shape: tuple[int, ...], hidden: int) -> tuple[int, int]:
    """Inputs and outputs of an expert's matrix, which families lay either way around."""
    first, second = shape
    if hidden in shape:
        other = second if first == hidden else first
        return (other, hidden) if _DOWN.search(name) else (hidden, other)
    return second, first


def _num_experts(module: nn.Module) -> int:
    values = (getattr(module, name, None) for name in _NUM_EXPERTS)
    return next((one for one in values if isinstance(one, int) and one > 0), 1)
