"""The folder where files are kept from one run to the next, and how they are written there.

Owns `$XDG_CACHE_HOME/kvoffload` and writing a file as a whole. Does not own what is kept (profiles, facts of models).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/kvoffload`, or `~/.cache/kvoffload` where that is unset or not absolute."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kvoffload"


def write_whole(path: Path, text: str) -> None:
    """Put `text` in a file of which a reader never sees half, whoever else writes it.

    Raises:
        OSError: its folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:20]}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
