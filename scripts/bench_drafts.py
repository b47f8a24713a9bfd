#!/usr/bin/env python3
"""Verified drafts of SmolLM2-135M over a long text: beside full transfer and prompt lookup at the same device memory.

scripts/bench_drafts.py --tasks summary,listing,question --ratios 8,25
scripts/bench_drafts.py --batches 4,8 --tasks mixed --ratios 25
scripts/bench_drafts.py --overhead --ratios 3,8 --new-tokens 200
scripts/bench_drafts.py --caches window,int4 --ratios 3,8,14,25,50 --no-lookup
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from rich.console import Console

import kvoffload
from campaign import rows
from kvoffload.bench.quality import text_of_python
from kvoffload.cli import chat
from kvoffload.cli.terminal import script
from kvoffload.config import GIB, EmulatedLink, OffloadConfig
from kvoffload.draft.rounds import Rounds
from kvoffload.planning.drafts import best_length, tokens_per_round
from kvoffload.profiler.stored import load_or_measure
from kvoffload.session.stats import GenerationStats

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS, SHORT_TOKENS = 4900, 512
RESIDENT_TOKENS = 1024  # that the device has room for beside what is needed anyway
# Seconds of a pass over the link in plain steps, and what has such a ratio by the figures of datasheets.
RATIOS = {
    3: "Llama-3.1-8B, 32k tokens, RTX 3090",
    8: "Llama-3.1-8B, 128k tokens, L4",
    14: "Llama-2-7B, 32k tokens, RTX 4090",
    25: "Llama-3.1-8B, 128k tokens, RTX 3090",
    50: "Llama-2-7B, 128k tokens, RTX 5090",
}
TASKS = {
    "summary": "Write a long and detailed summary of the text above.",
    "listing": "List the Python statements that are described in the text above, and explain each in a sentence.",
    "question": "Which number did the note in the middle of the text ask you to remember, and why? Answer in detail.",
}
NOTE = "\n\nNote: please remember the number 7319, because it opens the door of the archive on the third floor.\n\n"
MIXED = ("summary", "listing", "question")  # rows of a batch in turn
FULL_STEPS, UNEVEN_STEPS = 6, 2
LOOKUP_TOKENS = 10
RING_BYTES = 12_000_000  # of one sequence: ring, tails and what else a plan takes
ALL_THREADS = torch.get_num_threads()


class Found(NamedTuple):
    """One `generate()` with offloading."""

    tokens: torch.Tensor  # new ones, [rows, tokens]
    token_s: float  # of decoding, for the next token of every row
    stats: GenerationStats


def decoding_threads() -> int:
    """All cores but one, which copies for the link."""
    return max(1, ALL_THREADS - 1)


class Cell(NamedTuple):
    """What one cell gave."""

    rows: list[rows.Row]
    figures: dict[str, float | None]
    survivals: list[float]


class Clock:
    """A stopping criterion that notes when tokens come, and leaves a core to the link once decoding begins."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        torch.set_num_threads(decoding_threads())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Bench:
    """The model, its texts and how fast it is by itself."""

    def __init__(self, new_tokens: int) -> None:
        model, self._tokenizer = chat.load_model(None, torch.device("cpu"))[:2]
        self.model: Any = model
        self.new_tokens, self.draft_cache = new_tokens, "auto"
        config, itemsize = self.model.config, self.model.dtype.itemsize
        head_dim = config.hidden_size // config.num_attention_heads
        self.token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * itemsize
        self._plain_s: dict[int, float] = {}
        self.is_whole_on_device = False

    def prompts(self, task: str, batch: int) -> torch.Tensor:
        """[batch, about PROMPT_TOKENS]: pages of Python's own manual, then what to do with them."""
        names = [MIXED[idx % len(MIXED)] for idx in range(batch)] if task == "mixed" else [task] * batch
        found = [self._prompt(name, 40 * idx) for idx, name in enumerate(names)]
        shortest = min(map(len, found))
        return torch.tensor([row[:16] + row[16 + len(row) - shortest :] for row in found])

    def _prompt(self, task: str, skip: int) -> list[int]:
        ids = self._tokenizer(text_of_python())["input_ids"][skip:]
        note = self._tokenizer(NOTE)["input_ids"] if task == "question" else []
        half = (PROMPT_TOKENS - 60 - len(note)) // 2
        body = self._tokenizer.decode([*ids[:half], *note, *ids[half : 2 * half]])
        said = [{"role": "user", "content": f"{body}\n\n{TASKS[task]}"}]
        text = self._tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def generate(self, ids: torch.Tensor, new_tokens: int, **options: Any) -> tuple[torch.Tensor, list[float]]:
        """New tokens and when they came: greedy, without repeated 4-grams, which small models fall into."""
        clock = Clock()
        torch.set_num_threads(ALL_THREADS)  # until decoding begins
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            no_repeat_ngram_size=4,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
            **options,
        )
        return output[:, ids.shape[1] :], clock.times

    def plain_step_s(self, batch: int) -> float:
        """A step of the model's own `generate()` over a short text, on the cores that decoding has."""
        if batch not in self._plain_s:
            times = self.generate(self.prompts("mixed", batch)[:, :SHORT_TOKENS], 32)[1]
            steps = [after - before for before, after in itertools.pairwise(times[1:])]
            self._plain_s[batch] = statistics.median(steps)
        return self._plain_s[batch]

    def offloaded(self, ids: torch.Tensor, new_tokens: int, ratio: float, speculate: Any, **options: Any) -> Found:
        """One way over a link that takes `ratio` plain steps for a pass of full transfer."""
        with kvoffload.offload(self.model, self.config(ids, ratio, speculate=speculate)) as session:
            tokens, _ = self.generate(ids, new_tokens, **options)
            stats = session.stats
        assert stats is not None
        # Of passes that give several tokens the mean; else what most steps take: the first ones wait for the prompt.
        if stats.draft_acceptance is None and not options:
            token_s = statistics.median(stats.decode_step_s[UNEVEN_STEPS:])
        else:
            token_s = sum(stats.decode_step_s) / (new_tokens - 1)
        return Found(tokens, token_s, stats)

    def config(self, ids: torch.Tensor, ratio: float, **options: Any) -> OffloadConfig:
        """The options of a way; the link and the memory on the device are those of all of them."""
        batch, tokens = len(ids), ids.shape[1] + self.new_tokens // 2
        crossing = batch * (tokens - RESIDENT_TOKENS) * self.token_bytes
        resident = 2 * tokens if self.is_whole_on_device else RESIDENT_TOKENS
        return OffloadConfig(
            link=EmulatedLink(h2d_gb_per_s=crossing / (ratio * self.plain_step_s(batch)) / 1e9),
            device_gib=batch * (resident * self.token_bytes + RING_BYTES) / GIB,
            block_tokens=16,
            draft_cache=self.draft_cache,  # type: ignore[arg-type]
            **options,
        )


