"""A loop of one's own around a model and a cache, as tests play it with a plain cache and with ours."""

from __future__ import annotations

from typing import Any

import torch
from modes import PROMPT_TOKENS, given, padded_prompt, prompt
from transformers import PreTrainedModel


class Chat:
    """Feeds a model with masks and positions, and keeps the logits of each forward.

    Args:
        model: fed.
        cache: it is given in every forward.
        rows: of the batch.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, rows: int) -> None:
        self.model, self.cache, self.mask = model, cache, torch.ones(rows, 0, dtype=torch.long)
        self.logits: list[torch.Tensor] = []

    def feed(self, tokens: int = PROMPT_TOKENS, *, is_padded: bool = False, seed: int = 1) -> None:
        """More tokens; padded on the left, each row by another length."""
        rows = self.mask.shape[0]
        ids, mask = prompt(rows, tokens, seed), torch.ones(rows, tokens, dtype=torch.long)
        if is_padded:
            ids, mask = padded_prompt(rows, tokens, seed).values()
        self.mask = torch.cat([self.mask, mask], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        out = self.model(ids, attention_mask=self.mask, position_ids=positions, **given(self.cache))
        self.logits.append(out.logits[:, -1])

    def go_on(self, steps: int) -> None:
        for step in range(steps):
            self.feed(1, seed=step)

    def reorder(self, *rows: int) -> None:
        self.cache.reorder_cache(torch.tensor(rows))
        self.mask = self.mask[list(rows)]

    def select(self, *rows: int) -> None:
        self.cache.batch_select_indices(torch.tensor(rows))
        self.mask = self.mask[list(rows)]

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, 0)

    def crop(self, tokens: int) -> None:
        self.cache.crop(-tokens)
        self.mask = self.mask[:, :-tokens]
