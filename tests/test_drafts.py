"""Verified drafts give the tokens and logits of plain `generate()`, however good the drafts are."""

from __future__ import annotations

import pytest
from drafting import FACTORS, Cell, check_cell, full_product
from matrix import pairwise

CELLS = pairwise(FACTORS, Cell)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_tokens_and_logits_are_those_of_plain_generate(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    run = check_cell(cell, monkeypatch)
    for stats in run.stats:
        assert stats.tokens_per_pass is not None
        assert stats.draft_acceptance is not None
        assert stats.tokens_per_pass <= cell.number + 1
        if cell.device in ("window", "shadow"):
            assert stats.draft_cache == {"window": "window", "shadow": "int4"}[cell.device]
        if cell.device == "all" and cell.quality == 1.0:  # a draft sees all that the pass sees
            assert set(stats.draft_survivals) == {1.0}
        if cell.quality == 0.0 and stats.draft_survivals:
            assert stats.draft_survivals[0] < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("cell", list(full_product()), ids=str)
def test_the_full_product(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cell(cell, monkeypatch)
