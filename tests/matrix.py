"""The golden comparison: one generation plain and offloaded, step by step, with what the link had to carry.

Not a test module. `MODES` are the ways to generate, `Observer` says what each forward of the offloaded run needed from
the host, `compare` runs both and checks everything that holds for any cell, `pairwise` picks the cells.
"""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from models import RECOMPUTABLE, TRANSFERRED, make_model
from transformers import DynamicCache, PreTrainedModel

from kvoffload import EmulatedLink, HardwareProfile, OffloadConfig, cost
from kvoffload.backend import Backend, CheckingBackend, EmulatedBackend
from kvoffload.config import GIB
from kvoffload.decide import MeasuredRates
from kvoffload.hf import OffloadedHFCache, offloadable_layers
from kvoffload.model_shape import shape_from_config
from kvoffload.session import Session
from kvoffload.sizing import Geometry, choose_sizes
from kvoffload.types import Curve, Point

TOLERANCE = 5e-6  # max |d logits|, float32
PROMPT_TOKENS, NEW_TOKENS = 37, 12
LINK_GB_PER_S = 2.0
FAST_LINK = EmulatedLink(h2d_gb_per_s=LINK_GB_PER_S)

ARCHITECTURES = [*RECOMPUTABLE, *TRANSFERRED]
# Attention of these runs over whole layers: it is written into their modules, or has K and V of different sizes.
WHOLE_LAYER = ("deepseek_v3", "gptj", "bloom", "mpt")
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


class Outcome(NamedTuple):
    """What a generation gave: per turn the tokens, and the logits of all its steps."""

    sequences: list[torch.Tensor]
    logits: list[torch.Tensor]


Generate = Callable[[PreTrainedModel, Callable[[], Any] | None], list[Any]]


class Mode(NamedTuple):
    """A way to generate.

    Attributes:
        run: calls `model.generate` once or more; takes the model and a factory of empty caches.
        rows: sequences decoded at once, beams included.
        sequences: rows whose prompts differ.
        max_tokens: cached at the end, at most.
        planned_tokens: what buffers are made for; more than that for caches that may grow over several turns.
        ends_early: the last prefetched layers may never be used.
    """

    run: Generate
    rows: int
    sequences: int
    max_tokens: int = PROMPT_TOKENS + NEW_TOKENS - 1
    ends_early: bool = False
    planned_tokens: int = 0


