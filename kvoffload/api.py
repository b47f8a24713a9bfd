"""The public functions."""

from __future__ import annotations

from typing import Any

from kvoffload.config import OffloadConfig
from kvoffload.session import Session


def offload(model: Any, config: OffloadConfig | None = None) -> Session:
    """Keep the KV cache of a transformers decoder in host memory while it generates.

    Use it as a context manager, or keep the session and `close()` it; afterwards the model is as before.

    Args:
        model: a decoder-only transformers model on one device (also inside PEFT or torch.compile wrappers).
        config: options; all "auto" by default.

    Returns:
        The session: `session.stats` of the last `generate()`, `session.new_cache()`, `session.close()`.

    Raises:
        UnsupportedModelError: the model cannot be offloaded correctly.
        KVOffloadError: it is offloaded already.
    """
    return Session(model, config or OffloadConfig())


def generate(model: Any, *args: Any, offload_config: OffloadConfig | None = None, **kwargs: Any) -> Any:
    """`model.generate(*args, **kwargs)` with the KV cache in host memory, for a single call.

    Raises:
        as `offload`, and whatever `generate` raises.
    """
    with offload(model, offload_config):
        return model.generate(*args, **kwargs)
