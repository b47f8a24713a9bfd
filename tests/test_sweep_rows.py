from __future__ import annotations

import json
from pathlib import Path

import pytest

from campaign import sweep_rows
from campaign.sweep import CellVerdict, Report
from campaign.sweep_cells import CELLS, MODES
from kvoffload.errors import ConfigError

EQUAL = {cell: CellVerdict("equal", h2d_bytes=100, recomputed_tokens=int(cell[1] == "recompute")) for cell in CELLS}


def report(model_type: str = "llama", **changes: CellVerdict) -> Report:
    """All equal, but for cells such as `greedy__half`."""
    changed = {(mode, way): verdict for name, verdict in changes.items() for mode, _, way in [name.partition("__")]}
    return Report(model_type, "LlamaForCausalLM", "4 DynamicLayer", "", 9, 0.5, {**EQUAL, **changed}, 1.0)


def test_a_row_has_one_word_where_all_splits_agree_and_one_for_each_where_not() -> None:
    row = sweep_rows.row_of(report(beams__half=CellVerdict("wrong", error=0.3)))
    assert (row["greedy"], row["whole_layer"], row["unpaced"]) == ("equal", "equal", "equal")
    assert row["beams"] == "transfer:equal recompute:equal half:wrong auto:equal"
    assert (row["form"], row["error"], row["host_bytes"], row["distinct_tokens"]) == ("short", "0.3", "100", "9")
    assert tuple(row) == sweep_rows.COLUMNS


def test_shortcomings_are_modes_and_reasons_and_nothing_else() -> None:
    refused, wrong, error = CellVerdict("refused", "so"), CellVerdict("wrong"), CellVerdict("error", "IndexError: x")
    row = sweep_rows.row_of(report(beams__half=refused, turns__half=wrong, greedy__unpaced=error))
    splits = "transfer:equal recompute:equal half:wrong auto:equal"
    assert sweep_rows.shortcomings(row) == f"turns: {splits}; unpaced: error; error: IndexError: x"
    assert sweep_rows.shortcomings(sweep_rows.row_of(report(beams__half=refused))) == ""


def test_the_form_says_what_became_of_a_type() -> None:
    transferred = report()._replace(verdicts={cell: CellVerdict("equal", h2d_bytes=1) for cell in CELLS})
    refused = report()._replace(verdicts=dict.fromkeys(CELLS, CellVerdict("refused", "so")))
    plain = report()._replace(verdicts=dict.fromkeys(CELLS, CellVerdict("plain", "so")))
    cases = {
        "recomputable": report(lookup__half=CellVerdict("plain", "so")),
        "transferred": transferred,
        "idle": report()._replace(verdicts=dict.fromkeys(CELLS, CellVerdict("equal"))),
        "refused": refused,
        "not run": plain,
        "short": report(lookup__half=CellVerdict("inexact")),
    }
    assert {form: sweep_rows.form_of(one) for form, one in cases.items()} == {form: form for form in cases}
    assert set(cases) == set(sweep_rows.FORMS)
    assert sweep_rows.form_of(Report("llama", plain="not built")) == "not run"


def test_reasons_name_the_modes_they_are_of() -> None:
    refused = CellVerdict("refused", "so")
    lookup = {f"lookup__{way}": CellVerdict("plain", "stateful") for way in ("transfer", "recompute", "half", "auto")}
    row = sweep_rows.row_of(report(greedy__half=refused, turns__auto=refused, **lookup))
    assert json.loads(row["reasons"]) == {"refused: so": "greedy/half turns/auto", "plain: stateful": "lookup"}
    others = {cell: refused for cell in CELLS if cell[0] != "lookup"}
    everything = report(**lookup)._replace(verdicts={**report(**lookup).verdicts, **others})
    assert json.loads(sweep_rows.row_of(everything)["reasons"])["refused: so"] == "all"


def test_rows_are_read_as_written_sorted_and_replaced_by_type(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    first, second = (sweep_rows.row_of(report(kind)) for kind in ("opt", "llama"))
    sweep_rows.save(path, [first])
    sweep_rows.save(path, [second])
    assert sweep_rows.load(path) == [second, first]
    assert sweep_rows.done(sweep_rows.load(path)) == {"llama", "opt"}
    again = {**first, "commit": "other"}
    sweep_rows.save(path, [again])
    assert sweep_rows.load(path) == [second, again]
    assert sweep_rows.done(sweep_rows.load(path)) == {"llama"}
    assert [one.name for one in tmp_path.iterdir()] == ["sweep.csv"]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "\xff\xfe"])
def test_another_file_is_not_written_over(text: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    path.write_bytes(text.encode("latin-1"))
    for function in (sweep_rows.load, sweep_rows.check):
        with pytest.raises(ConfigError, match="rows"):
            function(path)
    assert path.read_bytes() == text.encode("latin-1")


def test_modes_have_a_column_each() -> None:
    assert set(MODES) < set(sweep_rows.COLUMNS)
