"""What each method of quantisation stores per weight, by the settings in a `quantization_config`.

Owns the methods that are known and their overheads (scales, zeros). Does not own which weights they are applied to
(`quantization`).

    bitsandbytes        load_in_4bit: 4 bits and a float32 per 64 weights (a byte if quantised twice);
                        load_in_8bit: 8 bits and a float32 per row; linear layers alone, no experts
    gptq, awq           `bits`, and per group a scale of 16 bits and a zero of `bits`; gptq an index per input as well
    auto-round          the same without an index, with other bits for some modules; blocks of layers alone
    hqq                 `nbits`, and per group a scale and a zero of 16 bits each; linear layers alone
    torchao             the bits in the name of its type, and a scale per group or row; linear layers alone
    fp8, fbgemm_fp8     8 bits and a float32 (or a byte) per block, else per row
    compressed-tensors, modelopt
                        `num_bits` of the group that a module is in, and a scale per group of weights, block or row;
                        modelopt without groups by the name of its algorithm
    mxfp4               4 bits and a byte per 32 weights, of experts alone

Source: the quantizers of transformers, and the layouts of the tensors these methods write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.model.matrix import Weight
from kvoffload.model.module_names import ModuleNames

Bits = Callable[[Weight], float | None]  # per weight with what is stored beside it; None: left as it was
Names = Callable[[Weight], Sequence[str]]  # everything the module of a weight is called

SCALE_BITS, FLOAT_BITS = 16, 32
_MODELOPT = {  # bits, and those of a scale, per how many weights
    "NVFP4": (4, 8, 16),
    "W4A8_NVFP4_FP8": (4, 8, 16),
    "W4A16_AWQ": (4, 16, 128),
    "INT4_AWQ": (4, 16, 128),
    "W4A8_AWQ": (4, 16, 128),
    "FP8": (8, 0, 1),  # one for the whole matrix
    "FP8_PB_WO": (8, 32, 128 * 128),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, 32, 0),  # 0: one per row
    "INT8_SQ": (8, 32, 0),
    "W8A8_SQ_PER_CHANNEL": (8, 32, 0),
    "MXFP8": (8, 8, 32),
    "MXFP4": (4, 8, 32),
}


class Reader(NamedTuple):
    """One quantization_config."""

    data: Mapping[str, Any]
    model_type: str
    names: Names

    def width(self, data: Mapping[str, Any], *names: str, default: int) -> int:
        """Bits per weight."""
        return self._number(data, names, default, range(1, 65))

    def group(self, data: Mapping[str, Any], *names: str, default: int) -> int:
        """Weights that share a scale; -1 is one group per row."""
        return self._number(data, names, default, range(-1, 2**20))

    def _number(self, data: Mapping[str, Any], names: tuple[str, ...], default: int, allowed: range) -> int:
        value = next((data[name] for name in names if data.get(name) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed or value == 0:
            raise ConfigError(f"{names[0]} in the quantization_config of {self.model_type} is {value!r}: correct it")
        return value


def _bitsandbytes(read: Reader) -> Bits | None:
    if read.data.get("load_in_8bit"):
        return lambda one: 8 + FLOAT_BITS / one.inputs
    if not read.data.get("load_in_4bit"):
        return None
    # a scale per 64 weights: a float32, or a byte and a float32 for every 256 of these
    scale = 8 / 64 + FLOAT_BITS / (64 * 256) if read.data.get("bnb_4bit_use_double_quant") else FLOAT_BITS / 64
    return lambda one: 4 + scale


def _packed(read: Reader, data: Mapping[str, Any], *, per_input_bits: int = 0) -> Bits:
    """Integers with a scale of 16 bits and a zero per group."""
    width = read.width(data, "bits", "w_bit", default=4)
    group = read.group(data, "group_size", "q_group_size", default=128)
    return lambda one: (
        width + (SCALE_BITS + width) / (one.inputs if group < 0 else group) + per_input_bits / one.outputs
    )


def _gptq(read: Reader) -> Bits:
    packed = _packed(read, read.data, per_input_bits=FLOAT_BITS)  # the group of every input
    rules = as_dict(read.data.get("dynamic"))  # of gptqmodel: what a minus begins stays as it was
    left = ModuleNames(f"re:{rule[2:]}" for rule in rules if rule.startswith("-:"))
    return lambda one: None if left.cover(read.names(one)) else packed(one)


def _auto_round(read: Reader) -> Bits:
    packed = _packed(read, read.data)
    blocks = read.data.get("block_name_to_quantize") or read.data.get("to_quant_block_names") or ()
    named = blocks.split(",") if isinstance(blocks, str) else [str(one) for one in _flat(blocks)]
    inside = ModuleNames(one.strip() for one in named)
    others = [
        (ModuleNames([str(name)]), _packed(read, {**read.data, **said}), read.width(said, "bits", default=16))
        for name, said in as_dict(read.data.get("extra_config")).items()
        if isinstance(said, Mapping)
    ]

    def bits(one: Weight) -> float | None:
        names = read.names(one)
        for covered, different, width in others:
            if covered.cover(names):
                return None if width >= 16 else different(one)
        return packed(one) if not named or inside.cover(names) else None

    return bits


def _hqq(read: Reader) -> Bits:
    said = as_dict(read.data.get("quant_config")) or read.data

    def of(settings: Any) -> Bits:
        settings = as_dict(settings)
        settings = as_dict(settings.get("weight_quant_params")) or settings
        width = read.width(settings, "nbits", default=4)
        group = read.group(settings, "group_size", default=64)
        packed = 3.2 if width == 3 else width  # ten of three bits in a word of 32
        return lambda one: packed + 2 * SCALE_BITS / (one.inputs if group < 0 else group)  # scale and zero

    if "weight_quant_params" in said or "nbits" in said or said is read.data:
        return of(said)
    by_module = [(ModuleNames([str(name)]), of(settings)) for name, settings in said.items()]

    def bits(one: Weight) -> float | None:
        tag = ".".join(part for part in one.module.split(".") if not part.isdigit())
        return next((found(one) for names, found in by_module if names.cover([tag, one.module])), None)

    return bits


def _torchao(read: Reader) -> Bits | None:
    said = read.data.get("quant_type")
    said = said.get("default", said) if isinstance(said, Mapping) else said
    kind = str(said.get("_type", "") if isinstance(said, Mapping) else said or "")
    settings = as_dict(said.get("_data")) if isinstance(said, Mapping) else as_dict(read.data.get("quant_type_kwargs"))
    by_module = as_dict(settings.get("fqn_to_config")) or as_dict(settings.get("module_fqn_to_config"))
    if by_module:
        found = [(name, _torchao(read._replace(data={"quant_type": one}))) for name, one in by_module.items() if one]
        rest = dict(found).get("_default")
        rules = [(ModuleNames([name]), bits) for name, bits in found if name != "_default"]
        left = ModuleNames(name for name, one in by_module.items() if not one)

        def bits_of(one: Weight) -> float | None:
            names = read.names(one)
            if left.cover(names):
                return None
            rule = next((bits for covered, bits in rules if covered.cover(names)), rest)
            return None if rule is None else rule(one)

        return bits_of
    number = re.search(r"(\d+)_?weight", kind, re.IGNORECASE)
    if number is None:
        return None
    width = int(number[1])
    default = 128 if "int4" in kind.lower() else -1
    group = read.group(settings, "group_size", default=default)
    # four bits have a scale and a zero of 16 bits per group, eight one scale
    beside = 2 * SCALE_BITS if width < 8 else FLOAT_BITS if "float8" in kind.lower() else SCALE_BITS
    return lambda one: width + beside / (one.inputs if group < 0 else group)


def _fp8(read: Reader) -> Bits:
    said = read.data.get("weight_block_size", (128, 128))
    block = [one for one in as_list(said) if isinstance(one, int) and one > 0]
    scale = 8 if read.data.get("scale_fmt") == "ue8m0" else FLOAT_BITS

    def bits(one: Weight) -> float:
        if one.kind == "experts" and read.data.get("expert_dtype") == "fp4":
            return 4 + 8 / 32
        return 8 + scale / (block[0] * block[1] if len(block) == 2 else one.inputs * one.outputs)

    return bits


def _compressed(read: Reader) -> Bits | None:
    groups = read.data.get("config_groups")
    rules: list[tuple[ModuleNames | None, Bits]] = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = as_dict(group).get("weights")
        if not isinstance(weights, Mapping):
            continue
        targets = [str(one) for one in as_list(as_dict(group).get("targets"))]
        names = None if not targets or "Linear" in targets else ModuleNames(targets)
        rules.append((names, _scaled(read, weights)))
    if not rules:
        return None

    def bits(one: Weight) -> float | None:
        return next((found(one) for names, found in rules if names is None or names.cover(read.names(one))), None)

    return bits


def _scaled(read: Reader, weights: Mapping[str, Any]) -> Bits:
    width = read.width(weights, "num_bits", default=8)
    group = read.group(weights, "group_size", default=-1)
    # scales of four-bit floats are bytes themselves
    scale = 8 if weights.get("type") == "float" and width == 4 else SCALE_BITS
    zero = width if weights.get("symmetric") is False else 0
    block = [one for one in as_list(weights.get("block_structure")) if isinstance(one, int) and one > 0]
    if weights.get("strategy") == "tensor":
        return lambda one: float(width)
    if weights.get("strategy") == "block" and len(block) == 2:
        return lambda one: width + scale / (block[0] * block[1])
    return lambda one: width + (scale + zero) / (one.inputs if group < 0 else group)


def _modelopt(read: Reader) -> Bits | None:
    if read.data.get("config_groups"):
        return _compressed(read)
    layers = as_dict(read.data.get("quantized_layers"))
    if layers:  # each module by itself
        rules = [
            (ModuleNames([str(name)], are_globs=True), _algorithm(as_dict(said), as_dict(said).get("quant_algo")))
            for name, said in layers.items()
        ]

        def bits(one: Weight) -> float | None:
            names = read.names(one)
            rule = next((found for covered, found in rules if covered.cover(names)), None)
            return None if rule is None else rule(one)

        return bits
    return _algorithm(read.data, read.data.get("quant_algo"))


def _algorithm(data: Mapping[str, Any], name: Any) -> Bits | None:
    found = _MODELOPT.get(str(name).upper())
    if found is None:
        return None
    width, scale, per = found
    said = data.get("group_size")
    if per > 1 and isinstance(said, int) and said > 0 and name != "FP8_PB_WO":
        per = said
    return lambda one: width + scale / (per or one.inputs)


METHODS: dict[str, Callable[[Reader], Bits | None]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": lambda read: _packed(read, read.data),
    "auto-round": _auto_round,
    "hqq": _hqq,
    "torchao": _torchao,
    "fp8": _fp8,
    "fbgemm_fp8": lambda read: lambda one: 8 + FLOAT_BITS / one.inputs,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "mxfp4": lambda read: lambda one: 4 + 8 / 32,
}


def as_list(value: Any) -> Sequence[Any]:
    """A list, empty where it is none."""
    return value if isinstance(value, (list, tuple)) else ()


def as_dict(value: Any) -> Mapping[str, Any]:
    """A mapping, empty where it is none."""
    return value if isinstance(value, Mapping) else {}


def _flat(value: Any) -> Iterable[Any]:
    for one in as_list(value):
        yield from _flat(one) if isinstance(one, (list, tuple)) else (one,)
