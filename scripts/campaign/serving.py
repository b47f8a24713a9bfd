"""One generation, watched from outside, and the figures people ask of it.

Owns the clock around `generate()` and what follows from its times: every provider is measured the same way, whatever
it says of itself.

    |<-- ttft of the first group -->|<- inter-token latency ->|          |<-- ttft of the second group, waiting included
    start                           token 1                   token 2    token n
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from kvoffload.session.stats import GenerationStats


class ServedGroup(NamedTuple):
    """Sequences that were generated together."""

    sequences: int
    began_s: float  # since the work was asked for
    token_s: list[float]  # when each new token was there, since the work was asked for

    @property
    def ttft_s(self) -> float:
        """Time to first token, from the moment the work was asked for."""
        return self.token_s[0]

    @property
    def prefill_s(self) -> float:
        """Time to first token, from the moment this group's turn came."""
        return self.token_s[0] - self.began_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self.token_s[-1] - self.token_s[0]

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 where there is only one."""
        return self.decode_s / max(1, len(self.token_s) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run of a provider produced and used. None is "not measured"."""

    tokens: torch.Tensor  # new ones, [sequences, new_tokens]
    logits: torch.Tensor | None  # float32 on the CPU, [steps, rows, vocabulary]
    groups: list[ServedGroup]
    total_s: float
    device_cache_bytes: int | None = None  # peak of what the cache holds on the device
    peak_device_bytes: int | None = None  # of the whole process, on a GPU
    host_bytes: int | None = None
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    stats: GenerationStats | None = None


def generate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    new_tokens: int,
    started_s: float,
    keeps_logits: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, ServedGroup]:
    """New tokens [sequences, new_tokens], logits, and their times since `started_s` on the clock `time.perf_counter`.

    Args:
        model: generates, greedily.
        ids: int64 [sequences, prompt tokens].
        mask: of the same shape.
        new_tokens: of every sequence.
        started_s: when the work was asked for.
        keeps_logits: return them, which takes memory.
        options: of transformers' `generate`.
    """
    prompt_tokens, times = ids.shape[1], [0.0] * new_tokens
    began_s = time.perf_counter() - started_s
    seen = 0

    def stamp(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal seen
        _synchronize(input_ids.device)
        now = time.perf_counter() - started_s
        there = input_ids.shape[1] - prompt_tokens
        times[seen:there] = [now] * (there - seen)
        seen = there
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    generating: Any = model
    found = generating.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=[stamp],
        return_dict_in_generate=True,
        output_logits=keeps_logits,
        **options,
    )
    logits = torch.stack([step.float().cpu() for step in found.logits]) if keeps_logits else None
    # Beams end where the best hypothesis does; the criteria see every step all the same.
    times = [at for at in times if at > 0]
    return found.sequences[:, prompt_tokens:].cpu(), logits, ServedGroup(ids.shape[0], began_s, times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class LatencyObjective(NamedTuple):
    """What a sequence's latency must be to count as served."""

    ttft_s: float
    tpot_s: float


Samples = dict[str, tuple[str, list[float]]]  # metric -> unit and one number per run, or per token


def samples(runs: Sequence[Outcome], prompt_tokens: int, objective: LatencyObjective) -> Samples:
    """The figures of some equal runs.

    `ttft` is that of the sequence that waits longest, `goodput` counts the new tokens of sequences within the
    objective. Beams count as one sequence.

    Args:
        runs: of one provider.
        prompt_tokens: of all sequences, without padding.
        objective: what counts as served.
    """
    found: Samples = {}

    def add(metric: str, unit: str, values: list[float]) -> None:
        if values:
            found[metric] = (unit, values)

    def each(metric: str, unit: str, of: Any) -> None:
        values = [of(run) for run in runs]
        add(metric, unit, [float(value) for value in values if value is not None])

    latencies = [
        after - before for run in runs for group in run.groups for before, after in itertools.pairwise(group.token_s)
    ]
    each("ttft", "s", lambda run: max(group.ttft_s for group in run.groups))
    each("tpot", "s", _tpot_s)
    add("inter_token_latency", "s", latencies)
    for q in (90, 95, 99):
        add(f"inter_token_latency_p{q}", "s", [float(np.percentile(latencies, q))] if latencies else [])
    each("total", "s", lambda run: run.total_s)
    each("prefill_tokens_per_s", "1/s", lambda run: prompt_tokens / sum(group.prefill_s for group in run.groups))
    each("decode_tokens_per_s", "1/s", _decode_rate)
    each("goodput_tokens_per_s", "1/s", lambda run: _goodput(run, objective))
    for metric in ("device_cache_bytes", "peak_device_bytes", "host_bytes", "h2d_bytes", "d2h_bytes"):
        each(metric, "bytes", lambda run, metric=metric: getattr(run, metric))
    for metric in ("link_utilization", "device_busy_fraction"):
        each(metric, "fraction", lambda run, metric=metric: run.stats and getattr(run.stats, metric))
    return found


def _tpot_s(run: Outcome) -> float:
    """Mean over the sequences."""
    sequences = sum(group.sequences for group in run.groups)
    return sum(group.sequences * group.tpot_s for group in run.groups) / sequences


def _decode_rate(run: Outcome) -> float | None:
    new = sum(group.sequences * (len(group.token_s) - 1) for group in run.groups)
    decode_s = sum(group.decode_s for group in run.groups)
    return new / decode_s if decode_s else None


def _goodput(run: Outcome, objective: LatencyObjective) -> float:
    served = sum(
        group.sequences * len(group.token_s)
        for group in run.groups
        if group.ttft_s <= objective.ttft_s and group.tpot_s <= objective.tpot_s
    )
    return served / run.total_s


class Sameness(NamedTuple):
    """How far one run's tokens and logits are from another's."""

    max_abs_logit_difference: float
    kl_divergence: float  # largest of any position, nats
    first_differing_token: int | None  # of any sequence; None where all are equal

    @classmethod
    def of(cls, found: Outcome, expected: Outcome) -> Sameness:
        """Compare up to the first differing token, behind which logits mean nothing.

        A token that only one of the two has differs. Logits that one does not have, or of other shapes, give NaN.
        """
        unknown = float("nan")
        if len(found.tokens) != len(expected.tokens):
            return cls(unknown, unknown, 0)
        length = min(found.tokens.shape[1], expected.tokens.shape[1])
        differs = (found.tokens[:, :length] != expected.tokens[:, :length]).any(0)
        first = int(differs.nonzero()[0]) if differs.any() else None
        if first is None and found.tokens.shape != expected.tokens.shape:
            first = length
        if found.logits is None or expected.logits is None or found.logits.shape != expected.logits.shape:
            return cls(unknown, unknown, first)
        steps = len(expected.logits) if first is None else first + 1
        ours, theirs = found.logits[:steps].double(), expected.logits[:steps].double()
        distance = float((ours - theirs).abs().max())
        log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
        return cls(distance, float((log_p.exp() * (log_p - log_q)).sum(-1).max()), first)
