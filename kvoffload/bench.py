"""Decode at a shape, in several modes, through the public API, beside the bound of the cost model.

Owns the benchmark that `scripts/bench_decode.py` and `kvoffload demo` run.

The bound of a row is the step time of the cost model for that mode's best plan, at rates measured in this process
before and after the row; a row whose rates moved by more than 10 % is measured again. Nothing here is faster than
the product: every mode is an `OffloadConfig`.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvoffload import cost, hf, ops, planner, recompute
from kvoffload.api import offload
from kvoffload.backend import Backend, CudaBackend
from kvoffload.config import EmulatedLink, OffloadConfig
from kvoffload.model_shape import shape_from_config
from kvoffload.profiler.environment import cpu_name
from kvoffload.profiler.profile import with_link
from kvoffload.stats import GenerationStats
from kvoffload.tail import KVShape
from kvoffload.types import HardwareProfile, PlanInputs, Rates

MODES = ("full_transfer", "recompute_all", "sequential", "kvpr", "planned")
# The same with a layer's K/V put together before attention, where `MODES` attend chunk by chunk.
WHOLE_LAYER_MODES = {"full_transfer_whole_layer": "full_transfer", "planned_whole_layer": "planned"}
MAX_RATE_DRIFT_FRACTION = 0.1
MAX_TRIES = 4


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A shape and how fast the link is."""

    architecture: str
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    layers: int
    batch: int
    cached_tokens: int
    vocab: int = 1024
    dtype: torch.dtype = torch.float32
    h2d_gb_per_s: float | None = None  # emulated; None on CUDA
    max_recompute_to_link: float | None = None  # lower the link until recomputing takes at most this share of it
    recompute_to_link: float | None = None  # set the link so that recomputing takes this multiple of it


def _gpu(architecture: str, hidden: int, heads: int, kv_heads: int, ffn: int, layers: int, vocab: int) -> Preset:
    return Preset(
        architecture=architecture,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        layers=layers,
        batch=32,
        cached_tokens=1024,
        vocab=vocab,
        dtype=torch.float16 if architecture == "opt" else torch.bfloat16,
    )


def _cpu(architecture: str, kv_heads: int, **link: float) -> Preset:
    preset = Preset(
        architecture=architecture,
        hidden=512,
        heads=8,
        kv_heads=kv_heads,
        ffn=1024,
        layers=4,
        batch=8,
        cached_tokens=512,
    )
    return replace(preset, **link)  # type: ignore[arg-type]


PRESETS: dict[str, Preset] = {
    "cpu-mha": _cpu("opt", 8, h2d_gb_per_s=0.15, max_recompute_to_link=0.7),
    "cpu-balanced": _cpu("opt", 8, recompute_to_link=1 / 0.43),
    "cpu-gqa": _cpu("llama", 2, h2d_gb_per_s=0.05),
    "opt-6.7b": _gpu("opt", 4096, 32, 32, 16384, 32, 50272),
    "opt-13b": _gpu("opt", 5120, 40, 40, 20480, 40, 50272),
    "opt-30b": _gpu("opt", 7168, 56, 56, 28672, 4, 50272),  # 4 of its 48 layers
    "llama-2-7b": _gpu("llama", 4096, 32, 32, 11008, 32, 32000),
    "llama-2-13b": _gpu("llama", 5120, 40, 40, 13824, 40, 32000),
    "llama-3.1-8b": _gpu("llama", 4096, 32, 8, 14336, 32, 128256),
}


