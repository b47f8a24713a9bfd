"""Every wait of the transfers is there for a reason: without it, a scenario finds a race or wrong logits.

The sources of both ways over the link are parsed, and each single wait is deleted in turn: every `compute_waits(...)`
statement (or call of a method that does nothing else), and every event that a copy is told to start after. The engine
made of the mutated source then runs scenarios under `CheckingBackend`, whose verdict depends on the order of events
alone, not on timing.
"""

from __future__ import annotations

import ast
import copy
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from matrix import FAST_LINK, TOLERANCE, profile
from models import make_model
from modes import COMMON, MODES, emptied, given, outcome, plain_cache, prompt
from streaming import kept_gib, streamable
from test_layering import ALLOWED
from transformers import PreTrainedModel

import kvoffload.session.offloaded_model
from kvoffload import OffloadConfig
from kvoffload.backend import CheckingBackend, EmulatedBackend, RaceError
from kvoffload.backend.checking import CheckedEvent
from kvoffload.config import GIB
from kvoffload.pipeline import buffers, engine, weights, write_back
from kvoffload.session.session import Session
from kvoffload.store.carried import PositionLayout

# by module, in the order of their imports
SOURCES = {
    module.__name__: Path(module.__file__ or "").read_text() for module in (write_back, buffers, weights, engine)
}


# ---- mutants ---------------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """The sources without one wait."""

    name: str  # function and what was deleted
    sources: dict[str, ast.Module]


