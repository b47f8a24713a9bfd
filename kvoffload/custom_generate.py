"""What a `custom_generate/` folder of transformers calls, and writing such a folder.

With one, tools that know nothing of kvoffload run it: transformers loads `FOLDER/custom_generate/generate.py` for
`model.generate(..., custom_generate=FOLDER, trust_remote_code=True)`, and puts it in the place of `generate` of a model
that was loaded with `from_pretrained(FOLDER, trust_remote_code=True)`. Each call is a session of its own.
"""

from __future__ import annotations

import logging
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvoffload.api import offload
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError

logger = logging.getLogger(__name__)
MARK = '"""generate() with the KV cache in host memory, written by `kvoffload custom-generate`.'
SOURCE = f'''{MARK}

transformers runs it for model.generate(..., custom_generate=FOLDER, trust_remote_code=True), and for models loaded with
from_pretrained(FOLDER, trust_remote_code=True). It needs the package kvoffload.
"""

import kvoffload.custom_generate

# Of kvoffload.OffloadConfig; offload_config= of a call goes before.
OPTIONS = {{options}}


def generate(*args, model, **kwargs):
    """As model.generate."""
    return kvoffload.custom_generate.generate(*args, model=model, options=OPTIONS, **kwargs)
'''


def generate(
    *args: Any,
    model: Any,
    options: Mapping[str, Any] | None = None,
    offload_config: OffloadConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(*args, **kwargs)` of its class, with the KV cache in host memory.

    Inside a session of this model, and for an assistant that drafts, it is the plain one of the class.

    Args:
        args: of `generate`.
        model: a transformers model; transformers passes it by name.
        options: of `OffloadConfig`, by name.
        offload_config: instead of `options`.
        kwargs: of `generate`.

    Raises:
        ConfigError: an option that does not exist or makes no sense, or any for a model that is offloaded already.
        UnsupportedModelError: the model cannot be offloaded correctly.
    """
    if "_kvoffload_session" in vars(model):
        if offload_config is not None:
            raise ConfigError("offload_config= has no effect on a model that is offloaded already: leave it out")
        return type(model).generate(model, *args, **kwargs)
    if getattr(kwargs.get("generation_config"), "is_assistant", False):
        return type(model).generate(model, *args, **kwargs)
    chosen = (options or {}) if offload_config is None else offload_config
    if isinstance(chosen, Mapping):
        chosen = OffloadConfig.from_json(chosen)
    with offload(model, chosen) as session:
        # What the session shadows may be this very function, as the `generate` of a model loaded with it: the call
        # then comes back here, finds the session, and goes on to the class.
        output = model.generate(*args, **kwargs)
    logger.info("%s", session.stats)
    return output


def write(folder: Path | str, config: OffloadConfig | None = None, *, force: bool = False) -> Path:
    """Write `custom_generate/generate.py` into a folder, which may be that of a model.

    Args:
        folder: made if it is not there.
        config: what the calls use.
        force: also over a file of ours with other options, or that was edited.

    Returns:
        The file.

    Raises:
        ConfigError: another one stands there, or without `force` one of ours that differs; the folder cannot be
            written, or `config` holds what a file cannot.
    """
    path = Path(folder) / "custom_generate" / "generate.py"
    options = pprint.pformat((config or OffloadConfig()).to_json(), sort_dicts=False)
    content = SOURCE.replace("{options}", options).encode()
    try:
        present = path.read_bytes() if path.exists() else content
        if not present.startswith(MARK.encode()):
            raise ConfigError(f"{path} is not from kvoffload: choose another folder, or remove it")
        if present != content and not force:
            raise ConfigError(f"{path} has other options or was edited: keep it, or write it anew with --force")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another folder") from error
    return path
