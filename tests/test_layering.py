"""Which room may import which. The map is that of docs/architecture.md.

Imports inside functions and behind `TYPE_CHECKING` count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping

import pytest
from rooms import PACKAGE, direct, floors, imported_names, picture, room_imports, room_of, source_files

# A room is a folder, or a file at the root. From the bottom; behind each, the rooms it may import.
_FACTS = {"errors", "units", "timeline", "machine", "model", "config"}
_STORAGE = _FACTS | {"planning", "backend", "kernels", "store"}
_DECODING = _STORAGE | {"pipeline", "cache"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "timeline": set(),
    "machine": {"errors", "units"},
    "model": {"errors", "units", "machine"},
    "config": {"errors", "machine"},
    "planning": _FACTS,
    "advise": _FACTS | {"planning"},
    "kernels": set(),
    "backend": _FACTS - {"model"},
    "store": _STORAGE - {"model", "store"},
    "pipeline": _STORAGE - {"model", "kernels"},
    "cache": _STORAGE - {"model"} | {"pipeline"},
    "profiler": _DECODING | {"advise"},
    "hf": _DECODING,
    "draft": _DECODING | {"hf"},
    "session": _DECODING | {"hf", "draft", "profiler"},
    "api": _FACTS | {"planning", "advise", "profiler", "session"},
    "__init__": _FACTS | {"planning", "session", "api"},
    "custom_generate": {"errors", "config", "api"},
    "bench": _DECODING | {"advise", "profiler", "hf", "session", "api"},
    "cli": _FACTS | {"planning", "advise", "profiler", "hf", "session", "api", "__init__", "custom_generate", "bench"},
}

# third-party package -> the only rooms that may import it
ONLY_IN: dict[str, set[str]] = {
    "pulp": {"planning"},
    "highspy": {"planning"},
    "triton": {"kernels"},
    "transformers": {"hf", "model", "cli", "bench"},  # the seam, facts, and the commands that load a model
    "typer": {"cli"},
    "plotly": {"profiler"},
}
# rooms that work without torch; of `model`, what reads stored facts does too (tests/test_stored_facts.py)
TORCH_FREE = {"errors", "units", "timeline", "machine", "config", "planning", "advise"}

# the only rooms that create streams, events or pinned memory
DEVICE_OWNERS = {"backend", "profiler"}
_DEVICE_CALLS = {
    f"torch.{prefix}{name}" for prefix in ("", "cuda.") for name in ("Stream", "Event", "ExternalStream")
} | {"torch.cuda.stream.Stream"}


def device_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that create a stream, an event or pinned memory. Annotations and isinstance checks are no calls."""
    full_name = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_name.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom):
            full_name.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        root, _, rest = ast.unparse(node.func).partition(".")
        name = full_name.get(root, root) + (f".{rest}" if rest else "")
        pins = any(
            keyword.arg == "pin_memory"
            and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            for keyword in node.keywords
        )
        if pins or name in _DEVICE_CALLS or name.endswith((".pin_memory", "cudaHostRegister", "cudaHostAlloc")):
            yield name


def violations(room: str, source: str) -> list[str]:
    """What `source`, as a file of `room`, does that it may not do there."""
    if room not in ALLOWED:
        return [f"{room} has no floor yet: give it one in ALLOWED and in docs/architecture.md"]
    tree = ast.parse(source)
    found = []
    for name in imported_names(tree):
        top, _, rest = name.partition(".")
        if top == "kvoffload":
            target = rest.partition(".")[0]
            if target not in ALLOWED:  # `from kvoffload import offload`: a name of the package itself
                target = "__init__"
            if target != room and target not in ALLOWED[room]:
                found.append(f"{room} may not import kvoffload.{target}")
        elif top in ("kernels", "profiler"):
            found.append(f"{room} imports a top-level `{top}`: write kvoffload.{top}")
        elif top == "torch" and room in TORCH_FREE:
            found.append(f"{room} must stay free of torch")
        elif room not in ONLY_IN.get(top, {room}):
            found.append(f"{room} may not import {top}, only {sorted(ONLY_IN[top])} may")
    if room not in DEVICE_OWNERS:
        found += [
            f"{room} may not call {name}: streams, events and pinned memory belong to {sorted(DEVICE_OWNERS)}"
            for name in device_calls(tree)
        ]
    return found


def test_every_import_runs_down_the_layers() -> None:
    found = {
        str(path.relative_to(PACKAGE.parent)): wrong
        for path in source_files()
        if (wrong := violations(room_of(path), path.read_text(encoding="utf-8")))
    }
    assert not found, "\n".join(f"{path}: {text}" for path, wrong in found.items() for text in wrong)


def test_the_allowed_edges_have_no_cycle() -> None:
    assert not circles(ALLOWED)


