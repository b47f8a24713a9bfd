"""A call of a model's forward for the next token of each row, and the calls that several tokens make of it.

Owns what of such a call depends on which tokens it is for, so that a model is asked for a draft, or for some tokens
together, as `generate()` would ask it for the next one. Does not own which tokens these are (`kvoffload/draft/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers.generation.configuration_utils import GenerationMode

from kvoffload.hf.arguments import CACHE_NAMES, given_cache

ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # ways to decode that ask for the next token alone
# What says the same for any number of tokens.
_ALIKE = {*CACHE_NAMES, "use_cache", "return_dict", "tokenizer"}


class DecodeCall(NamedTuple):
    """The call, of which nothing but the tokens changes."""

    inputs: Mapping[str, Any]
    token: torch.Tensor  # [rows, 1]
    cache: Any
    last: torch.Tensor | None = None  # positions [..., rows, 1] beyond which no token stands; None: anywhere

    @classmethod
    def of(cls, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> DecodeCall | str | None:
        """The call that a model's forward was given; why it cannot be made for several tokens, or None: for no token.

        Args:
            args: positional arguments.
            inputs: named ones.
        """
        token = inputs.get("input_ids")
        if not isinstance(token, torch.Tensor) or token.dim() != 2 or token.shape[1] != 1:
            return None
        if args:
            return "the model is called with arguments by position"
        for name, value in inputs.items():
            if not _is_known(name, value):
                return f"the model is asked for or given {name}"
        return cls(inputs, token, given_cache((), inputs))

    def for_next(self, token: torch.Tensor, ahead: int) -> dict[str, Any]:
        """The same for one token, [rows, 1], that is so many behind this one."""
        return self._inputs(token, ahead)

    def for_all(self, tokens: torch.Tensor) -> dict[str, Any]:
        """The same for this token and those that follow it, [rows, tokens] in all."""
        inputs = self._inputs(tokens, 0)
        if inputs.get("logits_to_keep") is not None:
            inputs["logits_to_keep"] = tokens.shape[1]
        return inputs

    @property
    def has_positions(self) -> bool:
        """Whether the model is told where its tokens stand, so that rows may stand at different places."""
        return isinstance(self.inputs.get("position_ids"), torch.Tensor)

    def by_rows(
        self, leads: Sequence[int], unused: Sequence[int], asked: int, stored: int, limit: int | None
    ) -> DecodeCall:
        """The same for a next token that stands at another place in each row.

        Args:
            leads: tokens of each row that are cached beyond those of the shortest one.
            unused: slots in front of each row's tokens, behind those that are stored in blocks; (): none.
            asked: tokens that every row has.
            stored: of these, those in blocks.
            limit: tokens that a row ever has: those beyond stand where the last one does, and mean nothing.
        """
        rows, device = self.token.shape[0], self.token.device
        given = self.inputs.get("attention_mask")
        if given is None:
            given = torch.ones(rows, asked + 1, dtype=torch.long, device=device)
        unused = unused or (0,) * rows
        mask = given.new_ones(rows, asked + max(leads) + 1)
        mask[:, :stored] = given[:, :stored]
        for row, skipped in enumerate(unused):
            begin = stored + skipped
            mask[row, stored:begin] = 0
            mask[row, begin : begin + asked - stored] = given[row, stored:asked]
        ahead = torch.tensor(leads, device=device).unsqueeze(-1)
        positions = self.inputs["position_ids"]
        last = None if limit is None else positions + max(0, limit - 1 - asked)
        return self._replace(
            inputs={**self.inputs, "attention_mask": mask, "position_ids": positions + ahead}, last=last
        )

    def _inputs(self, tokens: torch.Tensor, ahead: int) -> dict[str, Any]:
        inputs = dict(self.inputs, input_ids=tokens)
        count = tokens.shape[1]
        if (mask := inputs.get("attention_mask")) is not None:
            more = ahead + count - 1
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], more)], dim=1) if more else mask
        if (positions := inputs.get("position_ids")) is not None:
            positions = positions + torch.arange(ahead, ahead + count, device=positions.device)
            inputs["position_ids"] = positions if self.last is None else torch.minimum(positions, self.last)
        return inputs


def _is_known(name: str, value: Any) -> bool:
    if value is None or value is False or name in _ALIKE:
        return True
    if name == "input_ids":
        return True
    if name == "attention_mask":
        return isinstance(value, torch.Tensor) and value.dim() == 2
    if name == "position_ids":
        return isinstance(value, torch.Tensor) and value.shape[-1] == 1
    return name == "logits_to_keep" and type(value) is int


def logits_of(output: Any) -> torch.Tensor:
    """Of the tokens of a call, [rows, tokens, vocabulary]."""
    logits: torch.Tensor = output.logits
    return logits


def output_for(output: Any, index: int, count: int) -> Any:
    """What a model returned for `count` tokens, as if it had been asked for one of them.

    Args:
        output: of the forward.
        index: of the token among those.
        count: of the tokens.
    """
    logits = logits_of(output)
    start = logits.shape[1] - count + index
    return output_with(output, logits[:, start : start + 1])


def output_with(output: Any, logits: torch.Tensor) -> Any:
    """What a model returned, with other logits."""
    return type(output)(**{**output, "logits": logits})
