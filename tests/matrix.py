"""The golden comparison: one generation plain and offloaded, step by step, with what the link had to carry.

Not a test module. `Observer` says what each forward of the offloaded run needed from the host, `check_cell` runs both
and checks everything that holds for any cell, `pairwise` picks the cells. The ways to generate are those of modes.py.
"""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from models import GPTJ_IS_LIKE_OTHERS, RECOMPUTABLE, TRANSFERRED, make_model
from modes import MODES, Mode, Outcome, given, outcome, plain_cache, prompt
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvoffload import EmulatedLink, HardwareProfile, OffloadConfig
from kvoffload.backend import Backend, CheckingBackend, EmulatedBackend
from kvoffload.config import GIB
from kvoffload.hf import OffloadedHFCache, SegmentAttention, given_cache, offloadable_layers
from kvoffload.machine.quantities import Curve, Point
from kvoffload.model.model_shape import model_shape
from kvoffload.model.self_attention import attention_modules
from kvoffload.planning.forms import FORMS
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.placement import PLAIN
from kvoffload.planning.rates import least_chunk_bytes
from kvoffload.planning.sizing import choose_sizes
from kvoffload.session import generation_planner
from kvoffload.session.measured_rates import MeasuredRates
from kvoffload.session.session import Session

TOLERANCE = 5e-6  # max |d logits|, float32
LINK_GB_PER_S = 2.0
FAST_LINK = EmulatedLink(h2d_gb_per_s=LINK_GB_PER_S)

ARCHITECTURES = [*RECOMPUTABLE, *TRANSFERRED]
# Attention of these runs over whole layers: it is written into their modules, or has K and V of different sizes.
WHOLE_LAYER = ("deepseek_v3", "bloom", "mpt", *(() if GPTJ_IS_LIKE_OTHERS else ("gptj",)))
SPLITS: tuple[Literal["transfer", "recompute", "auto"] | float, ...] = ("transfer", "recompute", 0.5, "auto")
DEVICES = ("min", "half", "auto")
BLOCKS: dict[str, dict[str, Any]] = {
    "auto": {},
    "4x2": {"block_tokens": 4, "chunk_blocks": 2},
    "3x1": {"block_tokens": 3, "chunk_blocks": 1},  # nothing divides the prompt
}
PIPELINES: dict[str, dict[str, Any]] = {
    "pipelined": {},
    "kvpr": {"schedule": "kvpr"},
    "whole_layer": {"attention": "whole_layer"},
    "sequential": {"overlap": False},
}


# ---- machines and plans ----------------------------------------------------------------------------------------------


def profile(h2d_gb_per_s: float = LINK_GB_PER_S) -> HardwareProfile:
    """A machine whose link is that fast and whose arithmetic takes almost no time."""
    link = Curve(unit="bytes", points=tuple(Point((size,), size / h2d_gb_per_s / 1e9, 0.0) for size in (1e3, 1e9)))
    gemm = Curve(unit="m,n,k", points=tuple(Point((m, 48.0, 48.0), m * 1e-13, 0.0) for m in (1.0, 1e3)))
    attention = Curve(unit="bytes", points=tuple(Point((size,), size * 1e-15, 0.0) for size in (1e3, 1e9)))
    return HardwareProfile(
        device_name="test",
        link_name=f"emulated {h2d_gb_per_s} GB/s",
        emulated_link=True,
        key="test",
        h2d=link,
        d2h=link,
        gemm=gemm,
        attention=attention,
        device_copy_bytes_per_s=1e12,
        device_memory_bytes=2**30,
        host_s_per_layer=0.0,
        host_s_per_chunk=0.0,
        gap_s=0.0,
    )