def make_model(preset: Preset, device: torch.device) -> PreTrainedModel:
    """A model of that shape with random weights, made on the device."""
    common = {
        "hidden_size": preset.hidden,
        "num_attention_heads": preset.heads,
        "num_hidden_layers": preset.layers,
        "vocab_size": preset.vocab,
        "max_position_embeddings": max(2048, 2 * preset.cached_tokens),
    }
    if preset.architecture == "opt":
        config = AutoConfig.for_model(
            "opt", **common, ffn_dim=preset.ffn, word_embed_proj_dim=preset.hidden, dropout=0.0
        )
    else:
        config = AutoConfig.for_model(
            "llama", **common, num_key_value_heads=preset.kv_heads, intermediate_size=preset.ffn
        )
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=preset.dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class Bench:
    """One model on one machine, and the rates of both."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.device = torch.device("cuda" if torch.cuda.is_available() and preset.dtype != torch.float32 else "cpu")
        self.model = make_model(preset, self.device)
        self.shape = shape_from_config(self.model.config, preset.dtype)
        self.ids = torch.randint(3, preset.vocab, (preset.batch, preset.cached_tokens), device=self.device)
        self.block_tokens, self.chunk_blocks = self._chunking()
        self.link: EmulatedLink | Literal["auto"] = "auto"
        self.bytes_per_s = 0.0
        self._set_link()

    def _chunking(self) -> tuple[int, int]:
        """Sixteen blocks, so that a sweep over all block counts is short and the tail has room for the steps."""
        block_tokens = max(16, self.preset.cached_tokens // 16)
        return block_tokens, 1 if self.preset.dtype != torch.float32 else 2

    def _set_link(self) -> None:
        preset = self.preset
        beta_x = preset.batch * self.shape.activation_row_bytes
        if self.device.type == "cuda":
            backend = CudaBackend(self.device)
            num_bytes = self.block_tokens * self.chunk_blocks * beta_x
            self.bytes_per_s = _copy_rate(backend, num_bytes)
            backend.close()
            return
        gamma_r = self.recompute_s_per_token()
        speed = (preset.h2d_gb_per_s or 0.0) * 1e9
        if preset.max_recompute_to_link is not None:
            speed = min(speed, preset.max_recompute_to_link * beta_x / gamma_r)
        if preset.recompute_to_link is not None:
            speed = preset.recompute_to_link * beta_x / gamma_r
        self.bytes_per_s = round(speed / 1e6) * 1e6
        self.link = EmulatedLink(h2d_gb_per_s=self.bytes_per_s / 1e9)

    # ---- rates of this process -----------------------------------------------------------------------------------

    def recompute_s_per_token(self, idle_s: float = 0.0, *, is_segmented: bool = True) -> float:
        """gamma_r: one position of the whole batch, through the runtime's own recomputation.

        Args:
            idle_s: pause before each chunk, for schedules that wait for a copy before they compute: a core that
                comes out of a pause is slower at first.
            is_segmented: every chunk becomes K/V in the same scratch, else each at its place in a layer buffer.
        """
        module = hf.attention_modules(self.model)[0]
        p, tokens = self.preset, self.block_tokens * self.chunk_blocks
        shape = KVShape(p.kv_heads, p.hidden // p.heads, p.kv_heads, p.hidden // p.heads, p.dtype)
        # Chunks arrive in a ring, which is in no cache by itself.
        ring = torch.randn(4, tokens, p.batch, p.hidden, device=self.device, dtype=p.dtype)
        room = tokens if is_segmented else p.cached_tokens
        landing = torch.empty(room, p.batch, shape.width, device=self.device, dtype=p.dtype)
        turns = itertools.count()
        embeddings: tuple[torch.Tensor, ...] = ()
        if p.architecture == "llama":
            positions = torch.arange(tokens, device=self.device)[None]
            with torch.no_grad():
                model: Any = self.model
                embeddings = model.model.rotary_emb(ring[0], positions)
        path = recompute.FastRecompute(module, shape)

        def recompute_next() -> None:
            turn = next(turns)
            start = turn % (room // tokens) * tokens
            path(ring[turn % len(ring)], embeddings, landing[start : start + tokens])

        return self._time(recompute_next, budget_s=0.4, idle_s=idle_s) / tokens

    def attention_s_per_token(self, *, is_segmented: bool = True) -> float:
        """gamma_a: attention over chunks in a ring, or SDPA over a layer buffer."""
        p = self.preset
        d = p.hidden // p.heads
        if is_segmented:
            tokens = self.block_tokens * self.chunk_blocks
            ring = torch.randn(4, tokens, p.batch, 2, p.kv_heads, d, device=self.device, dtype=p.dtype)
            query = torch.randn(p.batch, 1, p.heads, d, device=self.device, dtype=p.dtype)
            out = torch.empty_like(query, dtype=torch.float32)
            lse = torch.empty(query.shape[:3], dtype=torch.float32, device=self.device)
            turns = itertools.count()

            def attend_next() -> None:
                turn = next(turns)
                segment, is_first = ring[turn % len(ring)], turn % 8 == 0
                ops.segment_attention(
                    query, segment, out, lse, scale=1.0, is_first=is_first, first_position=0, query_position=tokens
                )

            return self._time(attend_next, budget_s=0.2) / tokens
        kv = torch.randn(p.cached_tokens, p.batch, 2, p.kv_heads, d, device=self.device, dtype=p.dtype)
        q = torch.randn(p.batch, p.heads, 1, d, device=self.device, dtype=p.dtype)
        k, v = (kv[:, :, i].permute(1, 2, 0, 3) for i in range(2))

        def attend() -> None:
            groups = p.heads // p.kv_heads
            keys, values = (k, v) if groups == 1 else (t.repeat_interleave(groups, 1) for t in (k, v))
            torch.nn.functional.scaled_dot_product_attention(q, keys, values)

        return self._time(attend, budget_s=0.2) / p.cached_tokens

    def step_s_without_cache(self) -> float:
        """A whole decode step of generate() with next to no cache: dense parts, head, sampling and host time."""
        times: list[float] = []
        model: Any = self.model
        model.generate(self.ids[:, :2], max_new_tokens=14, do_sample=False, stopping_criteria=[_Stamp(times)])
        return statistics.median(after - before for before, after in itertools.pairwise(times[2:]))

    def _time(self, function: Callable[[], Any], budget_s: float, idle_s: float = 0.0) -> float:
        with torch.no_grad():
            for _ in range(2):
                function()
            _synchronize(self.device)
            samples: list[float] = []
            began = time.perf_counter()
            while len(samples) < 5 or time.perf_counter() - began < budget_s:
                time.sleep(idle_s)
                start = time.perf_counter()
                function()
                _synchronize(self.device)
                samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    def rates(self, mode: str) -> Rates:
        """What the cost model needs, measured now, as the mode meets it."""
        rest_s, is_segmented = self.step_s_without_cache(), _is_segmented(mode)
        chunk_bytes = self.block_tokens * self.chunk_blocks * self.preset.batch * self.shape.activation_row_bytes
        idle_s = chunk_bytes / self.bytes_per_s if mode == "sequential" else 0.0
        return Rates(
            h2d_activation_bytes_per_s=self.bytes_per_s,
            h2d_kv_bytes_per_s=self.bytes_per_s,
            recompute_s_per_token=self.recompute_s_per_token(idle_s, is_segmented=is_segmented),
            attention_s_per_token=self.attention_s_per_token(is_segmented=is_segmented),
            dense_s=0.0,
            head_s=rest_s,  # dense parts and host time of a step, in one piece
        )

    def inputs(self, rates: Rates, **changes: Any) -> PlanInputs:
        """The planning problem of the measured steps: whole blocks on the host, the rest is the tail."""
        p = self.preset
        values = PlanInputs(
            num_layers=p.layers,
            num_offloaded_layers=p.layers,
            num_blocks=p.cached_tokens // self.block_tokens,
            block_tokens=self.block_tokens,
            kv_bytes_per_token=p.batch * self.shape.kv_row_bytes,
            activation_bytes_per_token=p.batch * self.shape.activation_row_bytes,
            rates=rates,
            chunk_blocks=self.chunk_blocks,
            num_slots=4,
            device_bytes=0,
            fixed_device_bytes=0,
            host_bytes=2**62,
        )
        return replace(values, **changes)

    # ---- modes ---------------------------------------------------------------------------------------------------

    def config(self, mode: str, profile: HardwareProfile | str, split: float | None = None) -> OffloadConfig:
        """The options of a mode."""
        splits: dict[str, Any] = {"full_transfer": "transfer", "recompute_all": "recompute"}
        return OffloadConfig(
            split=splits.get(WHOLE_LAYER_MODES.get(mode, mode), "auto") if split is None else split,
            attention="whole_layer" if mode in WHOLE_LAYER_MODES else "auto",
            overlap=mode != "sequential",
            schedule="kvpr" if mode == "kvpr" else "pipelined",
            block_tokens=self.block_tokens,
            chunk_blocks=self.chunk_blocks,
            device_gib="min",
            profile=profile,
            link=self.link,
        )

    def bound_s(self, mode: str, rates: Rates, split: float | None = None) -> float:
        """The cost model's step for the mode's best plan."""
        splits = {"full_transfer": 0.0, "recompute_all": 1.0}
        chosen = splits.get(WHOLE_LAYER_MODES.get(mode, mode)) if split is None else split
        schedule = "kvpr" if mode == "kvpr" else "pipelined"
        inputs = self.inputs(rates, split=chosen, schedule=schedule, is_segmented=_is_segmented(mode))
        plan = planner.solve(inputs)
        if mode == "sequential":
            return cost.sequential_step_s(inputs, 0, plan.activation_blocks, plan.kv_blocks)
        return plan.predicted_step_s

    def steps(self, config: OffloadConfig, new_tokens: int) -> GenerationStats:
        """Decode and return the statistics of the product."""
        with offload(self.model, config) as session:
            model: Any = self.model
            model.generate(
                self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=new_tokens, do_sample=False
            )
        assert session.stats is not None
        return session.stats

    def on_this_link(self, profile: HardwareProfile | str) -> HardwareProfile | str:
        """A profile of this machine with the benchmark's emulated link in front of it."""
        if isinstance(profile, HardwareProfile) and isinstance(self.link, EmulatedLink):
            return with_link(profile, self.link)
        return profile

    def measure(
        self, mode: str, profile: HardwareProfile | str, new_tokens: int, split: float | None = None
    ) -> dict[str, Any]:
        """One row; measured again while the machine's rates move."""
        for tries in range(1, MAX_TRIES + 1):
            before = self.rates(mode)
            stats = self.steps(self.config(mode, self.on_this_link(profile), split), new_tokens)
            after = self.rates(mode)
            bounds = [self.bound_s(mode, rates, split) for rates in (before, after)]
            drift = abs(bounds[0] - bounds[1]) / min(bounds)
            if drift <= MAX_RATE_DRIFT_FRACTION or tries == MAX_TRIES:
                break
        offloaded = max(1, stats.plan.activation_blocks + stats.plan.kv_blocks)
        return {
            "mode": mode,
            # The first step waits for the end of the write-back, the second empties the ring.
            "decode_step_s": stats.decode_step_s[2:],
            "bounds_s": bounds,
            "rate_drift_fraction": drift,
            "tries": tries,
            "h2d_bytes_per_step": stats.plan.link_bytes_per_step,
            "h2d_gb_per_s": stats.h2d_gb_per_s,
            "link_utilization": stats.link_utilization,
            "split_fraction": stats.plan.activation_blocks / offloaded,
            "device_kv_peak_decode_bytes": stats.device_kv_peak_decode_bytes,
            "plan": stats.plan.to_json(),
        }


