"""Forms of K and V in fewer bytes: what comes back, how many bytes they take, and which blocks they cannot hold."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from quantizing import keys_through, values_through

from kvoffload.config import OffloadConfig
from kvoffload.planning.forms import FORMS, listed_exponents
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.sizing import planned_forms
from kvoffload.store.block import Span
from kvoffload.store.device_memory import DeviceMemory
from kvoffload.store.forms import made_of_kv, packed_kv
from kvoffload.store.tail import KVShape

LOSSY = ("int8", "int4", "int2")
SHAPES = [(head_dim, tokens) for head_dim in (32, 64, 80, 96, 128) for tokens in (3, 16, 40)]  # 40: two groups of keys


def form_of(name: str, head_dim: int, block_tokens: int, heads: int = 2) -> Any:
    dtype = torch.bfloat16 if name == "packed_kv" else torch.float32
    shape = KVShape(heads, head_dim, heads, head_dim, dtype)
    return importlib.import_module(f"kvoffload.store.forms.{name}").Stored.of(shape, block_tokens)


def random_blocks(form: Any, blocks: int = 3, rows: int = 2, seed: int = 0) -> torch.Tensor:
    """[blocks, tokens, rows, 2, heads, head_dim]."""
    size = (blocks, form.block_tokens, rows, 2, form.shape.key_heads, form.shape.key_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(form.shape.dtype)


def packed(form: Any, kv: torch.Tensor) -> torch.Tensor:
    """The blocks' bytes, as they are stored."""
    data = torch.full((len(kv), form.block_bytes(kv.shape[2])), 0xA5, dtype=torch.uint8)
    if form.rotates_keys:
        from kvoffload.kernels.hadamard import rotated

        kv = torch.stack((rotated(kv[..., 0, :, :]), kv[..., 1, :, :]), dim=3)
    form.encode(kv, data)
    return data


def restored(form: Any, data: torch.Tensor, rows: int) -> torch.Tensor:
    """K and V, [tokens, rows, 2, heads, head_dim]."""
    span = Span(form.name, 0, len(data), form.block_tokens, rows, 1)
    out = torch.empty(span.num_tokens, rows, form.shape.width, dtype=form.shape.dtype)
    form.restore(DeviceMemory(data.flatten()), span, out)
    return out.view(span.num_tokens, rows, 2, form.shape.key_heads, form.shape.key_dim)


