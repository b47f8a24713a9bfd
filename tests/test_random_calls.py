"""Random calls of `generate()` with and without offloading: what no list of cells thought of.

A seed stands for a model, a batch with or without padding, a way to generate, options and a number of turns. Everything
is drawn from it, so a failure is seen again with `-k 'seed-123'`, and `-m slow` draws many more.
"""

from __future__ import annotations

import functools
import random
from typing import Any, NamedTuple

import pytest
import torch
from matrix import checking_backend, profile
from models import RECOMPUTABLE, TRANSFERRED, make_model
from modes import given, plain_cache
from transformers import PreTrainedModel

from kvoffload import EmulatedLink, OffloadConfig
from kvoffload.config import GIB
from kvoffload.errors import HostMemoryError, InfeasiblePlanError
from kvoffload.session.session import Session

SEEDS, SLOW_SEEDS = range(120), range(1000, 3000)
TOLERANCE = 1e-5  # max |d logits|, float32
ALTERNATING = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
SCALED = {"factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in [*RECOMPUTABLE, *TRANSFERRED]} | {
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, all kv heads": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 20}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **SCALED}}),
    "llama, scaled by frequency": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}},
    ),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5, "num_key_value_heads": 4}),
    "gemma3, narrow": ("gemma3_text", {**ALTERNATING, "sliding_window": 9}),
    "gpt_oss, narrow": ("gpt_oss", {**ALTERNATING, "sliding_window": 7}),
    "stablelm, normed": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
}


class Call(NamedTuple):
    """One or several calls of `generate()`."""

    model: str
    ids: torch.Tensor  # [rows, tokens]
    mask: torch.Tensor
    options: dict[str, Any]
    added_tokens: list[int]  # given before each further turn
    config: OffloadConfig

    @property
    def is_capped(self) -> bool:
        """Whether it may be refused for want of memory."""
        return self.config.device_gib != "min" or self.config.host_gib != "auto"


def draw(seed: int) -> Call:
    rng = random.Random(seed)
    rows, tokens, new_tokens = (
        rng.choice([1, 1, 2, 3, 4]),
        rng.choice([1, 2, 5, 17, 31, 61, 90]),
        rng.choice([1, 2, 7, 16, 40]),
    )
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "sample": {"do_sample": True, "temperature": 1.3},
        "beams": {"do_sample": False, "num_beams": rng.choice([2, 3]), "length_penalty": rng.choice([0.5, 2.0])},
        "sampled beams": {"do_sample": True, "num_beams": 2},
        "several answers": {"do_sample": True, "num_return_sequences": rng.choice([2, 3])},
        "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": rng.choice([2, 4, 9])},
        "chunks": {"do_sample": False, "prefill_chunk_size": rng.choice([1, 3, 16, 40])},
    }
    way = rng.choice(["greedy", "greedy", *ways])
    rows = 1 if way == "prompt lookup" else rows
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    padding = rng.choice(["none", "equal", "of each row"])
    for row in range(rows):
        if padding != "none":
            mask[row, : rng.randint(0, tokens - 1)] = 0
    if padding == "equal":
        mask[:] = mask[:1]
    options = ways[way] | {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens if rng.random() < 0.5 else 1}
    if rng.random() < 0.15:
        options["repetition_penalty"] = 1.3
    speed = rng.choice([0.05, 2.0, 20.0])
    link, known = EmulatedLink(h2d_gb_per_s=speed, latency_s=rng.choice([0.0, 1e-5])), profile(speed)
    stored_rows = rows * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    drawn: dict[str, Any] = {"split": rng.choice(["transfer", "recompute", "auto", rng.random()]), "device_gib": "min"}
    if rng.random() < 0.4:
        drawn["device_gib"] = rng.choice([20e3, 60e3, 150e3, 300e3, 800e3]) * stored_rows / GIB
    if rng.random() < 0.2:
        drawn["host_gib"] = rng.choice([50e3, 200e3, 800e3]) * stored_rows / GIB
    often: list[tuple[str, float, list[Any]]] = [
        ("block_tokens", 0.6, [1, 2, 3, 5, 8, 16, 20]),
        ("chunk_blocks", 0.5, [1, 2, 3, 7]),
        ("slots", 0.5, [1, 2, 3, 6]),
        ("schedule", 0.2, ["kvpr"]),
        ("overlap", 0.15, [False]),
        ("attention", 0.3, ["whole_layer"]),
    ]
    drawn |= {name: rng.choice(values) for name, chance, values in often if rng.random() < chance}
    if rng.random() < 0.15:
        link = EmulatedLink()
        drawn["split"] = "transfer" if drawn["split"] == "auto" else drawn["split"]
    else:
        drawn["profile"] = known
    turns = rng.choice([1, 1, 2, 3]) if way in ("greedy", "sample", "chunks") else 1
    added = [rng.choice([1, 4, 11]) for _ in range(turns - 1)]
    return Call(rng.choice(list(MODELS)), ids, mask, options, added, OffloadConfig(link=link, **drawn))