def _is_segmented(mode: str) -> bool:
    return mode != "kvpr" and mode not in WHOLE_LAYER_MODES  # the paper puts whole layers together


class _Stamp:
    """A stopping criterion that only notes the time."""

    def __init__(self, times: list[float]) -> None:
        self._times = times

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _copy_rate(backend: Backend, num_bytes: int) -> float:
    host, device = backend.allocate_host(num_bytes), backend.allocate_device(num_bytes)
    for count in (2, 8):
        backend.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            backend.copy_to_device(device, host.tensor, [])
        backend.synchronize()
        rate = count * num_bytes / (time.perf_counter() - start)
    return rate


@contextlib.contextmanager
def core_for_the_link() -> Iterator[None]:
    """Leave one core of a CPU-only machine to the copies of the emulated link, as a GPU leaves them to its DMA engine.

    Otherwise each copy holds up one thread of a GEMM, and with it all of them.
    """
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pooled(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of all rounds: the median step, the median bound; the rest as in the round nearest to that step."""
    steps = [step_s for row in measured for step_s in row["decode_step_s"]]
    p50 = statistics.median(steps)
    bound = statistics.median(min(row["bounds_s"]) for row in measured)
    typical = min(measured, key=lambda row: abs(statistics.median(row["decode_step_s"]) - p50))
    row = {name: value for name, value in typical.items() if name != "bounds_s"}
    return row | {
        "decode_step_s": steps,
        "decode_step_s_p50": p50,
        "bound_step_s": bound,
        "fraction_of_bound": bound / p50,
        "rounds": len(measured),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(
    preset_name: str,
    modes: list[str],
    new_tokens: int,
    profile: HardwareProfile | str = "auto",
    sweep: bool = False,
    rounds: int = 1,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """All rows of a preset.

    Args:
        preset_name: one of `PRESETS`.
        modes: some of `MODES`.
        new_tokens: decoded per measurement; two steps of each are not counted.
        profile: as in `OffloadConfig`.
        sweep: also every split in whole blocks.
        rounds: passes over all rows, whose steps are pooled: a busy minute of the machine then meets all rows alike.
        on_row: called with each row when it is complete.
    """
    with core_for_the_link():
        bench = Bench(PRESETS[preset_name])
        blocks = bench.preset.cached_tokens // bench.block_tokens
        settings: list[tuple[str, str, float | None]] = [(mode, mode, None) for mode in modes]
        if sweep:
            settings += [(f"sweep_{x}_of_{blocks}", "planned", x / blocks) for x in range(blocks + 1)]
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in settings}
        for turn in range(rounds):
            for name, mode, split in settings:
                measured[name].append(bench.measure(mode, profile, new_tokens, split) | {"mode": name})
                if on_row is not None and turn == rounds - 1:
                    on_row(_pooled(measured[name]))
        found = [_pooled(rows) for rows in measured.values()]
        full = next((row["decode_step_s_p50"] for row in found if row["mode"] == "full_transfer"), None)
        for row in found:
            row["speedup_vs_full_transfer"] = None if full is None else full / row["decode_step_s_p50"]
        link = "emulated" if bench.device.type == "cpu" else "measured pinned"
        return {
            "preset": preset_name,
            "device": device_name(),
            "link": f"{link} {bench.bytes_per_s / 1e9:.3f} GB/s",
            "rows": found,
        }


def device_name() -> str:
    """The device as rows name it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()} ({torch.get_num_threads()} threads)"


def table(result: dict[str, Any]) -> Table:
    """The rows of a result as people read them."""
    result_table = Table(title=f"{result['preset']} on {result['device']}, link {result['link']}")
    for name in ("mode", "split", "step ms", "bound ms", "of bound", "vs full transfer", "link busy"):
        is_mode = name == "mode"
        result_table.add_column(name, justify="left" if is_mode else "right", no_wrap=is_mode)
    for row in result["rows"]:
        speedup = row["speedup_vs_full_transfer"]
        result_table.add_row(
            row["mode"],
            f"{row['split_fraction']:.2f}",
            f"{row['decode_step_s_p50'] * 1e3:.1f}",
            f"{row['bound_step_s'] * 1e3:.1f}",
            f"{row['fraction_of_bound']:.3f}",
            "" if speedup is None else f"{speedup:.2f}x",
            f"{row['link_utilization']:.3f}",
        )
    return result_table
