"""A session: what a user holds of an offloaded model.

Owns what is public of it, and noticing that it was lost before it was closed. All that is attached to the model belongs
to `offloaded_model`, which does not refer to the session.
"""

from __future__ import annotations

import warnings
import weakref
from types import TracebackType
from typing import Any

from kvoffload import hf
from kvoffload.backend import Backend
from kvoffload.config import OffloadConfig
from kvoffload.errors import KVOffloadError
from kvoffload.session.offloaded_model import OffloadedModel, offloaded_model
from kvoffload.session.stats import GenerationStats
from kvoffload.timeline import Timeline


class Session:
    """One offloaded model, from `kvoffload.offload` or `kvoffload.load` until `close()`.

    A context manager: `with kvoffload.offload(model) as session:` closes it at the end. One that is lost without
    being closed gives a `ResourceWarning`; its model stays offloaded, and works, until `kvoffload.release(model)`.

    Attributes:
        model: the transformers model, without wrappers.
        config: the options it was offloaded with.

    Args:
        model: a decoder-only transformers model on one device (also inside PEFT or torch.compile wrappers).
        config: options.
        backend: for tests: in the place of the one that `config.link` names.

    Raises:
        UnsupportedModelError: the model cannot be offloaded correctly.
        KVOffloadError: it is offloaded already.
    """

    def __init__(self, model: Any, config: OffloadConfig, backend: Backend | None = None) -> None:
        self._offloaded = offloaded = OffloadedModel(model, config, backend)
        if config.fixed_drafts == 0 and config.draft_cache != "auto":
            warnings.warn(
                f"draft_cache={config.draft_cache!r} has no effect with speculate={config.speculate!r}, which makes no "
                "drafts: leave one of them out",
                stacklevel=3,
            )
        self.model, self.config = offloaded.model, config
        self.backend, self.engine, self.pool = offloaded.backend, offloaded.engine, offloaded.pool
        self.planner, self.progress = offloaded.planner, offloaded.progress
        lost = weakref.finalize(self, _warn_of_lost, type(self.model).__name__)
        lost.atexit = False  # at the end of the interpreter everything goes
        offloaded.on_close(lost.detach)

    @property
    def stats(self) -> GenerationStats | None:
        """What the last `generate()` took and moved; None before the first one has ended."""
        return self._offloaded.stats

    @property
    def is_closed(self) -> bool:
        """Whether the model is as before again."""
        return self._offloaded.is_closed

    @property
    def num_forwards(self) -> int:
        """Forwards of the model that came to the first offloaded layer so far."""
        return self.progress.forwards

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Leave the model as it was before, and give back all memory. A second call does nothing.

        After one that was interrupted the second call does what is left.

        Caches of this session cannot be used afterwards; `stats` can be read.
        """
        self._offloaded.close()

    def new_cache(self) -> hf.OffloadedHFCache:
        """An empty cache for a custom loop or several turns; pass it as `cache` (`past_key_values` up to 5.23).

        Returns:
            A transformers `Cache`. Its memory is given back when nobody holds it any more, or with the session.

        Raises:
            KVOffloadError: the session is closed.
        """
        return self._offloaded.new_cache()

    def record_timeline(self, is_wanted: bool = True) -> None:
        """From the next `generate()` on, keep what ran when, for `timeline`. Off by default; costs nothing then.

        While it is on a decode step takes a little longer: a reading of the clock, or two CUDA events, at every
        attention to a chunk. Only `generate()` is recorded, not a loop of your own over `new_cache()`.

        Args:
            is_wanted: False ends it, and frees what is kept.
        """
        self._offloaded.record_timeline(is_wanted)

    def timeline(self) -> Timeline:
        """What ran when in the last `generate()`, if `record_timeline` was called before; waits for the device.

        Returns:
            Copies, recomputation, attention and the rest, and where each decode step begins. Plain data, in seconds
            since that `generate()` began; the latest 200,000 stretches of it.

        Raises:
            KVOffloadError: nothing is recorded.
        """
        return self._offloaded.timeline()

    def __repr__(self) -> str:
        if self.is_closed:
            state = "closed, the model is as before"
        elif self.stats is None:
            state = "open, no generate() has ended yet: print(session.stats) after the first"
        else:
            state = "open, print(session.stats) says what the last generate() did"
        model, link = type(self.model).__name__, self.backend.link_name
        return f"<kvoffload.Session of {model} on {self.backend.device}, link {link}: {state}>"


def release(model: Any) -> bool:
    """Undo the `offload` of a model whose session is lost, or was not closed: the model is as before.

    As `session.close()` of that session, which is closed then. It may be called any number of times, as the first line
    of a notebook's cell, say.

    Args:
        model: as it was given to `kvoffload.offload`, or without its PEFT or torch.compile wrapper.

    Returns:
        Whether it was offloaded; False: there was nothing to undo.

    Raises:
        KVOffloadError: it is no model.
    """
    offloaded = offloaded_model(model)
    if offloaded is not None:
        offloaded.close()
        return True
    if not hasattr(model, "config") or not hasattr(model, "parameters"):
        way_out = "close() it" if isinstance(model, Session) else "give the model that was offloaded"
        raise KVOffloadError(f"a {type(model).__name__} is no model: {way_out}")
    return False


def _warn_of_lost(model_name: str) -> None:
    warnings.warn(
        f"a kvoffload session of a {model_name} was lost without close(): the model stays offloaded until "
        "kvoffload.release(model); `with kvoffload.offload(model):` closes by itself",
        ResourceWarning,
        stacklevel=2,
    )
