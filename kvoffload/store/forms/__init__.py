"""The forms in which blocks are stored: a file for each, named like the form, with a class `Stored`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from kvoffload.planning.placement import FormName
from kvoffload.store.forms.form import Form
from kvoffload.store.tail import KVShape


def made_of_kv(names: Iterable[FormName], shape: KVShape) -> dict[FormName, Form]:
    """Those of the named forms that K and V of a layer are all it takes to make.

    Args:
        names: of forms.
        shape: of the layer's K and V.
    """
    found = {name: importlib.import_module(f"{__name__}.{name}").Stored.of(shape) for name in sorted(names)}
    return {name: form for name, form in found.items() if form is not None}
