"""A bar for long allocations: on a terminal, while they last, and gone afterwards."""

from __future__ import annotations

import io

import pytest
from matrix import FAST_LINK, profile
from models import make_model
from modes import COMMON, prompt
from rich.console import Console

from kvoffload import OffloadConfig
from kvoffload.session import progress
from kvoffload.session.session import Session


def terminal(is_terminal: bool = True) -> tuple[progress.AllocationProgress, io.StringIO]:
    out = io.StringIO()
    return progress.AllocationProgress(Console(file=out, force_terminal=is_terminal, width=100)), out


def test_a_long_allocation_shows_what_is_done_and_leaves_no_trace() -> None:
    bar, out = terminal()
    bar.expect(3 * 2**30)
    bar.update(2**30)
    bar.update(2 * 2**30)
    assert "allocating host memory" in out.getvalue()
    assert "3.2 GB" in out.getvalue()
    assert bar._progress is not None
    bar.update(3 * 2**30)
    assert bar._progress is None
    bar.stop()


@pytest.mark.parametrize(("is_terminal", "total"), [(False, 3 * 2**30), (True, 2**20)])
def test_nothing_is_drawn_for_a_file_or_a_moment(is_terminal: bool, total: int) -> None:
    bar, out = terminal(is_terminal)
    bar.expect(total)
    bar.update(total // 2)
    assert out.getvalue() == ""


def test_a_session_tells_how_far_the_pool_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        progress.AllocationProgress, "update", lambda self, held: seen.append((held, self._expected_bytes))
    )
    model = make_model("llama")
    config = OffloadConfig(split="transfer", link=FAST_LINK, profile=profile(), device_gib="min", block_tokens=4)
    with Session(model, config) as session:
        model.generate(prompt(2), **COMMON)
        assert session.stats is not None
        assert seen
        held, expected = seen[-1]
        assert held >= session.stats.host_bytes > 0
        assert expected == pytest.approx(session.stats.host_bytes, rel=0.2)
