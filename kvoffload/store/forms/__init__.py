"""The forms in which blocks are stored: a file for each, named like the form, with a class `Stored`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from kvoffload.planning.placement import FormName
from kvoffload.store.forms.form import Form
from kvoffload.store.tail import KVShape


def made_of_kv(names: Iterable[FormName], shape: KVShape, block_tokens: int) -> dict[FormName, Form]:
    """Those of the named forms that K and V of a layer are all it takes to make.

    Args:
        names: of forms.
        shape: of the layer's K and V.
        block_tokens: of each block.
    """
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in sorted(names)}
    found = {name: module.Stored.of(shape, block_tokens) for name, module in modules.items()}
    return {name: form for name, form in found.items() if form is not None}
