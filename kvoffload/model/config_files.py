"""Where the configuration of a model is that a text names.

    a file, a folder      that one
    a hub id              the local Hugging Face cache
    a well-known name     the sizes in this package (`known_models`)
    a hub id              on the hub: its config.json alone, asked once

Owns the order and the message where none has it. Does not own what a configuration says (`fields`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvoffload.errors import ConfigError
from kvoffload.model.hub import ask_hub, cached_file
from kvoffload.model.known_models import known_model, known_models, near_models

_NO_FILE = (
    "there is no such file; name a config.json or the folder it is in "
    "(`hf download OWNER/NAME config.json --local-dir FOLDER` gets that of a model on the hub)"
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_configuration(name: str | Path) -> Mapping[str, Any]:
    """The contents of the configuration that a text names.

    Args:
        name: a `config.json`, the folder it is in, a well-known name such as "llama-3.1-8b", or a hub id.

    Raises:
        ConfigError: there is none, or it holds no configuration; says where it was looked for and what is near.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        raise ConfigError(
            f"{path} is a GGUF file, whose configuration is not read here: name a config.json, the folder it is in, or "
            "a size by name"
        )
    if path.exists():
        return _read(path / "config.json" if path.is_dir() else path)
    text = str(name)
    is_hub_id = _HUB_ID.fullmatch(text) is not None and path.suffix != ".json"
    if is_hub_id and (cached := cached_file(text, "config.json")) is not None:
        return _read(Path(cached))
    if (known := known_model(text)) is not None:
        return known
    answer = ask_hub(text) if is_hub_id else None
    if answer == "is there":
        return _read(_fetched(text))
    raise ConfigError(_nowhere(text, path, answer))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"cannot read the model configuration {path}: {_NO_FILE}") from error
    except OSError as error:
        raise ConfigError(f"cannot read the model configuration {path}: {error}") from error
    except ValueError as error:  # no text, or text that is something else
        raise ConfigError(f"cannot read the model configuration {path}: it is no JSON ({error})") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} is not a model configuration: it holds a {type(data).__name__}, not an object")
    return data


def _fetched(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, OSError) as error:  # gated, say
        raise ConfigError(f"the hub does not give the config.json of {name}: {error}") from error


def _nowhere(text: str, path: Path, answer: str | None) -> str:
    said = f"cannot read the model configuration {path}: {_NO_FILE}"
    if path.suffix == ".json" or text.startswith((".", "/", "~")):
        return said
    near = near_models(text)
    hint = f"near: {', '.join(near)}" if near else f"known: {', '.join(known_models())}"
    hub = "" if answer is None else f"; the hub {answer}"
    return f"{said}, or a size by name ({hint}){hub}"
