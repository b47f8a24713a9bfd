"""How long every operation of a model takes on a device, what bounds it, and what would move that bound.

Owns the phases of a generation and their totals. Does not own the counting (`operations`), the time of one operation
(`timing`) or the machine (`machine`). Torch-free.

    prefill  of the prompt
    decode   of one token at the prompt's context
    task     the prefill, then a decode step for every token but the first, at its own context

A step takes the longer of all its device times and all its link times: an offloading pipeline overlaps the two. Where
the machine was not measured, every time is a lower bound.

Source: the roofline model (Williams et al. 2009); per operation for language models as in LLM-Viewer (2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from kvoffload.advise.timing import Bound, Remedy, RooflineSetting, TimedOperation, Timer, remedies_of, work_of
from kvoffload.errors import UnsupportedModelError
from kvoffload.machine.machine import Machine
from kvoffload.model.facts import Facts
from kvoffload.model.operations import Precision, attending, forward

CONTEXT_POINTS = 4  # at which the steps of a task are evaluated: the time is nearly linear in the context
_SUMMED = (
    *("flops", "memory_bytes", "link_bytes", "host_bytes", "weight_bytes", "kv_bytes"),
    *("seconds", "link_s", "low_s", "high_s"),
)


class OperationTime(NamedTuple):
    """One operation of all its layers in one phase."""

    name: str
    flops: float
    memory_bytes: float  # of the device
    link_bytes: float
    host_bytes: float
    weight_bytes: float
    kv_bytes: float  # read
    seconds: float  # on the device
    link_s: float
    bound: Bound
    remedies: tuple[Remedy, ...]  # best first
    low_s: float  # the interval of a fit, else equal to seconds
    high_s: float

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte of device memory."""
        return self.flops / self.memory_bytes if self.memory_bytes else 0.0


class Phase(NamedTuple):
    """All operations of one phase."""

    name: str
    rows: tuple[OperationTime, ...]
    seconds: float  # the longer of device and link, step by step
    low_s: float
    high_s: float

    def total(self, field: str) -> float:
        """Sum of one field over all operations."""
        return float(sum(getattr(row, field) for row in self.rows))

    @property
    def bound(self) -> Bound:
        """What most of the time goes into."""
        if self.total("link_s") > self.total("seconds"):
            return "link"
        spent: dict[Bound, float] = {}
        for row in self.rows:
            spent[row.bound] = spent.get(row.bound, 0.0) + row.seconds
        return max(spent, key=lambda bound: spent[bound])

    def to_json(self) -> dict[str, Any]:
        """Totals under the names that LLM-Viewer uses, ours beside them, and every operation."""
        return {
            "OPs": self.total("flops"),
            "memory_access": self.total("memory_bytes"),
            "load_weight": self.total("weight_bytes"),
            "load_kv_cache": self.total("kv_bytes"),
            "inference_time": self.seconds,
            "inference_time_low": self.low_s,
            "inference_time_high": self.high_s,
            "device_time": self.total("seconds"),
            "link_time": self.total("link_s"),
            "link_bytes": self.total("link_bytes"),
            "host_memory_bytes": self.total("host_bytes"),
            "bound": self.bound,
            "operations": [_row_json(row, self) for row in self.rows],
        }


class Roofline(NamedTuple):
    """What `evaluate` found."""

    dims: Facts
    machine: Machine
    setting: RooflineSetting
    prefill: Phase
    decode: Phase
    task: Phase
    weight_bytes: int
    kv_bytes: int  # at the end of the task

    @property
    def phases(self) -> tuple[Phase, Phase, Phase]:
        """In the order they happen."""
        return self.prefill, self.decode, self.task

    @property
    def device_bytes(self) -> float:
        """What must lie in device memory: weights and cache, without working buffers."""
        setting = self.setting
        return self.weight_bytes * (1 - setting.weights_on_host) + self.kv_bytes * (1 - setting.kv_on_host)

    @property
    def fits(self) -> bool:
        """Whether the device's memory holds it."""
        return self.device_bytes <= self.machine.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        setting, precision, machine = self.setting, self.setting.precision, self.machine
        return {
            "model_type": self.dims.model_type,
            "parameters": self.dims.num_weights,
            "parameters_are_exact": self.dims.is_exact,
            "is_exact": self.dims.is_exact,
            "doubt": self.dims.doubt,
            "hardware": machine.device_name,
            "link": machine.link_name,
            "mode": "fitted" if machine.fits else "datasheet",
            "provenance": machine.provenance,
            "batch": setting.batch,
            "seq": setting.seq,
            "new_tokens": setting.new_tokens,
            "w_bits": self.dims.linear_bits if precision.weight_bits is None else precision.weight_bits,
            "quantization": None if self.dims.quantized is None else self.dims.quantized.method,
            "a_bits": precision.activation_bits,
            "kv_bits": precision.kv_bits,
            "attention": setting.convention,
            "kv_on_host": setting.kv_on_host,
            "weights_on_host": setting.weights_on_host,
            "memory_consumption_weight": self.weight_bytes,
            "memory_consumption_kv_cache": self.kv_bytes,
            "device_memory_bytes": machine.memory_bytes,
            "fits": self.fits,
            **{phase.name: phase.to_json() for phase in self.phases},
        }


