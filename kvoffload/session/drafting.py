"""Verified drafts in one `generate()`: whether they can serve it, what stands in for the model, and what is told.

Owns the stand-ins on the model during the call, and the limits on how many tokens go together. Does not own a round
(`kvoffload/draft/`), nor the cache or the calls of `generate()` (`generate_calls`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvoffload import hf
from kvoffload.backend import Backend
from kvoffload.draft.lengths import Lengths
from kvoffload.draft.rounds import Rounds, Rule
from kvoffload.draft.row_rounds import RowRounds
from kvoffload.errors import ConfigError


class Drafting:
    """Of one `generate()`; ends with `close`.

    Args:
        model: the model.
        cache: of the call, planned.
        backend: of the session.
        generation_config: of the call, as transformers prepared it.
        lengths: how many tokens are drafted.
        is_asked_for: whether the user gave a number, so that what cannot be served is an error.
        before_pass: told when a pass begins, with how many drafts.
        switch: lets drafts read the other near cache from now on; whether that is possible.
        own_pace: whether rows go at their own pace where the cache can.
    """

    def __init__(
        self,
        model: Any,
        cache: hf.OffloadedHFCache,
        backend: Backend,
        generation_config: Any,
        lengths: Lengths,
        *,
        is_asked_for: bool,
        before_pass: Callable[[int], None],
        switch: Callable[[], bool],
        own_pace: bool,
    ) -> None:
        self.reason: str | None = None  # why tokens were decoded one by one
        self.lengths = lengths
        self._could_draft = False  # more than one token was left to decode, in some round
        self._cache, self._is_asked_for, self._switch = cache, is_asked_for, switch
        self._rotations = hf.changing_rotations(model.config)
        self._is_settled = False
        shadowed = {"forward": self._forward, "_get_logits_processor": self._processors}
        rule = _rule(generation_config, backend.device)
        self._shadows = hf.Shadows(model, shadowed)
        self.rounds: Rounds | None = (RowRounds if own_pace else Rounds)(
            self._shadows.originals["forward"],
            cache,
            backend,
            rule=rule,
            length=self._length,
            before_pass=before_pass,
            report=lengths.note,
            refuse=self._refuse,
        )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rounds is None:  # another thread was on its way into the model when the call ended
            return self._shadows.originals["forward"](*args, **kwargs)
        return self.rounds(*args, **kwargs)

    def _processors(self, *args: Any, **kwargs: Any) -> Any:
        prepared = self._shadows.originals["_get_logits_processor"](*args, **kwargs)
        given = kwargs.get("logits_processor") or ()
        assert self.rounds is not None
        self.rounds.rule = self.rounds.rule._replace(processors=hf.draft_processors(prepared, given))
        return prepared

    def _length(self, call: hf.DecodeCall) -> int:
        """How many tokens to draft now."""
        core = self._cache.core
        if not self._is_settled:
            self._is_settled = True
            if not all(layer.is_segmented for layer in core.layers):
                self._refuse("its attention puts whole layers together on the device (attention over segments cannot)")
            elif (reason := self._cache.why_not_croppable()) is not None:
                self._refuse(reason)
        if self.reason is not None:
            return 0
        cached, limit = core.layers[0].num_tokens - (self._cache.tokens_ahead or 0), core.placement.max_tokens
        most = self.lengths.most
        if limit is not None:
            most = min(most, limit - cached - 1)
            if self.lengths.wants_other(limit - cached) and self._switch():
                self.lengths.switch()
        if self._rotations:
            positions = call.inputs.get("position_ids")
            first = cached if positions is None else int(positions.max())
            for rotation in self._rotations:
                together = rotation.most_together(first)
                most = most if together is None else min(most, together - 1)
        self._could_draft |= most > 0
        return self.lengths.next(max(0, most))

    @property
    def why_none_yet(self) -> str | None:
        """Why no token was drafted so far, or from some round on none; None where nothing kept it."""
        if self.reason is not None or self.rounds is None or self.rounds.num_drafted:
            return self.reason
        return "a plain step was never expected to be slower" if self._could_draft else "too few tokens were left"

    def _refuse(self, reason: str) -> None:
        """This call is not served by drafts.

        Raises:
            ConfigError: a number of drafts was asked for.
        """
        if self._is_asked_for:
            raise cannot_draft(self.lengths.most, reason)
        self.reason = self.reason or reason

    def close(self) -> None:
        """Give the model its own methods back; it is not used any more."""
        self._shadows.remove()
        self.rounds = None  # they know each other, and the cache would live until the next collection

    def settle(self) -> None:
        """The call is over, or stopped between two forwards: the cache is as plain decoding leaves it."""
        assert self.rounds is not None
        self.rounds.settle()
        self._cache.record_past(False)


def cannot_draft(number: int, reason: str) -> ConfigError:
    """Why a number of drafts cannot be served, and the way out."""
    return ConfigError(f"speculate={number} cannot serve this generate(): {reason}; use speculate='auto' or 'off'")


def _rule(generation_config: Any, device: torch.device) -> Rule:
    """How the call chooses tokens, as `_prepare_special_tokens` left its configuration."""
    eos = getattr(generation_config, "_eos_token_tensor", None)
    pad = getattr(generation_config, "_pad_token_tensor", None)
    if not isinstance(eos, torch.Tensor) or not isinstance(pad, torch.Tensor):
        return Rule(do_sample=bool(generation_config.do_sample))
    return Rule(do_sample=bool(generation_config.do_sample), pad=int(pad), eos=eos.to(device))
