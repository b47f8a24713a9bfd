"""`kv_dtype`: where forms with loss apply, what is said of it, and what else goes on as before."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from form_matrix import SLOW_LINK
from matrix import FAST_LINK, checking_backend, leaves_no_trace, profile
from models import WIDE, make_model
from modes import COMMON, given, outcome, prompt
from test_memory import Call, measure
from transformers import PreTrainedModel

from kvoffload import EmulatedLink, OffloadConfig
from kvoffload.config import GIB
from kvoffload.errors import ConfigError, HostMemoryError
from kvoffload.session.session import Session


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", **WIDE)


def config(**options: Any) -> OffloadConfig:
    values: dict[str, Any] = {"block_tokens": 8, "chunk_blocks": 2, "slots": 2, "device_gib": "min", "speculate": "off"}
    values |= {"link": FAST_LINK, "profile": profile(SLOW_LINK.h2d_gb_per_s), "deterministic": True}
    return OffloadConfig(**values | options)


@pytest.mark.parametrize("value", ["int3", "bfloat16", 8, None, True])
def test_what_it_is_not_is_told_with_what_it_may_be(value: Any) -> None:
    with pytest.raises(ConfigError, match="kv_dtype must be one of model, int8, int4, int2"):
        OffloadConfig(kv_dtype=value)
    with pytest.raises(ConfigError, match="packing must be one of auto, off"):
        OffloadConfig(packing=value)


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
def test_small_heads_and_latent_attention_stay_exact_with_one_warning(architecture: str) -> None:
    model = make_model(architecture)  # heads of 12, and of 16 and 12
    wanted = outcome([model.generate(prompt(2), **COMMON)])
    with leaves_no_trace(model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Session(model, config(kv_dtype="int4", split="transfer"), backend=checking_backend()) as session:
            for _ in range(2):
                found = outcome([model.generate(prompt(2), **COMMON)])
                assert session.stats is not None
                assert session.stats.exact
    assert all(map(torch.equal, found.sequences, wanted.sequences))
    said = [str(one.message) for one in caught if "kv_dtype" in str(one.message)]
    assert len(said) == 2, "one for each cache"
    assert "stay exact" in said[0]


def test_a_model_of_which_some_layers_can_be_quantised(model: PreTrainedModel) -> None:
    mixed = make_model("gemma2", **WIDE, query_pre_attn_scalar=32)  # every other layer has a window, and stays
    with Session(mixed, config(kv_dtype="int8"), backend=checking_backend()) as session:
        mixed.generate(prompt(2), **COMMON)
        assert session.stats is not None
        assert session.stats.lossy_form == "int8"
        assert not session.stats.exact


def test_host_memory_that_only_few_bits_fit_into_is_enough(model: PreTrainedModel) -> None:
    with Session(model, config(), backend=checking_backend()) as session:
        model.generate(prompt(2), **COMMON)
        assert session.stats is not None
        plain = session.stats.host_bytes
    with Session(model, config(kv_dtype="int4", host_gib=plain / 3 / GIB), backend=checking_backend()) as session:
        model.generate(prompt(2), **COMMON)
        assert session.stats is not None
        assert session.stats.host_bytes <= plain / 3
    with Session(model, config(host_gib=plain / 3 / GIB)) as session, pytest.raises(HostMemoryError):
        model.generate(prompt(2), **COMMON)


def test_what_fits_on_the_device_stays_exact(model: PreTrainedModel) -> None:
    wanted = outcome([model.generate(prompt(2), **COMMON)])
    with Session(model, config(kv_dtype="int2", device_gib=0.1), backend=checking_backend()) as session:
        found = outcome([model.generate(prompt(2), **COMMON)])
        assert session.stats is not None
        assert session.stats.exact
        assert session.stats.lossy_form is None
    assert all(map(torch.equal, found.sequences, wanted.sequences))


def test_drafts_read_exact_blocks_and_check_against_the_stored_ones(model: PreTrainedModel) -> None:
    """With drafts nothing new on the device has another form, and the tokens are those that were checked."""
    options = {"kv_dtype": "int4", "device_gib": 0.35e6 / GIB, "deterministic": False}
    with leaves_no_trace(model), Session(model, config(speculate=4, **options), backend=checking_backend()) as session:
        cache = session.new_cache()
        model.generate(prompt(2, 96), **given(cache), **{**COMMON, "max_new_tokens": 24})
        stats = session.stats
        assert stats is not None
        assert stats.draft_acceptance is not None
        assert stats.lossy_form == "int4"
        for layer in cache.core.layers:
            assert {block.form for block in layer.blocks if block.is_resident} <= {"kv"}
            assert layer.window_places


def test_a_copy_of_a_cache_shares_quantised_blocks_and_a_crop_reopens_them(model: PreTrainedModel) -> None:
    import copy

    with Session(model, config(kv_dtype="int8"), backend=checking_backend()) as session:
        cache = session.new_cache()
        model.generate(prompt(2), **given(cache), **COMMON)
        keys = cache.layers[0].keys
        other = copy.deepcopy(cache)
        assert torch.equal(other.layers[0].keys, keys)
        other.crop(29 - other.get_seq_length())  # in the middle of a block
        torch.testing.assert_close(other.layers[0].keys, keys[:, :, :29])
        more = prompt(2, 9, seed=4)
        with torch.no_grad():
            model(more, **given(other))
        torch.testing.assert_close(other.layers[0].keys[:, :, :24], keys[:, :, :24])
        assert other.core.layers[0].blocks[0] is cache.core.layers[0].blocks[0]


@pytest.mark.parametrize(("kv_dtype", "least"), [("int8", 1.75), ("int4", 2.7), ("int2", 3.6)])
def test_host_and_resident_memory_shrink_alike(
    model: PreTrainedModel, kv_dtype: Any, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks of 32 tokens and heads of 32 values; against bfloat16, of which this float32 cache is twice."""
    call = Call(2, 160, 24)
    options: dict[str, Any] = {"block_tokens": 32, "chunk_blocks": 1, "attention": "auto", "speculate": "off"}
    options |= {"profile": profile(SLOW_LINK.h2d_gb_per_s), "deterministic": True}
    plain, plain_stats = measure(model, call, "transfer", monkeypatch, **options)
    small, stats = measure(model, call, "transfer", monkeypatch, kv_dtype=kv_dtype, **options)
    assert plain_stats.host_bytes / stats.host_bytes >= 2 * least
    assert plain.peak_host_bytes / small.peak_host_bytes >= 2 * least
    # then all of it on the device, which has room for the form alone
    cache_bytes = stats.plan.num_offloaded_layers * stats.plan.num_blocks * 32 * stats.plan.bytes_per_token[kv_dtype]
    cap = (stats.plan.device_bytes + 1.3 * cache_bytes) / GIB
    held, resident = measure(model, call, "transfer", monkeypatch, kv_dtype=kv_dtype, device_gib=cap, **options)
    assert resident.plan.count(tier="device") > 0
    assert held.decode_device_bytes <= 1.02 * cap * GIB
    assert held.decode_device_bytes == pytest.approx(resident.device_kv_peak_decode_bytes, rel=0.02)


