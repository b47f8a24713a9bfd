"""Whether one call of `generate()` is served by verified drafts, how many it drafts, and why not where it is not.

Owns that decision and its reason. Does not own the stand-ins on the model (`drafting`), a round (`draft/rounds`), nor
the call itself (`generate_calls`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvoffload import hf
from kvoffload.backend import Backend
from kvoffload.config import OffloadConfig
from kvoffload.draft.lengths import FixedLength, Lengths, PlannedLength
from kvoffload.session.drafting import Drafting, cannot_draft
from kvoffload.session.generation import DraftFigures
from kvoffload.session.generation_plan import GenerationPlan


class DraftedCall:
    """One call.

    Args:
        config: the user's options.
        has_own_loop: whether it was given a `custom_generate`.
    """

    def __init__(self, config: OffloadConfig, *, has_own_loop: bool = False) -> None:
        self._config = config
        self._reason = "custom_generate is a loop of its own" if has_own_loop else None
        self._drafting: Drafting | None = None

    @property
    def is_drafting(self) -> bool:
        """Whether the model's forward is answered from rounds."""
        return self._drafting is not None

    def is_wanted(
        self, generation_config: Any, generation_mode: Any, *, offers_segments: bool, has_hooks: Callable[[], bool]
    ) -> bool:
        """Whether the call can be served by drafts, before anything is planned for it.

        Args:
            generation_config: as transformers prepared it.
            generation_mode: what it comes to.
            offers_segments: whether attention over segments is installed on the model.
            has_hooks: whether somebody else has hooks on the model.

        Raises:
            ConfigError: a number of drafts was asked for, and the call cannot be served by them.
        """
        number = self._config.fixed_drafts
        if number == 0:
            self._reason = f"speculate={self._config.speculate!r}"
            return False
        reason = self._reason
        if generation_mode not in hf.ONE_BY_ONE:
            reason = f"{generation_mode.value.replace('_', ' ')} asks for more than the next token"
        elif number is None and generation_config.do_sample:
            reason = "tokens are sampled: 'auto' drafts for greedy decoding only, a number for both"
        elif number is None and has_hooks():
            reason = "hooks on the model would see drafts"
        elif not offers_segments:
            why = "attention='whole_layer'"
            if self._config.attention != "whole_layer":
                why = "the link has no speed, or the model's attention cannot take it in chunks"
            reason = f"its attention puts whole layers together on the device: {why}"
        if number is not None and reason is not None:
            raise cannot_draft(number, reason)
        self._reason = reason
        return reason is None

    def start(
        self,
        model: Any,
        cache: hf.OffloadedHFCache,
        backend: Backend,
        generation_config: Any,
        chosen: GenerationPlan | None,
        before_pass: Callable[[int], None],
        switch: Callable[[], bool],
    ) -> None:
        """From the next forward on the call is answered from rounds, if its plan has them.

        Args:
            model: the model.
            cache: of the call.
            backend: of the session.
            generation_config: as transformers prepared it.
            chosen: what is planned for the cache; None: nothing yet.
            before_pass: told when a pass begins, with how many drafts.
            switch: lets drafts read the other near cache; whether that is possible.
        """
        is_one_by_one = generation_config.do_sample or hf.changing_rotations(model.config)
        own_pace = cache.core.rows > 1 and not is_one_by_one
        number, lengths = self._config.fixed_drafts, self._lengths(chosen, own_pace=own_pace)
        if lengths is not None:
            self._drafting = Drafting(
                model,
                cache,
                backend,
                generation_config,
                lengths,
                is_asked_for=number is not None,
                before_pass=before_pass,
                switch=switch,
                own_pace=own_pace,
            )

    def _lengths(self, chosen: GenerationPlan | None, *, own_pace: bool) -> Lengths | None:
        """How many tokens rounds draft; None where they are not expected to gain."""
        number = self._config.fixed_drafts
        if number is not None:
            return FixedLength(number)
        if chosen is None or chosen.inputs is None:
            self._reason = "nothing is known that predicts what drafts gain (a link without a speed, or a fixed split)"
            return None
        if chosen.round_times is None:
            self._reason = chosen.no_drafts_reason or "not expected to gain anything here"
            return None
        if self._config.deterministic:
            return FixedLength(chosen.expected_drafts)
        times, other = (
            one if own_pace or one is None else replace(one, paced_rows=1)
            for one in (chosen.round_times, None if chosen.other is None else chosen.other.round_times)
        )
        assert times is not None
        return PlannedLength(times, chosen.geometry.rows, other)

    def note_prefix(self, input_ids: Any) -> None:
        """The tokens of each row so far, as processors see them."""
        if self._drafting is not None and self._drafting.rounds is not None:
            self._drafting.rounds.prefix = input_ids

    def settle(self) -> None:
        """The loop is over, or stopped between two forwards: the cache is as plain decoding leaves it."""
        if self._drafting is not None:
            self._drafting.settle()

    def figures(self, chosen: GenerationPlan) -> DraftFigures:
        """What drafts did, before `close`."""
        if self._drafting is None or self._drafting.rounds is None:
            return DraftFigures(reason=self._reason)
        rounds = self._drafting.rounds
        return DraftFigures(
            rounds.num_asked,
            rounds.num_passes,
            rounds.num_drafted,
            rounds.acceptance,
            tuple(rounds.survivals),
            chosen.round_times,
            self._drafting.why_none_yet,
            chosen.geometry.shadow_form or "window",
        )

    def close(self) -> None:
        """Give the model its own methods back."""
        drafting, self._drafting = self._drafting, None
        if drafting is not None:
            drafting.close()
