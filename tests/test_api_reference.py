"""The reference has every public name with its docstring, and every field with its meaning."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from run_script import SCRIPTS, run_script

import kvoffload

pytest.importorskip("pdoc", reason="needs pdoc")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("docs") / "new"
    done = run_script("api_reference", "--output", folder)
    assert done.exit_code == 0, done.output
    return (folder / "kvoffload.html").read_text(encoding="utf-8")


def test_every_public_name_is_there_and_has_a_docstring(page: str) -> None:
    for name in kvoffload.__all__:
        assert f'id="{name}"' in page, name
        assert (getattr(kvoffload, name).__doc__ or "").strip(), name
    assert page.index('id="offload"') < page.index('id="Session"') < page.index('id="ConfigError"')


def test_fields_have_their_meaning_and_inner_names_are_left_out(page: str) -> None:
    for field in dataclasses.fields(kvoffload.GenerationStats):
        shown = page.partition(f'id="GenerationStats.{field.name}"')[2].partition(' id="GenerationStats.')[0]
        assert 'class="docstring"' in shown, field.name
    assert "compute stood still for the link" in page  # from the page of figures
    assert "of an activation" in page  # from a comment
    for inner in ("Session.claim", "Session.offers_segments", "GenerationStats.__init__", "OffloadConfig.split"):
        assert f'id="{inner}"' not in page
    for shown in ("Session.new_cache", "Session.stats", "OffloadConfig.__init__", "Workload.__init__"):
        assert f'id="{shown}"' in page


def test_comments_behind_and_above_a_field_are_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class A:\n    a: int  # of one\n    # of two\n    b: int = 2\n    c: int\n    def d(self):\n        e = 1\n"
    (tmp_path / "some_fields.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import api_reference
    import some_fields

    assert api_reference.field_comments(some_fields.A) == {"a": "of one", "b": "of two"}
    sys.modules.pop("some_fields")
