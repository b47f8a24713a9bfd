"""Which way K and V are recomputed, and that the fast way is taken only where nothing can come between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import RECOMPUTABLE, TRANSFERRED, make_model
from modes import given
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvoffload
from kvoffload import OffloadConfig
from kvoffload.hf import attention_modules, offloadable_layers
from kvoffload.hf.arguments import name_of_cache
from kvoffload.kernels import ops
from kvoffload.store.recompute import FastRecompute, GenericRecompute, choose_path
from kvoffload.store.tail import KVShape

# Two plain projections, keys rotated in halves as they are: the others norm, fuse or interleave.
FAST = {
    *("llama", "opt", "mistral", "qwen2", "gemma", "gemma2", "phi", "stablelm", "olmo", "starcoder2", "granite"),
    *("qwen2_moe", "mixtral", "smollm3", "nemotron"),
}


class Seen:
    """What the first attention module of a model was given, and the K and V it made of that."""

    def __init__(self, model: PreTrainedModel, rows: int = 2, tokens: int = 11, layer: int | None = None) -> None:
        idx = offloadable_layers(model)[0] if layer is None else layer
        self.module = attention_modules(model)[idx]
        seen: dict[str, Any] = {}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.update(kwargs, hidden_states=kwargs.get("hidden_states", args[0] if args else None))

        handle = self.module.register_forward_pre_hook(before, with_kwargs=True)
        cache = DynamicCache(config=model.config)
        ids = torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(ids, **given(cache))
        handle.remove()
        self.activation: torch.Tensor = seen["hidden_states"].detach()
        self.embeddings = tuple(part.detach() for part in seen.get("position_embeddings") or ())
        cached: Any = cache.layers[idx]
        self.keys, self.values = cached.keys, cached.values
        self.shape = KVShape(
            self.keys.shape[1], self.keys.shape[3], self.values.shape[1], self.values.shape[3], self.keys.dtype
        )

    def choose(self) -> Any:
        return choose_path(
            self.module,
            self.shape,
            self.activation,
            self.embeddings,
            self.keys,
            self.values,
            cache_name=name_of_cache(self.module.forward) or "cache",
        )


@pytest.mark.parametrize("architecture", RECOMPUTABLE)
def test_the_fast_path_is_chosen_where_it_reproduces_the_model(architecture: str) -> None:
    chosen = Seen(make_model(architecture)).choose()
    assert isinstance(chosen, FastRecompute if architecture in FAST else GenericRecompute)


@pytest.mark.parametrize("architecture", TRANSFERRED)
def test_what_cannot_be_reproduced_is_not_recomputed(architecture: str) -> None:
    assert Seen(make_model(architecture)).choose() is None


@pytest.mark.parametrize("path", ["fast", "generic"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (2, 11), (5, 3)])
def test_both_paths_write_keys_and_values_where_a_transfer_would_have(path: str, rows: int, tokens: int) -> None:
    seen = Seen(make_model("llama"), rows, tokens)
    buffer = torch.full((tokens + 2, rows, seen.shape.width), torch.nan)
    out = buffer[1:-1]
    name = name_of_cache(seen.module.forward) or "cache"
    ways = {"fast": FastRecompute(seen.module, seen.shape), "generic": GenericRecompute(seen.module, seen.shape, name)}
    ways[path](seen.activation.transpose(0, 1).contiguous(), seen.embeddings, out)
    keys, values = seen.shape.split(out)
    torch.testing.assert_close(keys.permute(1, 2, 0, 3), seen.keys, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values.permute(1, 2, 0, 3), seen.values, atol=1e-6, rtol=1e-5)
    assert buffer[0].isnan().all()
    assert buffer[-1].isnan().all()


def test_a_wrong_reproduction_is_not_chosen() -> None:
    """Another rotation, a missing norm or a value that is not a number: nothing of that kind may pass."""
    seen = Seen(make_model("llama"))
    seen.keys = seen.keys * 1.001
    assert seen.choose() is None
    seen = Seen(make_model("llama"))
    seen.embeddings = tuple(part.roll(1, dims=1) for part in seen.embeddings)
    assert seen.choose() is None
    seen = Seen(make_model("llama"))
    seen.values = torch.full_like(seen.values, torch.nan)
    assert seen.choose() is None
    for added in (1.0, -1.0):
        seen = Seen(make_model("llama"))
        seen.values = seen.values + added
        assert seen.choose() is None


def first_tokens(seen: Seen, tokens: list[int]) -> Seen:
    """As if the first prompt had been these tokens."""
    index = torch.tensor(tokens)
    seen.activation, seen.keys, seen.values = (
        part.index_select(dim, index) for part, dim in ((seen.activation, 1), (seen.keys, 2), (seen.values, 2))
    )
    seen.embeddings = tuple(part.index_select(1, index) for part in seen.embeddings)
    return seen


@pytest.mark.parametrize("tokens", [[0], [0] * 16], ids=["one token", "padding"])
@pytest.mark.parametrize("architecture", RECOMPUTABLE)
def test_tokens_that_no_rotation_turns_choose_as_others_do(architecture: str, tokens: list[int]) -> None:
    """Position 0 turns nothing: there a layer without rotation, or one that pairs dimensions otherwise, looks alike."""
    model = make_model(architecture)
    for layer in range(len(attention_modules(model))):
        if layer in offloadable_layers(model):
            expected, found = Seen(model, layer=layer), first_tokens(Seen(model, layer=layer), tokens)
            assert type(found.choose()) is type(expected.choose())


@pytest.mark.parametrize("tokens", [1, 11])
def test_a_module_that_counts_positions_itself_is_not_recomputed(tokens: int) -> None:
    seen = Seen(make_model("llama"), tokens=tokens)
    forward, cos = seen.module.forward, seen.embeddings[0]
    ahead = torch.arange(tokens + 8).to(cos)[:, None].expand(-1, cos.shape[2])

    def counting(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        angles = ahead[None, : hidden_states.shape[1]]
        return forward(hidden_states=hidden_states, **kwargs | {"position_embeddings": (angles.cos(), angles.sin())})

    seen.module.forward = counting
    angles = ahead[None, :tokens]
    raw = seen.module.k_proj(seen.activation).unflatten(-1, (seen.shape.key_heads, -1)).transpose(1, 2)
    seen.keys = apply_rotary_pos_emb(raw, raw, angles.cos(), angles.sin())[1].detach()
    assert seen.choose() is None


def test_keys_and_values_that_are_clipped_are_not_taken_for_plain_projections() -> None:
    seen = Seen(make_model("olmo", clip_qkv=100.0))  # far above what these tokens have
    assert isinstance(seen.choose(), GenericRecompute)
    assert isinstance(Seen(make_model("olmo")).choose(), FastRecompute)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_fast_path_is_chosen_in_every_dtype(dtype: torch.dtype, scale: float) -> None:
    model = make_model("llama").to(dtype)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data *= scale
    assert isinstance(Seen(model).choose(), FastRecompute)


@pytest.mark.parametrize("prompt", [{"tokens": 1}, {"tokens": 40, "padding": 30}, {"tokens": 23, "chunk": 1}], ids=str)
@pytest.mark.parametrize("architecture", ["smollm3", "glm4", "cohere", "gpt_oss"])
def test_logits_do_not_depend_on_what_the_first_tokens_can_tell(architecture: str, prompt: dict[str, int]) -> None:
    model = make_model(architecture)
    ids = torch.randint(3, 96, (1, prompt["tokens"]), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, : prompt.get("padding", 0)] = 0
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True, "prefill_chunk_size": prompt.get("chunk")}
    expected = model.generate(ids, attention_mask=mask, **options)
    config = OffloadConfig(split="recompute", block_tokens=4, device_gib="min")
    found = kvoffload.generate(model, ids, attention_mask=mask, offload_config=config, **options)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert float((a - b).abs().max()) <= 5e-6


def hook(attention: Any) -> None:
    attention.k_proj.register_forward_hook(lambda module, args, output: output)


def pre_hook(attention: Any) -> None:
    attention.v_proj.register_forward_pre_hook(lambda module, args: None)


def parametrize(attention: Any) -> None:
    nn.utils.parametrizations.weight_norm(attention.k_proj)


def half(attention: Any) -> None:
    attention.v_proj.to(torch.bfloat16)


def subclass(attention: Any) -> None:
    class Linear(nn.Linear):
        pass

    attention.k_proj.__class__ = Linear


def fused(attention: Any) -> None:
    attention.qkv_proj = attention.k_proj
    del attention.k_proj


def adapter(attention: Any) -> None:
    """PEFT's layer shows the weight of the base layer as its own."""
    from peft.tuners.lora import Linear, LoraConfig

    attention.v_proj = Linear(attention.v_proj, "default", config=LoraConfig(r=2), r=2)


