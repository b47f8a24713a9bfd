"""Same logits at every step and same tokens as plain `generate`, over architectures x modes x plans x device budgets.

The default run takes one cell for each architecture and mode and chooses split, device budget, block size and pipeline
so that every pair of values of any two factors occurs in some cell (`matrix.pairwise`); the full product of
architecture, mode, split and device budget is behind the marker `slow`. Every cell runs on a `CheckingBackend`, so an
unordered access to any buffer fails it as well, whatever the timing was.

With another release of transformers: `scripts/test --release 5.17.0 tests/test_matrix.py`, and likewise for exactness,
modes, wrapped_models, callbacks and session_caches.
"""

from __future__ import annotations

import itertools

import pytest
import transformers
from matrix import FACTORS, Cell, check_cell, full_product, pairwise
from models import RECOMPUTABLE

CELLS = pairwise()
WITH_SLIDING_LAYERS = [name for name, values in RECOMPUTABLE.items() if values.get("sliding_window")]


def check(cell: Cell) -> None:
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    if release < (5, 23) and cell.mode == "assisted" and cell.architecture in WITH_SLIDING_LAYERS:
        pytest.skip("transformers 5.17 cannot draft with a model that has sliding layers, offloaded or not")
    check_cell(cell)


def test_the_default_cells_hold_every_pair_of_values() -> None:
    for (i, first), (j, second) in itertools.combinations(enumerate(FACTORS), 2):
        found = {(cell[i], cell[j]) for cell in CELLS}
        assert found == set(itertools.product(first, second)), (i, j)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_logits_and_tokens_equal_plain_generate(cell: Cell) -> None:
    check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", list(full_product()), ids=str)
def test_logits_and_tokens_equal_plain_generate_in_the_full_product(cell: Cell) -> None:
    check(cell)
