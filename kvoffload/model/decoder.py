"""What a token meets in the decoder of a built model: its weight matrices part by part, its MLPs and its norms.

Owns to which part of a layer a matrix belongs, told by the innermost module around it that calls itself attention, MLP
and so on, and the grouping of what is alike in all layers. Does not own the parameters (`weights`) nor the bits they
are stored in (`quantization`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from kvoffload.model.facts import Layer
from kvoffload.model.matrix import Group, Matrix, Part, Weight
from kvoffload.model.self_attention import decoder_of

_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_selected_experts")
_PARTS: tuple[tuple[Part, re.Pattern[str]], ...] = (  # asked of classes from the inside out, then of names
    ("mlp", re.compile(r"mlp|feed_?forward|ffn|moe|expert|router|topk")),
    ("mixer", re.compile(r"mamba|mixer|linear_?att|delta_?net|short_?conv|ssm|recurrent|rwkv|lightning")),
    ("attention", re.compile(r"att")),
)
_FUSED = re.compile(r"qkv|query_key_value|c_attn|att_proj")
_KEYS_OR_VALUES = re.compile(r"(^|_)(k|v|kv|key|value|keys|values)(_|$)")


class Mlp(NamedTuple):
    """The MLP that one token goes through, in the layer where it is widest."""

    active_width: int
    matrices: int  # 3 where it is gated


@dataclass(frozen=True, slots=True)
class Decoder:
    """The decoder of a model of transformers, and where it is in it.

    Args:
        model: the whole model.
        text_config: of the decoder.
        layers: what each of its layers caches.
    """

    model: Any
    text_config: Any
    layers: Sequence[Layer]

    def groups(self, weights: Sequence[Weight]) -> list[Group]:
        """Its matrices without the head; bits are left at their default.

        Args:
            weights: of the model.
        """
        modules = dict(self.model.named_modules())
        root = self._root(modules)
        alike: dict[Any, list[Weight]] = {}
        for one in weights:
            if one.kind in ("linear", "experts", "matrix") and (not root or one.module.startswith(f"{root}.")):
                pattern = ".".join(part for part in one.module.split(".") if not part.isdigit())
                key = (pattern, one.name, one.inputs, one.outputs, one.copies, one.has_bias)
                alike.setdefault(key, []).append(one)
        groups = [Group(self._matrix(modules, root, found), tuple(found)) for found in alike.values()]
        return _named_apart(groups)

    def mlp(self, groups: Sequence[Group]) -> Mlp:
        """Its MLP, dense, shared and active experts together."""
        hidden = int(getattr(self.text_config, "hidden_size", 0) or 0)
        blocks: dict[tuple[str, str], list[Matrix]] = {}  # by the layer, and the module they are in
        for matrix, weights in groups:
            if matrix.part in ("mlp", "experts"):
                for one in {(_layer_part(one.module), _around(one)): one for one in weights}.values():
                    blocks.setdefault((_layer_part(one.module), _around(one)), []).append(matrix)
        widths: dict[str, int] = {}
        widest, matrices = 0, 2
        known = {layer for (layer, _), members in blocks.items() if _down_and_ups(members, hidden)}
        for (layer, _), members in list(blocks.items()):  # parts of an MLP that are modules of their own
            if layer not in known:
                blocks.setdefault((layer, ""), []).extend(members)
        for (layer, _), members in blocks.items():
            both = _down_and_ups(members, hidden)
            if both is None:
                continue
            down, ups = both
            width = down.inputs * down.active
            widths[layer] = widths.get(layer, 0) + width
            if width > widest:
                widest, matrices = width, 1 + sum(one.outputs for one in ups) // down.inputs
        return Mlp(max(widths.values(), default=0), min(3, matrices))

    def norms_per_layer(self) -> int:
        """Norms as wide as the hidden state, of a layer on average."""
        lists = [module for module in decoder_of(self.model).modules() if isinstance(module, nn.ModuleList)]
        layers = next((list(one) for one in lists if len(one) == len(self.layers)), [])
        count = sum("norm" in type(child).__name__.lower() for layer in layers for child in layer.children())
        return round(count / max(1, len(layers)))

    def _root(self, modules: dict[str, nn.Module]) -> str:
        """The full name of the decoder; "" where that is the model itself."""
        decoder = decoder_of(self.model)
        return next((path for path, module in modules.items() if module is decoder), "")

    def _matrix(self, modules: dict[str, nn.Module], root: str, found: Sequence[Weight]) -> Matrix:
        first = found[0]
        inside = first.module.removeprefix(root).strip(".").split(".")
        numbers = [idx for idx, part in enumerate(inside) if part.isdigit()]
        layer = None
        if numbers and int(inside[numbers[0]]) < len(self.layers):
            layer = self.layers[int(inside[numbers[0]])]
        depth = numbers[0] + 1 if numbers else 0
        part = _part(modules, first, root, inside, depth, layer)
        num_layers = len({_layer_part(one.module.removeprefix(root)) for one in found})
        copies, uses = first.copies, len(found)
        if len(numbers) > 1 and "expert" in first.module and uses % num_layers == 0:
            copies = uses // num_layers  # each expert a module
        if copies > 1:
            part, uses = "experts", num_layers
        matrix = Matrix(
            name=_name(inside[depth:], first.name),
            part=part,
            inputs=first.inputs,
            outputs=first.outputs,
            layers=uses,
            stored=copies,
            active=min(copies, self._num_active()) if copies > 1 else 1,
            bias=first.has_bias,
        )
        return _with_cache(matrix, first, layer) if part == "attention" else matrix

    def _num_active(self) -> int:
        """Through how many experts a token goes; of several numbers, one per layer, the largest."""
        holders = [self.text_config, *(one for one in vars(self.text_config).values() if hasattr(one, "to_dict"))]
        for value in (getattr(holder, name, None) for holder in holders for name in _ACTIVE):
            if isinstance(value, (list, tuple)) and value:
                value = max(value)
            if isinstance(value, int) and value > 0:
                return value
        return 1


def _down_and_ups(members: Sequence[Matrix], hidden: int) -> tuple[Matrix, list[Matrix]] | None:
    """The last matrix of an MLP and those before its activation; None where these are none."""
    for down in reversed(members):
        ups = [one for one in members if one is not down and one.outputs in (down.inputs, 2 * down.inputs)]
        if down.outputs == hidden and ups:
            return down, ups
    return None


def _layer_part(module: str) -> str:
    """The number of the layer that a module is in, as text."""
    return next((part for part in module.split(".") if part.isdigit()), "")


def _around(one: Weight) -> str:
    """The module that a matrix is used in: of a linear layer what it stands in."""
    return one.module if one.kind == "experts" and one.name != "weight" else one.module.rpartition(".")[0]


def _part(
    modules: dict[str, nn.Module], one: Weight, root: str, inside: Sequence[str], depth: int, layer: Layer | None
) -> Part:
    """What the matrix is a part of."""
    around = [".".join(filter(None, [root, *inside[:end]])) for end in range(len(inside), depth, -1)]
    if one.kind == "linear":
        around = around[1:]  # its own class says nothing
    for path in around:
        # The last word of a class is what it is: an "Ernie4_5_MoeAttention" is attention.
        for text in (type(modules[path]).__name__.lower(), path.rpartition(".")[2]):
            said = [(match.start(), part) for part, pattern in _PARTS for match in pattern.finditer(text)]
            if said:
                part = max(said)[1]
                is_state = part == "attention" and layer is not None and layer.cache.kind == "state"
                return "mixer" if is_state else part
    return "mlp"


def _with_cache(matrix: Matrix, one: Weight, layer: Layer | None) -> Matrix:
    """Which of its outputs go to the cache."""
    if layer is None or layer.kv is None or layer.cache.kind not in ("grows", "window"):
        return matrix
    leaf, kv = one.module.rpartition(".")[2].lower(), layer.kv
    if _FUSED.search(leaf):
        return matrix._replace(cached=min(kv.values, matrix.outputs))
    if not _KEYS_OR_VALUES.search(leaf):
        return matrix
    if matrix.inputs == kv.key_dim and kv.num_heads == 1:
        return matrix._replace(expands=True)
    return matrix._replace(cached=min(kv.values, matrix.outputs))


def _name(inside: Sequence[str], parameter: str) -> str:
    """What stands last in its path, for experts with what they are in."""
    parts = [part for part in inside if not part.isdigit()] + ([] if parameter == "weight" else [parameter])
    needs_two = len(parts) > 1 and ("expert" in parts[-2] or parts[-1] == "layer")
    return ".".join(parts[-2 if needs_two else -1 :])


def _named_apart(groups: Sequence[Group]) -> list[Group]:
    """Matrices of one name get their sizes into it, and numbers where these are the same."""
    names = [one.matrix.name for one in groups]
    sized = [
        f"{matrix.name} {matrix.inputs}x{matrix.outputs}" if names.count(matrix.name) > 1 else matrix.name
        for matrix, _ in groups
    ]
    numbered = [
        f"{name} ({sized[:idx].count(name) + 1})" if name in sized[:idx] else name for idx, name in enumerate(sized)
    ]
    return [one._replace(matrix=one.matrix._replace(name=name)) for one, name in zip(groups, numbered, strict=True)]
