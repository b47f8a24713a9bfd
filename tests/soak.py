"""Many generations of random shape and mode, one session after another, and what they leave behind.

Not a test module. `play` runs them from a seeded generator; `Footprint` is what a process holds on to.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matrix import (
    BLOCKS,
    DEVICES,
    FAST_LINK,
    PIPELINES,
    SPLITS,
    TOLERANCE,
    distance,
    half_resident_gib,
    leaves_no_trace,
    profile,
)
from modes import KINDS, Mode, Shape, once, outcome, plain_cache
from test_callbacks import CollectingStreamer
from test_memory import CountingBackend
from transformers import PreTrainedModel

from kvoffload import EmulatedLink, OffloadConfig
from kvoffload.session.session import Session

MAX_CALLS_PER_SESSION = 5
CHECKED_FRACTION = 0.5  # of the calls, compared with the same without offloading
FAILING_FRACTION = 0.15


class Interrupted(Exception):
    """What ends a generation in the middle."""


# ---- what a process holds on to --------------------------------------------------------------------------------------


class Footprint(NamedTuple):
    """What must not grow.

    Attributes:
        threads: of Python.
        files: open descriptors.
        tensor_bytes: of all tensors that Python can reach, each storage once.
        rss_bytes: of the process.
    """

    threads: int
    files: int
    tensor_bytes: int
    rss_bytes: int

    @classmethod
    def now(cls) -> Footprint:
        """After everything unreachable has been given back."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed still counts as resident
        storages = {}
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            threading.active_count(),  # not the system's: a thread that was joined may take a moment to go
            len(list(Path("/proc/self/fd").iterdir())),
            sum(storages.values()),
            pages * 4096,
        )

    def growth_since(self, earlier: Footprint, *, rss_noise_bytes: int) -> dict[str, int]:
        """By how much what grew."""
        growth = {name: now - before for name, now, before in zip(self._fields, self, earlier, strict=True)}
        noise = {"rss_bytes": rss_noise_bytes}
        return {name: by for name, by in growth.items() if by > noise.get(name, 0)}


@contextmanager
def earlier_objects_aside() -> Iterator[None]:
    """Inside, neither the collector nor `Footprint` goes through the million objects that there are already."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ---- random generations ----------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One to play: `fails_after` forwards of its decoder's second layer, if at all."""

    kind: str
    mode: Mode
    fails_after: int | None
    is_checked: bool


def streamed(shape: Shape) -> Mode:
    """A thread generates, and its tokens are read while they come."""
    mode = once(shape._replace(rows=1))

    def run(model: PreTrainedModel, new_cache: Callable[[], Any] | None) -> list[Any]:
        outputs: list[Any] = []
        streamer, errors = CollectingStreamer(), []

        def work() -> None:
            try:
                outputs.extend(once(shape._replace(rows=1), streamer=streamer).run(model, new_cache))
            except Interrupted as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        assert torch.equal(torch.cat(streamer.tokens)[None], outputs[0].sequences)
        return outputs

    return mode._replace(run=run)


ALL_KINDS = KINDS | {"streamed": streamed}


def random_call(rng: random.Random) -> Call:
    """Any kind and shape; a conversation is as long as it is."""
    kind = rng.choice(list(ALL_KINDS))
    shape = Shape(rng.randint(1, 4), rng.randint(4, 90), rng.randint(2, 20), rng.randrange(1000))
    fails_after = rng.randint(1, 6) if rng.random() < FAILING_FRACTION else None
    is_checked = fails_after is None and (kind == "early_ends" or rng.random() < CHECKED_FRACTION)
    return Call(kind, ALL_KINDS[kind](shape), fails_after, is_checked)


def random_config(rng: random.Random, model: PreTrainedModel, calls: list[Call]) -> OffloadConfig:
    """Options with which every one of the calls can run."""
    link = rng.choice([FAST_LINK, FAST_LINK, EmulatedLink(), EmulatedLink(h2d_gb_per_s=0.5, latency_s=2e-5)])
    config = OffloadConfig(
        split=rng.choice(SPLITS),
        link=link,
        profile=profile(link.h2d_gb_per_s or 1.0),
        slots=rng.choice(["auto", 1, 2, 4]),
        **{**BLOCKS[rng.choice(list(BLOCKS))], **PIPELINES[rng.choice(list(PIPELINES))]},
    )
    device: Any = rng.choice(DEVICES)
    if device == "half":
        is_paced = link.h2d_gb_per_s is not None  # else whole layers are put together
        device = max(half_resident_gib(model, call.mode, config, can_segment=is_paced) for call in calls)
    return dataclasses.replace(config, device_gib=device)


@contextmanager
def interrupted(model: PreTrainedModel, after: int) -> Iterator[None]:
    """The given number of layers run, then an exception comes from between two of them."""
    left = [after]

    def count(module: Any, args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Interrupted

    handle = model.model.layers[1].mlp.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def play_call(session: Session, call: Call) -> bool:
    """Run one in a session; whether it came to its end."""
    model = session.model
    if call.fails_after is None:
        call.mode.run(model, session.new_cache)
        return True
    with interrupted(model, call.fails_after):
        try:
            call.mode.run(model, session.new_cache)
        except Interrupted:
            return False
    return True  # it was shorter than that


class Played(NamedTuple):
    """What was done."""

    calls: int = 0
    checked: int = 0
    interrupted: int = 0
    sessions: int = 0
    h2d_bytes: int = 0


def play(models: list[PreTrainedModel], num_calls: int, seed: int, after_session: Callable[[int], None]) -> Played:
    """That many calls, in sessions of one to five.

    Args:
        models: llamas to choose from.
        num_calls: calls in all; a conversation counts as one.
        seed: of every choice.
        after_session: told how many calls there have been, when a session is closed and nothing of it is referenced.

    Raises:
        AssertionError: logits differ, or a session left something on its model or in its pools.
    """
    rng, done = random.Random(seed), Played()
    while done.calls < num_calls:
        done = _play_session(rng, models, num_calls - done.calls, done)
        after_session(done.calls)
    return done


def _play_session(rng: random.Random, models: list[PreTrainedModel], most: int, done: Played) -> Played:
    model = rng.choice(models)
    calls = [random_call(rng) for _ in range(rng.randint(1, min(MAX_CALLS_PER_SESSION, most)))]
    config = random_config(rng, model, calls)
    assert isinstance(config.link, EmulatedLink)
    wanted = [outcome(call.mode.run(model, lambda: plain_cache(model))) if call.is_checked else None for call in calls]
    backend = CountingBackend(config.link)
    with leaves_no_trace(model), Session(model, config, backend) as session:
        for call, expected in zip(calls, wanted, strict=True):
            if expected is not None:
                error = distance(outcome(call.mode.run(model, session.new_cache)), expected)
                assert error <= TOLERANCE, f"{call.kind}: logits differ by {error:.3g} with {config}"
                done = done._replace(checked=done.checked + 1)
            elif not play_call(session, call):
                done = done._replace(interrupted=done.interrupted + 1)
            session.new_cache()  # memory of caches that nobody holds any more comes back with the next
            left = session.pool.used_bytes
            assert left == 0, f"{left} bytes of the pool are in use after {call.kind}"
            done = done._replace(calls=done.calls + 1)
        h2d_bytes = backend.link_use("h2d").copied_bytes
    assert session.pool.slab_bytes == 0
    assert not session.engine.account.held_bytes
    del session
    gc.collect()
    assert backend.device_bytes == 0, "device memory is held"
    return done._replace(sessions=done.sessions + 1, h2d_bytes=done.h2d_bytes + h2d_bytes)
