"""Who may import whom. The map is that of docs/architecture.md; imports inside functions count as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvoffload"

_LAYER_0 = {"errors", "units", "system_memory", "datasheet", "quantities", "hardware_profile", "types", "timeline"}
_LAYER_1 = _LAYER_0 | {
    *("cache_folder", "model"),
    *("config", "rates", "cost", "simulation", "placement", "stats", "progress"),
}
_LAYER_2 = _LAYER_1 | {"planner", "sizing", "backend", "store", "positions", "carried", "ops"}
_LAYER_3 = _LAYER_2 | {"write_back", "chunks", "room", "transfer", "ways", "advice", "forecast", "verdict"}
_LAYER_4 = _LAYER_3 | {"tail", "agreement", "block_memory", "layer", "cache", "attention", "recompute"}
_LAYER_5 = _LAYER_4 | {"hf", "decide", "profiler"}

# module (a file, or a folder as a whole) -> the modules of ours it may import
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "system_memory": set(),
    "datasheet": {"errors"},
    "quantities": {"errors"},
    "hardware_profile": {"errors", "datasheet", "quantities"},
    "types": {"errors", "quantities", "hardware_profile"},
    "timeline": set(),
    "config": _LAYER_0,
    "options": _LAYER_0 | {"config"},
    "model_source": _LAYER_0,
    "cost": _LAYER_0 | {"rates", "simulation"},
    "rates": _LAYER_0,
    "simulation": _LAYER_0 | {"placement"},
    "cache_folder": set(),
    "model": _LAYER_0 | {"cache_folder"},
    "placement": _LAYER_0,
    "progress": _LAYER_0,
    "stats": _LAYER_0,
    "kernels": _LAYER_0,
    "planner": _LAYER_1,
    "sizing": _LAYER_1,
    "backend": _LAYER_1,
    "store": _LAYER_1 | {"backend"},  # host memory is allocated, and its events are recorded, through a backend
    "positions": _LAYER_1,
    "carried": _LAYER_1 | {"positions"},
    "ops": _LAYER_1 | {"kernels"},
    "write_back": _LAYER_2,
    "chunks": _LAYER_2,
    "room": set(),
    "transfer": _LAYER_2 | {"write_back", "chunks", "room"},
    "ways": _LAYER_2,
    "advice": _LAYER_2 | {"ways"},
    "forecast": _LAYER_2 | {"ways"},
    "verdict": _LAYER_2 | {"ways", "forecast"},
    "profiler": _LAYER_3,
    "tail": _LAYER_2,
    "block_memory": _LAYER_2 | {"tail"},
    "agreement": _LAYER_2 | {"tail"},
    "layer": _LAYER_3 | {"tail", "agreement", "block_memory"},
    "cache": _LAYER_3 | {"tail", "agreement", "layer"},
    "attention": _LAYER_3 | {"tail", "layer"},
    "recompute": _LAYER_3 | {"tail", "agreement"},
    "segments": _LAYER_4,
    "hf": _LAYER_4 | {"segments"},
    "measured_rates": _LAYER_2 | {"profiler"},
    "memory_limits": _LAYER_2,
    "decide": _LAYER_4 | {"measured_rates", "memory_limits"},
    "run": _LAYER_5,
    "decisions": _LAYER_5,
    "session": _LAYER_5 | {"run", "decisions"},
    "api": _LAYER_5 | {"run", "session"},
    "__init__": _LAYER_5 | {"run", "session", "api"},
    "custom_generate": _LAYER_0 | {"config", "api"},
    "bench": _LAYER_5 | {"run", "session", "api"},
    "chat": _LAYER_5 | {"run", "session", "api", "model_source"},
    "demo": _LAYER_5 | {"run", "session", "api", "bench", "chat", "model_source"},
    "report": _LAYER_5,
    "measured_run": _LAYER_5 | {"run", "session", "api", "bench"},
    "cli": _LAYER_5
    | {"run", "session", "api", "__init__", "custom_generate", "bench", "chat", "demo", "options", "model_source"}
    | {"report", "measured_run"},
}

# third-party package -> the only modules of ours that may import it
ONLY_IN: dict[str, set[str]] = {
    "pulp": {"planner"},
    "highspy": {"planner"},
    "triton": {"kernels"},
    "transformers": {"hf", "model", "cli", "bench", "chat"},  # the seam, facts, and the commands that load a model
    "typer": {"cli", "options"},
    "plotly": {"profiler"},
}
TORCH_FREE = (_LAYER_1 - {"model"}) | {  # facts of a model are learned with it, and read without (test_stored_facts)
    *("options", "model_source", "planner", "sizing", "ways", "advice", "forecast", "verdict"),
}

# the only modules that create streams, events or pinned memory
DEVICE_OWNERS = {"backend", "store", "profiler"}
_DEVICE_CALLS = {
    f"torch.{prefix}{name}" for prefix in ("", "cuda.") for name in ("Stream", "Event", "ExternalStream")
} | {"torch.cuda.stream.Stream"}


def module_of(path: Path) -> str:
    """`kvoffload/store.py` -> "store", `kvoffload/kernels/pack.py` -> "kernels"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def source_files() -> list[Path]:
    """Every source file as it is imported, `kernels/` and `profiler/` through their links."""
    folders = [PACKAGE, *(path for path in sorted(PACKAGE.iterdir()) if path.is_dir())]
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Full dotted name of everything imported; literal `import_module("x")` and `__import__("x")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "kvoffload." * bool(node.level) + (f"{node.module}." if node.module else "")
            yield from (prefix + alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


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


def violations(module: str, source: str) -> list[str]:
    """What `source`, as a file of `module`, does that its layer may not do."""
    if module not in ALLOWED:
        return [f"{module} has no layer yet: give it one in ALLOWED and in docs/architecture.md"]
    tree = ast.parse(source)
    found = []
    for name in imported_names(tree):
        top, _, rest = name.partition(".")
        if top == "kvoffload":
            target = rest.partition(".")[0]
            if target not in ALLOWED:  # `from kvoffload import offload`: a name of the package itself
                target = "__init__"
            if target != module and target not in ALLOWED[module]:
                found.append(f"{module} may not import kvoffload.{target}")
        elif top in ("kernels", "profiler"):
            found.append(f"{module} imports a top-level `{top}`: write kvoffload.{top}")
        elif top == "torch" and module in TORCH_FREE:
            found.append(f"{module} must stay free of torch")
        elif module not in ONLY_IN.get(top, {module}):
            found.append(f"{module} may not import {top}, only {sorted(ONLY_IN[top])} may")
    if module not in DEVICE_OWNERS:
        found += [
            f"{module} may not call {name}: streams, events and pinned memory belong to {sorted(DEVICE_OWNERS)}"
            for name in device_calls(tree)
        ]
    return found


def test_every_import_runs_down_the_layers() -> None:
    found = {
        str(path.relative_to(PACKAGE.parent)): wrong
        for path in source_files()
        if (wrong := violations(module_of(path), path.read_text(encoding="utf-8")))
    }
    assert not found, "\n".join(f"{path}: {text}" for path, wrong in found.items() for text in wrong)


def test_the_allowed_edges_have_no_cycle() -> None:
    left = {module: set(targets) for module, targets in ALLOWED.items()}
    while left:
        free = [module for module, targets in left.items() if not targets & left.keys()]
        assert free, f"cycle among {sorted(left)}"
        for module in free:
            del left[module]


def test_kernels_and_profiler_are_relative_links_to_the_folders_at_the_root() -> None:
    for name in ("kernels", "profiler"):
        link = PACKAGE / name
        assert link.is_symlink(), f"{link} must be a link to ../{name} (check out with core.symlinks=true)"
        assert str(link.readlink()) == f"../{name}"


def test_kernels_has_no_package_file() -> None:
    # with one, a process started in the repository finds it before the `kernels` that transformers imports
    assert not (PACKAGE.parent / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("store", "from kvoffload.transfer import Engine", "may not import kvoffload.transfer"),
        ("store", "def f():\n    import kvoffload.transfer", "may not import kvoffload.transfer"),
        ("store", "from kvoffload import transfer", "may not import kvoffload.transfer"),
        ("store", "from .transfer import Engine", "may not import kvoffload.transfer"),
        ("store", "from . import transfer", "may not import kvoffload.transfer"),
        ("store", "import importlib\nimportlib.import_module('kvoffload.hf')", "may not import kvoffload.hf"),
        ("session", "from kvoffload import offload", "may not import kvoffload.__init__"),
        ("types", "import kvoffload.config", "may not import kvoffload.config"),
        ("transfer", "from kvoffload.kernels.reference import merge", "may not import kvoffload.kernels"),
        ("ops", "import kernels", "top-level `kernels`"),
        ("api", "from profiler.link import measure", "top-level `profiler`"),
        ("planner", "import torch.nn as nn", "free of torch"),
        ("cost", "import pulp", "may not import pulp"),
        ("session", "from transformers import Cache", "may not import transformers"),
        ("ops", "import triton.language as tl", "may not import triton"),
        ("utils", "", "no layer yet"),
        ("transfer", "import torch\ns = torch.cuda.Stream()", "may not call torch.cuda.Stream"),
        ("transfer", "from torch.cuda import Event as E\ne = E(enable_timing=True)", "may not call torch.cuda.Event"),
        ("transfer", "import torch as t\nt.Event()", "may not call torch.Event"),
        ("cache", "import torch\ntorch.empty(4, pin_memory=True)", "may not call torch.empty"),
        ("cache", "def f(x):\n    return x.cpu().pin_memory()", "may not call x.cpu().pin_memory"),
    ],
)
def test_a_forbidden_line_is_found(module: str, source: str, message: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops", "from kvoffload.kernels import reference"),
        ("kernels", "import torch\nimport triton\nfrom kvoffload.kernels import reference"),
        ("backend", "from kvoffload.backend.base import Backend\nimport torch\ntorch.cuda.Stream()"),
        ("cli", "import kvoffload\nfrom kvoffload import offload\nimport transformers, typer"),
        ("transfer", "import threading\nimport torch\nthreading.Event()\ndef f(s: torch.cuda.Stream): ..."),
        ("cache", "import torch\ntorch.empty(4, pin_memory=False)"),
        ("planner", "import pulp\nfrom kvoffload.cost import simulate"),
    ],
)
def test_an_allowed_line_is_left_alone(module: str, source: str) -> None:
    assert violations(module, source) == []
