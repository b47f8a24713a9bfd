"""How many bits a quantised checkpoint keeps per weight, read from the `quantization_config` of its configuration.

Owns which weights each method leaves as they were, and what that makes of a model. Does not own what a method stores
(`quantization_methods`), the weights (`weights`, `guess`) nor the matching of their names (`module_names`).

Embeddings, norms and biases stay as they were; the head does unless a method says otherwise. Which names are left out
is said under any of `_SKIPPING`.

Source: the quantizers of transformers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvoffload.model.facts import QuantizedWeights
from kvoffload.model.matrix import Group, Kind, Matrix, Weight
from kvoffload.model.module_names import ModuleNames
from kvoffload.model.quantization_methods import METHODS, Bits, Names, Reader, as_dict, as_list

_SKIPPING = (
    *("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules", "ignored_layers", "ignore"),
    *("exclude_modules", "linear_weights_not_to_quantize"),
)
_LINEAR: tuple[Kind, ...] = ("linear",)
_LINEAR_AND_EXPERTS: tuple[Kind, ...] = ("linear", "experts")  # each expert is a linear layer in the files


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
    maker = METHODS.get("bitsandbytes" if method.startswith("bitsandbytes") else method)
    if data.get("dequantize") and method in ("fp8", "mxfp4"):  # they are made plain again as they are loaded
        return None
    bits = None if maker is None else maker(Reader(data, model_type, names))
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
        "Linear" in as_list(as_dict(one).get("targets")) for one in groups.values()
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
