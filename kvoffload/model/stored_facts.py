"""Facts of models as they are asked for: from memory, from a file of an earlier run, else learned and kept.

Owns the files, one per configuration and release of transformers, and when they are made anew. Does not own how facts
are learned (`learn`), nor the folder (`cache_folder`). Facts that are kept need neither torch nor transformers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from kvoffload.machine.cache_folder import cache_folder, write_whole
from kvoffload.model.facts import SCHEMA, Facts
from kvoffload.model.fields import contents, dtype_name, itemsize_bytes

logger = logging.getLogger(__name__)
_SAYS_NOTHING = ("_name_or_path", "transformers_version")  # of the sizes of a model


def facts_of(config: Any, dtype: Any = None) -> Facts:
    """Everything known of the size of the model that `config` describes.

    The first time a configuration is met transformers builds its class without memory, which takes seconds; what was
    learned is kept in a file.

    Args:
        config: a transformers configuration object, the dict of a `config.json`, or a path to such a file or to the
            folder it is in.
        dtype: of weights, K/V and activations: a torch dtype or its name; by default what the configuration says.

    Raises:
        ConfigError: there is no such file, transformers refuses it, or the dtype is unknown.
        UnsupportedModelError: no decoder with a cache.
    """
    text = _text_of(config)
    found = _facts(text, facts_path(text))
    return found if dtype is None else found.in_dtype(itemsize_bytes(dtype), dtype_name(dtype))


def is_known(config: Any) -> bool:
    """Whether nothing has to be learned for this configuration; arguments and errors as of `facts_of`."""
    return facts_path(_text_of(config)).exists()


def facts_path(text: str) -> Path:
    """The file of a configuration, given as canonical JSON, with the installed release of transformers."""
    kind = str(json.loads(text).get("model_type") or "model")
    digest = hashlib.sha256(f"{SCHEMA} {_release()} {text}".encode()).hexdigest()
    slug = re.sub(r"[^a-z0-9.]+", "-", kind.lower())[:40]
    return cache_folder() / "models" / f"{slug}-{digest[:24]}.json"


@functools.lru_cache(maxsize=64)
def _facts(text: str, path: Path) -> Facts:
    kept = _kept(path)
    if kept is not None:
        return kept
    from kvoffload.model.learn import is_of_transformers, learned

    said = json.loads(text)
    found = learned(said)
    if is_of_transformers(said):
        _keep(found, path)
    return found


def _text_of(config: Any) -> str:
    said = {name: value for name, value in contents(config).items() if name not in _SAYS_NOTHING}
    return json.dumps(said, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """What a configuration object holds beside plain data: settings of a quantisation, names, types."""
    return value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", str(value))


def _kept(path: Path) -> Facts | None:
    """What an earlier run kept; None where there is nothing that can be used."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["digest"] != _digest(data["facts"]):
            raise ValueError("it was changed after it was written")
        return Facts.from_json(data["facts"])
    except OSError:  # not there yet, or not for us to read
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("the facts of a model kept in %s are damaged (%s): made anew", path, error)
        return None


def _keep(facts: Facts, path: Path) -> None:
    """For the next run; a folder that cannot be written is no reason to stop this one."""
    data = json.loads(json.dumps(facts.to_json()))
    try:
        write_whole(path, json.dumps({"digest": _digest(data), "facts": data}, indent=1) + "\n")
    except OSError as error:
        logger.info("could not keep the facts of a model in %s (%s): they will be learned again", path, error)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _release() -> str:
    """That of the transformers that would be imported, without importing it."""
    imported = sys.modules.get("transformers")
    if imported is not None:
        return str(imported.__version__)
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return "none"
    found = re.search(r"^__version__ *= *[\"'](.+)[\"']", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else str(Path(spec.origin).stat().st_mtime_ns)
