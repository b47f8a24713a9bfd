"""`kvoffload demo`: a real model answers with its cache in host memory, then a table shows what the plan gains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvoffload import bench
from kvoffload.cli import chat
from kvoffload.cli.model_source import Source
from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.profiler.profile import with_link
from kvoffload.profiler.stored import load_or_measure

PROMPT = "What is the capital of France? Answer in one sentence."
MODES = ["full_transfer", "kvpr", "planned"]
DECODE_STEPS = 6
CHAT_LINK = EmulatedLink(h2d_gb_per_s=1.0)


class Demo(NamedTuple):
    """What the demo found."""

    answer: chat.Reply
    result: dict[str, Any]  # as `bench.run`

    def to_json(self) -> dict[str, Any]:
        """`text`, `tokens_equal` and `rows`, and what they were measured on."""
        return {
            "text": self.answer.text,
            "tokens_equal": self.answer.tokens_equal,
            "rows": self.result["rows"],
            "preset": self.result["preset"],
            "device": self.result["device"],
            "link": self.result["link"],
            "stats": self.answer.stats.to_json(),
        }


def demonstrate(source: Source, prompt: str, max_new_tokens: int, tell: Callable[[str], None]) -> Demo:
    """Both halves of the demo.

    Args:
        source: the model that answers.
        prompt: what to ask.
        max_new_tokens: length of the answer.
        tell: called with what happens next.
    """
    with bench.core_for_the_link():
        return _run(source, prompt, max_new_tokens, tell)


def _run(source: Source, prompt: str, max_new_tokens: int, tell: Callable[[str], None]) -> Demo:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    tell(f"loading {source.gguf_file or source.name} on {device}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    loaded, tokenizer = chat.load_model(source, device)
    profile = load_or_measure(device, has_fewer_threads=not on_gpu)
    where = "the GPU's link" if on_gpu else f"an emulated link of {CHAT_LINK.h2d_gb_per_s:g} GB/s"
    tell(f"answering with the KV cache in host memory over {where}, then again without offloading")
    config = OffloadConfig(
        split="transfer",
        block_tokens=8,
        device_gib="min",
        profile=profile if on_gpu else with_link(profile, CHAT_LINK),
        link="auto" if on_gpu else CHAT_LINK,
    )
    answer = chat.answer(loaded, tokenizer, prompt, config=config, max_new_tokens=max_new_tokens, compare=True)
    del loaded
    tell("decoding a multi-head-attention model of random weights in three modes")
    result = bench.run(
        "llama-2-7b" if on_gpu else "cpu-mha",
        MODES,
        DECODE_STEPS,
        profile=profile,
        on_row=lambda row: tell(f"  {row['mode']}: {row['decode_step_s_p50'] * 1e3:.0f} ms a step"),
    )
    return Demo(answer, result)