def setting_of(
    dims: Facts, *, bits: tuple[float | None, float | None, float | None], convention: Any, **others: Any
) -> RooflineSetting:
    """A setting whose precision is the model's own where `bits` (weights, activations, K and V) are None.

    Raises:
        ConfigError: a number or the convention makes no sense; names it.
    """
    own_bits = 8 * dims.itemsize_bytes
    weight, activation, kv = (own_bits if one is None else one for one in bits)
    as_stored = bits[0] is None and dims.quantized is not None
    precision = Precision(weight_bits=None if as_stored else weight, activation_bits=activation, kv_bits=kv)
    return RooflineSetting(precision=precision, convention=convention, **others)


def evaluate(dims: Facts, machine: Machine, setting: RooflineSetting) -> Roofline:
    """Times and bounds of every operation in every phase.

    Args:
        dims: the model.
        machine: the device; with fits the times are predictions, without they are lower bounds.
        setting: batch, lengths, precision and what lives on the host.

    Raises:
        UnsupportedModelError: some layers compute something else than attention over cached keys and values.
    """
    if dims.unknown_layers or not dims.num_attention_layers:
        raise UnsupportedModelError(
            f"{dims.unknown_layers or dims.num_layers} of {dims.num_layers} layers of {dims.model_type} keep a state "
            "(linear attention or the like), and what they compute is not known here"
        )
    timer = Timer(machine, setting, reads_cache=True)
    prefill = _phase("prefill", Timer(machine, setting, reads_cache=False), dims, setting.seq, setting.seq)
    decode = _phase("decode", timer, dims, 1, setting.seq)
    task = _task(timer, dims, prefill, decode)
    return Roofline(
        dims, machine, setting, prefill, decode, task, weight_bytes(dims, setting.precision), kv_bytes(dims, setting)
    )


def prefill_s(dims: Facts, machine: Machine, *, batch: int, tokens: int) -> float:
    """Seconds of a prefill alone, as `evaluate` has them; 0 where what some layers compute is not known."""
    if dims.unknown_layers or not dims.num_attention_layers:
        return 0.0
    setting = setting_of(dims, bits=(None, None, None), convention="fused", batch=batch, seq=tokens)
    timer = Timer(machine, setting, reads_cache=False)
    operations = forward(dims, setting.precision, batch=batch, queries=tokens, context=tokens)
    return sum(timer.time(one).seconds * one.layers for one in operations)


def weight_bytes(dims: Facts, precision: Precision) -> int:
    """Bytes of all weights: matrices at their precision, embedding, norms and biases in the model's own dtype."""
    if precision.weight_bits is None:
        return dims.weight_bytes
    matrices = sum(one.num_values for one in dims.matrices if not (dims.is_tied and one.part == "head"))
    others = dims.num_weights - matrices
    return round(matrices * precision.weight_bits / 8) + others * dims.itemsize_bytes


def kv_bytes(dims: Facts, setting: RooflineSetting) -> int:
    """Bytes of the whole cache at the end of the task."""
    tokens = setting.seq + setting.new_tokens - 1
    return round(setting.batch * dims.cached_values(tokens) * setting.precision.kv_bits / 8)