def prompt(rows: int, tokens: int = PROMPT_TOKENS, seed: int = 1) -> torch.Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded_prompt(rows: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left; the first row has no padding."""
    tokens = prompt(rows)
    mask = torch.ones_like(tokens)
    for row in range(1, rows):
        tokens[row, : 5 * row + 3] = 0
        mask[row, : 5 * row + 3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


COMMON: dict[str, Any] = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "pad_token_id": 0,
}


def _once(rows: int, **kwargs: Any) -> Generate:
    inputs = kwargs.pop("inputs", None) or {"input_ids": prompt(rows)}

    def run(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
        torch.manual_seed(7)
        return [model.generate(**inputs, **{**COMMON, **kwargs})]

    return run


def _assisted(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
    return [model.generate(prompt(1), assistant_model=assistant_of(model), **COMMON)]


def assistant_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model that mostly agrees: half of its drafts are taken, so that every step crops another number of tokens."""
    values = {name: getattr(model.config, name, None) for name in ("num_key_value_heads",)}
    assistant = make_model(model.config.model_type, **{k: v for k, v in values.items() if v is not None})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1 * parameter.std().nan_to_num())
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def _prompt_lookup(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
    tokens = prompt(1, 12).repeat(1, 3)  # so that there is something to find
    return [model.generate(tokens, prompt_lookup_num_tokens=4, **COMMON)]


def _multi_turn(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
    assert new_cache is not None
    cache, tokens, outputs = new_cache(), prompt(2), []
    for turn in range(3):
        outputs.append(model.generate(tokens, past_key_values=cache, **{**COMMON, "max_new_tokens": 5}))
        tokens = torch.cat([outputs[-1].sequences, prompt(2, 6, seed=turn + 2)], dim=1)
    return outputs


def _returned_cache(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
    first = model.generate(**padded_prompt(2), **{**COMMON, "max_new_tokens": 5})
    tokens = torch.cat([first.sequences, prompt(2, 6, seed=2)], dim=1)
    mask = torch.cat([padded_prompt(2)["attention_mask"], torch.ones(2, 11, dtype=torch.long)], dim=1)
    second = model.generate(
        tokens, attention_mask=mask, past_key_values=first.past_key_values, **{**COMMON, "max_new_tokens": 5}
    )
    return [first, second]


def _early_ends(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
    """Rows that meet their end token at different steps, the last one before `max_new_tokens`."""
    eos = end_tokens(model)
    torch.manual_seed(7)
    return [model.generate(prompt(3), **{**COMMON, "do_sample": True, "eos_token_id": eos})]


def end_tokens(model: PreTrainedModel) -> list[int]:
    """One token of each row of the sampled continuation, from different steps; read without any offloading."""
    known = getattr(model, "_end_tokens", None)
    if known is None:
        torch.manual_seed(7)
        new = model.generate(prompt(3), **{**COMMON, "do_sample": True}).sequences[:, PROMPT_TOKENS:]
        known = [int(new[0, 2]), int(new[1, 5]), int(new[2, 8])]
        object.__setattr__(model, "_end_tokens", known)
    return known


MODES: dict[str, Mode] = {
    "greedy": Mode(_once(2), 2, 2),
    "sampling": Mode(_once(2, do_sample=True, temperature=1.3, top_k=20), 2, 2),
    "beams": Mode(_once(2, num_beams=3), 6, 2),
    "padded_beams": Mode(_once(2, inputs=padded_prompt(2), num_beams=3), 6, 2),
    "left_padding": Mode(_once(3, inputs=padded_prompt(3)), 3, 3),
    "assisted": Mode(_assisted, 1, 1, ends_early=True),
    "prompt_lookup": Mode(_prompt_lookup, 1, 1, 36 + NEW_TOKENS - 1, ends_early=True),
    "chunked_prefill": Mode(_once(2, prefill_chunk_size=10), 2, 2),
    "multi_turn": Mode(_multi_turn, 2, 2, PROMPT_TOKENS + 26, planned_tokens=256),
    "returned_cache": Mode(_returned_cache, 2, 2, PROMPT_TOKENS + 4),
    "early_ends": Mode(_early_ends, 3, 3, ends_early=True),
    "return_sequences": Mode(_once(2, do_sample=True, num_return_sequences=3), 6, 2),
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
        model(prompt(1, 2), past_key_values=cache)
    layer = cache.layers[offloadable_layers(model)[0]]
    kv = (layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel()) * layer.keys.element_size()
    return RowBytes(kv, model.config.get_text_config(decoder=True).hidden_size * layer.keys.element_size())


def half_resident_gib(
    model: PreTrainedModel, mode: Mode, config: OffloadConfig, *, can_recompute: bool = True, can_segment: bool = True
) -> float:
    """What everything we hold takes with half of the cache on the device."""
    bytes_of = row_bytes(model)
    geometry = Geometry(
        num_offloaded_layers=len(offloadable_layers(model)),
        rows=mode.rows,
        max_tokens=max(mode.max_tokens, mode.planned_tokens),
        kv_row_bytes=bytes_of.kv,
        activation_row_bytes=bytes_of.activation,
        beams=mode.rows // mode.sequences,
        is_segmented=can_segment and config.attention == "auto" and config.schedule == "pipelined",
        least_chunk_bytes=cost.least_chunk_bytes(
            profile(), shape_from_config(model.config.get_text_config(decoder=True)), recomputes=config.split != 0
        ),
    )
    fixed = choose_sizes(
        geometry, config, keeps_activations=can_recompute and config.split != "transfer", device_bytes=None, rates=None
    ).fixed_device_bytes
    # "auto" may keep activations there, where more tokens fit.
    row = min(bytes_of) if config.split == "auto" and can_recompute else bytes_of.kv
    cached = geometry.num_offloaded_layers * mode.rows * row * mode.max_tokens
    return (fixed + cached / 2) / GIB


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


def pairwise(factors: Sequence[Sequence[Any]] = FACTORS) -> list[Cell]:
    """One cell for each architecture and mode; the other factors so that every pair of any two values occurs.

    Greedy: each cell takes the values that cover most pairs still missing, of equals the next in rotation.
    """
    seen: set[tuple[int, Any, int, Any]] = set()
    rest = list(itertools.product(*factors[2:]))
    cells = []
    for idx, (first, second) in enumerate(itertools.product(factors[0], factors[1])):
        fixed = [(0, first), (1, second)]

        def pairs(choice: tuple[Any, ...], fixed: list[tuple[int, Any]] = fixed) -> set[tuple[int, Any, int, Any]]:
            values = [*fixed, *enumerate(choice, start=2)]
            return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(values, 2)}

        rotated = rest[idx * 7 % len(rest) :] + rest[: idx * 7 % len(rest)]
        best = max(rotated, key=lambda choice: len(pairs(choice) - seen))
        seen |= pairs(best)
        cells.append(Cell(first, second, *best))
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
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, OffloadedHFCache) or not cache.core.layers[0].num_tokens:
            return
        self.block_tokens = bt = cache.core.placement.block_tokens
        num_bytes = 0
        for layer in cache.core.layers:
            host = [block for block in layer.blocks if block.resident is None]
            width = {"kv": self._bytes_of.kv, "activation": self._bytes_of.activation}
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


def plain_cache(model: PreTrainedModel) -> DynamicCache:
    """What the model caches in without us."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def emptied(cache: Any) -> Any:
    """The cache without its tokens. Transformers' own one is replaced: up to 5.17 `reset` kept its length."""
    if isinstance(cache, OffloadedHFCache):
        cache.reset()
        return cache
    return DynamicCache()


def outcome(outputs: list[Any]) -> Outcome:
    """Tokens and logits of all turns."""
    return Outcome([out.sequences for out in outputs], [step for out in outputs for step in out.logits])


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
    hooks_before = {id(m): len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()}
    session = Session(model, config, backend=backend)
    if fixed_rates:
        session.decider.measured = FixedRates(*bytes_of)
    observer = Observer(model, bytes_of)
    stats: list[Any] = []
    original = vars(model)["generate"]

    def generate(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        stats.append(session.stats)
        return output

    vars(model)["generate"] = generate
    try:
        with session:
            outputs = mode.run(model, session.new_cache)
            used_bytes = session.pool.used_bytes
            result = outcome(outputs)
            del outputs
            vars(model)["generate"] = original
    finally:
        observer.remove()
        session.close()
    assert session.pool.used_bytes == session.pool.slab_bytes == 0
    assert not {"generate", "_prepare_cache_for_generation", "_kvoffload_session"} & set(vars(model))
    assert {id(m): len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()} == hooks_before
    assert not kvoffload_threads()
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
    wants = cell.split in ("recompute", 0.5) or (cell.split == "auto" and gains)
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