@functools.cache
def _model(name: str) -> PreTrainedModel:
    architecture, overrides = MODELS[name]
    return make_model(architecture, **overrides)


def _outputs(model: PreTrainedModel, call: Call, new_cache: Any) -> list[Any]:
    """What each turn generates; without further turns the cache is `generate`'s own."""
    ids, mask, options, found = call.ids.masked_fill(call.mask == 0, 0), call.mask, dict(call.options), list[Any]()
    cache = given(new_cache()) if call.added_tokens else {}
    for added in [*call.added_tokens, None]:
        torch.manual_seed(7)
        common = {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        found.append(model.generate(ids, attention_mask=mask, **options, **common, **cache))  # type: ignore[operator]
        if added is not None:
            sequences = found[-1].sequences
            more = torch.randint(3, 96, (sequences.shape[0], added), generator=torch.Generator().manual_seed(added))
            ones = torch.ones(mask.shape[0], sequences.shape[1] + added - mask.shape[1], dtype=mask.dtype)
            ids, mask = torch.cat([sequences, more], 1), torch.cat([mask, ones], 1)
            options.pop("prefill_chunk_size", None)  # of the prompt
    return found


def _distance(found: torch.Tensor, expected: torch.Tensor, *, in_any_order: bool) -> float:
    """Between logits [rows, vocabulary]; nearly tied beams may have changed places."""
    apart = (found[:, None] - expected[None]).abs().amax(-1)  # [rows, rows]
    return float(apart.amin(1).max() if in_any_order else apart.diagonal().max())


def check(seed: int) -> None:
    call = draw(seed)
    model, has_beams = _model(call.model), "num_beams" in call.options
    expected = _outputs(model, call, lambda: plain_cache(model))
    assert isinstance(call.config.link, EmulatedLink)
    try:
        with Session(model, call.config, checking_backend(call.config.link)) as session:
            found = _outputs(model, call, session.new_cache)
    except (InfeasiblePlanError, HostMemoryError):
        assert call.is_capped
        return
    for turn, wanted in zip(found, expected, strict=True):
        assert has_beams or torch.equal(turn.sequences, wanted.sequences)
        for step in zip(turn.logits, wanted.logits, strict=True):
            assert _distance(*step, in_any_order=has_beams) <= TOLERANCE  # what is not a number is more


@pytest.mark.filterwarnings("ignore::UserWarning:kvoffload")  # what cannot be recomputed or attended in chunks
@pytest.mark.parametrize("seed", SEEDS, ids="seed-{}".format)
def test_random_calls_give_the_logits_of_plain_generate(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:kvoffload")
@pytest.mark.parametrize("seed", SLOW_SEEDS, ids="seed-{}".format)
def test_many_random_calls_give_the_logits_of_plain_generate(seed: int) -> None:
    check(seed)


def test_random_calls_are_of_all_kinds() -> None:
    calls = [draw(seed) for seed in SEEDS]
    for name in ("split", "schedule", "overlap", "attention", "device_gib", "host_gib", "block_tokens", "slots"):
        assert len({getattr(call.config, name) for call in calls}) > 1
    assert len({call.model for call in calls}) > 25
    assert {len(call.added_tokens) for call in calls} == {0, 1, 2}
    assert sum(not call.is_capped for call in calls) > len(calls) / 3
    for name in ("num_beams", "num_return_sequences", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        assert any(name in call.options for call in calls)
    assert any(bool((call.mask[:, 0] == 0).any()) for call in calls)
