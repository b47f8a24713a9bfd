"""Kinds of models and calls that people reported of offloaded caches: tokens of plain generate, bytes from the host.

Each is an example of a kind; what is refused stands in test_refusals.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from matrix import FAST_LINK
from modes import given
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kvoffload
from kvoffload import KVOffloadError, OffloadConfig

WAYS = {
    "transfer": OffloadConfig(split="transfer", device_gib="min", block_tokens=8, link=FAST_LINK),
    "half": OffloadConfig(split=0.5, device_gib="min", block_tokens=8, link=FAST_LINK),
    "unpaced": OffloadConfig(split="transfer", device_gib="min", block_tokens=8),
}
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RUN: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = torch.randint(12, 96, (2, 37), generator=torch.Generator().manual_seed(1))
REPEATED = IDS[:1, :13].repeat(1, 3)  # in which prompt lookup finds drafts


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights large enough to tell tokens apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.mul_(3)
    return model.eval()


def tiny(kind: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **more})
    return loud(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def same(model: PreTrainedModel, ids: torch.Tensor = IDS, *, is_long: bool = True, **more: Any) -> None:
    """Offloaded generation equals the plain one, in every way, and something of a long text came from the host."""
    call: dict[str, Any] = {**RUN, **more}
    wanted = model.generate(ids, **call)
    for name, config in WAYS.items():
        with kvoffload.offload(model, config) as session:
            found = model.generate(ids, **call)
        assert torch.equal(found, wanted), name
        assert session.stats is not None
        assert session.stats.h2d_bytes > 0 or not is_long, name


def longrope(original: int) -> dict[str, Any]:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    rope |= {"original_max_position_embeddings": original}
    return {"rope_parameters": rope, "original_max_position_embeddings": original, "sliding_window": None}


# ---- attention of another kind ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:DogeAttention attends in a way")
@pytest.mark.filterwarnings("ignore:K/V of DogeAttention cannot be recomputed")
@pytest.mark.parametrize("call", ["greedy", "beams", "prompt lookup"])
def test_a_mask_that_a_module_builds_from_what_it_took_from_the_cache(call: str) -> None:
    model = tiny("doge")
    for idx, layer in enumerate(model.model.layers):
        layer.self_attn.A.data.normal_(generator=torch.Generator().manual_seed(idx))
    more = {"greedy": {}, "beams": {"num_beams": 3}, "prompt lookup": {"prompt_lookup_num_tokens": 4}}[call]
    same(model, REPEATED if call == "prompt lookup" else IDS, **more)


def test_the_decoder_of_an_encoder_decoder_with_its_unused_cross_attention() -> None:
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             {"layers": 3, "attention_heads": 4, "ffn_dim": 64}.items()}  # fmt: skip
    config = transformers.BartConfig(
        vocab_size=96, d_model=48, max_position_embeddings=256, is_decoder=True, is_encoder_decoder=False, **sizes
    )
    same(loud(transformers.BartForCausalLM(config)))


def mllama() -> PreTrainedModel:
    torch.manual_seed(0)
    text = transformers.MllamaTextConfig(
        **SMALL, cross_attention_layers=[1, 3], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    vision = {
        "hidden_size": 32,
        "attention_heads": 2,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 2,
        "vision_output_dim": 96,
        "intermediate_layers_indices": [0, 1],
        "supported_aspect_ratios": [[1, 1]],
    }
    config = transformers.MllamaConfig(text_config=text.to_dict(), vision_config=vision, image_token_index=5)
    return loud(transformers.MllamaForConditionalGeneration(config).float())


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")  # inside Mllama, in 5.17
def test_layers_of_cross_attention_keep_the_cache_of_transformers() -> None:
    model, mask = mllama(), torch.ones_like(IDS)
    same(model, attention_mask=mask)
    image = {
        "pixel_values": torch.randn(1, 1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(4)),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        "cross_attention_mask": torch.ones(1, 37, 1, 2, dtype=torch.long),
    }
    same(model, IDS[:1], attention_mask=mask[:1], **image)


def gemma4_text(**more: Any) -> dict[str, Any]:
    return {
        **SMALL,
        "head_dim": 12,
        "global_head_dim": 24,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **more,
    }


@pytest.mark.filterwarnings("ignore:K/V of Gemma4TextAttention cannot be recomputed")
def test_head_sizes_that_differ_between_layers() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(**gemma4_text())
    same(loud(AutoModelForCausalLM.from_config(config, dtype=torch.float32)))


@pytest.mark.filterwarnings("ignore:K/V of Gemma4TextAttention cannot be recomputed")
def test_the_attention_of_a_tower_is_left_alone() -> None:
    torch.manual_seed(0)
    names = ("image_token_id", "audio_token_id", "video_token_id", "boi_token_id", "eoi_token_id", "boa_token_id",
             "eoa_token_id")  # fmt: skip
    audio = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 48}
    config = transformers.Gemma4Config(
        text_config=gemma4_text(),
        vision_config=None,
        audio_config=audio,
        **{name: 5 + idx for idx, name in enumerate(names)},
    )
    same(loud(transformers.Gemma4ForConditionalGeneration(config).float()))


def test_experts_beside_layers_of_linear_attention() -> None:
    torch.manual_seed(0)
    text = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    text |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    text |= {"layer_types": ["linear_attention", "full_attention"] * 2}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    config = transformers.Qwen3_5MoeTextConfig(**text)
    same(loud(AutoModelForCausalLM.from_config(config, dtype=torch.float32)))


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
def test_layers_that_hold_attention_and_a_state(more: dict[str, Any]) -> None:
    sizes = {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 8}
    same(tiny("falcon_h1", **sizes, mamba_chunk_size=8, num_key_value_heads=2), **more)


# ---- windows and positions -------------------------------------------------------------------------------------------


def test_a_window_wider_than_the_positions_is_a_full_cache() -> None:
    same(tiny("phi3", sliding_window=512))


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("original", [20, 43], ids=["in the prompt", "while decoding"])
def test_a_text_that_grows_past_the_original_length_of_longrope(original: int, more: dict[str, Any]) -> None:
    """There transformers drops the cache and begins anew, with other rotations of all tokens."""
    is_long = original == 20  # up to 5.22 transformers begins anew with the newest token alone
    same(tiny("phi3", **longrope(original)), is_long=is_long, **more)


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_classifier_free_guidance_runs_its_second_forward_with_a_cache_of_transformers() -> None:
    same(tiny("llama"), guidance_scale=1.5)
    same(tiny("llama"), guidance_scale=1.5, negative_prompt_ids=IDS.flip(1)[:, :9])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_configuration_copied_inside_a_session_works_after_it(attention: str) -> None:
    model = tiny("llama", attn_implementation=attention)
    wanted = model.generate(IDS, **RUN)
    names = []
    for _ in range(2):
        with kvoffload.offload(model, WAYS["half"]):
            copied = copy.deepcopy(model.config)
        names.append(copied._attn_implementation)
        again = type(model)(copied).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.generate(IDS, **RUN), wanted)
        with kvoffload.offload(model, WAYS["half"]), kvoffload.offload(again, WAYS["half"]) as other:
            assert torch.equal(model.generate(IDS, **RUN), wanted)
            assert torch.equal(again.generate(IDS, **RUN), wanted)
            assert other.stats is not None
            assert other.stats.h2d_bytes > 0
    assert names[0] == names[1], "names that no session uses are taken again"


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_keys_and_values_of_a_cache_can_be_read(kind: str, way: str) -> None:
    more = {} if kind == "llama" else {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    model = tiny(kind, **more)
    plain = transformers.DynamicCache(config=model.config)
    with kvoffload.offload(model, WAYS[way]) as session, torch.no_grad():
        cache = session.new_cache()
        assert cache.layers[1].keys is None
        for new in (IDS, IDS[:, :1], IDS[:, 3:8]):
            ours, theirs = (model(new, **given(one)).logits for one in (cache, plain))
            assert (ours - theirs).abs().max() <= 5e-6
            for found, wanted in zip(cache, plain, strict=True):
                for one, other in zip(found[:2], wanted[:2], strict=True):
                    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        keys = cache.layers[1].keys
        keys.zero_()  # a copy
        assert cache.layers[1].values.abs().sum() > 0
        if kind == "llama" and way != "half":  # of the first layer, moved and nothing else
            assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
        with pytest.raises(KVOffloadError, match="cannot be replaced"):
            cache.layers[1].keys = keys
        copied = copy.deepcopy(cache)
        assert torch.equal(copied.layers[1].values, cache.layers[1].values)


def test_keys_can_be_read_after_rows_became_fewer_and_after_a_forward_that_failed() -> None:
    model = tiny("llama")
    with kvoffload.offload(model, WAYS["transfer"]) as session, torch.no_grad():
        cache = session.new_cache()
        model(IDS.repeat(3, 1), **given(cache))
        cache.batch_select_indices(torch.tensor([0, 3]))
        plain = transformers.DynamicCache(config=model.config)
        model(IDS.repeat(3, 1), **given(plain))
        plain.batch_select_indices(torch.tensor([0, 3]))
        for ours, theirs in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)

        def fail(module: Any, args: Any) -> None:
            raise RuntimeError("in the middle")

        handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(IDS[:, :1], **given(cache))
        handle.remove()
        keys = cache.layers[3].keys
        assert not keys.is_meta
        torch.testing.assert_close(keys, plain.layers[3].keys, atol=1e-5, rtol=1e-5)


def test_in_the_middle_of_a_forward_keys_have_a_shape_and_no_values() -> None:
    """Their buffers are in use then; some modules ask how many tokens there are."""
    model, seen = tiny("llama"), []
    with kvoffload.offload(model, WAYS["transfer"]) as session, torch.no_grad():
        cache = session.new_cache()

        def read(module: Any, args: Any, output: Any) -> None:
            seen.append([cache.layers[idx].keys for idx in range(2)])

        handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(read)
        for new in (IDS, IDS[:, :1]):
            model(new, **given(cache))
        handle.remove()
    (first, none), (after, before) = seen
    assert none is None
    assert all(one.is_meta for one in (first, after, before))
    assert [tuple(one.shape) for one in (first, after, before)] == [(2, 4, n, 12) for n in (37, 38, 37)]
