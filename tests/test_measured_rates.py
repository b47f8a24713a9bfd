"""What is measured replaces the profile's rates, and a chunk is timed once."""

from __future__ import annotations

import pytest
from matrix import FAST_LINK, FixedRates
from models import make_model

from kvoffload import OffloadConfig
from kvoffload.backend import EmulatedBackend
from kvoffload.measured_rates import MeasuredRates
from kvoffload.model.shape import model_shape
from kvoffload.sizing import Geometry, choose_sizes
from kvoffload.types import Rates

PROFILED = Rates(
    h2d_activation_bytes_per_s=1e9,
    h2d_kv_bytes_per_s=2e9,
    recompute_s_per_token=1e-6,
    attention_s_per_token=2e-6,
    dense_s=3e-6,
)


def test_only_what_was_measured_is_replaced_and_only_by_a_newer_measurement() -> None:
    measured = MeasuredRates()
    assert measured.correct(PROFILED, rows=4) == PROFILED
    measured.take(5e-6, None)
    found = measured.correct(PROFILED, rows=4)
    assert found.recompute_s_per_token == 2e-5
    assert (found.h2d_kv_bytes_per_s, found.attention_s_per_token) == (2e9, 2e-6)
    measured.take(None, 7e9)
    found = measured.correct(PROFILED, rows=2)
    assert found.recompute_s_per_token == 1e-5
    assert found.h2d_kv_bytes_per_s == found.h2d_activation_bytes_per_s == 7e9
    measured.take(6e-6, None)
    found = measured.correct(PROFILED, rows=1)
    assert (found.recompute_s_per_token, found.h2d_kv_bytes_per_s) == (6e-6, 7e9)


@pytest.mark.parametrize("is_segmented", [True, False])
def test_a_chunk_is_timed_once_and_a_link_of_given_speed_never(is_segmented: bool) -> None:
    shape = model_shape(make_model("llama").config)
    geometry = Geometry(
        num_offloaded_layers=3,
        rows=2,
        max_tokens=64,
        kv_row_bytes=shape.kv_row_bytes,
        activation_row_bytes=shape.activation_row_bytes,
        is_segmented=is_segmented,
    )
    config = OffloadConfig(block_tokens=4, chunk_blocks=3)
    sizes = choose_sizes(geometry, config, keeps_activations=True, device_bytes=None, rates=None)
    prepared = []
    measured, backend = MeasuredRates(), EmulatedBackend(FAST_LINK)
    try:
        for known in (measured, measured, FixedRates(shape.kv_row_bytes, shape.activation_row_bytes)):
            known.time_chunk(backend, shape, geometry, sizes, lambda tokens: prepared.append(tokens) or (lambda: None))
    finally:
        backend.close()
    assert prepared == [12]
    assert measured.recompute_s_per_row_token is not None
    assert measured.attention_s_per_row_token is not None
    assert measured.h2d_bytes_per_s is None
