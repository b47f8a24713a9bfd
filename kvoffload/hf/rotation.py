"""Where the rotation of a model's queries and keys changes with the length of the text, so that tokens differ by it.

Two kinds of rotary embedding look at how far a forward reaches: `dynamic` rescales with every length beyond the
original one, `longrope` takes other factors from there on. Tokens that go through a model together are then rotated as
the last of them is, and not as each would be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class ChangingRotation(NamedTuple):
    """One whose angles change where a forward reaches beyond a length."""

    original_tokens: int
    changes_beyond: bool  # with every further token

    def most_together(self, first: int) -> int | None:
        """How many tokens a forward may have so that each is rotated as it would be alone; None: any number.

        Args:
            first: position of the first of them.
        """
        if first < self.original_tokens:
            return self.original_tokens - first
        return 1 if self.changes_beyond else None


def changing_rotations(config: Any) -> list[ChangingRotation]:
    """Those of a model, by its configuration."""
    text = config.get_text_config(decoder=True)
    found = []
    for parameters in _rotations(text):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind in ("dynamic", "longrope"):
            tokens = parameters.get("original_max_position_embeddings")
            tokens = tokens or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
            found.append(ChangingRotation(tokens, kind == "dynamic"))
    return found


def _rotations(text: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of each rotation: one for the model, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(text, name, None)
        if isinstance(found, Mapping):
            yield found
            yield from (inner for inner in found.values() if isinstance(inner, Mapping))
