"""What the campaign measures: a shape, the prompts, how much is generated, and how much device memory there is.

Owns the workloads and the question each of them answers. Does not own who is measured (`providers`).

    latency      the paper's grid: batch 64, prompts of 128, 256 and 512 tokens, 32 and 128 new tokens (KVPR, 4.2)
    throughput   its prompts of 256, 512 and 1024 tokens
    large        layers of OPT-30B and OPT-66B, where the best split is inside
    long         8k to 64k tokens of context, batch 1 to 8
    gqa          Llama-3.1-8B and Qwen3-8B, where recomputation cannot pay
    first        one for the first minutes on a GPU: its uncapped reference fits a card of 24 GB
    shapes       ragged prompts, 3 beams over one prompt, a copy-heavy prompt with prompt lookup
    cpu          the same questions at a size for two cores and an emulated link

A speed-up counts only where neither the whole batch nor a part of it can be decoded on the device, or is slower: hence
the caps on device memory.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from kvoffload.bench.presets import PRESETS, Preset

Group = Literal["first", "latency", "throughput", "large", "long", "gqa", "shapes", "cpu"]
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One workload."""

    name: str
    group: Group
    rank: int  # 0 is the most informative
    question: str
    preset: Preset  # its batch and cached_tokens are the sequences and the tokens of the longest prompt
    new_tokens: int
    num_beams: int = 1
    is_ragged: bool = False  # prompts from a quarter of the length to all of it, padded on the left
    prompt_lookup_tokens: int | None = None  # the prompt repeats itself
    device_memory_gb: float | None = None  # GPU: cap on all memory of the process
    room_sequences: float | None = None  # emulated: how many sequences' K/V the "device" has room for

    @property
    def batch(self) -> int:
        """Sequences, beams not counted."""
        return self.preset.batch

    @property
    def prompt_tokens(self) -> int:
        """Of the longest prompt."""
        return self.preset.cached_tokens

    def to_json(self) -> dict[str, object]:
        """What identifies the cell in a row, whatever machine it ran on."""
        return {
            "group": self.group,
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "num_beams": self.num_beams,
            "is_ragged": self.is_ragged,
            "prompt_lookup_tokens": self.prompt_lookup_tokens,
            "device_memory_gb": self.device_memory_gb,
            "room_sequences": self.room_sequences,
            "dtype": str(self.preset.dtype).removeprefix("torch."),
            "layers": self.preset.layers,
            "hidden": self.preset.hidden,
            "kv_heads": self.preset.kv_heads,
        }

    def prompts(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both [batch, prompt_tokens] int64; the same at every call."""
        generator = torch.Generator()
        generator.manual_seed(0)
        size = (self.batch, self.prompt_tokens)
        ids = torch.randint(3, self.preset.vocab, size, generator=generator)
        if self.prompt_lookup_tokens is not None:
            phrase = min(64, self.prompt_tokens)
            ids = ids[:, :phrase].repeat(1, -(-self.prompt_tokens // phrase))[:, : self.prompt_tokens]
        mask = torch.ones_like(ids)
        if self.is_ragged:
            for row in range(self.batch):
                share = 1 - 0.75 * row / max(1, self.batch - 1)
                padding = self.prompt_tokens - max(1, round(share * self.prompt_tokens))
                mask[row, :padding], ids[row, :padding] = 0, 0
        return ids.to(device), mask.to(device)


def _at(preset: Preset, batch: int, prompt_tokens: int) -> Preset:
    return replace(preset, batch=batch, cached_tokens=prompt_tokens)


def _first() -> list[Cell]:
    return [
        Cell(
            name="llama-2-7b 12x1024+16 20 GB",
            group="first",
            rank=0,
            question="beside transformers' own offloaded cache, in two minutes at most",
            preset=_at(PRESETS["llama-2-7b"], 12, 1024),
            new_tokens=16,
            device_memory_gb=20,
        )
    ]


def _paper_grid() -> list[Cell]:
    cells = []
    for rank, name in enumerate(("opt-6.7b", "llama-2-7b", "opt-13b", "llama-2-13b")):
        for prompt_tokens in (512, 256, 128):
            for new_tokens in (32, 128):
                cells.append(
                    Cell(
                        name=f"{name} 64x{prompt_tokens}+{new_tokens}",
                        group="latency",
                        # one of each model first, then the rest
                        rank=rank if (prompt_tokens, new_tokens) == (512, 32) else 30 + rank,
                        question="the paper's latency grid",
                        preset=_at(PRESETS[name], 64, prompt_tokens),
                        new_tokens=new_tokens,
                        device_memory_gb=40,
                    )
                )
        for prompt_tokens in (1024, 512, 256):
            cells.append(
                Cell(
                    name=f"{name} 64x{prompt_tokens}+32 24 GB",
                    group="throughput",
                    rank=10 + rank if prompt_tokens == 1024 else 40 + rank,
                    question="the paper's throughput prompts, on a device that has no room for them",
                    preset=_at(PRESETS[name], 64, prompt_tokens),
                    new_tokens=32,
                    device_memory_gb=24 if "13b" not in name else 40,
                )
            )
    return cells


def _large() -> list[Cell]:
    return [
        Cell(
            name=f"{name} layers 64x1024+32",
            group="large",
            rank=5 + rank,
            question="layers so wide that the best split is inside",
            preset=_at(PRESETS[name], 64, 1024),
            new_tokens=32,
            device_memory_gb=24,
        )
        for rank, name in enumerate(("opt-30b", "opt-66b"))
    ]


def _long() -> list[Cell]:
    return [
        Cell(
            name=f"llama-2-7b {batch}x{prompt_tokens}+32 24 GB",
            group="long",
            rank=rank,
            question="a context that does not fit, alone or together",
            preset=_at(PRESETS["llama-2-7b"], batch, prompt_tokens),
            new_tokens=32,
            device_memory_gb=24,
        )
        for rank, (batch, prompt_tokens) in enumerate(((1, 32768), (4, 16384), (8, 8192), (1, 65536), (2, 32768)), 4)
    ]


def _grouped() -> list[Cell]:
    return [
        Cell(
            name=f"{name} {batch}x{prompt_tokens}+32 24 GB",
            group="gqa",
            rank=8 + rank,
            question="grouped-query attention: nothing to recompute",
            preset=_at(PRESETS[name], batch, prompt_tokens),
            new_tokens=32,
            device_memory_gb=24,
        )
        for rank, (name, batch, prompt_tokens) in enumerate(
            (("llama-3.1-8b", 1, 65536), ("llama-3.1-8b", 16, 8192), ("qwen3-8b", 1, 65536))
        )
    ]


def _shapes() -> list[Cell]:
    base = PRESETS["llama-2-7b"]
    cell = partial(Cell, group="shapes", rank=9, new_tokens=32, device_memory_gb=24.0)
    return [
        cell(
            name="llama-2-7b ragged 32x2048",
            question="prompts of different lengths",
            preset=_at(base, 32, 2048),
            is_ragged=True,
        ),
        cell(
            name="llama-2-7b 3 beams 1x16384",
            question="beams over one long prompt",
            preset=_at(base, 1, 16384),
            num_beams=3,
        ),
        cell(
            name="llama-2-7b lookup 1x16384",
            question="several tokens per pass over the link",
            preset=_at(base, 1, 16384),
            prompt_lookup_tokens=8,
        ),
    ]


def _cpu() -> list[Cell]:
    multi_head, grouped = PRESETS["cpu-mha"], PRESETS["cpu-gqa"]
    cell = partial(Cell, group="cpu", new_tokens=10, room_sequences=0.75)
    return [
        cell(
            name="cpu-mha 2x2048",
            rank=0,
            question="two long contexts, of which not even one fits",
            preset=_at(multi_head, 2, 2048),
        ),
        cell(
            name="cpu-gqa 2x2048",
            rank=1,
            question="grouped-query attention: nothing to recompute",
            preset=_at(grouped, 2, 2048),
        ),
        cell(
            name="cpu-gqa 8x512 in parts",
            rank=1,
            question="half of the batch fits: no offloading is better",
            preset=grouped,
            room_sequences=5,
        ),
        cell(
            name="cpu-mha 3 beams 1x1024",
            rank=2,
            question="beams over one prompt, which cannot be decoded apart",
            preset=_at(multi_head, 1, 1024),
            num_beams=3,
        ),
        cell(
            name="cpu-mha lookup 1x2048",
            rank=3,
            question="several tokens per pass over the link",
            preset=_at(multi_head, 1, 2048),
            prompt_lookup_tokens=4,
        ),
        cell(
            name="cpu-mha ragged 2x2048",
            rank=4,
            question="prompts of different lengths",
            preset=_at(multi_head, 2, 2048),
            is_ragged=True,
        ),
        cell(name="cpu-mha 1x4096", rank=5, question="one long context", preset=_at(multi_head, 1, 4096)),
    ]


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in sorted(
        [*_first(), *_paper_grid(), *_large(), *_long(), *_grouped(), *_shapes(), *_cpu()],
        key=lambda cell: (cell.rank, cell.name),
    )
}


def choose(patterns: list[str], *, is_emulated: bool) -> list[Cell]:
    """The cells of this kind of machine whose name or group matches one of the patterns, most informative first."""
    here = [cell for cell in CELLS.values() if cell.preset.is_emulated == is_emulated]
    return [
        cell
        for cell in here
        if any(fnmatch.fnmatch(cell.name, pattern) or cell.group == pattern for pattern in patterns or ["*"])
    ]