def _deletions(function: ast.FunctionDef) -> Iterator[tuple[str, Callable[[ast.FunctionDef], None]]]:
    """Each way to delete one wait from a copy of `function`, found again by its place in `ast.walk`."""
    for place, node in enumerate(ast.walk(function)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if called.endswith(("compute_waits", "take_over")) or called == "after.append":

                def skip(tree: ast.FunctionDef, place: int = place) -> None:
                    statement = list(ast.walk(tree))[place]
                    assert isinstance(statement, ast.Expr)
                    statement.value = ast.Constant(None)

                yield ast.unparse(node.value), skip
        if isinstance(node, ast.List) and _is_after(node, function):
            for idx, element in enumerate(node.elts):

                def remove(tree: ast.FunctionDef, place: int = place, idx: int = idx) -> None:
                    events = list(ast.walk(tree))[place]
                    assert isinstance(events, ast.List)
                    del events.elts[idx]

                yield f"{ast.unparse(element)} of {ast.unparse(node)}", remove


def _is_after(events: ast.List, function: ast.FunctionDef) -> bool:
    """Whether the list is what a copy waits for: its third argument, or assigned to `after`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("copy_to_device", "copy_to_host")):
            third = node.args[2]
            assert isinstance(third, ast.List) or ast.unparse(third) == "after", ast.unparse(node)
            if third is events:
                return True
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "after" and events in ast.walk(node):
            return True
    return False


def _mutants() -> list[Mutant]:
    trees = {module: ast.parse(source) for module, source in SOURCES.items()}
    found = []
    for module, tree in trees.items():
        for place, function in enumerate(ast.walk(tree)):
            if not isinstance(function, ast.FunctionDef):
                continue
            for name, delete in _deletions(function):
                mutated = copy.deepcopy(tree)
                target = list(ast.walk(mutated))[place]
                assert isinstance(target, ast.FunctionDef)
                delete(target)
                found.append(Mutant(f"{function.name}: {name}", {**trees, module: mutated}))
    return found


MUTANTS = _mutants()


def put_engine(monkeypatch: pytest.MonkeyPatch, sources: dict[str, ast.Module]) -> None:
    """Give sessions the engine of these source trees, each executed in a module of its own."""
    with monkeypatch.context() as patch:
        for name, tree in sources.items():
            module = types.ModuleType(name)
            patch.setitem(sys.modules, name, module)  # where the imports of the next one find it
            exec(compile(ast.fix_missing_locations(tree), f"mutated {name}", "exec"), vars(module))
    monkeypatch.setattr(kvoffload.session.offloaded_model, "TransferEngine", module.TransferEngine)


# ---- scenarios -------------------------------------------------------------------------------------------------------


def checking() -> CheckingBackend:
    return CheckingBackend(EmulatedBackend(FAST_LINK))


def config(split: Any, **kwargs: Any) -> OffloadConfig:
    values = {"link": FAST_LINK, "profile": profile(), "device_gib": "min", "block_tokens": 4, "chunk_blocks": 1}
    return OffloadConfig(split=split, **{**values, "slots": 2, **kwargs})


class Scenario:
    """Runs something plain and offloaded and compares the logits.

    Args:
        play: takes the model and a factory of caches, returns all logits.
        options: of the plan.
        backend: makes the backend.
        model: another one than that of all.
    """

    def __init__(
        self,
        play: Callable[[PreTrainedModel, Callable[[], Any] | None], list[torch.Tensor]],
        *options: OffloadConfig,
        backend: Callable[[], CheckingBackend] = checking,
        model: PreTrainedModel | None = None,
    ) -> None:
        self._model = model
        self._play, self._options, self._backend = play, options, backend
        self._wanted: list[torch.Tensor] | None = None

    def run(self, model: PreTrainedModel) -> None:
        """Raises whatever goes wrong."""
        model = self._model or model
        if self._wanted is None:
            with torch.no_grad():
                self._wanted = self._play(model, lambda: plain_cache(model))
        for options in self._options:
            with Session(model, options, self._backend()) as session, torch.no_grad():
                found = self._play(model, session.new_cache)
                assert session.backend.link_use("h2d").copied_bytes > 0
            for ours, theirs in zip(found, self._wanted, strict=True):
                error = (ours - theirs).abs().max().item()
                assert error <= TOLERANCE, f"logits differ by {error:.3g}"


def generations(*modes: str) -> Callable[..., list[torch.Tensor]]:
    """Several generations in one session: each begins with the memory of the one before."""

    def play(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[torch.Tensor]:
        return [step for mode in modes for step in outcome(MODES[mode].run(model, new_cache)).logits]

    return play


def growing(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[torch.Tensor]:
    """Ever longer prompts: all buffers are made anew each time, while the last ones may be in use."""
    logits: list[torch.Tensor] = []
    for tokens in (20, 37, 61):
        for new in (1, 3):
            out = model.generate(prompt(2, tokens), **{**COMMON, "max_new_tokens": new})
            logits += out.logits
    return logits


def cropping(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[torch.Tensor]:
    """Crops right behind a write-back, into every layer's newest block and deeper, and writes over what was there."""
    assert new_cache is not None
    logits = []
    for first, removed in ((37, 2), (37, 6), (38, 19), (36, 1), (30, 30)):
        cache = new_cache()
        tokens = prompt(2, first)
        model(tokens, **given(cache))
        cache.crop(-removed)
        # With nothing left, new blocks are written before anything is asked for that would drop what was prefetched.
        for step, more in enumerate((1, 9, 1, 1) if removed < first else (23, 1, 1, 1)):
            logits.append(model(prompt(2, more, seed=step), **given(cache)).logits[:, -1])
            if step == 2:
                cache.crop(-7)
    return logits


def two_caches(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[torch.Tensor]:
    """In turns: what was prefetched for one is dropped for the other, and its buffers are used at once."""
    assert new_cache is not None
    caches = [new_cache(), new_cache()]
    logits = []
    for step in range(6):
        for idx, cache in enumerate(caches):
            tokens = prompt(2, 33 + 7 * idx if step == 0 else 1, seed=10 * step + idx)
            logits.append(model(tokens, **given(cache)).logits[:, -1])
    return logits


def one_then_another(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[torch.Tensor]:
    """A cache is freed while its last copies are under way, and the next one is written to the same memory."""
    assert new_cache is not None
    logits = []
    for seed in range(3):
        cache = new_cache()
        for step, tokens in enumerate((37, 1, 1)):
            logits.append(model(prompt(2, tokens, seed=seed), **given(cache)).logits[:, -1])
            if step == 1 and seed == 1:
                cache = emptied(cache)
                logits.append(model(prompt(2, 40, seed=9), **given(cache)).logits[:, -1])
        del cache
    return logits


class Sequential(CheckingBackend):
    """Without overlap no copy to the device may start before all compute issued so far has ended."""

    def copy_to_device(
        self, dst: torch.Tensor, src: torch.Tensor, after: Sequence[Any], *, lane: Any = "h2d"
    ) -> CheckedEvent:
        known = max((event.clock["compute"] for event in after), default=0)
        assert known == self._clocks["compute"]["compute"], "a copy overlaps compute"
        return super().copy_to_device(dst, src, after, lane=lane)


def sequential() -> CheckingBackend:
    return Sequential(EmulatedBackend(FAST_LINK))


RESIDENT_GIB = 150_000 / GIB  # about half of what these scenarios cache
SPLITS = ("transfer", "recompute", 0.5)
WHOLE_LAYER = [config(split, attention="whole_layer") for split in SPLITS]
SEGMENTED = [config(split) for split in SPLITS]
BY_FORM = [*WHOLE_LAYER, *SEGMENTED]
LARGE = streamable("llama", num_layers=4, num_key_value_heads=4)
STREAMED = [
    config(split, device_weights_gib=kept_gib(LARGE, stay), overlap=overlap)
    for split, stay, overlap in (("transfer", 0, True), (0.5, 1, True), ("recompute", 0, True), (0.5, 0, False))
]
SCENARIOS = {
    "greedy": Scenario(generations("greedy"), *BY_FORM, config(0.5, chunk_blocks=2, slots=1)),
    "beams": Scenario(generations("padded_beams"), *BY_FORM),
    "kvpr": Scenario(generations("greedy"), config(0.5, schedule="kvpr"), config("recompute", schedule="kvpr")),
    "resident": Scenario(
        generations("left_padding", "early_ends", "left_padding"),
        *(config(s, device_gib=RESIDENT_GIB, attention="whole_layer") for s in ("transfer", 0.5)),
        *(config(s, device_gib=RESIDENT_GIB / 2) for s in ("transfer", 0.5)),
    ),
    "one after another": Scenario(generations("greedy", "prompt_lookup", "left_padding", "early_ends"), *BY_FORM),
    "growing": Scenario(growing, *BY_FORM),
    "cropping": Scenario(cropping, *BY_FORM),
    "two caches": Scenario(two_caches, *BY_FORM, config("transfer", device_gib=500_000 / GIB, attention="whole_layer")),
    "freed and reused": Scenario(one_then_another, *BY_FORM),
    "chunked prefill": Scenario(generations("chunked_prefill"), *BY_FORM),
    "streamed weights": Scenario(generations("greedy", "prompt_lookup"), *STREAMED, model=LARGE),
    "sequential": Scenario(
        generations("greedy", "left_padding"),
        *(config(s, overlap=False, attention=a) for s in ("transfer", 0.5) for a in ("auto", "whole_layer")),
        backend=sequential,
    ),
}


# Which scenario notices that a wait is missing, to be tried first; any may, and what is not here is tried in order.
SEEN_BY = {
    "store: packed of [packed, guard]": "resident",
    "store: guard of [packed, guard]": "cropping",
    "configure: buffer.take_over(self._backend)": "growing",
    "brought: backend.compute_waits(arrived)": "streamed weights",
    "brought: fresh of [fresh]": "streamed weights",
    "begin: self._backend.compute_waits(passage.arrived)": "streamed weights",
    "_issue: passage.slab.released of [passage.slab.released]": "streamed weights",
    "_issue: self._backend.release() of [self._backend.release()]": "streamed weights",
    "drop: self.backend.compute_waits(self.last_h2d)": "resident",
    "drop: job.buffer.take_over(self.backend)": "two caches",
    "_issue: after.append(self.backend.release())": "sequential",
    "fetch: self.backend.compute_waits(self.last_h2d)": "cropping",
    "fetch: fresh of [fresh, cargo.after]": "cropping",
    "fetch: cargo.after of [fresh, cargo.after]": "cropping",
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_engine_as_it_is_passes(name: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    put_engine(monkeypatch, {module: ast.parse(source) for module, source in SOURCES.items()})
    SCENARIOS[name].run(model)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_without_any_single_wait_a_scenario_fails(
    mutant: Mutant, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_engine(monkeypatch, mutant.sources)
    for name in sorted(SCENARIOS, key=lambda name: name != SEEN_BY.get(mutant.name)):
        try:
            SCENARIOS[name].run(model)
        except (RaceError, AssertionError):
            return
    pytest.fail("no scenario noticed: is this wait needed?")


def test_the_scenarios_move_position_embeddings_too(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    original, carried = PositionLayout.read, []

    def read(self: PositionLayout, stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        carried.append(stored.shape)
        return original(self, stored)

    monkeypatch.setattr(PositionLayout, "read", read)
    SCENARIOS["greedy"].run(model)
    assert carried


def test_the_waits_are_found() -> None:
    """The walk over the sources sees what a reader sees."""
    everything = "".join(SOURCES.values())
    assert len(MUTANTS) == len({mutant.name for mutant in MUTANTS})
    assert sum("compute_waits" in mutant.name for mutant in MUTANTS) == everything.count("compute_waits(")
    assert everything.count("copy_to_device(") == 4
    assert everything.count("copy_to_host(") == 1


def test_nothing_else_on_the_way_of_a_step_waits_or_copies() -> None:
    package = Path(kvoffload.__file__).parent
    calls = ("compute_waits(", "take_over(", "copy_to_device(", "copy_to_host(")
    found = set()
    for room in (ALLOWED["hf"] | {"hf"}) - {"backend"}:
        for path in [package / f"{room}.py", *(package / room).glob("**/*.py")]:
            if path.exists() and any(call in path.read_text() for call in calls):
                found.add(".".join(path.relative_to(package.parent).with_suffix("").parts))
    assert found == SOURCES.keys()