class FixedRates(MeasuredRates):
    """Rates that no measurement changes, so that "auto" chooses the same split on any machine.

    Link and recomputation take equally long where 0.6 of the tokens are activations.

    Args:
        kv_row_bytes: of the model; `activation_row_bytes` likewise.
    """

    def __init__(self, kv_row_bytes: int, activation_row_bytes: int) -> None:
        link_s = (0.6 * activation_row_bytes + 0.4 * kv_row_bytes) / (LINK_GB_PER_S * 1e9)
        fixed = {"recompute_s_per_row_token": link_s / 0.6, "h2d_bytes_per_s": LINK_GB_PER_S * 1e9}
        super().__init__()
        vars(self).update(fixed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self):
            super().__setattr__(name, value)


@functools.lru_cache(maxsize=8)
def model_for(architecture: str, multi_head: bool) -> PreTrainedModel:
    """The tiny model; with as many key as query heads where an activation must be smaller than K and V."""
    return make_model(architecture, **({"num_key_value_heads": 4} if multi_head else {}))


class RowBytes(NamedTuple):
    """Bytes of one token of one row of one layer."""

    kv: int
    activation: int


def row_bytes(model: PreTrainedModel) -> RowBytes:
    """As transformers' own cache holds them."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(prompt(1, 2), **given(cache))
    layer = cache.layers[offloadable_layers(model)[0]]
    kv = (layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel()) * layer.keys.element_size()
    return RowBytes(kv, model.config.get_text_config(decoder=True).hidden_size * layer.keys.element_size())


def position_bytes(model: PreTrainedModel) -> int:
    """Of the position embeddings that attention is given for a token."""
    seen: list[torch.Tensor] = []
    module = attention_modules(model)[offloadable_layers(model)[0]]

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.extend(kwargs.get("position_embeddings") or ())

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        model(prompt(1, 2))
    handle.remove()
    return sum(-(-part.shape[2] * part.element_size() // 16) * 16 for part in seen)


def half_resident_gib(
    model: PreTrainedModel, mode: Mode, config: OffloadConfig, *, can_recompute: bool = True, can_segment: bool = True
) -> float:
    """What everything we hold takes with half of the cache on the device."""
    assert isinstance(config.profile, HardwareProfile)
    bytes_of, shape = row_bytes(model), model_shape(model.config.get_text_config(decoder=True))
    max_tokens = mode.max_tokens
    geometry = Geometry(
        num_offloaded_layers=len(offloadable_layers(model)),
        rows=mode.rows,
        max_tokens=max_tokens,
        other_device_bytes=shape.other_layers_bytes(mode.rows, max_tokens),
        kv_row_bytes=bytes_of.kv,
        activation_row_bytes=bytes_of.activation,
        beams=mode.rows // mode.sequences,
        is_segmented=can_segment and config.attention == "auto" and config.schedule == "pipelined",
        least_chunk_bytes=least_chunk_bytes(config.profile, shape, recomputes=config.split != 0),
    )
    keeps = can_recompute and config.split != "transfer"

    def budget(geometry: Geometry) -> float:
        fixed, plain = (
            choose_sizes(geometry, config, forms=forms, device_bytes=None, rates=None).fixed_device_bytes
            for forms in (FORMS if keeps else {PLAIN}, {PLAIN})
        )
        # "auto" may keep activations there, where more tokens fit.
        row = min(bytes_of) if config.split == "auto" and can_recompute else bytes_of.kv
        tokens = geometry.num_offloaded_layers * mode.rows * mode.max_tokens
        found = fixed + tokens * row / 2
        sized_for = [FORMS if keeps else {PLAIN}]
        if config.split == "auto" and config.schedule == "pipelined":  # may be sized as transfer, which needs less
            found = min(found, plain + tokens * bytes_of.kv * 3 / 4)
            sized_for.append({PLAIN})
        # Where the whole cache fits beside a smaller ring, it stays: then half of it beside that.
        for forms in sized_for:
            sizes = choose_sizes(geometry, config, forms=forms, device_bytes=int(found), rates=None)
            if sizes.fixed_device_bytes + tokens * bytes_of.kv <= found:
                found = sizes.fixed_device_bytes + tokens * row / 2
        return found

    found, token_bytes = budget(geometry), position_bytes(model) if keeps else 0
    # then blocks carry them, and slots are larger
    if geometry.max_tokens * token_bytes > generation_planner.POSITION_SHARE * found:
        found = budget(replace(geometry, position_row_bytes=-(-token_bytes // mode.sequences // 16) * 16))
    return found / GIB


def config_for(cell: Cell) -> OffloadConfig:
    """The options of a cell."""
    values = {**BLOCKS[cell.blocks], **PIPELINES[cell.pipeline], "slots": 2}
    config = OffloadConfig(split=cell.split, link=FAST_LINK, profile=profile(), device_gib="min", **values)
    if cell.device == "min":
        return config
    gib: Any = "auto"
    if cell.device == "half":
        model = model_for(cell.architecture, cell.multi_head)
        can_recompute, can_segment = cell.architecture in RECOMPUTABLE, cell.architecture not in WHOLE_LAYER
        mode = MODES[cell.mode]
        gib = half_resident_gib(model, mode, config, can_recompute=can_recompute, can_segment=can_segment)
    return OffloadConfig(split=cell.split, link=FAST_LINK, profile=profile(), device_gib=gib, **values)


# ---- cells -----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One point of the matrix."""

    architecture: str
    mode: str
    split: Literal["transfer", "recompute", "auto"] | float
    device: str
    blocks: str
    pipeline: str

    @property
    def multi_head(self) -> bool:
        """Whether the model has as many key as query heads: only then can "auto" gain by recomputing."""
        return self.split == "auto"

    def __str__(self) -> str:
        return "-".join(map(str, self))