def test_no_file_is_in_a_circle_of_imports_also_inside_a_room_and_behind_type_checking() -> None:
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in source_files()}
    imported: dict[str, set[str]] = {}
    for name, path in files.items():
        imported[name] = set()
        for target in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
            while target and target not in files and f"{target}.__init__" not in files:
                target = target.rpartition(".")[0]
            if target and target != "kvoffload":
                imported[name].add(target if target in files else f"{target}.__init__")
    assert not circles(imported)


def circles(edges: Mapping[str, Iterable[str]]) -> set[str]:
    """What lies on a circle of `edges`, or between two."""
    left = {name: set(targets) for name, targets in edges.items()}
    while True:
        ends = {name for name, targets in left.items() if not targets & left.keys()}
        ends |= {name for name in left if not any(name in targets for targets in left.values())}
        if not ends:
            return set(left)
        for name in ends:
            del left[name]


def test_kernels_and_profiler_are_relative_links_to_the_folders_at_the_root() -> None:
    for name in ("kernels", "profiler"):
        link = PACKAGE / name
        assert link.is_symlink(), f"{link} must be a link to ../{name} (check out with core.symlinks=true)"
        assert str(link.readlink()) == f"../{name}"


def test_kernels_has_no_package_file() -> None:
    # with one, a process started in the repository finds it before the `kernels` that transformers imports
    assert not (PACKAGE.parent / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("room", "source", "message"),
    [
        ("store", "from kvoffload.pipeline.engine import Engine", "may not import kvoffload.pipeline"),
        ("store", "def f():\n    import kvoffload.pipeline.engine", "may not import kvoffload.pipeline"),
        ("store", "from kvoffload import pipeline", "may not import kvoffload.pipeline"),
        ("store", "from .pipeline import engine", "may not import kvoffload.pipeline"),
        ("store", "from . import pipeline", "may not import kvoffload.pipeline"),
        ("store", "import importlib\nimportlib.import_module('kvoffload.hf')", "may not import kvoffload.hf"),
        ("session", "from kvoffload import offload", "may not import kvoffload.__init__"),
        ("machine", "import kvoffload.config", "may not import kvoffload.config"),
        ("pipeline", "from kvoffload.kernels.reference import merge", "may not import kvoffload.kernels"),
        ("cache", "import kernels", "top-level `kernels`"),
        ("api", "from profiler.link import measure", "top-level `profiler`"),
        ("planning", "import torch.nn as nn", "free of torch"),
        ("advise", "import pulp", "may not import pulp"),
        ("session", "from transformers import Cache", "may not import transformers"),
        ("cache", "import triton.language as tl", "may not import triton"),
        ("utils", "", "no floor yet"),
        ("pipeline", "import torch\ns = torch.cuda.Stream()", "may not call torch.cuda.Stream"),
        ("pipeline", "from torch.cuda import Event as E\ne = E(enable_timing=True)", "may not call torch.cuda.Event"),
        ("pipeline", "import torch as t\nt.Event()", "may not call torch.Event"),
        ("cache", "import torch\ntorch.empty(4, pin_memory=True)", "may not call torch.empty"),
        ("cache", "def f(x):\n    return x.cpu().pin_memory()", "may not call x.cpu().pin_memory"),
    ],
)
def test_a_forbidden_line_is_found(room: str, source: str, message: str) -> None:
    found = violations(room, source)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cache", "from kvoffload.kernels import reference"),
        ("kernels", "import torch\nimport triton\nfrom kvoffload.kernels import reference"),
        ("backend", "from kvoffload.backend.base import Backend\nimport torch\ntorch.cuda.Stream()"),
        ("cli", "import kvoffload\nfrom kvoffload import offload\nimport transformers, typer"),
        ("pipeline", "import threading\nimport torch\nthreading.Event()\ndef f(s: torch.cuda.Stream): ..."),
        ("cache", "import torch\ntorch.empty(4, pin_memory=False)"),
        ("planning", "import pulp\nfrom kvoffload.planning.simulation import simulate"),
    ],
)
def test_an_allowed_line_is_left_alone(room: str, source: str) -> None:
    assert violations(room, source) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_the_picture_shows_the_imports_there_are() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert picture(room_imports()) in text, "run scripts/rooms.py"


def test_a_picture_leaves_out_what_a_longer_way_implies() -> None:
    edges = {"cli": {"cache", "store", "errors"}, "cache": {"store", "errors"}, "store": set(), "errors": set()}
    assert direct(edges) == {"cli": {"cache"}, "cache": {"store", "errors"}, "store": set(), "errors": set()}
    assert floors(edges) == [["errors", "store"], ["cache"], ["cli"]]
    assert picture(edges).splitlines()[2:-1] == ["  cli --> cache", "  cache --> store"]
    with pytest.raises(ValueError, match="in a circle"):
        floors({"a": {"b"}, "b": {"a"}})
