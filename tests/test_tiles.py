"""How attention is cut into programs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvoffload.kernels import tiles

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of one program


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_tiles_fit_the_registers_and_steps_the_memory_of_a_processor(capability: int) -> None:
    for head_dim in (1, 8, 64, 80, 96, 128, 200, 256):
        for element_bytes in (2, 4):
            for rows in (1, 8, 16, 17, 40, 1000):
                tile = tiles.tile(head_dim, element_bytes, rows, capability)
                block_dim = max(16, 1 << (head_dim - 1).bit_length())
                assert tile.rows >= min(rows, 16)
                assert tile.block_tokens >= 16
                assert tile.rows * block_dim <= (8192 if capability == 90 else 4096)
                assert tile.stages >= 2
                kv_bytes = 2 * tile.block_tokens * block_dim * element_bytes * (tile.stages - 1)
                q_bytes = tile.rows * block_dim * element_bytes
                assert kv_bytes + q_bytes <= SHARED_KIB[capability] * 1024


def test_a_form_of_padded_heads_has_the_fewest_rows() -> None:
    for capability in SHARED_KIB:
        assert tiles.tile(80, 2, 1000, capability, is_decoded=True).rows == 16
        decoded, plain = (tiles.tile(128, 2, 1000, capability, is_decoded=one) for one in (True, False))
        assert decoded.block_tokens == plain.block_tokens // (2 if capability >= 100 else 1)
        assert decoded.rows == plain.rows


def test_a_capability_without_a_line_of_its_own_has_the_tiles_of_the_one_before() -> None:
    for capability, before in ((87, 86), (103, 100), (121, 120), (130, 120)):
        assert tiles.tile(128, 2, 64, capability) == tiles.tile(128, 2, 64, before)


@pytest.mark.parametrize(("major", "minor", "found"), [(7, 5, 75), (8, 9, 89), (10, 0, 100), (12, 0, 120)])
def test_a_device_tells_its_capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, found: int) -> None:
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 0)
    assert tiles.capability.__wrapped__(device) == found
    tiles.capability.cache_clear()
    assert tiles.processors.__wrapped__(device) == (0 if found < 80 else 7)
    tiles.capability.cache_clear()


@pytest.mark.parametrize(
    ("tokens", "programs", "wanted"),
    [
        (256, 1024, (1, 256)),  # OPT-6.7B, a batch of 32: enough without a split
        (256, 256, (2, 128)),  # Llama-3.1-8B, a batch of 32
        (256, 8, (4, 64)),  # its batch of 1: every step by itself
        (4096, 8, (64, 64)),
        (4096, 100, (5, 832)),
        (65, 1, (2, 64)),
        (64, 1, (1, 64)),
        (0, 1, (1, 64)),
    ],
)
def test_a_segment_is_split_only_to_fill_the_device(tokens: int, programs: int, wanted: tuple[int, int]) -> None:
    parts, part_tokens = tiles.split(tokens, 64, programs, processors=132)
    assert (parts, part_tokens) == wanted
    assert (parts - 1) * part_tokens < max(tokens, 1) <= parts * part_tokens
