"""The forms in which a block can be stored, a row per form, and the names of options made of them. Plain data.

Owns how many bytes a form takes and whether attention reads it as it lies; how those bytes are made and read is in
`kvoffload/store/forms/`, a file per form. Another form is a file there and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvoffload.planning.geometry import Geometry
from kvoffload.planning.placement import PLAIN, FormName, Kind, Part, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """One form."""

    name: FormName
    label: str  # what people read: blocks are transferred as ...
    made_of: Part = "kv"  # what of the newest tokens the device keeps for it
    row_bytes: Callable[[Geometry], int]  # of a token of one stored row
    is_read_as_stored: bool = True  # False: K and V come back by work of the device (`Rates.restore_s_per_token`)

    @property
    def is_recomputed(self) -> bool:
        """Whether K and V come back from a layer's input; what `split` is the share of."""
        return self.made_of == "activation"


FORMS: dict[FormName, StoredForm] = {
    row.name: row
    for row in (
        StoredForm(name=PLAIN, label="K/V", row_bytes=lambda cache: cache.kv_row_bytes),
        StoredForm(
            name="activation",
            label="activations",
            made_of="activation",
            row_bytes=lambda cache: cache.stored_activation_row_bytes,
            is_read_as_stored=False,
        ),
    )
}


def option_name(form: FormName, tier: Tier) -> str:
    """What a plan calls blocks of a form in a tier."""
    return form if tier == "host" else f"resident_{form}"


KINDS: dict[str, Kind] = {option_name(form, tier): Kind(form, tier) for tier in ("device", "host") for form in FORMS}


def largest_row_bytes(forms: Collection[FormName], geometry: Geometry) -> int:
    """Of a token of one stored row, in the largest of some forms; 0 without any."""
    return max((FORMS[form].row_bytes(geometry) for form in forms), default=0)
