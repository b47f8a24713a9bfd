"""How much a model's predictions change where its K and V are stored with loss, against its own exact cache.

Owns what is compared: the same text goes through the model twice, past a long context in short passes, once over
transformers' own cache and once over ours with every full block in the form that is asked for; each pass sees what is
before it as decoding would, in blocks and an exact tail. Figures are those of llama.cpp's perplexity tool: the
Kullback-Leibler divergence of the next token's distribution (mean and 99th percentile), how often its top token is the
same, and the change of perplexity. Does not own the model, the text nor the table (`cli`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from kvoffload import hf
from kvoffload.api import offload
from kvoffload.config import OffloadConfig
from kvoffload.errors import ConfigError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.quantities import Curve, Point, Quantity
from kvoffload.planning.forms import FORMS
from kvoffload.planning.rates import decode_quantity
from kvoffload.units import count

PASS_TOKENS = 16  # that see each other exactly
CONTEXTS = (1000, 3000)
POSITIONS = 1000
PREFILL_TOKENS = 1024  # of a context at once
# Next to so slow a link nothing else takes time: every block gets the form of fewest bytes.
_SLOW_LINK_BYTES_PER_S = 1e3


class Quality(NamedTuple):
    """What one form does to the predictions after one context."""

    kv_dtype: str
    context_tokens: int
    positions: int
    mean_kld: float  # in nats
    p99_kld: float
    same_top_share: float
    perplexity: float
    perplexity_change: float  # over the exact cache's, as a share
    bytes_ratio: float  # of K and V in 16 bits, over what is stored of them
    kept_exact_blocks: int


def text_of_python() -> str:
    """English that comes with Python itself: the pages of its manual that `help()` shows."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def measure_quality(
    model: Any,
    ids: torch.Tensor,
    kv_dtypes: Sequence[str],
    *,
    contexts: Sequence[int] = CONTEXTS,
    positions: int = POSITIONS,
    block_tokens: Any = "auto",
    tell: Callable[[str, float], None] | None = None,
) -> list[Quality]:
    """Predictions over stored forms against those over the model's own cache.

    Args:
        model: a causal language model of transformers.
        ids: its text, [1, tokens].
        kv_dtypes: as of `OffloadConfig`.
        contexts: tokens before the first position that counts, each a measurement of its own.
        positions: that count, after each context.
        block_tokens: of the offloaded cache.
        tell: told what begins, and the share that is done.

    Returns:
        For each context and form what changed.

    Raises:
        ConfigError: the text is too short.
        UnsupportedModelError: as of `offload`.
    """
    needed = max(contexts) + positions + 1
    if ids.shape[1] < needed:
        raise ConfigError(
            f"the text has {count(ids.shape[1])} tokens, contexts of {', '.join(map(count, contexts))} and "
            f"{count(positions)} positions need {count(needed)}: give a longer text, or ask for fewer"
        )
    found, done, rounds = [], 0, len(contexts) * (1 + len(kv_dtypes))
    for context in contexts:
        part = ids[:, : context + positions + 1]
        if tell is not None:
            tell(f"exact, {count(context)} tokens before", done / rounds)
        exact = list(_logits(model, part, context, DynamicCache(config=model.config.get_text_config(decoder=True))))
        done += 1
        for kv_dtype in kv_dtypes:
            if tell is not None:
                tell(f"{kv_dtype}, {count(context)} tokens before", done / rounds)
            found.append(_compare(model, part, context, exact, kv_dtype, block_tokens))
            done += 1
    return found


def _compare(
    model: Any, ids: torch.Tensor, context: int, exact: list[torch.Tensor], kv_dtype: str, block_tokens: Any
) -> Quality:
    klds, same, nll, exact_nll, seen = [], 0, 0.0, 0.0, context
    with offload(model, bytes_decide(kv_dtype=kv_dtype, block_tokens=block_tokens)) as session:
        cache = session.new_cache()
        for wanted, logits in zip(exact, _logits(model, ids, context, cache), strict=True):
            before, after = wanted.to(logits.device).log_softmax(-1), logits.log_softmax(-1)
            klds.append((before.exp() * (before - after)).sum(-1).cpu())
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            follows = ids[0, seen + 1 : seen + 1 + len(logits)].to(logits.device)[:, None]
            exact_nll -= float(before.gather(-1, follows).sum())
            nll -= float(after.gather(-1, follows).sum())
            seen += len(logits)
        core = cache.core
        kept = sum(core.kept_plain.values())
        stored = sum(block.num_bytes for layer in core.layers for block in layer.blocks)
        values = sum(
            block.rows * core.placement.block_tokens * layer.shape.width
            for layer in core.layers
            if layer.shape is not None
            for block in layer.blocks
        )
    kld = torch.cat(klds).double()
    positions = len(kld)
    return Quality(
        kv_dtype=kv_dtype,
        context_tokens=context,
        positions=positions,
        mean_kld=max(0.0, float(kld.mean())),
        p99_kld=float(kld.quantile(0.99)),
        same_top_share=same / positions,
        perplexity=math.exp(nll / positions),
        perplexity_change=math.exp((nll - exact_nll) / positions) - 1,
        bytes_ratio=2 * values / max(1, stored),
        kept_exact_blocks=kept,
    )


def _logits(model: Any, ids: torch.Tensor, context: int, cache: Any) -> Iterator[torch.Tensor]:
    """Of each pass behind the context, float32 [tokens, vocabulary]."""
    name, stop = hf.generation_name(), ids.shape[1] - 1
    with torch.no_grad():
        for start in range(0, context, PREFILL_TOKENS):
            _forward(model, ids[:, start : min(context, start + PREFILL_TOKENS)], {name: cache}, start)
        for start in range(context, stop, PASS_TOKENS):
            part = ids[:, start : min(stop, start + PASS_TOKENS)]
            yield _forward(model, part, {name: cache}, start).logits[0].float()


def _forward(model: Any, part: torch.Tensor, cache: dict[str, Any], start: int) -> Any:
    positions = torch.arange(start, start + part.shape[1], device=part.device)[None]
    return model(part, position_ids=positions, use_cache=True, **cache)


def bytes_decide(**options: Any) -> OffloadConfig:
    """All blocks on the host, in the form of fewest bytes that the options allow."""
    preset = HardwareProfile.preset("a100-40gb-pcie4")
    points = tuple(Point((size,), size / _SLOW_LINK_BYTES_PER_S, 0.0) for size in (1e3, 1e9))
    slow = Curve(unit="bytes", points=points)
    fixed: dict[str, Any] = {"split": "transfer", "packing": "off", "device_gib": "min", "speculate": "off"}
    no_time = {decode_quantity(name): Quantity(value=0.0, unit="s") for name, form in FORMS.items() if form.is_encoded}
    profile = replace(preset, h2d=slow, d2h=slow, quantities=preset.quantities | no_time)
    fixed |= {"deterministic": True, "profile": profile}
    return OffloadConfig(**fixed | options)
