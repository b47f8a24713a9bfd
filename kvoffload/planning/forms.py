"""The forms in which a block can be stored, a row per form, and the names of options made of them. Plain data.

Owns how many bytes a form takes, whether attention reads it as it lies, and who asked for it; how those bytes are made
and read is in `kvoffload/store/forms/`, a file per form. Another form is a file there and a row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvoffload.config import OffloadConfig
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.placement import PLAIN, FormName, Kind, Part, Tier

GROUP = 32  # values that share a scale and a least value
MOST_PLACES = 2**16  # of a head in a packed block
LEAST_HEAD_DIM = 32  # of what is encoded
SHADOW_FORM: FormName = "int4"  # of copies that drafts read


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """One form."""

    name: FormName
    label: str  # what people read: blocks are transferred as ...
    made_of: Part = "kv"  # what of the newest tokens the device keeps for it
    row_bytes: Callable[[Geometry, int], int]  # of a token of one stored row, in blocks of so many tokens
    # False: K and V come back by work of the device (`Rates.restore_s_per_token`) before attention reads them
    is_read_as_stored: bool = True
    is_encoded: bool = False  # attention decodes while it reads, which takes the same rate in addition
    loss: float = (
        0.0  # of precision, as a share of the largest value in a group: what plans avoid where it gains nothing
    )
    # whether the configuration wants it for such a cache; None: `split` says it
    is_wanted: Callable[[OffloadConfig, Geometry], bool] | None = None
    # of use only where it is known to be faster; whether a block can have it is seen when it is there
    needs_rates: bool = False

    @property
    def is_recomputed(self) -> bool:
        """Whether K and V come back from a layer's input; what `split` is the share of."""
        return self.made_of == "activation"

    @property
    def is_exact(self) -> bool:
        """Whether K and V come back bit for bit (or are computed anew by the same operations)."""
        return not self.loss


def can_encode(head_dim: int) -> bool:
    """Whether forms of fewer bytes are made for heads of that size; 0 stands for K and V of unequal heads."""
    return head_dim >= LEAST_HEAD_DIM and head_dim % 4 == 0


def why_no_shadow(config: OffloadConfig, geometry: Geometry) -> str | None:
    """Why drafts cannot read copies of few bits of all blocks; None if they can."""
    shadow = FORMS[SHADOW_FORM]
    if not can_encode(geometry.head_dim):
        size = (
            f"heads of {geometry.head_dim} values" if geometry.head_dim else "K and V of unequal heads, or without any"
        )
        return f"{size} cannot be encoded (at least {LEAST_HEAD_DIM}, divisible by 4)"
    if config.kv_dtype != "model" and FORMS[config.kv_dtype].loss >= shadow.loss:
        return f"the cache itself is stored as {FORMS[config.kv_dtype].label}"
    return None


def _can_pack(config: OffloadConfig, geometry: Geometry) -> bool:
    """Wanted, of bfloat16, and a block can list in 16 bits where an exponent is."""
    is_short = config.block_tokens == "auto" or config.block_tokens * geometry.head_dim <= MOST_PLACES
    is_asked_for = config.packing == "auto" and geometry.may_pack
    return is_asked_for and is_short and geometry.kv_dtype == "bfloat16" and can_encode(geometry.head_dim)


def _is_quantized_to(*coarser: str) -> Callable[[OffloadConfig, Geometry], bool]:
    """Wanted where one of these is the coarsest that the configuration allows."""
    return lambda config, geometry: config.kv_dtype in coarser and can_encode(geometry.head_dim)


def _vectors(cache: Geometry) -> int:
    """Keys and values of one token of one stored row, counted by heads."""
    return cache.kv_row_bytes // (cache.kv_itemsize_bytes * cache.head_dim) if cache.head_dim else 0


def _groups(size: int) -> int:
    return math.ceil(size / GROUP)


