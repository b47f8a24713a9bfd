from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from campaign import sweep
from campaign.sweep import CellOutcome, compare, distance, verdict_of
from campaign.sweep_cells import MODES, QUICK, QUICK_CELLS, SPLITS, WAYS
from campaign.sweep_rows import form_of
from campaign.tiny_models import model_types, tiny_model
from kvoffload.cache import attention
from kvoffload.errors import UnsupportedModelError

# The part of the sweep that runs with the tests, and what must come of it.
FORMS = {
    **dict.fromkeys(("llama", "gpt2", "gemma2", "gpt_oss", "deepseek_v3", "deepseek_v32"), "recomputable"),
    **dict.fromkeys(("qwen3_next", "bart", "qwen2_vl", "doge", "mllama", "falcon_h1"), "recomputable"),
    **dict.fromkeys(("bloom", "gemma4_text"), "transferred"),
    "mamba": "refused",
}


@pytest.mark.parametrize("model_type", QUICK)
def test_a_type_of_each_kind_is_equal_or_refused_for_its_reason(model_type: str) -> None:
    report = verdict_of(model_type, QUICK_CELLS)
    found = {cell: (verdict.outcome, verdict.reason) for cell, verdict in report.verdicts.items()}
    assert form_of(report) == FORMS[model_type], found
    if form_of(report) != "refused":
        assert report.distinct >= 3
        assert report.reach > 1e-3
        assert any(verdict.h2d_bytes for verdict in report.verdicts.values())


def test_each_kind_is_a_type_and_every_mode_and_split_is_met_in_the_part() -> None:
    assert set(QUICK) == set(FORMS) <= set(model_types())
    assert {mode for mode, _ in QUICK_CELLS} == set(MODES)
    assert {way for _, way in QUICK_CELLS} == set(SPLITS) <= set(WAYS)


# ---- the judge itself ------------------------------------------------------------------------------------------------


def one(change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> sweep.CellVerdict:
    """A llama whose attention over segments gives what `change` makes of it."""
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: change(attend(*args)))
    return verdict_of("llama", [("greedy", "transfer")]).verdicts["greedy", "transfer"]


def test_a_fault_in_attention_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(lambda output: output * 3, monkeypatch).outcome == "wrong"


def test_a_small_fault_that_changes_no_token_is_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    found = one(lambda output: output * (1 + 1e-4), monkeypatch)
    assert found.outcome == "inexact"
    assert found.error > sweep.TOLERANCE


def test_what_transformers_itself_differs_by_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_control", lambda *args: 1e-3)
    assert one(lambda output: output * (1 + 1e-4), monkeypatch).outcome == "equal"


def test_the_control_is_rounding_alone_and_changes_nothing_for_good() -> None:
    model, update = tiny_model("llama"), DynamicLayer.update
    model.generation_config.eos_token_id = None
    wanted = sweep._plain(model, "greedy")
    assert 0 < sweep._control(model, "greedy", wanted) < sweep.TOLERANCE
    assert model.config._attn_implementation == "sdpa"
    assert DynamicLayer.update is update


def test_nothing_changed_is_equal_and_came_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = one(lambda output: output, monkeypatch)
    assert (found.outcome, found.reason) == ("equal", "")
    assert found.h2d_bytes > 0


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (UnsupportedModelError("so it is"), "refused", "generate: so it is"),
        (IndexError("out of range"), "error", "IndexError: out of range (test_sweep.py:"),
    ],
)
def test_exceptions_of_ours_are_refusals_and_others_are_errors(
    error: Exception, outcome: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(output: Any) -> Any:
        raise error

    found = one(change, monkeypatch)
    assert found.outcome == outcome
    assert found.reason.startswith(reason)


def test_a_type_that_cannot_be_made_or_does_not_generate_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pixel_values" in verdict_of("blip").plain

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("no timm")

    monkeypatch.setattr(sweep, "tiny_model", broken)
    report = verdict_of("llama")
    assert report.plain.startswith("not built: ImportError: no timm")
    assert not report.verdicts
    assert form_of(report) == "not run"


def test_a_model_whose_tokens_are_all_the_same_is_made_louder(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def quiet(model_type: str, *, loudness: float) -> Any:
        tried.append(loudness)
        return tiny_model(model_type, loudness=10.0 if len(tried) > 1 else 0.0)

    monkeypatch.setattr(sweep, "tiny_model", quiet)
    report = verdict_of("llama", [])
    assert tried == list(sweep.LOUDNESSES[:2])
    assert report.distinct >= sweep.ENOUGH_DISTINCT


def test_what_transformers_cannot_do_is_not_ours() -> None:
    found = compare(tiny_model("llama"), MODES["greedy"], WAYS["transfer"], ValueError("not supported"))
    assert (found.outcome, found.reason) == ("plain", "ValueError: not supported")


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 4.0], [1.0, 2.0], 1.0),  # relative to the largest
        ([0.1, 0.3], [0.1, 0.2], 0.1),  # which counts as 1 at least
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([float("-inf"), 2.0], [float("-inf"), 2.0], 0.0),
        ([1.0], [1.0, 2.0], float("inf")),
    ],
)
def test_the_distance_of_logits(ours: list[float], theirs: list[float], expected: float) -> None:
    found, wanted = (CellOutcome([], [torch.tensor(values)]) for values in (ours, theirs))
    assert distance(found, wanted) == pytest.approx(expected)
    assert distance(CellOutcome([], []), wanted) == float("inf")
