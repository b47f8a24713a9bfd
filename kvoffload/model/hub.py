"""Whether the hub, or the local cache of it, has a model: asked once, without the retries of a download."""

from __future__ import annotations

from typing import Literal

HUB_TIMEOUT_S = 5.0

Answer = Literal["is there", "does not have it", "was not reached", "is switched off (HF_HUB_OFFLINE)"]


def ask_hub(model: str) -> Answer:
    """One request for OWNER/NAME; of a broken connection it says so after seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        return "does not have it"
    except OfflineModeIsEnabled:
        return "is switched off (HF_HUB_OFFLINE)"
    except Exception:  # whatever the hub's HTTP library, which changes, calls a broken connection: the cache may do
        return "was not reached"
    return "is there"


def cached_file(model: str, *names: str) -> str | None:
    """The path in the local cache of the first of some files that is there; None: none is."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(model, name) for name in names)
    return next((path for path in found if isinstance(path, str)), None)