@contextlib.contextmanager
def worthless_drafts() -> Iterator[None]:
    """Every draft is another token than the model would choose."""
    choose = Rounds._choose

    def wrong(self: Rounds, ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
        return (choose(self, ids, logits) + 1) % logits.shape[-1]

    with mock.patch.object(Rounds, "_choose", wrong):
        yield


def measure_overhead(bench: Bench, ratio: float, pairs: int) -> list[rows.Row]:
    """What drafts cost where none is right, or with a ratio of 0 where nothing crosses the link: over all steps.

    Runs with drafts and without take turns; a sample is of two that follow each other.
    """
    ids = bench.prompts("summary", 1)
    around = worthless_drafts if ratio else contextlib.nullcontext
    bench.is_whole_on_device = not ratio
    found: dict[str, tuple[str, list[float]]] = {
        "total_over_off": ("ratio", []),
        "step_over_off": ("ratio", []),
        "drafted_tokens": ("tokens", []),
        "same_tokens": ("fraction", []),
    }
    for idx in range(pairs):
        runs = {}
        for mode in ("off", "auto") if idx % 2 == 0 else ("auto", "off"):
            with around() if mode == "auto" else contextlib.nullcontext():
                runs[mode] = bench.offloaded(ids, bench.new_tokens, ratio or 1, mode)
        drafted, off = runs["auto"], runs["off"]
        total_s = [sum(run.stats.decode_step_s) for run in (drafted, off)]
        steps_s = [statistics.median(run.stats.decode_step_s) for run in (drafted, off)]
        found["total_over_off"][1].append(total_s[0] / total_s[1])
        found["step_over_off"][1].append(steps_s[0] / steps_s[1])
        found["drafted_tokens"][1].append(drafted.stats.drafted_tokens)
        found["same_tokens"][1].append(float(torch.equal(drafted.tokens, off.tokens)))
    provider = "worthless drafts" if ratio else "all on the device"
    how = {"task": "summary", "batch": 1, "ratio": ratio, "new_tokens": bench.new_tokens}
    told = ", ".join(f"{name} {statistics.median(values):.4g}" for name, (_, values) in found.items())
    Console(width=160).print(f"{provider}, ratio {ratio}: {told}; {drafted.stats.drafts_off_reason}")
    return [
        rows.row("drafts", provider, metric, unit, ratio, values, how, drafted.stats.link_name)
        for metric, (unit, values) in found.items()
    ]


def repeated_share(tokens: torch.Tensor, length: int = 8) -> float:
    """Of all runs of so many tokens the share that was there before, the mean of the rows."""
    shares = []
    for row in tokens.tolist():
        seen = Counter(tuple(row[start : start + length]) for start in range(len(row) - length + 1))
        shares.append(sum(count - 1 for count in seen.values()) / max(1, sum(seen.values())))
    return statistics.mean(shares)


def expected_token_s(stats: GenerationStats, survivals: Sequence[float]) -> float | None:
    """The planned rounds with the acceptance of another run: seconds for a token; None where there are none."""
    times = stats.round_times
    if times is None or not survivals:
        return None
    length = best_length(survivals, times.round_s, len(survivals), times.paced_rows)
    return times.round_s(length) / tokens_per_round(survivals, length, times.paced_rows)


def measure(bench: Bench, task: str, batch: int, ratio: int, survivals: Sequence[float], *, with_lookup: bool) -> Cell:
    """One cell.

    Args:
        bench: the model.
        task: what is asked of it.
        batch: sequences.
        ratio: plain steps for a pass.
        survivals: of another run of the task, which predict this one.
        with_lookup: whether prompt lookup runs as well.
    """
    ids, plain_s = bench.prompts(task, batch), bench.plain_step_s(batch)
    full = bench.offloaded(ids, FULL_STEPS, ratio, "off")
    drafted = bench.offloaded(ids, bench.new_tokens, ratio, "auto")
    stats = drafted.stats
    found: dict[str, tuple[str, float | None]] = {
        "plain_step": ("s", plain_s),
        "full_transfer_token": ("s", full.token_s),
        "full_transfer_over_plain": ("ratio", full.token_s / plain_s),
        "token": ("s", drafted.token_s),
        "round": ("s", stats.decode_step_s_p50),
        "round_over_predicted": ("ratio", _over(stats.decode_step_s_p50, stats.predicted_step_s)),
        "speedup_over_full_transfer": ("ratio", full.token_s / drafted.token_s),
        "tokens_per_pass": ("tokens", stats.tokens_per_pass),
        "acceptance": ("fraction", stats.draft_acceptance),
        "draft_over_plain": ("ratio", _over(stats.draft_s, stats.drafted_tokens * plain_s)),
        "share_of_prediction": ("ratio", _over(expected_token_s(stats, survivals), drafted.token_s)),
        "repeated_8grams": ("fraction", repeated_share(drafted.tokens)),
    }
    if with_lookup:
        looked = bench.offloaded(ids, bench.new_tokens, ratio, "off", prompt_lookup_num_tokens=LOOKUP_TOKENS)
        found["prompt_lookup_token"] = ("s", looked.token_s)
        found["speedup_over_prompt_lookup"] = ("ratio", looked.token_s / drafted.token_s)
        found["same_tokens_as_prompt_lookup"] = ("fraction", float(torch.equal(looked.tokens, drafted.tokens)))
    how = {"task": task, "batch": batch, "ratio": ratio, "as": RATIOS[ratio], "new_tokens": bench.new_tokens}
    how |= {"prompt_tokens": ids.shape[1], "device_tokens": stats.plan.count(tier="device") * stats.plan.block_tokens}
    how |= {"draft_cache": stats.draft_cache or "none", "asked": bench.draft_cache}
    new = [
        rows.row("drafts", task, metric, unit, ratio, [value], how, stats.link_name)
        for metric, (unit, value) in found.items()
        if value is not None
    ]
    return Cell(new, {metric: value for metric, (_, value) in found.items()}, stats.draft_survivals)


def _over(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


def main(
    tasks: Annotated[str, typer.Option(help=f"of {', '.join(TASKS)}, and mixed: a row of each in turn")] = "summary",
    ratios: Annotated[str, typer.Option(help=f"plain steps for a pass: {', '.join(map(str, RATIOS))}")] = "25",
    batches: Annotated[str, typer.Option(help="sequences, such as 1,4,8")] = "1",
    new_tokens: Annotated[int, typer.Option(min=16, help="of each answer")] = 160,
    is_overhead: Annotated[
        bool, typer.Option("--overhead", help="what useless drafts cost; ratio 0: all on the device")
    ] = False,
    pairs: Annotated[int, typer.Option(min=1, help="of runs with and without, for --overhead")] = 3,
    with_lookup: Annotated[bool, typer.Option("--lookup/--no-lookup", help="prompt lookup as well (batch 1)")] = True,
    caches: Annotated[str, typer.Option(help="what drafts read: auto, window, int4")] = "auto",
    csv_path: Annotated[Path, typer.Option("--csv", help="rows are added to this file")] = RESULTS / "drafts.csv",
) -> None:
    """Tokens per pass, acceptance, and how much faster than full transfer and prompt lookup."""
    rows.check(csv_path)
    load_or_measure()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    bench, survivals = Bench(new_tokens), dict[str, list[float]]()
    if is_overhead:
        bench.draft_cache = caches
        for ratio in map(int, ratios.split(",")):
            torch.set_num_threads(decoding_threads())  # as rows name the device
            rows.save(csv_path, measure_overhead(bench, ratio, pairs))
        return
    cells = itertools.product(map(int, batches.split(",")), tasks.split(","), ratios.split(","), caches.split(","))
    for batch, task, ratio, bench.draft_cache in cells:
        torch.set_num_threads(decoding_threads())  # as rows name the device
        lookup = with_lookup and batch == 1
        kind = f"{task} {batch} {bench.draft_cache}"
        cell = measure(bench, task, batch, int(ratio), survivals.get(kind, []), with_lookup=lookup)
        survivals[kind] = cell.survivals
        rows.save(csv_path, cell.rows)
        shown = (f"{name} {value:.3g}" for name, value in cell.figures.items() if value is not None)
        console.print(f"{task}, batch {batch}, {ratio} plain steps a pass, {bench.draft_cache}: {', '.join(shown)}")


if __name__ == "__main__":
    script(main)()