def _means_bytes(cache: Geometry, block_tokens: int) -> int:
    return math.ceil(_vectors(cache) // 2 * cache.head_dim * 2 / block_tokens)  # of keys over a block, float16


def _int8_row_bytes(cache: Geometry, block_tokens: int) -> int:
    return _vectors(cache) * (cache.head_dim + 2) + _means_bytes(cache, block_tokens)


def _int4_row_bytes(cache: Geometry, block_tokens: int) -> int:
    groups = 4 * _groups(cache.head_dim)  # float16 scale and least value
    return _vectors(cache) * (cache.head_dim // 2 + groups) + _means_bytes(cache, block_tokens)


def _int2_row_bytes(cache: Geometry, block_tokens: int) -> int:
    codes = _vectors(cache) * cache.head_dim // 4
    values = _vectors(cache) // 2 * _groups(cache.head_dim) * 4  # float16 scale and least value
    keys = _vectors(cache) // 2 * cache.head_dim * 4 * _groups(block_tokens)  # of a block
    return codes + values + math.ceil(keys / block_tokens)


def listed_exponents(block_tokens: int, head_dim: int) -> int:
    """Exponents that a packed block lists of each row, K or V, and head, as they are too far away: 0.8 % and four."""
    return block_tokens * head_dim // 128 + 4


def _packed_row_bytes(cache: Geometry, block_tokens: int) -> int:
    columns = _vectors(cache) * (1 + 2 + 3 * listed_exponents(block_tokens, cache.head_dim))  # of a block
    return _vectors(cache) * cache.head_dim * 3 // 2 + math.ceil(columns / block_tokens)


FORMS: dict[FormName, StoredForm] = {
    row.name: row
    for row in (
        StoredForm(name=PLAIN, label="K/V", row_bytes=lambda cache, _: cache.kv_row_bytes),
        StoredForm(
            name="activation",
            label="activations",
            made_of="activation",
            row_bytes=lambda cache, _: cache.stored_activation_row_bytes,
            is_read_as_stored=False,
        ),
        StoredForm(
            name="packed_kv",
            label="packed K/V",
            row_bytes=_packed_row_bytes,
            is_encoded=True,
            is_wanted=_can_pack,
            needs_rates=True,
        ),
        StoredForm(
            name="int8",
            label="8-bit K/V",
            row_bytes=_int8_row_bytes,
            is_encoded=True,
            loss=2**-8,
            is_wanted=_is_quantized_to("int8", "int4", "int2"),
        ),
        StoredForm(
            name="int4",
            label="4-bit K/V",
            row_bytes=_int4_row_bytes,
            is_encoded=True,
            loss=2**-4,
            is_wanted=_is_quantized_to("int4", "int2"),
        ),
        StoredForm(
            name="int2",
            label="2-bit K/V",
            row_bytes=_int2_row_bytes,
            is_encoded=True,
            loss=2**-2,
            is_wanted=_is_quantized_to("int2"),
        ),
    )
}


def option_name(form: FormName, tier: Tier) -> str:
    """What a plan calls blocks of a form in a tier."""
    return form if tier == "host" else f"resident_{form}"


KINDS: dict[str, Kind] = {option_name(form, tier): Kind(form, tier) for tier in ("device", "host") for form in FORMS}


def largest_row_bytes(forms: Collection[FormName], geometry: Geometry, block_tokens: int) -> int:
    """Of a token of one stored row, in the largest of some forms; 0 without any."""
    return max((FORMS[form].row_bytes(geometry, block_tokens) for form in forms), default=0)


def wanted_forms(config: OffloadConfig, geometry: Geometry, *, has_rates: bool) -> frozenset[FormName]:
    """Forms that the configuration decides on, and wants for such a cache."""
    return frozenset(
        name
        for name, form in FORMS.items()
        if form.is_wanted is not None and form.is_wanted(config, geometry) and (has_rates or not form.needs_rates)
    )
