"""Scripts run in this process: importing everything again would take seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvoffload.cli.terminal import script

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run_script(name: str, *args: object) -> Result:
    """`scripts/NAME.py ARGS...`."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # typer looks annotations up there
        spec.loader.exec_module(module)
        return CliRunner().invoke(script(module.main), [str(arg) for arg in args])
