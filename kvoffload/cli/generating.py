"""What `kvoffload generate` does once a model is loaded: answers as they come, as lines of JSON, or as one document.

Owns what is shown and written. Does not own the prompts (`prompts`) nor how they are answered (`answering`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import typer

from kvoffload.cli.answering import Answered, answer_all
from kvoffload.cli.loading import Loaded
from kvoffload.cli.prompts import Record
from kvoffload.cli.sampling import Sampling
from kvoffload.cli.stream import Stream, tell_for_now
from kvoffload.cli.terminal import print_json, print_text
from kvoffload.units import counted


class Request(NamedTuple):
    """What was asked for."""

    records: list[Record]
    is_many: bool  # a file of prompts, even of one
    batch: int
    system: str | None
    max_new_tokens: int
    sampling: Sampling
    compare: bool
    output: Path | None  # lines of JSON; "-" is standard output


class _Shown:
    """Answers on their way out, batch by batch.

    Args:
        request: what was asked for.
        prints: whether answers are text on standard output.
    """

    def __init__(self, request: Request, *, prints: bool) -> None:
        self._request, self._prints = request, prints
        self._done = 0
        if request.output is not None and str(request.output) != "-":
            request.output.write_text("", encoding="utf-8")

    def add(self, found: Answered) -> None:
        """A batch is answered: written at once, so that what is done stays done."""
        records = self._request.records[self._done : self._done + len(found.answers)]
        self._done += len(records)
        tell_for_now("")
        lines = [json.dumps(_line(record, found, idx)) for idx, record in enumerate(records)]
        if str(self._request.output) == "-":
            typer.echo("\n".join(lines))
        elif self._request.output is not None:
            with self._request.output.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        elif self._prints:
            for idx, (record, answer) in enumerate(zip(records, found.answers, strict=True)):
                number = self._done - len(records) + idx + 1
                print_text(f"{number}/{len(self._request.records)} {_first_line(record['prompt'])}", style="bold")
                print_text(answer.text)
                typer.echo()
        self.tell()

    def tell(self) -> None:
        """What is being done, while it is."""
        total = len(self._request.records)
        if self._done < total:
            upto = min(self._done + self._request.batch, total)
            tell_for_now(f"answering {self._done + 1} to {upto} of {total} ..." if total > 1 else "reading ...")


def run(loaded: Loaded, request: Request, *, as_json: bool) -> None:
    """Answer all prompts, and say what that took.

    Args:
        loaded: what answers.
        request: what was asked for.
        as_json: one document on standard output, and nothing else there.
    """
    is_streamed = not (as_json or request.is_many or request.output)
    shown = _Shown(request, prints=not as_json and request.is_many)
    shown.tell()
    found = answer_all(
        loaded.model,
        loaded.tokenizer,
        [record["prompt"] for record in request.records],
        config=loaded.config,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        system=request.system,
        batch=request.batch if request.is_many else 1,
        compare=request.compare,
        streamer=Stream(loaded.tokenizer) if is_streamed else None,
        on_batch=shown.add,
        on_compare=lambda: tell_for_now("again without offloading ..."),
    )
    tell_for_now("")
    if as_json:
        print_json(_document(found, request))
        return
    if request.output is not None and str(request.output) != "-":
        print_text(f"wrote {counted(len(request.records), 'answer')} to {request.output}", err=True)
    if request.compare:
        print_text(compared(found), err=True)
    if request.is_many:
        print_text(_summary(found), err=True)
    elif sys.stdout.isatty():
        typer.echo(err=True)
    last = found[-1]
    measured = last.stats.token_s and last.plain_tokens_per_s  # of as many sequences at once
    stats = last.stats.compared_with(len(last.answers) / measured) if measured else last.stats
    print_text(str(stats), err=True, style="dim")


def same_tokens(equal: bool) -> str:
    """What a comparison with plain generation found."""
    return f"{'the same' if equal else 'NOT the same'} tokens as without offloading"


def compared(found: list[Answered]) -> str:
    """Both speeds, and whether the tokens are the same."""
    if why := found[0].why_not_compared:
        return f"not compared: {why}"
    text = same_tokens(all(one.tokens_equal for one in found))
    with_it, without = _rate(found), _plain_rate(found)
    if with_it is None or without is None:
        return f"{text}; no speeds, only one token was generated"
    return f"{text}; {with_it:.1f} tokens/s with offloading, {without:.1f} without ({with_it / without:.2f}x)"


def _rate(found: list[Answered]) -> float | None:
    """Tokens per second of all batches, after the first token of each."""
    return _together([one.stats.tokens_per_s if one.stats.decode_step_s else None for one in found], found)


def _plain_rate(found: list[Answered]) -> float | None:
    return _together([one.plain_tokens_per_s for one in found], found)


def _together(rates: list[float | None], found: list[Answered]) -> float | None:
    tokens = [sum(answer.new_tokens - 1 for answer in one.answers) for one in found]
    pairs = [(count, rate) for count, rate in zip(tokens, rates, strict=True) if count and rate]
    seconds = sum(count / rate for count, rate in pairs)
    return sum(count for count, _ in pairs) / seconds if seconds else None


def _summary(found: list[Answered]) -> str:
    answers = [answer for one in found for answer in one.answers]
    tokens, rate = sum(answer.new_tokens for answer in answers), _rate(found)
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    batches = counted(len(found), "batch", "batches")
    return f"{counted(len(answers), 'answer')} in {batches}: {counted(tokens, 'token')}{speed}; the last batch:"


def _line(record: Record, found: Answered, idx: int) -> dict[str, Any]:
    return record | found.answers[idx]._asdict()


def _document(found: list[Answered], request: Request) -> dict[str, Any]:
    """As `text` and `stats` of one prompt; of many in `answers`."""
    equal = all(one.tokens_equal for one in found) if found[0].tokens_equal is not None else None
    data: dict[str, Any] = {"tokens_equal": equal}
    if request.compare:
        data |= {
            "tokens_per_s": _rate(found),
            "plain_tokens_per_s": _plain_rate(found),
            "why_not_compared": found[0].why_not_compared,
        }
    if request.sampling.seed is not None:
        data["seed"] = request.sampling.seed
    if not request.is_many:
        (one,) = found
        return one.answers[0]._asdict() | data | {"stats": one.stats.to_json()}
    numbers = [(one, idx) for one in found for idx in range(len(one.answers))]
    lines = [_line(record, *each) for record, each in zip(request.records, numbers, strict=True)]
    return data | {"answers": lines, "stats": [one.stats.to_json() for one in found]}


def _first_line(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 60 else line[:57] + "..."
