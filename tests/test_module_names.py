"""Which modules a name in a quantisation's configuration covers."""

from __future__ import annotations

import pytest

from kvoffload.errors import ConfigError
from kvoffload.model.module_names import ModuleNames

MODULE = "model.language_model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "is_covered"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn", True),
        ("layers.10", True),
        ("layers.1", False),
        ("model.layers.10.self_attn", True),  # as files of older releases call it
        ("language_model.model.layers.10", True),
        ("vision_tower.layers.10.self_attn", False),
        (r"model\.language_model\.layers\.10", True),
        ("model.language_model.layers.*.self_attn", True),
        ("re:model.language_model.layers.[0-9]+.self_attn", True),
        ("re:layers.10", False),
        ("*.self_attn", True),
        ("*self_attn*", True),
        ("", False),
    ],
)
def test_a_name_covers_a_module_and_what_is_in_it(name: str, is_covered: bool) -> None:
    assert ModuleNames([name]).cover([MODULE]) is is_covered
    assert ModuleNames(["lm_head", name]).cover(["elsewhere", MODULE]) is is_covered


@pytest.mark.parametrize(("name", "is_covered"), [("*q_proj", True), ("*self_attn", False), ("model.*.10.*", True)])
def test_globs_cover_full_names(name: str, is_covered: bool) -> None:
    assert ModuleNames([name], are_globs=True).cover([MODULE]) is is_covered


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'re:\(' in the quantization_config is no pattern"):
        ModuleNames(["re:("])
