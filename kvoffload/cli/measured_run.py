"""Decode steps that really run on this machine, recorded, beside what was planned for them.

Owns the shape that runs, its split and the rates around it. Does not own the run itself (`bench`) nor what a report
makes of it. Weights are random. What runs is the given model and workload, scaled to this machine: on a GPU fewer
layers, and a smaller batch where the cache of these is still large; on a CPU narrower layers and shorter prompts too,
with as many query heads for each K/V head and as wide an MLP for its hidden size, and an emulated link. `shape` names
both sides of every scaling.

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
from kvoffload.units import count, counted

NEW_TOKENS = 12
SHOWN_STEPS = 2
MEASURED_LAYERS = 4  # at most
MAX_CACHED_BYTES = 8 * 10**9  # of a run on a GPU: pinned in seconds
CPU_HIDDEN, CPU_HEADS, CPU_BATCH, CPU_TOKENS, CPU_VOCAB = 512, 8, 8, 512, 1024  # at most, where there is no GPU
HEAD_STEP = 8  # heads are multiples of it wide
LEAST_TOKENS = 64  # of a prompt: four blocks


def measure_run(
    dims: Facts,
    workload: Workload,
    progress: Callable[[str, float], None] | None = None,
    preset: bench.Preset | None = None,
) -> MeasuredRun:
    """Decode steps of this machine at the best split for it, recorded, and what was planned for them.

    Args:
        dims: the model's.
        workload: batch and prompt; both are scaled to this machine (`scaled_preset`).
        progress: called with what begins and the share done.
        preset: another shape.

    Raises:
        UnsupportedModelError, HostMemoryError: as `offload`.
        ConfigError: the shape cannot be made.
    """
    tell = progress or (lambda _what, _share: None)
    preset = preset or scaled_preset(dims, workload)
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
        shape=_in_words(preset, dims, workload),
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


def scaled_preset(dims: Facts, workload: Workload) -> bench.Preset:
    """The given model and workload as this machine can run them in seconds.

    Raises:
        ConfigError: a GPU is to run heads that are not hidden_size / heads wide.
    """
    return _on_gpu(dims, workload) if torch.cuda.is_available() else _on_cpu(dims, workload)


def _on_cpu(dims: Facts, workload: Workload) -> bench.Preset:
    """Small, with the model's ratio of query to K/V heads and of MLP to hidden size; the link is set by its attention.

    Where activations are fewer bytes than K and V the link is as fast as makes both worth their while, as in the
    preset `cpu-balanced`; else as slow as in `cpu-gqa`.
    """
    shape = shape_of(dims)
    halves = dims.hidden_size < shape.kv_row_bytes // dims.itemsize_bytes
    like = bench.PRESETS["cpu-balanced" if halves else "cpu-gqa"]
    heads = min(CPU_HEADS, dims.num_heads)
    group = max(1, dims.num_heads // max(1, shape.num_kv_heads))  # query heads for each K/V head
    hidden = heads * max(HEAD_STEP, min(CPU_HIDDEN, dims.hidden_size) // heads // HEAD_STEP * HEAD_STEP)
    return replace(
        like,
        architecture=_architecture(dims),
        hidden=hidden,
        heads=heads,
        kv_heads=max(1, heads // group),
        ffn=max(1, round(dims.active_width * hidden / dims.hidden_size)),
        layers=min(MEASURED_LAYERS, dims.num_layers),
        batch=min(CPU_BATCH, workload.rows),
        cached_tokens=max(LEAST_TOKENS, min(CPU_TOKENS, workload.prompt_tokens)),
        vocab=min(CPU_VOCAB, dims.vocab_size),
    )


def _on_gpu(dims: Facts, workload: Workload) -> bench.Preset:
    """Layers as wide as the model's, few of them."""
    if dims.hidden_size != dims.num_heads * dims.head_dim or dims.latent_width:
        raise ConfigError(
            f"--measure makes heads of hidden_size / heads, but {dims.model_type} has heads of {dims.head_dim} at a "
            f"hidden size of {dims.hidden_size}: leave it out"
        )
    layers, cached_tokens = min(MEASURED_LAYERS, dims.num_layers), max(LEAST_TOKENS, workload.prompt_tokens)
    row_bytes = layers * cached_tokens * shape_of(dims).kv_row_bytes
    return bench.Preset(
        architecture=_architecture(dims),
        hidden=dims.hidden_size,
        heads=dims.num_heads,
        kv_heads=shape_of(dims).num_kv_heads,
        ffn=dims.active_width,
        layers=layers,
        batch=max(1, min(workload.rows, MAX_CACHED_BYTES // row_bytes)),
        cached_tokens=cached_tokens,
        vocab=dims.vocab_size,
        dtype=torch.float16 if dims.mlp_matrices == 2 else torch.bfloat16,
    )


def _architecture(dims: Facts) -> str:
    return "opt" if dims.mlp_matrices == 2 else "llama"


def _in_words(preset: bench.Preset, dims: Facts, workload: Workload) -> str:
    """The shape that ran; behind it how it was scaled."""
    kind = "multi-head" if preset.heads == preset.kv_heads else "grouped-query"
    dtype = str(preset.dtype).removeprefix("torch.")
    pairs = (
        ("layers", preset.layers, dims.num_layers),
        ("hidden size", preset.hidden, dims.hidden_size),
        ("query heads", preset.heads, dims.num_heads),
        ("MLP width", preset.ffn, dims.active_width),
        ("sequences", preset.batch, workload.rows),
        ("prompt tokens", preset.cached_tokens, workload.prompt_tokens),
        ("vocabulary", preset.vocab, dims.vocab_size),
    )
    scaled = [f"{name} {count(ours)} for {count(theirs)}" for name, ours, theirs in pairs if ours != theirs]
    return (
        f"{counted(preset.layers, 'layer')} of hidden size {preset.hidden} with {kind} attention in {dtype}, "
        f"{counted(preset.batch, 'sequence')} of {counted(preset.cached_tokens, 'cached token')}"
    ) + (f" (scaled to this machine: {', '.join(scaled)})" if scaled else "")


def _spread(rates: Rates, made: bench.Lab) -> Rates:
    """Dense parts that were measured in one piece, given to layers and head by their weights."""
    shape = made.shape
    layers, head = shape.num_layers * shape.layer_weights, shape.head_weights
    share = layers / (layers + head)
    return replace(rates, dense_s=rates.head_s * share / shape.num_layers, head_s=rates.head_s * (1 - share))