def test_over_a_link_without_a_speed_the_coarsest_form_is_taken(model: PreTrainedModel) -> None:
    with Session(
        model, config(kv_dtype="int4", link=EmulatedLink(), profile="auto"), backend=checking_backend()
    ) as session:
        model.generate(prompt(2), **COMMON)
        assert session.stats is not None
        assert session.stats.lossy_form == "int4"


def test_what_a_crop_left_of_quantised_blocks_is_still_not_exact(model: PreTrainedModel) -> None:
    with Session(model, config(kv_dtype="int8"), backend=checking_backend()) as session:
        cache = session.new_cache()
        output = model.generate(prompt(2), **given(cache), **COMMON)
        cache.crop(5 - cache.get_seq_length())  # within the first block
        model.generate(output.sequences[:, :6], **given(cache), **{**COMMON, "max_new_tokens": 4})
        assert session.stats is not None
        assert not session.stats.exact
        assert session.stats.lossy_form == "int8"


def test_a_longer_turn_over_a_link_without_a_speed_has_the_form_that_was_asked_for(model: PreTrainedModel) -> None:
    asked = config(kv_dtype="int8", link=EmulatedLink(), profile="auto", device_gib=0.25e6 / GIB)
    with Session(model, asked, backend=checking_backend()) as session:
        cache = session.new_cache()
        output = model.generate(prompt(2), **given(cache), **COMMON)
        more = torch.cat([output.sequences, prompt(2, 60, seed=3)], dim=1)
        model.generate(more, **given(cache), **{**COMMON, "max_new_tokens": 24})
        assert session.stats is not None
        assert session.stats.lossy_form == "int8"
        assert cache.core.count_blocks()["int8"] >= sum(cache.core.count_blocks().values()) / 2


def test_a_fixed_split_beside_few_bits_shares_out_no_more_than_there_is(model: PreTrainedModel) -> None:
    """All of it fits on the device, so that the shares are of what may come."""
    with Session(model, config(kv_dtype="int4", split=0.5, device_gib=0.1), backend=checking_backend()) as session:
        cache = session.new_cache()
        model.generate(prompt(2), **given(cache), **COMMON)
        assert sum(cache.core.placement.shares.values()) == pytest.approx(1)
        assert cache.core.placement.shares["activation"] == 0.5
