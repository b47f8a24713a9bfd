"""Forms with loss x ways to generate x models: logits as of a plain cache that stores its blocks the same way.

The default run has a cell for each form and mode, the other factors so that every pair of values occurs; the product is
behind the marker `slow`. Then damage on purpose, each of which must be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from form_matrix import FACTORS, FORMS, ROUNDED, TOLERANCE, Cell, check, error_of, full_product, model_of, run
from matrix import pairwise
from printed import said

from kvoffload.hf import OffloadedHFCache
from kvoffload.planning import forms as planned
from kvoffload.store.block import Block
from kvoffload.store.forms import encoded

CELLS = pairwise(FACTORS, Cell)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_logits_are_those_of_a_plain_cache_with_the_same_forms(cell: Cell) -> None:
    check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", list(full_product()), ids=str)
def test_logits_are_those_of_a_plain_cache_in_the_full_product(cell: Cell) -> None:
    check(cell)


@pytest.mark.parametrize("form", FORMS)
def test_on_a_slow_link_all_blocks_have_the_coarsest_form(form: str) -> None:
    seen = run(sound(form))
    assert set(seen.forms.values()) == {form}
    assert seen.stats[0].lossy_form == form
    assert not seen.stats[0].kept_exact_blocks
    assert "not exact" in said(seen.stats[0])
    assert f"with {planned.FORMS[form].label} (not exact)" in said(seen.stats[0])


# ---- the matrix bites ------------------------------------------------------------------------------------------------


def sound(form: str, mode: str = "left_padding") -> Cell:
    """A cell that is right; int2 in blocks where it is smaller than int4."""
    return Cell(form, mode, "llama", "12x9" if form == "int2" else "8x2", "min", "transfer", "pipelined")


def parts_of(block: Block, form: Any) -> list[torch.Tensor]:
    """The fields of a stored block."""
    return list(encoded.fields(block.bytes.view(1, -1), *form._parts(block.rows)))


def scale_of_the_neighbour(cache: OffloadedHFCache) -> None:
    """Every token is read with the scale of the one before."""
    for layer in cache.core.layers:
        for block in layer.blocks:
            scales = parts_of(block, layer.forms[block.form])[-2 if block.form != "int8" else -1]
            scales.copy_(scales.roll(1, dims=1))


def swapped_halves_of_bytes(cache: OffloadedHFCache) -> None:
    """Low and high bits of each byte change places."""
    for layer in cache.core.layers:
        for block in layer.blocks:
            codes = parts_of(block, layer.forms[block.form])[0]
            codes.copy_((codes >> 4) | (codes << 4))


def swapped_heads(cache: OffloadedHFCache) -> None:
    """The codes of the heads change places, their scales do not."""
    for layer in cache.core.layers:
        for block in layer.blocks:
            codes = parts_of(block, layer.forms[block.form])[0]
            codes.copy_(codes.flip(-2))


def error_after(form: str, damage: Callable[[OffloadedHFCache], None] | None) -> float:
    cell = sound(form)
    return error_of(cell, run(cell, damage=damage))


@pytest.mark.parametrize("form", FORMS)
def test_without_damage_nothing_is_noticed(form: str) -> None:
    assert error_after(form, None) <= TOLERANCE


@pytest.mark.parametrize("damage", [scale_of_the_neighbour, swapped_heads])
@pytest.mark.parametrize("form", FORMS)
def test_damaged_blocks_are_noticed(form: str, damage: Callable[[OffloadedHFCache], None]) -> None:
    assert error_after(form, damage) > ROUNDED


@pytest.mark.parametrize("form", ["int4", "int2"])
def test_swapped_codes_are_noticed(form: str) -> None:
    assert error_after(form, swapped_halves_of_bytes) > ROUNDED


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rotated_keys_with_unrotated_queries_are_noticed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded.Encoded, "question", lambda self, query: query)
    assert error_after(form, None) > ROUNDED


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_keys_that_were_not_rotated_are_noticed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_with_rotated_keys", lambda kv: kv)
    assert error_after(form, None) > ROUNDED


# ---- what a form cannot hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_blocks_that_are_not_finite_stay_exact_and_are_counted(form: str) -> None:
    model = model_of("llama", is_double=False)

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] > 1:
            output = output.clone()
            output[0, 3, 0] = float("inf")
        return output

    cell = sound(form, "greedy")
    handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(poison)
    try:
        seen = run(cell)
    finally:
        handle.remove()
    assert seen.forms[1, 0] == "kv"
    assert {form_ for (layer, block), form_ in seen.forms.items() if (layer, block) != (1, 0)} <= {form, "kv"}
    assert seen.stats[0].kept_exact_blocks >= 1
    assert "kept exact" in said(seen.stats[0])