def _phase(name: str, timer: Timer, dims: Facts, queries: int, context: int) -> Phase:
    """One forward."""
    setting = timer.setting
    operations, doubled = (
        forward(
            dims,
            setting.precision,
            batch=batch,
            queries=queries,
            context=context,
            convention=setting.convention,
        )
        for batch in (setting.batch, 2 * setting.batch)
    )
    timed = [timer.time(one) for one in operations]
    device_s = sum(one.seconds * one.operation.layers for one in timed)
    link_s = sum(one.link_s * one.operation.layers for one in timed)
    rows = tuple(
        _row(timer, one, remedies_of(timer, one, twice, device_s, link_s))
        for one, twice in zip(timed, doubled, strict=True)
    )
    _, low_s, high_s, _ = _sums(rows)
    return Phase(name, rows, max(device_s, link_s), max(low_s, link_s), max(high_s, link_s))


def _task(timer: Timer, dims: Facts, prefill: Phase, decode: Phase) -> Phase:
    """The prefill and a step for every token but the first, whose context grows from step to step."""
    setting, steps = timer.setting, timer.setting.new_tokens - 1
    if not steps:
        return prefill._replace(name="task")
    grown: dict[str, list[OperationTime]] = {}
    fixed: tuple[float, ...] = ()
    mean_s = [0.0, 0.0, 0.0]
    points = min(CONTEXT_POINTS, steps)
    for point in range(points):  # the middle of each of as many equal stretches
        context = setting.seq + 1 + round((point + 0.5) * steps / points - 0.5)
        rows = [
            _row(timer, timer.time(one), ())
            for one in attending(
                dims, setting.precision, batch=setting.batch, queries=1, context=context, convention=setting.convention
            )
        ]
        for row in rows:
            grown.setdefault(row.name, []).append(row)
        fixed = fixed or _sums(row for row in decode.rows if row.name not in grown)
        seconds, low_s, high_s, link_s = (one + other for one, other in zip(fixed, _sums(rows), strict=True))
        for idx, value in enumerate((seconds, low_s, high_s)):
            mean_s[idx] += max(value, link_s) / points
    seconds, low_s, high_s = (first + steps * mean for first, mean in zip(prefill[2:], mean_s, strict=True))
    summed = []
    for first, step in zip(prefill.rows, decode.rows, strict=True):
        stretches = grown.get(step.name, [step])
        share = steps / len(stretches)
        numbers = {
            name: getattr(first, name) + share * sum(getattr(row, name) for row in stretches) for name in _SUMMED
        }
        decisive = first if max(first.seconds, first.link_s) > steps * max(step.seconds, step.link_s) else step
        phase_s = prefill.seconds if decisive is first else steps * decode.seconds
        moved = tuple(
            one._replace(phase_gain=seconds / max(1e-30, seconds - phase_s * (1 - 1 / one.phase_gain)))
            for one in decisive.remedies
        )
        summed.append(OperationTime(name=step.name, bound=decisive.bound, remedies=moved, **numbers))
    return Phase("task", tuple(summed), seconds, low_s, high_s)


def _sums(rows: Iterable[OperationTime]) -> tuple[float, ...]:
    """Seconds, the limits of their interval, and seconds of the link."""
    return tuple(map(sum, zip(*((row.seconds, row.low_s, row.high_s, row.link_s) for row in rows), strict=True)))


def _row(timer: Timer, timed: TimedOperation, remedies: tuple[Remedy, ...]) -> OperationTime:
    one, layers, seconds = timed.operation, timed.operation.layers, timed.seconds
    low_s = high_s = seconds
    fitted = timer.fit(one)
    if fitted is not None:
        _, low_s, high_s = fitted.predict(work_of(one))
    crossing = layers * timed.link_bytes
    return OperationTime(
        one.name,
        layers * one.flops,
        layers * one.memory_bytes,
        crossing,
        crossing,  # read from host memory, or written to it
        layers * one.weight_bytes,
        layers * one.kv_read_bytes,
        layers * seconds,
        layers * timed.link_s,
        timed.bound,
        remedies,
        layers * low_s,
        layers * high_s,
    )


def _row_json(row: OperationTime, phase: Phase) -> dict[str, Any]:
    data = row._asdict()
    data["intensity"] = row.intensity
    data["share"] = max(row.seconds, row.link_s) / phase.seconds
    data["remedies"] = [remedy._asdict() for remedy in row.remedies]
    data["remedy"] = remedy_text(row)
    return data


def remedy_text(row: OperationTime) -> str:
    """The best remedy of a row, for a table."""
    if not row.remedies:
        return ""
    best = row.remedies[0]
    return f"{best.change}: {best.gain:.2f}x, phase {best.phase_gain:.2f}x"
