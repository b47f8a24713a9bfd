#!/usr/bin/env python3
"""Verified drafts and packing in half precision: which tokens differ from plain `generate()`, beside eager and sdpa.

Every way is shown the same text, that of plain decoding, so that each of its tokens is compared; where one differs, the
gap between the two best logits of plain decoding says how near the choice was.

scripts/eval_half_precision.py --new-tokens 300
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import LogitsProcessor

import kvoffload
from campaign import rows
from kvoffload.bench.quality import bytes_decide, text_of_python
from kvoffload.cli import chat
from kvoffload.cli.terminal import script
from kvoffload.config import GIB, EmulatedLink, OffloadConfig

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 1024
PROMPTS = 3
DRAFTS = (4, 15)


class Following(LogitsProcessor):
    """Makes every row say a given text."""

    def __init__(self, text: torch.Tensor, prompt_tokens: int) -> None:
        self._text, self._prompt_tokens = text, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self._text[:, input_ids.shape[1] - self._prompt_tokens]
        return torch.full_like(scores, -torch.inf).scatter_(1, wanted[:, None], 0.0)


def prompts(tokenizer: Any) -> Iterator[torch.Tensor]:
    """[1, PROMPT_TOKENS] each: parts of Python's own manual."""
    ids = tokenizer(text_of_python())["input_ids"]
    for idx in range(PROMPTS):
        yield torch.tensor([ids[idx * PROMPT_TOKENS : (idx + 1) * PROMPT_TOKENS]])


def logits(model: Any, ids: torch.Tensor, new_tokens: int, text: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Of every new token, [new tokens, vocabulary], and the text."""
    following = [] if text is None else [Following(text, ids.shape[1])]
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=following,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(output.logits), output.sequences[:, ids.shape[1] :]


def main(
    new_tokens: Annotated[int, typer.Option(min=16, help="of each answer")] = 200,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    ways: Annotated[str, typer.Option(help="some of eager, drafts, off and packed")] = "eager,drafts,off,packed",
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS
    / "half_precision.csv",
) -> None:
    """Shares of equal tokens, and the gaps where they differ."""
    rows.check(csv_path)
    model, tokenizer = chat.load_model(None, torch.device("cpu"))[:2]
    model.to(getattr(torch, dtype))
    equal: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    passes: dict[str, list[float]] = {}
    for ids in prompts(tokenizer):
        wanted, text = logits(model, ids, new_tokens, None)
        best = wanted.float().topk(2).values
        for way, found, tokens_per_pass in _ways(model, ids, new_tokens, text, ways.split(",")):
            same = found.argmax(-1) == wanted.argmax(-1)
            equal.setdefault(way, []).append(float(same.float().mean()))
            gaps.setdefault(way, []).extend((best[~same, 0] - best[~same, 1]).tolist())
            passes.setdefault(way, []).append(tokens_per_pass)
    new = []
    how = {"dtype": dtype, "prompt_tokens": PROMPT_TOKENS, "prompts": PROMPTS, "new_tokens": new_tokens}
    link = "emulated 1 GB/s"
    for way in equal:
        for metric, unit, samples in (
            ("equal_tokens", "fraction", equal[way]),
            ("gap_of_two_best_where_different", "logits", gaps[way]),
            ("tokens_per_pass", "tokens", passes[way]),
        ):
            new.append(rows.row("half_precision", way, metric, unit, dtype, samples, how, link))
        share = sum(equal[way]) / len(equal[way])
        told = f"largest gap {max(gaps[way]):.3g}" if gaps[way] else "none differs"
        Console().print(f"{way}: {share:.4f} of the tokens equal, {len(gaps[way])} differ, {told}")
    rows.save(csv_path, new)


def _ways(
    model: Any, ids: torch.Tensor, new_tokens: int, text: torch.Tensor, asked: list[str]
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Each way, its logits, and its tokens for a pass over the link."""
    if "eager" in asked:
        model.set_attn_implementation("eager")
        found = logits(model, ids, new_tokens, text)[0]
        model.set_attn_implementation("sdpa")
        yield "eager", found, 1.0
    if "packed" in asked:
        config = bytes_decide(packing="auto", link=EmulatedLink(h2d_gb_per_s=1.0))
        with kvoffload.offload(model, config) as session:
            found = logits(model, ids, new_tokens, text)[0]
            stats = session.stats
        assert stats is not None
        assert stats.packed_fraction == 1
        yield "packed", found, 1.0
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    token_bytes = model.config.num_hidden_layers * 4 * model.config.num_key_value_heads * head_dim
    for speculate in (*DRAFTS * ("drafts" in asked), *("off",) * ("off" in asked)):
        config = OffloadConfig(
            speculate=speculate,
            device_gib=(PROMPT_TOKENS // 2 * token_bytes + 12_000_000) / GIB,
            link=EmulatedLink(h2d_gb_per_s=1.0),
            block_tokens=16,
            packing="off",
        )
        with kvoffload.offload(model, config) as session:
            found = logits(model, ids, new_tokens, text)[0]
            stats = session.stats
        assert stats is not None
        name = "no drafts" if speculate == "off" else f"drafts {speculate}"
        yield name, found, stats.tokens_per_pass or 1.0


if __name__ == "__main__":
    script(main)()