@pytest.mark.parametrize("change", [hook, pre_hook, parametrize, half, subclass, fused, adapter])
def test_the_fast_path_needs_plain_projections(change: Callable[[Any], None]) -> None:
    """Decided by what is there, not only by comparing: what is hooked in may act on later tokens only."""
    attention = attention_modules(make_model("llama"))[0]
    assert FastRecompute.applies_to(attention, torch.float32)
    change(attention)
    assert not FastRecompute.applies_to(attention, torch.float32)


def test_the_fast_path_is_off_under_autocast() -> None:
    attention = attention_modules(make_model("llama"))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not FastRecompute.applies_to(attention, torch.float32)
    assert FastRecompute.applies_to(attention, torch.float32)


# ---- the operations below --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "rows", "heads"), [(1, 1, 1), (7, 3, 2), (64, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_equals_transformers_bit_for_bit(tokens: int, rows: int, heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(tokens, rows, heads, 24, generator=generator).to(dtype)
    angle = torch.rand(rows, tokens, 12, generator=generator).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    heads_first = keys.permute(1, 2, 0, 3)
    _, wanted = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    buffer = torch.randn(tokens, rows, 2, heads, 24, generator=generator).to(dtype)
    values = buffer[:, :, 1].clone()
    strided = buffer[:, :, 0]  # the K half of token-major K and V
    strided.copy_(keys)
    ops.rope_(strided, cos.transpose(0, 1), sin.transpose(0, 1))
    assert torch.equal(strided.permute(1, 2, 0, 3), wanted)
    assert torch.equal(buffer[:, :, 1], values)


def test_rope_of_a_part_of_each_head_leaves_the_rest() -> None:
    keys = torch.randn(5, 2, 3, 16)
    before = keys.clone()
    angle = torch.rand(5, 1, 4).repeat(1, 1, 2)  # one row for all
    ops.rope_(keys, angle.cos(), angle.sin())
    assert torch.equal(keys[..., 8:], before[..., 8:])
    assert not torch.equal(keys[..., :8], before[..., :8])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 24, 48), (64, 13, 5)])
def test_linear_into_a_strided_half(m: int, n: int, k: int, bias: bool) -> None:
    linear = nn.Linear(k, n, bias=bias)
    x, buffer = torch.randn(m, k), torch.full((m, n + 3), torch.nan)
    with torch.no_grad():
        ops.linear_into(x, linear.weight, linear.bias, buffer[:, 3:])
        torch.testing.assert_close(buffer[:, 3:], linear(x), atol=1e-6, rtol=1e-5)
    assert buffer[:, :3].isnan().all()
