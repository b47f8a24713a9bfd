"""How many bits a quantised checkpoint keeps per weight, read from the `quantization_config` of its configuration.

Owns the methods that are known, their overheads (scales, zeros), and which weights each leaves as they were. Does not
own the weights (`weights`, `guess`) nor the matching of their names (`module_names`).

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

Embeddings, norms and biases stay as they were; the head does unless a method says otherwise. Which names are left out
is said under any of `_SKIPPING`.

Source: the quantizers of transformers, and the layouts of the tensors these methods write.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.model.facts import QuantizedWeights
from kvoffload.model.matrix import Group, Kind, Matrix, Weight
from kvoffload.model.module_names import ModuleNames

Bits = Callable[[Weight], float | None]  # per weight with what is stored beside it; None: left as it was
Names = Callable[[Weight], Sequence[str]]  # everything the module of a weight is called

SCALE_BITS, FLOAT_BITS = 16, 32
_SKIPPING = (
    *("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules", "ignored_layers", "ignore"),
    *("exclude_modules", "linear_weights_not_to_quantize"),
)
_LINEAR: tuple[Kind, ...] = ("linear",)
_LINEAR_AND_EXPERTS: tuple[Kind, ...] = ("linear", "experts")  # each expert is a linear layer in the files
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


class Quantization(NamedTuple):
    """What is quantised, and how."""

    method: str
    bits: Bits | None  # None: the method is not known here, so that weights count as not quantised
    kinds: Collection[Kind] = _LINEAR_AND_EXPERTS
    skipped: ModuleNames = ModuleNames(())

    def bits_of(self, weight: Weight, names: Sequence[str]) -> float | None:
        """Bits of one weight as it is stored, scales included; None where it is left as it was.

        Args:
            weight: one parameter.
            names: everything its module is called.
        """
        if self.bits is None or weight.kind not in self.kinds or self.skipped.cover(names):
            return None
        return self.bits(weight)


def quantization_of(data: Any, model_type: str, names: Names) -> Quantization | None:
    """That of a `quantization_config`, None where there is none.

    Args:
        data: the value, a mapping or an object that makes one.
        model_type: for messages.
        names: everything that the module of a weight is called.

    Raises:
        ConfigError: a known method with a width or group that makes no sense.
    """
    if hasattr(data, "to_dict"):
        data = data.to_dict()
    if not isinstance(data, Mapping) or not data:
        return None
    method = str(getattr(data.get("quant_method"), "value", data.get("quant_method")) or "").lower()
    if not method and (data.get("load_in_4bit") or data.get("load_in_8bit")):
        method = "bitsandbytes"
    if "auto-round" in method:
        method = "auto-round"
    if isinstance(data.get("quantization"), Mapping):  # modelopt's own file has its settings one level below
        data = {**data, **data["quantization"]}
    listed = [data[key] for key in _SKIPPING if isinstance(data.get(key), (list, tuple))]
    skipped = ModuleNames((str(one) for some in listed for one in some), are_globs=method == "modelopt")
    maker = _METHODS.get("bitsandbytes" if method.startswith("bitsandbytes") else method)
    if data.get("dequantize") and method in ("fp8", "mxfp4"):  # they are made plain again as they are loaded
        return None
    bits = None if maker is None else maker(_Reader(data, model_type, names))
    return Quantization(method or "unnamed", bits, _kinds(method, data, has_list=bool(listed)), skipped)


def _kinds(method: str, data: Mapping[str, Any], *, has_list: bool) -> tuple[Kind, ...]:
    """What a method quantises, by what the loaders do."""
    if method == "mxfp4":
        return ("experts",)
    kinds = _LINEAR if method.startswith("bitsandbytes") or method in ("hqq", "torchao") else _LINEAR_AND_EXPERTS
    # These leave the head out only where nobody says what to leave out.
    by_default = method.startswith("bitsandbytes") or method in ("torchao", "fp8", "fbgemm_fp8", "hqq")
    groups = data.get("config_groups") if method == "compressed-tensors" else None
    says_linear = isinstance(groups, Mapping) and any(
        "Linear" in _list(_dict(one).get("targets")) for one in groups.values()
    )
    if (by_default and has_list) or says_linear or data.get("lm_head") is True:
        kinds = (*kinds, "head")
    if method == "torchao" and data.get("include_input_output_embeddings"):
        kinds = (*kinds, "head", "embedding")
    return kinds


def stored(
    quantization: Quantization | None,
    names: Names,
    weights: Iterable[Weight],
    groups: Iterable[Group],
    plain_bits: float,
) -> tuple[tuple[Matrix, ...], QuantizedWeights | None]:
    """The matrices with the bits of their weights, and what of a whole model is quantised.

    Args:
        quantization: of the checkpoint; None where it is plain.
        names: everything that the module of a weight is called.
        weights: of the whole model, towers included, tied ones once.
        groups: the matrices of its decoder.
        plain_bits: of a weight that is left as it was.
    """
    if quantization is None:
        return tuple(matrix._replace(bits=plain_bits) for matrix, _ in groups), None

    @functools.cache
    def bits_of(one: Weight) -> float | None:
        return quantization.bits_of(one, names(one))

    found = [(one.num_values, kept) for one in weights if (kept := bits_of(one)) is not None]
    matrices = []
    for matrix, members in groups:
        each = [plain_bits if (bits := bits_of(member)) is None else bits for member in members]
        matrices.append(matrix._replace(bits=sum(each) / len(each)))
    return tuple(matrices), QuantizedWeights(
        quantization.method,
        quantization.bits is not None,
        sum(count for count, _ in found),
        math.ceil(sum(count * bits for count, bits in found) / 8),
    )


class _Reader(NamedTuple):
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


def _bitsandbytes(read: _Reader) -> Bits | None:
    if read.data.get("load_in_8bit"):
        return lambda one: 8 + FLOAT_BITS / one.inputs
    if not read.data.get("load_in_4bit"):
        return None
    # a scale per 64 weights: a float32, or a byte and a float32 for every 256 of these
    scale = 8 / 64 + FLOAT_BITS / (64 * 256) if read.data.get("bnb_4bit_use_double_quant") else FLOAT_BITS / 64
    return lambda one: 4 + scale


def _packed(read: _Reader, data: Mapping[str, Any], *, per_input_bits: int = 0) -> Bits:
    """Integers with a scale of 16 bits and a zero per group."""
    width = read.width(data, "bits", "w_bit", default=4)
    group = read.group(data, "group_size", "q_group_size", default=128)
    return lambda one: (
        width + (SCALE_BITS + width) / (one.inputs if group < 0 else group) + per_input_bits / one.outputs
    )


def _gptq(read: _Reader) -> Bits:
    packed = _packed(read, read.data, per_input_bits=FLOAT_BITS)  # the group of every input
    rules = _dict(read.data.get("dynamic"))  # of gptqmodel: what a minus begins stays as it was
    left = ModuleNames(f"re:{rule[2:]}" for rule in rules if rule.startswith("-:"))
    return lambda one: None if left.cover(read.names(one)) else packed(one)


def _auto_round(read: _Reader) -> Bits:
    packed = _packed(read, read.data)
    blocks = read.data.get("block_name_to_quantize") or read.data.get("to_quant_block_names") or ()
    named = blocks.split(",") if isinstance(blocks, str) else [str(one) for one in _flat(blocks)]
    inside = ModuleNames(one.strip() for one in named)
    others = [
        (ModuleNames([str(name)]), _packed(read, {**read.data, **said}), read.width(said, "bits", default=16))
        for name, said in _dict(read.data.get("extra_config")).items()
        if isinstance(said, Mapping)
    ]

    def bits(one: Weight) -> float | None:
        names = read.names(one)
        for covered, different, width in others:
            if covered.cover(names):
                return None if width >= 16 else different(one)
        return packed(one) if not named or inside.cover(names) else None

    return bits


def _hqq(read: _Reader) -> Bits:
    said = _dict(read.data.get("quant_config")) or read.data

    def of(settings: Any) -> Bits:
        settings = _dict(settings)
        settings = _dict(settings.get("weight_quant_params")) or settings
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


def _torchao(read: _Reader) -> Bits | None:
    said = read.data.get("quant_type")
    said = said.get("default", said) if isinstance(said, Mapping) else said
    kind = str(said.get("_type", "") if isinstance(said, Mapping) else said or "")
    settings = _dict(said.get("_data")) if isinstance(said, Mapping) else _dict(read.data.get("quant_type_kwargs"))
    by_module = _dict(settings.get("fqn_to_config")) or _dict(settings.get("module_fqn_to_config"))
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


def _fp8(read: _Reader) -> Bits:
    said = read.data.get("weight_block_size", (128, 128))
    block = [one for one in _list(said) if isinstance(one, int) and one > 0]
    scale = 8 if read.data.get("scale_fmt") == "ue8m0" else FLOAT_BITS

    def bits(one: Weight) -> float:
        if one.kind == "experts" and read.data.get("expert_dtype") == "fp4":
            return 4 + 8 / 32
        return 8 + scale / (block[0] * block[1] if len(block) == 2 else one.inputs * one.outputs)

    return bits


def _compressed(read: _Reader) -> Bits | None:
    groups = read.data.get("config_groups")
    rules: list[tuple[ModuleNames | None, Bits]] = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = _dict(group).get("weights")
        if not isinstance(weights, Mapping):
            continue
        targets = [str(one) for one in _list(_dict(group).get("targets"))]
        names = None if not targets or "Linear" in targets else ModuleNames(targets)
        rules.append((names, _scaled(read, weights)))
    if not rules:
        return None

    def bits(one: Weight) -> float | None:
        return next((found(one) for names, found in rules if names is None or names.cover(read.names(one))), None)

    return bits


def _scaled(read: _Reader, weights: Mapping[str, Any]) -> Bits:
    width = read.width(weights, "num_bits", default=8)
    group = read.group(weights, "group_size", default=-1)
    # scales of four-bit floats are bytes themselves
    scale = 8 if weights.get("type") == "float" and width == 4 else SCALE_BITS
    zero = width if weights.get("symmetric") is False else 0
    block = [one for one in _list(weights.get("block_structure")) if isinstance(one, int) and one > 0]
    if weights.get("strategy") == "tensor":
        return lambda one: float(width)
    if weights.get("strategy") == "block" and len(block) == 2:
        return lambda one: width + scale / (block[0] * block[1])
    return lambda one: width + (scale + zero) / (one.inputs if group < 0 else group)


def _modelopt(read: _Reader) -> Bits | None:
    if read.data.get("config_groups"):
        return _compressed(read)
    layers = _dict(read.data.get("quantized_layers"))
    if layers:  # each module by itself
        rules = [
            (ModuleNames([str(name)], are_globs=True), _algorithm(_dict(said), _dict(said).get("quant_algo")))
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


_METHODS: dict[str, Callable[[_Reader], Bits | None]] = {
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


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _flat(value: Any) -> Iterable[Any]:
    for one in _list(value):
        yield from _flat(one) if isinstance(one, (list, tuple)) else (one,)
