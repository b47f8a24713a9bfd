"""One model of random weights on one machine: what is measured, over which link, and the bound of each mode.

Owns the model, the link's speed, the options that each mode stands for, and the cost model's step at rates measured
here and now. Does not own what is run (`decode`, `providers`).
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch

from kvoffload.backend import Backend, CudaBackend
from kvoffload.backend.clock import LEAST_CALLS
from kvoffload.bench.current_rates import (
    attention_s_per_token,
    decode_s_per_token,
    forward_s,
    recompute_s_per_token,
    step_s_without_cache,
)
from kvoffload.bench.presets import Preset, make_model
from kvoffload.config import EmulatedLink, OffloadConfig, Schedule
from kvoffload.errors import ConfigError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.model.live import shape_of_model
from kvoffload.planning import planner, step_time
from kvoffload.planning.forms import FORMS
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.placement import PLAIN, FormName
from kvoffload.planning.plan import Plan
from kvoffload.planning.problem import make_inputs
from kvoffload.planning.rates import Rates
from kvoffload.planning.sizing import choose_sizes, planned_forms
from kvoffload.profiler.environment import cpu_name
from kvoffload.profiler.profile import with_link

MODES = ("full_transfer", "recompute_all", "sequential", "kvpr", "planned")
# The same with a layer's K/V put together before attention, where `MODES` attend chunk by chunk.
WHOLE_LAYER_MODES = {"full_transfer_whole_layer": "full_transfer", "planned_whole_layer": "planned"}
# Full transfer in a form of fewer bytes.
FORM_MODES: dict[str, FormName] = {"packed": "packed_kv", "int8": "int8", "int4": "int4", "int2": "int2"}
_SPLITS = {"full_transfer": 0.0, "recompute_all": 1.0, **dict.fromkeys(FORM_MODES, 0.0)}  # the others plan


class Lab:
    """One model on one machine, and the rates of both.

    Raises:
        ConfigError: the preset needs a GPU, and there is none.
    """

    def __init__(self, preset: Preset) -> None:
        if not preset.is_emulated and not torch.cuda.is_available():
            raise ConfigError("this shape is measured on a CUDA device, and there is none: choose a cpu- preset")
        self.preset = preset
        # with an index: some functions of `torch.cuda` ask for one
        self.device = torch.device("cpu") if preset.is_emulated else torch.device("cuda", torch.cuda.current_device())
        self.model = make_model(preset, self.device)
        self.shape = shape_of_model(self.model)
        self.ids = torch.randint(3, preset.vocab, (preset.batch, preset.cached_tokens), device=self.device)
        # Sixteen blocks, so that a sweep over all block counts is short and the tail has room for the steps.
        self.block_tokens = max(16, preset.cached_tokens // 16)
        self.chunk_blocks = 2 if preset.is_emulated else 1
        self.link: EmulatedLink | Literal["auto"] = "auto"
        self.bytes_per_s = 0.0
        self._is_pinned = True
        self._set_link()

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one chunk."""
        return self.block_tokens * self.chunk_blocks

    @property
    def link_name(self) -> str:
        """The link as rows name it."""
        kind = "emulated" if self.preset.is_emulated else "measured pinned" if self._is_pinned else "measured pageable"
        return f"{kind} {self.bytes_per_s / 1e9:.3f} GB/s"

    def _set_link(self) -> None:
        preset = self.preset
        beta_x = preset.batch * self.shape.activation_row_bytes
        if not preset.is_emulated:
            backend = CudaBackend(self.device)
            self.bytes_per_s, self._is_pinned = _copy_rate(backend, self.chunk_tokens * beta_x)
            backend.close()
            return
        gamma_r = self.recompute_s_per_token()
        speed = (preset.h2d_gb_per_s or 0.0) * 1e9
        if preset.max_recompute_to_link is not None:
            speed = min(speed, preset.max_recompute_to_link * beta_x / gamma_r)
        if preset.recompute_to_link is not None:
            speed = preset.recompute_to_link * beta_x / gamma_r
        self.set_link_bytes_per_s(speed)

    def set_link_bytes_per_s(self, bytes_per_s: float) -> None:
        """Another speed of the emulated link, in whole MB/s."""
        self.bytes_per_s = round(bytes_per_s / 1e6) * 1e6
        self.link = EmulatedLink(h2d_gb_per_s=self.bytes_per_s / 1e9)

    # ---- rates of this process -----------------------------------------------------------------------------------

    def recompute_s_per_token(self, idle_s: float = 0.0, *, is_segmented: bool = True) -> float:
        """gamma_r, as `Rates.restore_s_per_token`."""
        return recompute_s_per_token(
            self.model, self.preset, self.chunk_tokens, idle_s=idle_s, is_segmented=is_segmented
        )

    def meets(self, mode: str) -> str:
        """A name for what the mode makes of the machine's rates: modes of one name have the same."""
        if mode in FORM_MODES:
            return mode
        return "sequential" if mode == "sequential" else "segments" if _is_segmented(mode) else "whole layers"

    def rates(self, mode: str) -> Rates:
        """What the cost model needs, measured now, as the mode meets it."""
        is_segmented = _is_segmented(mode)
        chunk_bytes = self.chunk_tokens * self.preset.batch * self.shape.activation_row_bytes
        idle_s = chunk_bytes / self.bytes_per_s if mode == "sequential" else 0.0
        step_s = step_s_without_cache(self.model, self.ids)
        # On a CPU the host's time is the device's. A GPU works while its host asks for more, and a step takes the
        # longer of both: what the host took for the whole step is the host's, at least where that was the longer.
        is_cpu = self.preset.is_emulated
        restore_s = {"activation": self.recompute_s_per_token(idle_s, is_segmented=is_segmented)}
        if mode in FORM_MODES:
            restore_s[FORM_MODES[mode]] = decode_s_per_token(
                self.preset, self.device, self.chunk_tokens, self.block_tokens, FORM_MODES[mode]
            )
        return Rates(
            h2d_bytes_per_s=dict.fromkeys(FORMS, self.bytes_per_s),
            dense_s=0.0,
            # dense parts of a step, in one piece
            head_s=step_s if is_cpu else forward_s(self.model, self.ids),
            host_s_per_layer=0.0 if is_cpu else step_s / self.preset.layers,
            restore_s_per_token=restore_s,
            attention_s_per_token=attention_s_per_token(
                self.preset, self.device, self.chunk_tokens, idle_s=idle_s, is_segmented=is_segmented
            ),
        )

    def inputs(
        self,
        rates: Rates,
        *,
        is_segmented: bool,
        split: float | None = None,
        schedule: Schedule = "pipelined",
        form: FormName = PLAIN,
    ) -> PlanInputs:
        """The planning problem of the measured steps: whole blocks on the host, the rest is the tail."""
        p = self.preset
        config = OffloadConfig(
            block_tokens=self.block_tokens, chunk_blocks=self.chunk_blocks, schedule=schedule, packing="off"
        )
        geometry = Geometry(
            num_offloaded_layers=p.layers,
            rows=p.batch,
            max_tokens=p.cached_tokens,
            kv_row_bytes=self.shape.kv_row_bytes,
            head_dim=self.shape.kv_head_dim,
            kv_dtype=self.shape.kv_dtype,
            activation_row_bytes=self.shape.activation_row_bytes,
            is_segmented=is_segmented,
        )
        forms = planned_forms(config, geometry, can_recompute=split != 0) | {form}
        sizes = choose_sizes(geometry, config, forms=forms, device_bytes=None, rates=rates)
        return make_inputs(
            self.shape,
            geometry,
            sizes,
            rates,
            num_blocks=p.cached_tokens // self.block_tokens,
            device_bytes=sizes.fixed_device_bytes,  # as little as works: no block is resident
            host_cap_bytes=2**62,
            split=split,
            config=config,
            forms=forms,
        )

    def bound_s(self, mode: str, rates: Rates, split: float | None = None, like: Plan | None = None) -> float:
        """The cost model's step for the mode's best plan.

        Args:
            mode: one of `MODES` and `WHOLE_LAYER_MODES`.
            rates: as measured.
            split: instead of the mode's own.
            like: a plan that ran, whose sizes and room for resident blocks the best plan is to have.
        """
        chosen = _SPLITS.get(WHOLE_LAYER_MODES.get(mode, mode)) if split is None else split
        schedule: Schedule = "kvpr" if mode == "kvpr" else "pipelined"
        form = FORM_MODES.get(mode, PLAIN)
        inputs = self.inputs(rates, split=chosen, schedule=schedule, is_segmented=_is_segmented(mode), form=form)
        if like is not None:
            resident = sum(
                n * like.bytes_per_token[kind.form] for kind, n in like.placed.items() if kind.tier == "device"
            )
            inputs = replace(
                inputs,
                num_blocks=like.num_blocks,
                block_tokens=like.block_tokens,
                chunk_blocks=like.chunk_blocks,
                num_slots=like.num_slots,
                bytes_per_token=like.bytes_per_token,
                device_bytes=inputs.fixed_device_bytes + like.num_offloaded_layers * like.block_tokens * resident,
                host_bytes=2**62,
            )
        plan = planner.solve(inputs)
        if mode == "sequential":
            return step_time.sequential_step_s(inputs, plan.blocks)
        return plan.predicted_step_s

    # ---- modes ---------------------------------------------------------------------------------------------------

    def config(
        self, mode: str, profile: HardwareProfile | str, split: float | None = None, **changes: Any
    ) -> OffloadConfig:
        """The options of a mode, with `changes` to them."""
        splits: dict[str, Any] = {"full_transfer": "transfer", "recompute_all": "recompute"}
        splits |= {mode: "transfer" for mode in FORM_MODES if mode != "packed"}  # packing takes a prediction
        options: dict[str, Any] = {
            "split": splits.get(WHOLE_LAYER_MODES.get(mode, mode), "auto") if split is None else split,
            "attention": "whole_layer" if mode in WHOLE_LAYER_MODES else "auto",
            "overlap": mode != "sequential",
            "schedule": "kvpr" if mode == "kvpr" else "pipelined",
            "block_tokens": self.block_tokens,
            "chunk_blocks": self.chunk_blocks,
            "device_gib": "min",
            "speculate": "off",  # these compare steps; drafts have a benchmark of their own
            "packing": "auto" if mode == "packed" else "off",
            "kv_dtype": mode if mode in FORM_MODES and mode != "packed" else "model",
            "profile": self.on_this_link(profile),
            "link": self.link,
        }
        return OffloadConfig(**options | changes)

    def on_this_link(self, profile: HardwareProfile | str) -> HardwareProfile | str:
        """A profile of this machine with the emulated link in front of it."""
        if isinstance(profile, HardwareProfile) and isinstance(self.link, EmulatedLink):
            return with_link(profile, self.link)
        return profile


def _is_segmented(mode: str) -> bool:
    return mode != "kvpr" and mode not in WHOLE_LAYER_MODES  # the paper puts whole layers together


def _copy_rate(backend: Backend, num_bytes: int) -> tuple[float, bool]:
    """Of copies from the backend's host memory, back to back, and whether that is pinned.

    From and to a ring as the engine's.
    """
    host, device = backend.allocate_host(4 * num_bytes), backend.allocate_device(4 * num_bytes)
    host.tensor.zero_()
    turns = itertools.cycle(zip(device.split(num_bytes), host.tensor.split(num_bytes), strict=True))

    def stretch() -> float:
        copies = backend.time_copies(
            lambda: backend.copy_to_device(*next(turns), []), LEAST_CALLS, ("h2d",), is_pageable=not host.pinned_bytes
        )
        return copies.seconds / LEAST_CALLS

    stretch()  # warm-up
    return num_bytes / statistics.median(stretch() for _ in range(3)), host.pinned_bytes > 0


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


def device_and_threads() -> str:
    """The device as rows name it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_name()} ({threads} thread{'s' if threads > 1 else ''})"