FACTORS: tuple[Sequence[Any], ...] = (ARCHITECTURES, list(MODES), SPLITS, DEVICES, list(BLOCKS), list(PIPELINES))


def pairwise(factors: Sequence[Sequence[Any]] = FACTORS, make: Callable[..., Any] = Cell) -> list[Any]:
    """One cell for each architecture and mode; the other factors so that every pair of any two values occurs.

    Greedy: each cell takes the values that cover most pairs still missing, of equals the next in rotation.
    """
    seen: set[tuple[int, Any, int, Any]] = set()
    rest = list(itertools.product(*factors[2:]))
    cells: list[Any] = []
    for idx, (first, second) in enumerate(itertools.product(factors[0], factors[1])):
        fixed = [(0, first), (1, second)]

        def pairs(choice: tuple[Any, ...], fixed: list[tuple[int, Any]] = fixed) -> set[tuple[int, Any, int, Any]]:
            values = [*fixed, *enumerate(choice, start=2)]
            return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(values, 2)}

        rotated = rest[idx * 7 % len(rest) :] + rest[: idx * 7 % len(rest)]
        best = max(rotated, key=lambda choice: len(pairs(choice) - seen))
        seen |= pairs(best)
        cells.append(make(first, second, *best))
    return cells


def full_product() -> Iterator[Cell]:
    """Every architecture, mode, split and device budget; block sizes and pipelines in rotation."""
    others = itertools.cycle(itertools.product(BLOCKS, PIPELINES))
    for values in itertools.product(*FACTORS[:4]):
        yield Cell(*values, *next(others))


# ---- the comparison --------------------------------------------------------------------------------------------------


