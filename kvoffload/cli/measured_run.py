"""Decode steps that really run on this machine, recorded, beside what was planned for them.

Owns the shape that runs, its split and the rates around it. Does not own the run itself (`bench`) nor what a report
makes of it. Weights are random; on a CPU a small shape stands for the model, and the link is emulated.

Timeline of the measurement, about 20 seconds on two CPU cores:

    rates       recomputation, attention and dense parts of the shape, and the best split at these rates
    generate    `NEW_TOKENS` at that split, recorded
    rates       once more; what was planned is what the cost model says at the mean of both

Valid are the steps after the first two, which still wait for the write-back of the prefill.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from kvoffload import bench
from kvoffload.bench.decode import NUM_UNEVEN_STEPS, recorded_steps
from kvoffload.errors import ConfigError
from kvoffload.model.facts import Facts
from kvoffload.model.shape import shape_of
from kvoffload.planning import planner, step_time
from kvoffload.planning.rates import Rates
from kvoffload.planning.workload import Workload
from kvoffload.profiler.drawing.study import MeasuredRun, simulated, typical_steps
from kvoffload.units import counted

NEW_TOKENS = 12
SHOWN_STEPS = 2
MEASURED_LAYERS = 4  # of a model on a GPU, at most


def measure_run(
    dims: Facts,
    workload: Workload,
    progress: Callable[[str, float], None] | None = None,
    preset: bench.Preset | None = None,
) -> MeasuredRun:
    """Decode steps of this machine at the best split for it, recorded, and what was planned for them.

    Args:
        dims: the model's; a GPU runs up to `MEASURED_LAYERS` layers of its shape, a CPU a small model of the same kind
            of attention over an emulated link.
        workload: batch and prompt of a run on a GPU.
        progress: called with what begins and the share done.
        preset: another shape.

    Raises:
        UnsupportedModelError, HostMemoryError: as `offload`.
        ConfigError: the shape cannot be made.
    """
    tell = progress or (lambda _what, _share: None)
    preset = preset or _preset(dims, workload)
    with bench.core_for_the_link():
        tell("the model", 0.0)
        made = bench.Lab(preset)
        tell("rates", 0.2)
        before = made.rates("planned")
        inputs = made.inputs(before, is_segmented=True)
        plan = planner.solve(inputs)
        tell("decode steps", 0.4)
        config = made.config("planned", "auto", plan.split_fraction)
        stats, recorded = recorded_steps(made, config, NEW_TOKENS)
        tell("rates again", 0.8)
        after = made.rates("planned")
        device_name = bench.device_and_threads()
    executed = stats.plan
    inputs = replace(inputs, num_blocks=executed.num_blocks)  # at the mean length of the run

    def predicted_s(rates: Rates) -> float:
        return step_time.predict(replace(inputs, rates=rates), executed.blocks).step_s

    mean = before.mean_with(after)
    step_s = tuple(stats.decode_step_s[NUM_UNEVEN_STEPS:])
    planned, simulated_step_s = simulated(executed, replace(inputs, rates=_spread(mean, made)), SHOWN_STEPS)
    tell("done", 1.0)
    return MeasuredRun(
        shape=_in_words(preset),
        device_name=device_name,
        link_name=stats.link_name,
        is_emulated=preset.is_emulated,
        plan=executed,
        predicted_step_s=predicted_s(mean),
        predicted_range_s=(predicted_s(before), predicted_s(after)),
        simulated_step_s=simulated_step_s,
        step_s=step_s,
        planned=planned,
        measured=typical_steps(recorded, statistics.median(step_s), SHOWN_STEPS, after=NUM_UNEVEN_STEPS),
    )


def _preset(dims: Facts, workload: Workload) -> bench.Preset:
    """The shape that is measured: small ones stand for a model where there is no GPU."""
    if not torch.cuda.is_available():
        halves = dims.hidden_size < shape_of(dims).kv_row_bytes // dims.itemsize_bytes
        return bench.PRESETS["cpu-balanced" if halves else "cpu-gqa"]
    if dims.hidden_size != dims.num_heads * dims.head_dim or dims.latent_width:
        raise ConfigError(
            f"--measure makes heads of hidden_size / heads, but {dims.model_type} has heads of {dims.head_dim} at a "
            f"hidden size of {dims.hidden_size}: leave it out"
        )
    return bench.Preset(
        architecture="opt" if dims.mlp_matrices == 2 else "llama",
        hidden=dims.hidden_size,
        heads=dims.num_heads,
        kv_heads=shape_of(dims).num_kv_heads,
        ffn=dims.active_width,
        layers=min(MEASURED_LAYERS, dims.num_layers),
        batch=workload.rows,
        cached_tokens=workload.prompt_tokens,
        vocab=dims.vocab_size,
        dtype=torch.float16 if dims.mlp_matrices == 2 else torch.bfloat16,
    )


def _in_words(preset: bench.Preset) -> str:
    kind = "multi-head" if preset.heads == preset.kv_heads else "grouped-query"
    dtype = str(preset.dtype).removeprefix("torch.")
    return (
        f"{counted(preset.layers, 'layer')} of hidden size {preset.hidden} with {kind} attention in {dtype}, "
        f"{counted(preset.batch, 'sequence')} of {counted(preset.cached_tokens, 'cached token')}"
    )


def _spread(rates: Rates, made: bench.Lab) -> Rates:
    """Dense parts that were measured in one piece, given to layers and head by their weights."""
    shape = made.shape
    layers, head = shape.num_layers * shape.layer_weights, shape.head_weights
    share = layers / (layers + head)
    return replace(rates, dense_s=rates.head_s * share / shape.num_layers, head_s=rates.head_s * (1 - share))
