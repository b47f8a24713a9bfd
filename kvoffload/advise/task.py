"""The ways to do one workload on one machine, and what each is predicted to take.

Owns the inputs of the planning problem made from a model, a workload and a profile, and the memory and time of doing
without offloading. Does not own the prediction of a step (`step_time`), the sizes (`sizing`) or the choice (`planner`,
`advice`).

Times are for the whole task: prefill, then one step per further token at the mean context, so that short prompts with
long answers are not judged by their last step.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import replace
from typing import NamedTuple

from kvoffload.advise import roofline
from kvoffload.advise.ways import Way
from kvoffload.config import GIB, OffloadConfig
from kvoffload.errors import InfeasiblePlanError
from kvoffload.machine.hardware_profile import HardwareProfile
from kvoffload.machine.machine import machine_of
from kvoffload.model.facts import Facts
from kvoffload.model.shape import ModelShape
from kvoffload.planning import planner, step_time
from kvoffload.planning.drafts import (
    ExpectedRounds,
    RoundTimes,
    expected_rounds,
    round_times,
    rows_may_differ,
    token_s_usually,
)
from kvoffload.planning.forms import SHADOW_FORM, why_no_shadow
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.memory import (
    DEVICE_SHARE,
    HOST_SHARE,
    MIN_PREFILL_TOKENS,
    PREFILL_TOKENS,
    PrefillParts,
    prefill_chunk_tokens,
    prefill_parts,
    prefill_peak_bytes,
)
from kvoffload.planning.plan import Plan
from kvoffload.planning.problem import does_without, may_do_without, mean_tokens, pose, with_chunk_sizes
from kvoffload.planning.sizing import LEAST_GAP_S, planned_forms, smallest_sizes, uncapped_sizes
from kvoffload.planning.weights import WeightSizes
from kvoffload.planning.workload import Workload
from kvoffload.units import gb

logger = logging.getLogger(__name__)


@functools.cache
def _tell(text: str) -> None:
    """Once: a task is asked several times."""
    logger.warning(text)


class Alternative(NamedTuple):
    """One way to do the whole task, and what it is predicted to take."""

    way: Way
    batch: int  # sequences at once, beams not counted
    runs: int
    prefill_s: float  # of one run
    step_s: float  # at the mean context
    total_s: float
    tokens_per_s: float  # new tokens of all sequences, over everything
    device_bytes: int  # weights included


class Task(NamedTuple):
    """One workload of one model on one machine."""

    shape: ModelShape
    workload: Workload
    profile: HardwareProfile
    config: OffloadConfig
    acceptance: float | None = None  # assumed of each draft of a sequence; None: by what drafts read
    facts: Facts | None = None  # of the model, where they are known; a prefill takes no less than its roofline then

    def in_weight_bits(self, bits: float) -> Task:
        """This task with the weights of decoder layers in so many bits each, scales included."""
        facts = None if self.facts is None else self.facts.in_weight_bits(bits)
        return self._replace(shape=self.shape.with_layer_bytes(bits / self.shape.layer_bits), facts=facts)

    def inputs(self, cached_tokens: int, batch: int | None = None, *, has_shadow: bool = False) -> PlanInputs:
        """The planning problem with `cached_tokens` in the cache of all sequences.

        With `batch` that of fewer sequences without a cap on device memory, for predicting them on the device; with
        `has_shadow` beside copies of all blocks on the host.

        Raises:
            InfeasiblePlanError: there is no room for what must be on the device.
        """
        shape, config = self.shape, self.config
        rows = (batch or self.workload.batch) * self.workload.num_beams
        geometry = self._geometry(rows)
        if not batch and (kept := self.kept_layers(rows)) is not None:
            sizes = self.weight_sizes
            geometry = replace(
                geometry,
                weight_bytes=sizes.streamed_bytes(kept),
                weight_device_bytes=sizes.device_bytes(kept) - sizes.outside,
            )
        return pose(
            shape,
            replace(geometry, shadow_form=SHADOW_FORM) if has_shadow else geometry,
            config,
            self.profile,
            is_emulated=self.profile.emulated_link,
            cached_tokens=cached_tokens,
            device_cap_bytes=lambda settled: None if batch else self._device_cap_bytes(settled),
            host_cap_bytes=self._host_cap_bytes(),
            must_predict=True,
        ).inputs

    def _geometry(self, rows: int) -> Geometry:
        shape, config = self.shape, self.config
        return Geometry(
            num_offloaded_layers=shape.num_offloaded_layers,
            rows=rows,
            max_tokens=self.workload.cached_tokens,
            kv_row_bytes=shape.kv_row_bytes,
            head_dim=shape.kv_head_dim,
            kv_dtype=shape.kv_dtype,
            activation_row_bytes=shape.activation_row_bytes,
            beams=self.workload.num_beams,
            other_device_bytes=self.shape.other_layers_bytes(rows, self.workload.cached_tokens),
            is_segmented=config.attention == "auto" and config.schedule == "pipelined",
        )

    def settled(self) -> Task:
        """This task with "auto" as plain transfer where that is predicted to be faster."""
        geometry = self._geometry(self.workload.rows)
        if not may_do_without(self.config, geometry):
            return self
        plain = self._replace(config=replace(self.config, split="transfer"))
        return plain if does_without(self._mean_step_s(), plain._mean_step_s()) else self

    def _mean_step_s(self) -> float:
        try:
            return planner.solve(self.inputs(self.mean_tokens())).predicted_step_s
        except InfeasiblePlanError:
            return math.inf

    def offload(self, chosen: Plan) -> Alternative:
        """What the plan is predicted to take; the prefill writes the cache back while it computes."""
        inputs = self.inputs(self.mean_tokens())
        mean = planner.solve(inputs)
        device_s = step_time.predict(inputs, mean.blocks).device_s
        step_s = max(mean.predicted_step_s, device_s + self.tail_s(inputs))
        written = 0.0
        if chosen.host_bytes and self.profile.d2h is not None:
            written = chosen.host_bytes / self.profile.d2h.rate(chosen.host_bytes)
        passes = self.prefill_passes()
        read_s = passes * inputs.rates.weights_s(self.streamed_bytes)
        if self.profile.h2d is not None and chosen.host_bytes:  # each part of a prefill reads those before it
            read_s += (passes - 1) / 2 * chosen.host_bytes / self.profile.h2d.rate(chosen.host_bytes)
        prefill_s = max(self.prefill_s(self.workload.batch), written, read_s)
        used = self.device_weight_bytes + chosen.device_bytes
        return self._alternative("offload", self.workload.batch, 1, prefill_s, step_s, used)

    def rounds(self) -> ExpectedRounds | None:
        """Rounds of verified drafts at the mean context; None where there are none, or they gain nothing."""
        number, inputs = self.config.fixed_drafts, self.inputs(self.mean_tokens())
        mean = planner.solve(inputs)
        if number == 0 or self.workload.num_beams > 1 or not inputs.is_segmented or not mean.count(tier="host"):
            return None
        found = [self._round_times(replace(inputs, is_plain_on_device=True))]  # a window of K and V
        asked, reason = self.config.draft_cache, why_no_shadow(self.config, self._geometry(self.workload.rows))
        if asked != "window" and reason is None and (self._caps_device or asked == SHADOW_FORM):
            try:
                found.append(self._round_times(self.inputs(self.mean_tokens(), has_shadow=True)))
            except InfeasiblePlanError as error:
                reason = str(error)
        if asked == SHADOW_FORM and reason is not None:
            _tell(f"draft_cache='{asked}': {reason}; drafts read a window of the newest tokens")
        if asked == SHADOW_FORM:
            found = found[-1:]
        expected = {
            times: expected_rounds(times, self.workload.batch, acceptance=self.acceptance, drafts=number)
            for times in found
        }

        def token_s(times: RoundTimes) -> tuple[bool, float]:
            """What near caches are compared by; those that gain nothing come last."""
            if self.acceptance is not None:
                return not expected[times].drafts, expected[times].token_s
            return not expected[times].drafts, token_s_usually(times, self.workload.batch, number)

        best = expected[min(found, key=token_s)]
        return best if best.drafts else None

    def _round_times(self, inputs: PlanInputs) -> RoundTimes:
        """Of rounds with such inputs."""
        rows = self.workload.batch
        own_pace = rows_may_differ(self.shape, self._geometry(rows), self.config)
        plan = planner.solve(inputs)
        return round_times(inputs, plan, self.shape, self.profile, rows=rows, own_pace=own_pace)

    def drafted(self, offload: Alternative, rounds: ExpectedRounds) -> Alternative:
        """Offloading with such rounds."""
        used, prefill_s = offload.device_bytes, offload.prefill_s
        return self._alternative("drafts", self.workload.batch, 1, prefill_s, rounds.token_s, used)

    def on_device(self) -> Alternative | None:
        """The whole batch on the device, else in sub-batches, else None where not even one sequence fits."""
        beams = self.workload.num_beams
        fitting = (n for n in range(self.workload.batch, 0, -1) if self.resident_bytes(n) <= self.free_bytes(n * beams))
        largest = next(fitting, None)
        if largest is None:
            return None
        runs = -(-self.workload.batch // largest)
        batch = -(-self.workload.batch // runs)  # equal parts
        inputs = self.inputs(self.mean_tokens(), batch)
        found = step_time.predict(inputs, {"resident_kv": inputs.num_blocks})
        step_s = max(found.device_s + self.tail_s(inputs), found.issue_s)
        used = self.shape.weight_bytes + self.resident_bytes(batch)
        way: Way = "on_device" if runs == 1 else "sub_batches"
        return self._alternative(way, batch, runs, self.prefill_s(batch), step_s, used)

    def resident_bytes(self, batch: int) -> int:
        """The whole cache of `batch` sequences, plus one layer's, which plain generate() copies to append a token."""
        rows, tokens = batch * self.workload.num_beams, self.workload.cached_tokens
        growing = (self.shape.num_offloaded_layers + 1) * rows * tokens * self.shape.kv_row_bytes
        return growing + self.shape.other_layers_bytes(rows, tokens)

    def _alternative(
        self, way: Way, batch: int, runs: int, prefill_s: float, step_s: float, device_bytes: int
    ) -> Alternative:
        new_tokens = self.workload.new_tokens
        total_s = runs * (prefill_s + (new_tokens - 1) * step_s)
        rate = self.workload.batch * new_tokens / total_s
        return Alternative(way, batch, runs, prefill_s, step_s, total_s, rate, device_bytes)

    def mean_tokens(self) -> int:
        """Tokens in the cache of one sequence, halfway through the decoding."""
        return mean_tokens(self.workload.prompt_tokens, self.workload.cached_tokens)

    def prefill_flops(self, batch: int) -> float:
        """Operations for the prompts of `batch` sequences."""
        return self.shape.prefill_flops(batch, self.workload.prompt_tokens)

    def step_flops(self, batch: int) -> float:
        """Operations of one decode step at the mean context."""
        return self.shape.step_flops(batch * self.workload.num_beams, self.mean_tokens())

    def step_bytes(self, batch: int) -> float:
        """Bytes of device memory that a step at the mean context cannot do without: active weights and the cache."""
        return self.shape.step_bytes(batch * self.workload.num_beams, self.mean_tokens())

    def tail_s(self, inputs: PlanInputs) -> float:
        """Attention over the newest tokens, which fill no block."""
        tail_tokens = self.mean_tokens() - inputs.num_blocks * inputs.block_tokens
        return inputs.num_offloaded_layers * tail_tokens * inputs.rates.attention_s_per_token

    def prefill_s(self, batch: int) -> float:
        """Seconds of computing the prompts of `batch` sequences."""
        shape = self.shape
        rows = min(batch * self.workload.prompt_tokens, PREFILL_TOKENS)
        flops_per_s = self.profile.gemm_flops_per_s(rows, shape.dense_width, shape.hidden_size)
        return max(self.prefill_flops(batch) / flops_per_s, self.least_prefill_s(batch))

    def least_prefill_s(self, batch: int) -> float:
        """By the roofline of a datasheet; a measured machine's rates are achieved ones, and need no such bound."""
        if self.facts is None or "datasheet" not in self.profile.extra:
            return 0.0
        tokens = self.workload.prompt_tokens
        return roofline.prefill_s(self.facts, machine_of(self.profile), batch=batch, tokens=tokens)

    def free_bytes(self, rows: int) -> int:
        """Device memory that weights and the prefill peak of `rows` sequences leave; at most the configured cap.

        Without offloading: parts of a prefill have `PREFILL_TOKENS` tokens then.
        """
        num_tokens = min(rows * self.workload.prompt_tokens, PREFILL_TOKENS)
        return self._capped(self._usable_bytes - prefill_peak_bytes(self.shape, num_tokens=num_tokens, rows=rows))

    # ---- weights ---------------------------------------------------------------------------------------------------

    @property
    def weight_sizes(self) -> WeightSizes:
        """Of the model, its decoder layers all alike."""
        shape = self.shape
        layer = -(-shape.layers_weight_bytes // max(1, shape.num_layers))
        outside = shape.weight_bytes - shape.layers_weight_bytes
        return WeightSizes(outside=outside, layers=(layer,) * shape.num_layers if layer else ())

    def kept_layers(self, rows: int) -> int | None:
        """Decoder layers whose weights stay on the device, where `rows` sequences are offloaded; None: all.

        Under "auto" all where that leaves room for the least that a cache takes, else as many as leave room for
        comfortable buffers and a prefill in parts; 0 where even that is too much.
        """
        asked, sizes = self.config.device_weights_gib, self.weight_sizes
        if asked == "all" or not sizes.layers:
            return None
        if not isinstance(asked, str):
            number = sizes.num_resident(int(asked * GIB))
            return None if number == len(sizes.layers) else max(0, number)
        if self._has_room(rows, None):
            return None
        ringed = replace(self._geometry(rows), least_gap_s=0.0 if self.profile.emulated_link else LEAST_GAP_S)
        comfortable = uncapped_sizes(ringed, self.config).fixed_device_bytes  # as the runtime has it
        left = self._usable_with(0) - comfortable - self._peak_bytes(rows, self._prefill_parts(rows, 0))
        resident = sizes.num_resident(sizes.device_bytes(0) + int(left / DEVICE_SHARE))
        return max(0, min(resident, len(sizes.layers) - 1))

    @property
    def streamed_bytes(self) -> int:
        """Weights that cross the link in every forward."""
        kept = self.kept_layers(self.workload.rows)
        return 0 if kept is None else self.weight_sizes.streamed_bytes(kept)

    @property
    def device_weight_bytes(self) -> int:
        """Weights on the device where the cache is offloaded, slabs for streamed ones included."""
        kept = self.kept_layers(self.workload.rows)
        return self.shape.weight_bytes if kept is None else self.weight_sizes.device_bytes(kept)

    @property
    def host_weight_bytes(self) -> int:
        """Weights that host memory holds: those of all decoder layers, where some are streamed."""
        return sum(self.weight_sizes.layers) if self.streamed_bytes else 0

    def prefill_passes(self) -> int:
        """Forwards of the prefill, in each of which streamed weights cross the link."""
        rows = self.workload.rows
        parts = self._prefill_parts(rows, self.kept_layers(rows))
        return -(-self.workload.prompt_tokens // parts.tokens)

    def _prefill_parts(self, rows: int, kept: int | None) -> PrefillParts:
        """In which parts a prompt goes through the model, as the runtime has it."""
        geometry = with_chunk_sizes(
            self.shape, self._geometry(rows), self.config, self.profile, is_emulated=self.profile.emulated_link
        )
        room = self._usable_with(kept) - uncapped_sizes(geometry, self.config).fixed_device_bytes
        prompt_tokens = self.workload.prompt_tokens
        if kept is not None:
            return prefill_parts(self.shape, rows=rows, prompt_tokens=prompt_tokens, room_bytes=room)
        tokens = prefill_chunk_tokens(self.shape, rows=rows, prompt_tokens=prompt_tokens, room_bytes=room)
        return PrefillParts(tokens, rows)

    def has_room(self, rows: int) -> bool:
        """Whether offloading `rows` sequences fits beside the weights that stay, with the shortest parts of a prefill.

        The host has to hold the weights, where some are streamed.
        """
        kept = self.kept_layers(rows)
        return self._has_room(rows, kept) and (kept is None or self._host_cap_bytes() > 0)

    def _has_room(self, rows: int, kept: int | None) -> bool:
        geometry = self._geometry(rows)
        return self._least_bytes(geometry) <= self._left_by_prefill(rows, self._shortest_parts(rows, kept), kept)

    def _least_bytes(self, geometry: Geometry) -> int:
        return smallest_sizes(geometry, self.config, forms=planned_forms(self.config, geometry)).fixed_device_bytes

    def _shortest_parts(self, rows: int, kept: int | None) -> PrefillParts:
        tokens = min(MIN_PREFILL_TOKENS, self.workload.prompt_tokens)
        if kept is None:
            return PrefillParts(tokens, rows)
        return prefill_parts(self.shape, rows=rows, prompt_tokens=tokens, room_bytes=0)

    def _left_by_prefill(self, rows: int, parts: PrefillParts, kept: int | None) -> int:
        """Device memory beside weights and such parts of a prefill of `rows` sequences."""
        return self._usable_with(kept) - self._peak_bytes(rows, parts)

    def _peak_bytes(self, rows: int, parts: PrefillParts) -> int:
        num_tokens = rows * min(parts.tokens, self.workload.prompt_tokens)
        return prefill_peak_bytes(self.shape, num_tokens=num_tokens, rows=rows, rows_at_once=parts.rows)

    def _usable_with(self, kept: int | None) -> int:
        """Device memory beside the weights of so many layers, and slabs for the others; None: of all."""
        weight_bytes = self.shape.weight_bytes if kept is None else self.weight_sizes.device_bytes(kept)
        return int(DEVICE_SHARE * (self.profile.device_memory_bytes - weight_bytes))

    @property
    def _usable_bytes(self) -> int:
        """Without offloading."""
        return self._usable_with(None)

    @property
    def _caps_device(self) -> bool:
        """As the runtime has it: else as little as works is held on the device."""
        setting = self.config.device_gib
        return not (setting == "min" or (setting == "auto" and self.profile.emulated_link))

    def _capped(self, num_bytes: int) -> int:
        cap = self.config.device_gib
        return num_bytes if isinstance(cap, str) else min(num_bytes, int(cap * GIB))

    def _device_cap_bytes(self, geometry: Geometry) -> int | None:
        """What we may hold on the device, as the runtime has it; None for as little as works."""
        rows = geometry.rows
        kept = self.kept_layers(rows)
        if not self.has_room(rows):
            raise self._no_room(geometry, kept)
        if not self._caps_device:
            return None
        left = self._left_by_prefill(rows, self._prefill_parts(rows, kept), kept)
        return self._capped(max(left, self._least_bytes(geometry)))

    def _no_room(self, geometry: Geometry, kept: int | None) -> InfeasiblePlanError:
        """Says which memory is too small, by how much, and what to do."""
        rows, sizes = geometry.rows, self.weight_sizes
        if kept is not None and self._host_cap_bytes() <= 0:
            installed = self.profile.extra.get("host_memory_bytes", 0)
            return InfeasiblePlanError(
                f"host memory: weights of {gb(sizes.total)} do not fit on the device, and not in the host's "
                f"{gb(installed)} either: use quantised weights or a larger machine"
            )
        left = self._left_by_prefill(rows, self._shortest_parts(rows, kept), kept)
        smaller = ", quantised weights or a smaller batch" if self.has_room(self.workload.num_beams) else ""
        weights = (
            gb(self.shape.weight_bytes) if kept is None else f"{gb(sizes.device_bytes(kept))} (others are streamed)"
        )
        return InfeasiblePlanError(
            f"device memory: weights of {weights} and the prefill leave "
            f"{gb(left) if left > 0 else 'nothing'} of {gb(self.profile.device_memory_bytes)}, offloading takes at "
            f"least {gb(self._least_bytes(geometry))}: use a larger device{smaller or ' or quantised weights'}"
        )

    def _host_cap_bytes(self) -> int:
        """The cap on host memory; a preset's host is unknown and taken as large enough."""
        if not isinstance(self.config.host_gib, str):
            return int(self.config.host_gib * GIB)
        installed = self.profile.extra.get("host_memory_bytes")
        if not isinstance(installed, int):
            return 2**62
        used = self.shape.weight_bytes if self.profile.emulated_link else 0  # the "device" is host memory there
        used = max(used, 0 if self.kept_layers(self.workload.rows) is None else self.shape.weight_bytes)
        return max(0, int(HOST_SHARE * installed) - used)
