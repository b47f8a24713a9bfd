"""Logits processors of transformers that a draft may apply.

Owns which: those whose result follows from the tokens and the scores alone, however often and in whatever order they
are called. A user's own, and those that keep a state, are called by `generate()` only, once for each token. One that is
missing here makes drafts worse, and changes no token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_PURE = {
    *("EncoderNoRepeatNGramLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor", "EpsilonLogitsWarper"),
    *("EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor"),
    *("ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization"),
    *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper"),
    *("NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor", "PLessLogitsWarper"),
    *("RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor"),
    *("SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper"),
    *("TopPLogitsWarper", "TypicalLogitsWarper"),
}

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def draft_processors(prepared: Iterable[Any], given: Iterable[Any]) -> list[Processor]:
    """Those of a call that a draft applies, in their order.

    Args:
        prepared: all processors of the call.
        given: those of the user among them.
    """
    own = {id(one) for one in given}
    return [
        one
        for one in prepared
        if id(one) not in own
        and type(one).__module__ == "transformers.generation.logits_process"
        and type(one).__name__ in _PURE
    ]
