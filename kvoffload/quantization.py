"""How many bits a quantised checkpoint keeps per weight, read from the `quantization_config` of its configuration.

Owns the methods that are known and their overheads (scales, zeros), and which matrices are left as they were. Does not
own the matrices (`matrices`). Only linear layers are quantised: embeddings, the head, norms and biases stay in the
model's dtype.

    bitsandbytes        load_in_4bit: 4 bits and a float32 per 64 weights (a byte if quantised twice);
                        load_in_8bit: 8 bits and a float32 per row
    gptq, awq           `bits`, and per group a scale of 16 bits and a zero of `bits`; gptq an index per input as well
    fp8, fbgemm_fp8     8 bits and a float32 per block or row
    compressed-tensors  `num_bits` of its first group, and a scale of 16 bits per group or row
    mxfp4               4 bits and a byte per 32 weights, of experts alone

What is left as it was is named under any of `_SKIPPING`. `re:` begins a pattern for full names, from their start; any
other name covers the module of that name and everything below it, wherever in the model it stands.

Source: the layouts of the tensors these methods write, as their loaders in transformers read them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.model_config import Get, model_type

Scope = Literal["linear layers", "experts", "nothing"]
Bits = Callable[[int, int], float]  # per weight of a matrix, from its inputs and outputs

SCALE_BITS, FLOAT_BITS = 16, 32
_SKIPPING = ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers", "ignore")
# Full names of the matrices are made of these, as model families write them.
_LAYERS = (
    *("model.layers", "model.decoder.layers", "model.language_model.layers", "language_model.model.layers"),
    *("transformer.h", "transformer.blocks", "gpt_neox.layers", "backbone.layers"),
)
_MLPS = ("mlp", "feed_forward", "block_sparse_moe")
_INSIDE = {  # a layer, by the part of a matrix or the beginning of its name
    "attention": ("self_attn", "attention", "attn", "self_attention"),
    "mlp": ("", *_MLPS),
    "expert_": tuple(f"{mlp}.experts{number}" for mlp in _MLPS for number in ("", ".0")),  # one stands for all
    "shared_": tuple(f"{mlp}.{name}" for mlp in _MLPS for name in ("shared_expert", "shared_experts", "shared_mlp")),
}
_CALLED = {  # by our name of a matrix
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj", "query_key_value", "c_attn", "Wqkv")),
    "o_proj": ("out_proj", "dense", "c_proj"),
    "gate_proj": ("gate_up_proj", "w1"),
    "up_proj": ("gate_up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h"),
    "down_proj": ("w2", "fc2", "c_proj", "dense_4h_to_h"),
    "router": ("gate",),
}
_MAX_LAYERS = 1024


class Quantization(NamedTuple):
    """What is quantised, and how."""

    method: str
    scope: Scope  # "nothing": the method is not known here, so that weights are counted in the model's dtype
    bits: Bits
    skipped: tuple[str, ...]  # names of modules that stay as they were

    def bits_of(self, name: str, part: str, inputs: int, outputs: int, layers: int, plain_bits: float) -> float:
        """Mean bits per weight of one matrix over its layers, of which some may be skipped."""
        is_quantized = part != "head" and (self.scope == "linear layers" or part == self.scope)
        if not is_quantized or not layers:
            return plain_bits
        left = min(layers, _skipped_layers(self.skipped, name, part, layers))
        return (left * plain_bits + (layers - left) * self.bits(inputs, outputs)) / layers


@functools.lru_cache(maxsize=256)
def _skipped_layers(skipped: tuple[str, ...], name: str, part: str, layers: int) -> int:
    """In how many layers a matrix stays as it was."""
    if not skipped:
        return 0
    plain = {_unescaped(one) for one in skipped}
    patterns = [_pattern(one) for one in skipped if not _is_plain(_unescaped(one))]
    # A matrix of some layers only may be in the last ones.
    numbers = (int(number) for one in plain if _is_plain(one) for number in re.findall(r"\d+", one))
    last = max((number for number in numbers if number < _MAX_LAYERS), default=0)

    def is_skipped(module: str) -> bool:
        return not plain.isdisjoint(_within(module)) or any(pattern.match(module) for pattern in patterns)

    return sum(any(map(is_skipped, _full_names(name, part, idx))) for idx in range(max(layers, last + 1)))


def _full_names(name: str, part: str, layer_idx: int) -> Iterator[str]:
    """What a matrix of one layer may be called in a model."""
    prefix = next((one for one in ("expert_", "shared_") if name.startswith(one) and name != "shared_expert_gate"), "")
    leaf = name.removeprefix(prefix)
    for layers in _LAYERS:
        for inside in _INSIDE.get(prefix or part, ("",)):
            for called in (leaf, *_CALLED.get(leaf, ())):
                yield ".".join(filter(None, (layers, str(layer_idx), inside, called)))


def _within(module: str) -> Iterator[str]:
    """The names of a module and of what it is in, and the ends of these: "a.b" gives "a", "a.b" and "b"."""
    parts = module.split(".")
    for first in range(len(parts)):
        for end in range(first + 1, len(parts) + 1):
            yield ".".join(parts[first:end])


def _unescaped(name: str) -> str:
    return name if name.startswith("re:") else name.removesuffix("$").replace("\\.", ".")


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.-]*", name) is not None


def _pattern(name: str) -> re.Pattern[str]:
    """Of full names: what follows "re:", else the name with whatever is above and below it."""
    given = name.removeprefix("re:")
    try:
        return re.compile(given if given != name else rf"(?:.*\.)?(?:{name})(?:\.|$)")
    except re.error as error:
        raise ConfigError(f"{name!r} in the quantization_config is no pattern ({error}): correct it") from error


def quantization_of(get: Get) -> Quantization | None:
    """That of a configuration, None where its weights are plain.

    Raises:
        ConfigError: a known method with a width or group that makes no sense.
    """
    data = get("quantization_config")
    if hasattr(data, "to_dict"):
        data = data.to_dict()
    if not isinstance(data, Mapping) or not data:
        return None
    method = str(getattr(data.get("quant_method"), "value", data.get("quant_method")) or "").lower()
    if not method and (data.get("load_in_4bit") or data.get("load_in_8bit")):
        method = "bitsandbytes"
    skipped = tuple(str(one) for key in _SKIPPING for one in _names(data.get(key)))
    scope: Scope = "experts" if method == "mxfp4" else "linear layers"
    bits = _bits(get, method, data)
    return Quantization(method or "unnamed", "nothing" if bits is None else scope, bits or (lambda *_: 0.0), skipped)


def _names(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _bits(get: Get, method: str, data: Mapping[str, Any]) -> Bits | None:
    """Bits per weight with everything that is stored beside it; None for a method that is not known."""
    if method.startswith("bitsandbytes"):
        if data.get("load_in_8bit"):
            return lambda inputs, outputs: 8 + FLOAT_BITS / inputs
        if not data.get("load_in_4bit"):
            return None
        # a scale per 64 weights: a float32, or a byte and a float32 for every 256 of these
        scale = 8 / 64 + FLOAT_BITS / (64 * 256) if data.get("bnb_4bit_use_double_quant") else FLOAT_BITS / 64
        return lambda inputs, outputs: 4 + scale
    if method in ("gptq", "awq"):
        width = _width(get, data, "bits", "w_bit", default=4)
        group = _group(get, data, "group_size", "q_group_size", default=128)
        per_output = FLOAT_BITS if method == "gptq" else 0  # the group of every input
        return lambda inputs, outputs: (
            width + (SCALE_BITS + width) / (inputs if group < 0 else group) + per_output / outputs
        )
    if method in ("fp8", "fbgemm_fp8"):
        block = [one for one in _names(data.get("weight_block_size")) if isinstance(one, int) and one > 0]
        return lambda inputs, outputs: 8 + FLOAT_BITS / (block[0] * block[1] if len(block) == 2 else inputs)
    if method == "compressed-tensors":
        groups = data.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        if not isinstance(weights, Mapping):
            return None
        width = _width(get, weights, "num_bits", default=8)
        group = _group(get, weights, "group_size", default=-1)
        return lambda inputs, outputs: width + SCALE_BITS / (inputs if group < 0 else group)
    return (lambda inputs, outputs: 4 + 8 / 32) if method == "mxfp4" else None


def _width(get: Get, data: Mapping[str, Any], *names: str, default: int) -> int:
    return _number(get, data, names, default, range(1, 65))


def _group(get: Get, data: Mapping[str, Any], *names: str, default: int) -> int:
    """Weights that share a scale; -1 is one group per row."""
    return _number(get, data, names, default, range(-1, 2**20))


def _number(get: Get, data: Mapping[str, Any], names: tuple[str, ...], default: int, allowed: range) -> int:
    value = next((data[name] for name in names if data.get(name) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed or value == 0:
        raise ConfigError(f"{names[0]} in the quantization_config of {model_type(get)} is {value!r}: correct it")
    return value