class Observer:
    """Sees each forward of an offloaded model and adds up what its attention will need.

    Attributes:
        h2d_bytes: of the blocks on the host.
        recomputed_tokens: of the blocks stored as activations, per layer and row.
        largest_forward_bytes: the most that one forward needed.
        placements: per forward (cached tokens, blocks on the device, activation blocks on the host, K/V blocks there).
    """

    def __init__(self, model: PreTrainedModel, bytes_of: RowBytes) -> None:
        self._bytes_of = bytes_of
        self.h2d_bytes = self.recomputed_tokens = self.largest_forward_bytes = 0
        self.placements: list[tuple[int, int, int, int]] = []
        self.block_tokens = 0
        self._handle = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        cache = given_cache(args, kwargs)
        if not isinstance(cache, OffloadedHFCache) or not cache.core.layers[0].num_tokens:
            return
        self.block_tokens = bt = cache.core.placement.block_tokens
        num_bytes = 0
        for layer in cache.core.layers:
            host = [block for block in layer.blocks if not block.is_resident]
            form: Any = layer.forms.get("activation")
            carried = 0 if form is None or form.layout is None else form.layout.row_bytes - self._bytes_of.activation
            width = {"kv": self._bytes_of.kv, "activation": self._bytes_of.activation + carried}
            num_bytes += sum(bt * block.rows * width[block.form] for block in host)
            self.recomputed_tokens += sum(bt * b.rows for b in layer.blocks if b.form == "activation")
        self.h2d_bytes += num_bytes
        self.largest_forward_bytes = max(self.largest_forward_bytes, num_bytes)
        forms = [block.form for block in host]
        self.placements.append(
            (layer.num_tokens, len(layer.blocks) - len(host), forms.count("activation"), forms.count("kv"))
        )

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()


def kvoffload_threads() -> list[str]:
    """Names of our threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvoffload")]


@functools.lru_cache(maxsize=32)
def reference(architecture: str, multi_head: bool, mode: str) -> Outcome:
    """The same without offloading."""
    model = model_for(architecture, multi_head)
    return outcome(MODES[mode].run(model, lambda: plain_cache(model)))


def distance(found: Outcome, wanted: Outcome) -> float:
    """Largest difference of any logit at any step; infinite where tokens or shapes differ."""
    if len(found.logits) != len(wanted.logits) or len(found.sequences) != len(wanted.sequences):
        return float("inf")
    if not all(map(torch.equal, found.sequences, wanted.sequences)):
        return float("inf")
    error = 0.0
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        both_out = ours.isinf() & (ours == theirs)  # masked by a logits processor
        step = (ours - theirs).masked_fill(both_out, 0).abs().max().item()
        error = max(error, step if step == step else float("inf"))  # NaN: a buffer was read after its release
    return error


@contextmanager
def not_recomputable(architecture: str, split: Any) -> Iterator[None]:
    """Expects the one warning of architectures whose K/V are always transferred, and of latent attention."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [w for w in caught if "cannot be recomputed" in str(w.message)]
    others = [w for w in caught if w not in ours and not issubclass(w.category, DeprecationWarning)]
    if architecture == "deepseek_v3":  # the others that need whole layers do not come to us with their attention
        others = [w for w in others if "whole layers are put together" not in str(w.message)]
    assert not others, [str(w.message) for w in others]
    assert bool(ours) == (architecture in TRANSFERRED and split != "transfer")


