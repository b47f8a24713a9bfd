"""What the package promises to export, and that importing it costs nothing and changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvoffload


def test_every_promised_name_is_there() -> None:
    for name in kvoffload.__all__:
        assert getattr(kvoffload, name) is not None
        assert name in dir(kvoffload)
    promised = {"offload", "load", "generate", "plan", "measure_hardware", "OffloadConfig", "Workload"}
    assert promised <= set(kvoffload.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_that"):
        kvoffload.nothing_like_that  # noqa: B018


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, kvoffload; print(*sorted({'torch', 'transformers', 'pulp'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
