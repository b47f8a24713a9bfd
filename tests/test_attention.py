"""Attention over segments beyond the matrix: deeper models with windows, chats with padding in the middle, and what
makes it leave a call to the model's own attention."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from matrix import FAST_LINK, TOLERANCE, checking_backend, distance, profile
from models import make_model
from modes import COMMON, given, outcome, plain_cache, prompt
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvoffload import ConfigError, OffloadConfig, UnsupportedModelError, hf
from kvoffload.cache import attention
from kvoffload.config import GIB
from kvoffload.hf import SegmentAttention
from kvoffload.hf.masks import MaskReader, pack
from kvoffload.session.session import Session

SPLITS = ["transfer", "recompute", 0.5]


def config(split: Any = "transfer", **options: Any) -> OffloadConfig:
    values = {"link": FAST_LINK, "profile": profile(), "device_gib": "min", "block_tokens": 4, "chunk_blocks": 2}
    return OffloadConfig(split=split, **{**values, "slots": 3, **options})


class Watch:
    """Counts the attention calls that ran over segments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_calls = 0
        attend = attention.attend

        def counted(*args: Any) -> torch.Tensor:
            self.num_calls += 1
            return attend(*args)

        monkeypatch.setattr(attention, "attend", counted)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


DEEP_TOLERANCE = 1e-5  # of six layers; gemma2 comes to 9.9e-6 on transformers 5.17
DEEP: dict[str, dict[str, Any]] = {
    "mistral": {"num_hidden_layers": 6, "sliding_window": 16, "layer_types": None},
    "gemma3_text": {
        "num_hidden_layers": 7,
        "sliding_window": 12,
        "layer_types": [*["sliding_attention"] * 5, "full_attention", "full_attention"],
    },
    "gemma2": {"num_hidden_layers": 6, "sliding_window": 9, "final_logit_softcapping": 5.0},
    "gpt_oss": {
        "num_hidden_layers": 6,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}


def deep_model(architecture: str) -> PreTrainedModel:
    values = dict(DEEP[architecture])
    if architecture == "mistral":  # transformers gives either every layer a window or none
        values.pop("layer_types")
        deep = make_model("mistral", **{**values, "sliding_window": None})
    else:
        deep = make_model(architecture, **values)
    return deep


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("architecture", DEEP)
def test_deep_models_with_windows_shorter_than_the_prompt(
    architecture: str, split: Any, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks (gpt_oss), soft caps (gemma2) and layers whose window is the cache's, beside layers over segments."""
    deep = deep_model(architecture)
    inputs = {"input_ids": prompt(3, 41), "attention_mask": torch.ones(3, 41, dtype=torch.long)}
    inputs["attention_mask"][1, :11] = 0
    for extra in ({}, {"num_beams": 3}, {"prefill_chunk_size": 10}):
        wanted = outcome([deep.generate(**inputs, **COMMON, **extra)])
        before = watch.num_calls
        with Session(deep, config(split), checking_backend()) as session:
            found = outcome([deep.generate(**inputs, **COMMON, **extra)])
            assert session.stats is not None
            assert session.stats.h2d_bytes > 0
        assert watch.num_calls > before
        assert distance(found, wanted) <= DEEP_TOLERANCE
        assert all(map(torch.equal, found.sequences, wanted.sequences))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2", "gpt_oss"])
def test_a_chat_whose_second_turn_is_padded_too(architecture: str, split: Any, watch: Watch) -> None:
    """Rows of different lengths in both turns: positions that nobody may see lie in the middle of the cache."""
    chatting = make_model(architecture)

    def chat(new_cache: Any) -> list[torch.Tensor]:
        cache, mask, logits = new_cache(), torch.ones(2, 0, dtype=torch.long), []
        for turn, (tokens, hidden) in enumerate(((23, 9), (19, 12), (7, 3))):
            new_mask = torch.ones(2, tokens, dtype=torch.long)
            new_mask[turn % 2, :hidden] = 0
            mask = torch.cat([mask, new_mask], 1)
            ids = prompt(2, tokens, seed=turn) * new_mask
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            for _ in range(5):
                out = chatting(ids, attention_mask=mask, position_ids=positions[:, -ids.shape[1] :], **given(cache))
                logits.append(out.logits[:, -1])
                ids = out.logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                positions = (mask.cumsum(1) - 1).clamp(min=0)
            mask = mask[:, :-1]
        return logits

    with torch.no_grad():
        wanted = chat(lambda: plain_cache(chatting))
        with Session(chatting, config(split), checking_backend()) as session:
            found = chat(session.new_cache)
    assert watch.num_calls > 0
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert (ours - theirs).abs().max().item() <= TOLERANCE, f"step {step}"


def test_whole_layers_where_asked_for(model: PreTrainedModel, watch: Watch) -> None:
    with Session(model, config(attention="whole_layer"), checking_backend()) as session:
        assert model.config._attn_implementation == "sdpa"
        model.generate(prompt(2), **COMMON)
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0
    assert watch.num_calls == 0
    with pytest.raises(ConfigError, match="attention must be 'auto' or 'whole_layer', got 'eager'"):
        OffloadConfig(attention="eager")  # type: ignore[arg-type]


def test_whole_layers_where_the_link_has_no_speed(model: PreTrainedModel, watch: Watch) -> None:
    with Session(model, OffloadConfig(split="transfer", device_gib="min", block_tokens=4)) as session:
        model.generate(prompt(2), **COMMON)
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0
    assert watch.num_calls == 0


def compare(model: PreTrainedModel, forward: Any) -> Session:
    """A prefill and then `forward(model, cache)`, plain and offloaded."""
    with torch.no_grad():
        results = []
        for new_cache in (lambda: plain_cache(model), None):
            if new_cache is None:
                with Session(model, config(0.5), checking_backend()) as session:
                    cache = session.new_cache()
                    model(prompt(2, 21), **given(cache))
                    results.append(forward(model, cache))
            else:
                cache = new_cache()
                model(prompt(2, 21), **given(cache))
                results.append(forward(model, cache))
    assert (results[0] - results[1]).abs().max().item() <= TOLERANCE
    return session


@pytest.mark.parametrize("q_tokens", [1, 3, 40])
def test_a_mask_that_is_more_than_causal_takes_whole_layers(
    q_tokens: int, model: PreTrainedModel, watch: Watch
) -> None:
    """A mask of the caller's own: each new token skips other cached ones."""
    generator = torch.Generator().manual_seed(5)
    allowed = torch.rand(2, 1, q_tokens, 21 + q_tokens, generator=generator) < 0.6
    allowed[..., 21:] = torch.ones(q_tokens, q_tokens, dtype=torch.bool).tril()

    def forward(model: PreTrainedModel, cache: Any) -> torch.Tensor:
        return model(prompt(2, q_tokens, seed=3), attention_mask=allowed, **given(cache)).logits

    if q_tokens == 1:  # one query: any mask is a set of positions
        compare(model, forward)
        assert watch.num_calls == 3
    else:
        with pytest.warns(UserWarning, match="whole layers are put together") as caught:
            compare(model, forward)
        assert len([w for w in caught if "whole layers" in str(w.message)]) == 1
        assert watch.num_calls == 0


def test_a_bias_in_the_mask_takes_whole_layers(model: PreTrainedModel, watch: Watch) -> None:
    bias = torch.randn(2, 1, 1, 22, generator=torch.Generator().manual_seed(5))
    with pytest.warns(UserWarning, match="a bias, a mask that is more than causal"):
        compare(model, lambda m, cache: m(prompt(2, 1, seed=3), attention_mask=bias, **given(cache)).logits)
    assert watch.num_calls == 0


def test_an_argument_that_is_not_known_takes_whole_layers(model: PreTrainedModel, watch: Watch) -> None:
    def forward(model: PreTrainedModel, cache: Any) -> torch.Tensor:
        bias = torch.randn(1, 4, 1, 22, generator=torch.Generator().manual_seed(2))
        return model(prompt(2, 1), **given(cache), position_bias=bias).logits

    with pytest.warns(UserWarning, match="whole layers are put together"):
        compare(model, forward)
    assert watch.num_calls == 0


def test_segments_again_after_a_call_over_whole_layers(model: PreTrainedModel, watch: Watch) -> None:
    def forward(model: PreTrainedModel, cache: Any) -> torch.Tensor:
        logits = []
        for step in range(9):
            bias = torch.zeros(1, 4, 1, 22 + step) + step if step % 3 == 1 else None
            logits.append(model(prompt(2, 1, seed=step), **given(cache), position_bias=bias).logits)
        return torch.cat(logits)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        compare(model, forward)
    assert watch.num_calls == 3 * 6


def test_layers_that_share_their_keys_keep_them_to_themselves(watch: Watch) -> None:
    sharing = make_model("gemma3n_text")
    wanted = outcome([sharing.generate(prompt(2), **COMMON)])
    with Session(sharing, config(0.5), checking_backend()) as session:
        found = outcome([sharing.generate(prompt(2), **COMMON)])
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0
    assert distance(found, wanted) <= TOLERANCE


def test_a_model_that_shares_the_configuration_is_left_alone(model: PreTrainedModel, watch: Watch) -> None:
    other = copy.deepcopy(model)
    other.config = model.config
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = model.config
    wanted = outcome([other.generate(prompt(2), **COMMON)])
    with Session(model, config(), checking_backend()):
        assert model.config._attn_implementation.startswith("kvoffload")
        found = outcome([other.generate(prompt(2), **COMMON)])
        assert watch.num_calls == 0
    assert distance(found, wanted) == 0


def test_a_name_means_what_was_selected_before_when_the_session_is_over(model: PreTrainedModel) -> None:
    """Configurations that were copied meanwhile have it; the next session takes it again, so that they stay few."""
    first = Session(model, config(), checking_backend())
    name = model.config._attn_implementation
    second = Session(make_model("opt"), config(), checking_backend())
    assert name in AttentionInterface._global_mapping
    assert name in AttentionMaskInterface._global_mapping
    first.close()
    assert model.config._attn_implementation == "sdpa"
    assert model.model.config._attn_implementation == "sdpa"
    left_behind = AttentionInterface._global_mapping[name]
    assert not isinstance(left_behind, SegmentAttention)
    assert not vars(left_behind).keys() & {"_hooks", "_configs"}, "which would keep the model"
    third = Session(model, config(), checking_backend())
    assert model.config._attn_implementation == name
    third.close()
    second.close()


def test_an_attention_function_of_the_users_own_is_kept(model: PreTrainedModel, watch: Watch) -> None:
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("mine", mine)
    AttentionMaskInterface.register("mine", sdpa_mask)
    try:
        model.set_attn_implementation("mine")
        with Session(model, config(), checking_backend()) as session:
            assert model.config._attn_implementation == "mine"
            model.generate(prompt(2), **COMMON)
            assert session.stats is not None
            assert session.stats.h2d_bytes > 0
        assert len(calls) == 3 * COMMON["max_new_tokens"]
        assert watch.num_calls == 0
    finally:
        del AttentionInterface._global_mapping["mine"], AttentionMaskInterface._global_mapping["mine"]


def test_attention_that_stops_coming_to_us_is_an_error(model: PreTrainedModel) -> None:
    """Else it would see the new tokens alone."""
    with Session(model, config(), checking_backend()) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(2, 21), **given(cache))
        model.set_attn_implementation("sdpa")
        with pytest.raises(UnsupportedModelError, match="attended without its cached tokens"):
            model(prompt(2, 1), **given(cache))
    assert model.config._attn_implementation == "sdpa"
    model.generate(prompt(2), **COMMON)


def test_keys_that_are_changed_after_caching_take_whole_layers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    """What attention gets is not what was cached: only the model's own attention after its own change is right."""
    update = hf.OffloadedHFCache.update
    plain_update = DynamicCache.update

    def changed(original: Any) -> Any:
        def call(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            keys, values = original(self, keys, values, *args, **kwargs)
            return keys * 1.5, values

        return call

    with monkeypatch.context() as patch:
        patch.setattr(hf.OffloadedHFCache, "update", changed(update))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with Session(model, config(), checking_backend()):
                found = outcome([model.generate(prompt(2), **COMMON)])
    with monkeypatch.context() as patch:
        patch.setattr(DynamicCache, "update", changed(plain_update))
        wanted = outcome([model.generate(prompt(2), **COMMON)])
    assert watch.num_calls == 0
    assert distance(found, wanted) <= TOLERANCE


# ---- masks -----------------------------------------------------------------------------------------------------------


def bits(words: torch.Tensor, positions: int) -> torch.Tensor:
    """The inverse of `pack`, slowly."""
    return torch.tensor([[bool((int(row[p // 32]) >> (p % 32)) & 1) for p in range(positions)] for row in words])


@pytest.mark.parametrize("positions", [1, 31, 32, 33, 64, 100])
def test_bits_are_packed_one_per_position(positions: int) -> None:
    valid = torch.rand(3, positions, generator=torch.Generator().manual_seed(positions)) < 0.5
    valid[0] = True
    words = pack(valid)
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-positions // 32))
    assert torch.equal(bits(words, positions), valid)


def causal(valid: torch.Tensor, q_tokens: int) -> torch.Tensor:
    total = valid.shape[1]
    place = torch.arange(total)
    return (valid[:, None] & (place <= place[total - q_tokens :, None]))[:, None]


@pytest.mark.parametrize("q_tokens", [1, 2, 7])
@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_read_from_either_kind_of_mask(q_tokens: int, additive: bool) -> None:
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 3:9] = False
    mask = causal(valid, q_tokens)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    where = {"rows": 2, "query_tokens": q_tokens, "cached_tokens": 20 - q_tokens}
    padding = MaskReader().read(mask, forward=1, **where)
    assert padding is not None
    assert padding.valid is not None
    assert torch.equal(bits(padding.valid, 20), valid)
    if q_tokens > 1:
        mask[0, 0, 0, 2] = mask[1, 0, -1, 4]  # which the newest token may see
        assert MaskReader().read(mask, forward=1, **where) is None


@pytest.mark.parametrize("q_tokens", [1, 2])
def test_a_bias_is_no_padding(q_tokens: int) -> None:
    """Also where it is that of a cached position, and the same for all queries."""
    allowed = causal(torch.ones(1, 20, dtype=torch.bool), q_tokens)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    where = {"forward": 1, "rows": 1, "query_tokens": q_tokens, "cached_tokens": 20 - q_tokens}
    assert MaskReader().read(mask, **where) is not None
    mask[..., 4] = -1.5
    assert MaskReader().read(mask, **where) is None


def test_a_mask_is_read_once_per_forward_and_again_in_the_next() -> None:
    reader, mask = MaskReader(), torch.ones(1, 1, 1, 9, dtype=torch.bool)
    where = {"rows": 1, "query_tokens": 1, "cached_tokens": 8}
    first = reader.read(mask, forward=1, **where)
    assert reader.read(mask.view(1, 1, 1, 9), forward=1, **where) is first
    mask[..., 4] = False
    again = reader.read(mask, forward=2, **where)
    assert again is not None
    assert again.valid is not None
    assert bits(again.valid, 9)[0].tolist() == [True] * 4 + [False] + [True] * 4


def test_masks_of_one_forward_are_told_apart() -> None:
    """Also where one is a view of another."""
    reader, both = MaskReader(), torch.ones(2, 1, 1, 9, dtype=torch.bool)
    both[1, ..., 3] = False
    other = both.roll(1, dims=3)
    for mask in (both, other, both[1:], both[:1], both[:1].expand(2, -1, -1, -1), other, both):
        padding = reader.read(mask, forward=1, rows=2, query_tokens=1, cached_tokens=8)
        assert padding is not None
        assert padding.valid is not None
        assert torch.equal(bits(padding.valid, 9), mask[:, 0, 0].expand(2, 9))


def test_masks_of_other_shapes_are_not_understood() -> None:
    where = {"rows": 2, "query_tokens": 1, "cached_tokens": 8}
    for shape in ((2, 9), (2, 1, 1), (2, 4, 1, 9), (3, 1, 1, 9), (2, 1, 1, 8), (2, 1, 2, 9)):
        assert MaskReader().read(torch.ones(shape, dtype=torch.bool), forward=1, **where) is None
    assert MaskReader().read(None, forward=1, rows=2, query_tokens=3, cached_tokens=8) is None


# ---- order of segments -----------------------------------------------------------------------------------------------


def test_resident_blocks_are_attended_to_between_the_chunks_that_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise their work stands in front of the chunks, whose slots it keeps full while the link waits."""
    model = make_model("opt", num_hidden_layers=2)
    attended: list[int] = []
    real = attention._Answer.add

    def noted(self: Any, stored: Any, span: Any) -> None:
        attended.extend(range(span.first_block, span.first_block + span.num_blocks))
        real(self, stored, span)

    monkeypatch.setattr(attention._Answer, "add", noted)
    with Session(model, config(split="transfer", chunk_blocks=1, device_gib=60_000 / GIB)) as session, torch.no_grad():
        ids = prompt(1, 97)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert session.stats is not None
    plan = session.stats.plan
    resident, chunks = plan.resident_kv_blocks, plan.kv_blocks
    assert resident > chunks > 1, (resident, chunks)
    order = attended[: resident + chunks]
    assert sorted(order) == list(range(resident + chunks))
    firsts = [idx for idx, block in enumerate(order) if block >= resident]
    stretches = [after - before - 1 for before, after in itertools.pairwise([*firsts, len(order)])]
    assert max(stretches) <= -(-resident // chunks)