@contextmanager
def leaves_no_trace(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards the model has the hooks it had and its own methods, and no thread and no attention of ours is left."""

    def hooks() -> dict[int, int]:
        return {id(m): len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()}

    hooks_before, own_before = hooks(), set(vars(model))
    yield
    assert hooks() == hooks_before, "hooks are left on the model"
    assert set(vars(model)) - own_before <= {"_end_tokens"}, "the model has attributes it had not"
    assert not kvoffload_threads(), "threads are left"
    left = [name for name, function in ALL_ATTENTION_FUNCTIONS.items() if isinstance(function, SegmentAttention)]
    assert not left, f"attention functions are left: {left}"


def checking_backend(link: EmulatedLink = FAST_LINK) -> CheckingBackend:
    """An emulated link, each access to its buffers checked."""
    return CheckingBackend(EmulatedBackend(link))


class Run(NamedTuple):
    """An offloaded generation and what was seen of it."""

    outcome: Outcome
    observer: Observer
    h2d_bytes: int
    recomputed_tokens: int
    plans: list[Any]
    used_bytes: int  # of the pool, while the outputs were alive


@contextmanager
def noted_statistics(model: PreTrainedModel, session: Session) -> Iterator[list[Any]]:
    """The statistics of every `generate()` within, as they come."""
    found: list[Any] = []
    original = vars(model)["generate"]

    def generate(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        found.append(session.stats)
        return output

    vars(model)["generate"] = generate
    try:
        yield found
    finally:
        vars(model)["generate"] = original


def run_offloaded(
    model: PreTrainedModel,
    mode: Mode,
    config: OffloadConfig,
    backend: Backend | None = None,
    *,
    fixed_rates: bool = True,
) -> Run:
    """Generate with a session of its own; afterwards nothing of it may be left."""
    bytes_of = row_bytes(model)
    with leaves_no_trace(model):
        session = Session(model, config, backend=backend)
        if fixed_rates:
            session.planner.measured = FixedRates(*bytes_of)
        observer = Observer(model, bytes_of)
        try:
            with session, noted_statistics(model, session) as stats:
                outputs = mode.run(model, session.new_cache)
                used_bytes = session.pool.used_bytes
                result = outcome(outputs)
                del outputs
        finally:
            observer.remove()
            session.close()
    assert session.pool.used_bytes == session.pool.slab_bytes == 0
    return Run(
        result,
        observer,
        sum(s.h2d_bytes for s in stats),
        sum(s.recomputed_tokens for s in stats),
        [s.plan for s in stats],
        used_bytes,
    )


def check_cell(cell: Cell, backend: Backend | None = None) -> Run:
    """Run a cell and check logits, tokens, bytes, recomputation and placement."""
    model, mode = model_for(cell.architecture, cell.multi_head), MODES[cell.mode]
    wanted = reference(cell.architecture, cell.multi_head, cell.mode)
    bytes_of = row_bytes(model)
    with not_recomputable(cell.architecture, cell.split):
        run = run_offloaded(model, mode, config_for(cell), backend or checking_backend())
    error = distance(run.outcome, wanted)
    assert error <= TOLERANCE, f"logits differ by {error:.3g}"

    seen = run.observer
    # Bytes: every forward needs every block of the host once. A generation that ends early, and a crop that changes a
    # prefetched layer, may have brought something nobody used: at most two layers' worth each time.
    assert seen.h2d_bytes > 0, "nothing was on the host"
    spare = 2 * seen.largest_forward_bytes if mode.ends_early else 0
    assert seen.h2d_bytes <= run.h2d_bytes <= 1.1 * seen.h2d_bytes + spare
    assert seen.recomputed_tokens <= run.recomputed_tokens <= 1.1 * seen.recomputed_tokens + 1
    can_recompute = cell.architecture in RECOMPUTABLE
    gains = bytes_of.activation < bytes_of.kv
    if cell.device == "half":  # memory for recomputing may cost more resident blocks than it gains
        gains &= any(plan.activation_blocks + plan.resident_activation_blocks for plan in run.plans)
    wants = cell.split in ("recompute", 0.5) or (cell.split == "auto" and gains)
    if cell.device == "half" and cell.split == 0.5:  # of a single block on the host there is no half
        wants = any(activations + kv > 1 for _, _, activations, kv in seen.placements)
    assert (run.recomputed_tokens > 0) == (can_recompute and wants)

    # Placement: where the tokens of each forward were, as the plan and the split say.
    share = {"transfer": 0.0, "recompute": 1.0, "auto": None}.get(cell.split, 0.5) if can_recompute else 0.0
    for tokens, resident, activations, kv in seen.placements:
        assert resident + activations + kv == tokens // seen.block_tokens
        if share is not None:
            assert abs(activations - share * (activations + kv)) <= 1
    if cell.split in ("auto", 0.5) and cell.device != "half" and wants and can_recompute:
        assert any(activations and kv for _, _, activations, kv in seen.placements), "the split is not inside"
    resident = max(placement[1] for placement in seen.placements)
    assert (resident > 0) == (cell.device == "half")
    return run