@pytest.mark.parametrize(("head_dim", "tokens"), SHAPES)
@pytest.mark.parametrize("name", LOSSY)
def test_what_comes_back_is_what_the_form_means(name: str, head_dim: int, tokens: int) -> None:
    form = form_of(name, head_dim, tokens)
    kv = random_blocks(form)
    kv[1, 0, 1, 0, 1, 5] = 40.0  # something stands out
    found = restored(form, packed(form, kv), 2).view(kv.shape)
    for block, was in zip(found, kv, strict=True):
        keys, values = was.permute(2, 1, 3, 0, 4)  # [rows, heads, tokens, head_dim]
        torch.testing.assert_close(block[:, :, 0].permute(1, 2, 0, 3), keys_through(name, keys), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(block[:, :, 1].permute(1, 2, 0, 3), values_through(name, values), atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_channel_that_stands_out_costs_keys_little(name: str) -> None:
    """As by the biases of Qwen2.5: the mean over a block takes it away. A key without it, a sink's, is kept too."""
    form = form_of(name, 64, 16)
    kv = random_blocks(form)
    plain = restored(form, packed(form, kv), 2).view(kv.shape) - kv
    kv[..., 0, :, 3] += 60.0
    kv[:, 0, ..., 0, :, :] = random_blocks(form, seed=1)[:, 0, ..., 0, :, :] / 8
    found = restored(form, packed(form, kv), 2).view(kv.shape) - kv
    keys, plain_keys = found[..., 0, :, :], plain[..., 0, :, :]
    assert keys[:, 1:].square().mean() <= 2 * plain_keys.square().mean()
    assert keys[:, 0].square().mean() <= plain_keys.square().mean()


def test_zeros_and_a_constant_are_kept() -> None:
    for name in LOSSY:
        form = form_of(name, 64, 16)
        kv = random_blocks(form)
        kv[0] = 0
        kv[1, ..., 1, :, :] = 0.5  # values: no spread, so no scale
        found = restored(form, packed(form, kv), 2).view(kv.shape)
        assert not found[0].any()
        torch.testing.assert_close(found[1, ..., 1, :, :], kv[1, ..., 1, :, :], atol=0.5 / 127, rtol=0)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("head_dim", "tokens"), SHAPES)
@pytest.mark.parametrize("name", [*LOSSY, "packed_kv"])
def test_plans_know_the_bytes_of_a_block(name: str, head_dim: int, tokens: int, rows: int) -> None:
    form = form_of(name, head_dim, tokens)
    dtype = str(form.shape.dtype).removeprefix("torch.")
    geometry = Geometry(
        num_offloaded_layers=1, rows=rows, max_tokens=99, kv_row_bytes=form.shape.row_bytes, head_dim=head_dim,
        kv_dtype=dtype, activation_row_bytes=1,
    )  # fmt: skip
    planned = tokens * rows * FORMS[name].row_bytes(geometry, tokens)
    assert form.num_bytes(2 * tokens, rows) == 2 * form.block_bytes(rows)
    assert form.block_bytes(rows) <= planned < form.block_bytes(rows) + tokens * rows
    assert form.block_bytes(rows) % 2 == 0, "scales of the next block would not be aligned"


def test_bytes_of_bfloat16_over_those_of_a_form() -> None:
    ratios = {
        name: 2 * 2 * 3 * 64 * 64 / form_of(name, 64, 64, heads=3).block_bytes(1) for name in (*LOSSY, "packed_kv")
    }
    assert ratios["int8"] >= 1.8
    assert ratios["int4"] >= 2.9
    assert ratios["int2"] >= 4.2
    assert ratios["packed_kv"] >= 1.27


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e20])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("name", LOSSY)
def test_blocks_that_are_not_finite_are_not_held(name: str, half: int, bad: float) -> None:
    form = form_of(name, 64, 16)
    kv = random_blocks(form)
    kv[1, 3, 1, half, 0, 7] = bad
    assert form.held(kv).tolist() == [True, False, True]


def test_what_cannot_be_encoded_has_no_form() -> None:
    latent = KVShape(1, 192, 1, 128, torch.float32)
    small = KVShape(2, 16, 2, 16, torch.float32)
    uneven = KVShape(4, 64, 2, 64, torch.float32)
    for shape in (latent, small, uneven):
        assert made_of_kv(["kv", *LOSSY, "packed_kv"], shape, 16).keys() == {"kv"}
    halves = KVShape(2, 64, 2, 64, torch.float16)
    assert made_of_kv(["kv", *LOSSY, "packed_kv"], halves, 16).keys() == {"kv", *LOSSY}
    brain = KVShape(2, 64, 2, 64, torch.bfloat16)
    assert made_of_kv(["packed_kv"], brain, 16).keys() == {"packed_kv"}
    assert not made_of_kv(["packed_kv"], brain, 2048), "a place has 16 bits"


