"""What one `generate()` call is asked to do. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one `generate()` call is asked to do.

    Args:
        batch: sequences.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens to generate for each.
        num_beams: beams of each sequence.

    Raises:
        ConfigError: one of them is no whole number of at least 1.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens", "num_beams"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Workload.{name} must be a whole number of at least 1, got {value!r}")

    @property
    def rows(self) -> int:
        """Sequences decoded at once, beams included."""
        return self.batch * self.num_beams

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache when the last token is sampled (which is never fed back)."""
        return self.prompt_tokens + self.new_tokens - 1
