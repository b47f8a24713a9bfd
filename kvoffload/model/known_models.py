"""Well-known models by name: the sizes that their configurations have, so that a plan needs no file.

Owns the names and what is near one. The dimensions in known_models.json are facts that the makers of the models have
published, written in the names of a `config.json`; what follows from them comes from transformers' class as ever.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_suffix(".json")
# What a hub id has beside the name of a size: its owner, and how the model was trained further.
_OWNER = re.compile(r"^[\w.-]+/")
_TRAINED = re.compile(r"-(instruct|chat|base|hf|it)(?=-|$)|-v0\.\d+$|^meta-(?=llama)")


def known_models() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(_models()))


def known_model(name: str) -> dict[str, Any] | None:
    """The configuration that a name stands for; None: there is none.

    Args:
        name: such as "llama-3.1-8b"; case, the owner of a hub id and endings such as "-Instruct" do not count.
    """
    found = _models().get(_plain(name))
    return None if found is None else dict(found)


def near_models(name: str) -> list[str]:
    """Known names that are like this one, the nearest first."""
    plain = _plain(name)
    within = [known for known in known_models() if plain and plain in known]
    return within or difflib.get_close_matches(plain, known_models(), cutoff=0.6)


def _plain(name: str) -> str:
    plain = _OWNER.sub("", name.strip()).lower().replace("_", "-")
    return _TRAINED.sub("", _TRAINED.sub("", plain))


@lru_cache(maxsize=1)
def _models() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return models