@pytest.mark.parametrize(
    ("kv_dtype", "dtype", "head_dim", "wanted"),
    [
        ("model", "bfloat16", 64, {"kv", "packed_kv"}),
        ("model", "float16", 64, {"kv"}),
        ("model", "float32", 64, {"kv"}),
        ("model", "bfloat16", 0, {"kv"}),
        ("int8", "float16", 64, {"kv", "int8"}),
        ("int4", "bfloat16", 64, {"kv", "packed_kv", "int8", "int4"}),
        ("int2", "float32", 64, {"kv", "int8", "int4", "int2"}),
        ("int4", "bfloat16", 16, {"kv"}),
    ],
)
def test_who_wants_which_form(kv_dtype: Any, dtype: str, head_dim: int, wanted: set[str]) -> None:
    geometry = Geometry(
        num_offloaded_layers=1, rows=1, max_tokens=99, kv_row_bytes=1024, head_dim=head_dim, kv_dtype=dtype,
        activation_row_bytes=2048,
    )  # fmt: skip
    config = OffloadConfig(kv_dtype=kv_dtype)
    assert planned_forms(config, geometry) == wanted
    assert planned_forms(config, geometry, has_rates=False) == wanted - {"packed_kv"}
    off = OffloadConfig(kv_dtype=kv_dtype, packing="off")
    assert planned_forms(off, geometry) == wanted - {"packed_kv"}


# ---- without loss ----------------------------------------------------------------------------------------------------


def bits(*values: int) -> torch.Tensor:
    """bfloat16 with these bits."""
    return torch.tensor(values, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same_bits(found: torch.Tensor, kv: torch.Tensor) -> bool:
    return torch.equal(found.view(torch.int16), kv.view(torch.int16))


@pytest.mark.parametrize(("head_dim", "tokens"), SHAPES)
def test_packing_keeps_every_bit(head_dim: int, tokens: int) -> None:
    form = form_of("packed_kv", head_dim, tokens)
    kv = random_blocks(form)
    special = bits(0x0000, 0x8000, 0x0001, 0x807F)  # zeros and denormals of both signs
    kv[0, 0, 0, 0, 0, :4] = special
    kv[1, -1, 1, 1, 1, -4:] = special
    assert form.held(kv).all()
    found = restored(form, packed(form, kv), 2).view(kv.shape)
    assert same_bits(found, kv)


@pytest.mark.parametrize("exponent", range(256))
def test_packing_keeps_every_exponent_and_mantissa(exponent: int) -> None:
    """All 256 numbers of an exponent, infinities and payloads of NaN at the last, among others within reach."""
    form = form_of("packed_kv", 64, 16, heads=1)
    below = torch.arange(2 * 16 * 64) % min(exponent + 1, packed_kv.FAR)  # distances
    numbers = ((exponent - below) << 7) | (torch.arange(2 * 16 * 64) * 7 & 0x7F) | ((below % 2) << 15)
    kv = numbers.to(torch.int16).view(torch.bfloat16).view(1, 16, 1, 2, 1, 64).clone()
    everything = torch.arange(128, dtype=torch.int32) | (exponent << 7)
    kv.view(-1)[:128] = bits(*everything.tolist())
    kv.view(-1)[128:256] = bits(*(everything | 0x8000).tolist())
    assert form.held(kv).all()
    assert same_bits(restored(form, packed(form, kv), 1).view(kv.shape), kv)


def test_a_column_with_more_exponents_far_away_than_are_listed_is_not_packed() -> None:
    form = form_of("packed_kv", 64, 16)
    room = listed_exponents(16, 64)
    kv = random_blocks(form).sign()
    for block, far in enumerate((room - 1, room, room + 1)):
        column = kv[block, :, 1, 0, 1]  # of one row and head: [tokens, head_dim]
        for idx in range(far):
            column[idx % 16, 5 * idx % 64] = 1e-30 * (idx + 1)
    assert form.held(kv).tolist() == [True, True, False]
    held = kv[:2]
    assert same_bits(restored(form, packed(form, held), 2).view(held.shape), held)


def test_random_bits_are_not_packed() -> None:
    form = form_of("packed_kv", 64, 16)
    numbers = torch.randint(-(2**15), 2**15, (3, 16, 2, 2, 2, 64), generator=torch.Generator().manual_seed(0))
    assert not form.held(numbers.to(torch.int16).view(torch.bfloat16)).any()
