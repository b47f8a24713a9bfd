"""How the next token is chosen on the command line: greedily, or drawn from what the model predicts.

Owns the options for it and what `generate()` of transformers is told. Torch-free.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, NamedTuple

import typer

from kvoffload.cli.options import whole_number, within
from kvoffload.errors import ConfigError

PANEL = "Choosing tokens"

Temperature = Annotated[
    float | None,
    typer.Option(
        callback=within(0, 100, "a number"),
        rich_help_panel=PANEL,
        help="Sample, flatter above 1; 0 is greedy. Default: greedy.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        callback=within(0, 1, "a share"),
        rich_help_panel=PANEL,
        help="Sample from the likeliest tokens of this share 0..1.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(callback=whole_number(), rich_help_panel=PANEL, help="Sample from so many likeliest tokens."),
]
Seed = Annotated[
    int | None,
    typer.Option(
        callback=whole_number(0, 2**63 - 1),
        rich_help_panel=PANEL,
        help="Of sampling; the same gives the same. Default: drawn.",
    ),
]


class Sampling(NamedTuple):
    """How tokens are chosen; greedily where nothing is given but a seed."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self[:3] == (None, None, None) or self.temperature == 0

    def arguments(self) -> dict[str, Any]:
        """What `generate()` is told. What was not asked for is off, whatever the model's own defaults are."""
        if self.is_greedy:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
        }

    def with_seed(self) -> Sampling:
        """The same with a seed of its own where none was given and one is needed."""
        is_needed = self.seed is None and not self.is_greedy
        return self._replace(seed=random.randrange(2**31)) if is_needed else self


def sampling_of(temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> Sampling:
    """What the options ask for.

    Raises:
        ConfigError: greedy and sampled at once, or a share of nothing.
    """
    if temperature == 0 and (top_p, top_k) != (None, None):
        raise ConfigError("--temperature 0 is greedy: leave it out, or leave out --top-p and --top-k")
    if top_p == 0:
        raise ConfigError("--top-p 0 leaves no token to choose: give a share above 0, or --temperature 0 for greedy")
    return Sampling(temperature, top_p, top_k, seed)
