"""What a person installs is what the repository holds, and it does not get in the way of transformers."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_DATA = (".py", ".typed", ".json", ".css", ".js")  # suffixes of the files that belong into a wheel


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, links kept, without build isolation: no network."""
    source = tmp_path_factory.mktemp("source") / "kvoffload"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kvoffload", "kernels", "profiler"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, ".", cwd=source)
    return next(out.glob("kvoffload-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder the wheel is installed into; alone on the import path of the processes below."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index")
    run(*pip, "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_a_wheel_holds_every_file_of_the_package_and_no_other_top_level_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for pattern in ("*", "*/*", "*/*/*")
        for path in (ROOT / "kvoffload").glob(pattern)
        if path.suffix in PACKAGE_DATA
    }
    assert packaged == expected | {"kvoffload/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_an_installed_wheel_imports_from_another_folder_and_leaves_transformers_working(
    installed: Path, tmp_path: Path
) -> None:
    # -P keeps the current folder off the path. An editable install of this repository in the same environment adds its
    # own folders behind the wheel's, so the first entry and the file that was really imported are what counts.
    program = (
        "import kvoffload.errors, kvoffload.kernels.reference as reference, kvoffload.profiler.trials as trials\n"
        "import kvoffload.kernels\n"
        "print(kvoffload.kernels.__path__[0], kvoffload.errors.__file__, reference.__file__, trials.__file__)\n"
        "from transformers import LlamaForCausalLM\n"
        "print(LlamaForCausalLM.__name__)\n"
    )
    out = run(sys.executable, "-P", "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    package = installed / "kvoffload"
    files = ("kernels", "errors.py", "kernels/reference.py", "profiler/trials.py")
    assert out.split() == [*(str(package / name) for name in files), "LlamaForCausalLM"]
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["bin", "kvoffload"]


def test_importing_from_the_repository_leaves_transformers_working() -> None:
    # the folder kernels/ is then on the import path under its bare name
    program = (
        "from transformers import LlamaForCausalLM; import kvoffload.kernels; print(kvoffload.kernels.__path__[0])"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT).strip() == str(ROOT / "kvoffload" / "kernels")


def test_requirements_are_ranges_and_pins_are_only_in_the_constraints() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.List)
    }
    assert "torch>=2.11" in lists["RUNTIME"]  # no upper end: an install must leave an existing torch as it is
    assert not [line for line in lists["RUNTIME"] + lists["DEV"] if "==" in line.partition(";")[0]]
    pins = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    assert "torch==2.13.0" in pins
    assert all(line.count("==") == 1 and "+" not in line and "@" not in line for line in pins)
