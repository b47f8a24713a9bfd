"""Bad input and faults: a clear error of the right class with the numbers and the way out, and nothing lost.

After every fault the model generates plainly, and the same as before; no hook, thread or memory of ours is left.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import (
    FAST_LINK,
    TOLERANCE,
    checking_backend,
    distance,
    kvoffload_threads,
    profile,
)
from models import make_model
from modes import COMMON, MODES, Outcome, outcome, padded_prompt, plain_cache, prompt
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import kvoffload
from kvoffload import (
    ConfigError,
    EmulatedLink,
    HostMemoryError,
    InfeasiblePlanError,
    KVOffloadError,
    OffloadConfig,
    ProfileError,
    UnsupportedModelError,
)
from kvoffload.backend import EmulatedBackend
from kvoffload.hf import check_supported
from kvoffload.session import Session
from kvoffload.units import gib

PLAN: dict[str, Any] = {
    "link": FAST_LINK,
    "profile": profile(),
    "device_gib": "min",
    "block_tokens": 4,
    "chunk_blocks": 2,
    "split": 0.5,
}


def config(**kwargs: Any) -> OffloadConfig:
    return OffloadConfig(**{**PLAN, **kwargs})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", num_key_value_heads=4)


@pytest.fixture(scope="module")
def wanted(model: PreTrainedModel) -> Outcome:
    return outcome(MODES["left_padding"].run(model, None))


def generate(model: PreTrainedModel, **kwargs: Any) -> Any:
    return model.generate(**padded_prompt(3), **{**COMMON, **kwargs})


def num_hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(autouse=True)
def nothing_is_left(model: PreTrainedModel, wanted: Outcome) -> Iterator[None]:
    """Whatever a test did: afterwards the model is as it was."""
    yield
    assert num_hooks(model) == 0
    assert not {"generate", "_prepare_cache_for_generation", "_kvoffload_session"} & set(vars(model))
    assert not kvoffload_threads()
    assert distance(outcome(MODES["left_padding"].run(model, None)), wanted) == 0


@contextmanager
def no_forward(model: PreTrainedModel) -> Iterator[None]:
    """Nothing may be computed inside: the error comes before the first token."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        yield
    finally:
        handle.remove()
    assert not calls


# ---- models that are refused -----------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused() -> None:
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    )
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder; only decoder"):
        kvoffload.offload(t5, config())
    assert num_hooks(t5) == 0
    assert not kvoffload_threads()


def test_a_model_without_attention_is_refused() -> None:
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    )
    with pytest.raises(UnsupportedModelError, match=r"no attention layer with an unbounded cache.*use plain generate"):
        kvoffload.offload(mamba, config())
    assert num_hooks(mamba) == 0
    assert not kvoffload_threads()


def test_a_model_with_sliding_layers_only_is_refused() -> None:
    sliding = make_model("mistral", sliding_window=16)
    with pytest.raises(UnsupportedModelError, match=r"MistralForCausalLM has no attention layer with an unbounded"):
        kvoffload.offload(sliding, config())


def test_what_cannot_generate_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is not a transformers model .*AutoModelForCausalLM"):
        kvoffload.offload(nn.Linear(2, 2), config())
    headless = AutoModel.from_config(make_model("llama").config)
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel is not a transformers model with generate"):
        kvoffload.offload(headless, config())


def test_a_model_on_several_devices_is_refused(model: PreTrainedModel) -> None:
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    try:
        with pytest.raises(UnsupportedModelError, match=r"spread over .*0.*; load it on one device, .*{'': 0}"):
            kvoffload.offload(model, config())
    finally:
        del model.hf_device_map
    half = make_model("llama")
    half.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="spread over cpu, meta"):
        check_supported(half)


def test_a_cache_that_the_model_drops_is_refused() -> None:
    """Phi-3 with LongRoPE starts a new cache where a context passes its original length."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 43,
    }
    phi3 = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=43)
    with kvoffload.offload(phi3, config()):
        phi3.generate(prompt(1), **{**COMMON, "max_new_tokens": 4})
        with pytest.raises(UnsupportedModelError, match=r"without the offloaded cache .*use plain generate\(\)"):
            phi3.generate(prompt(1), **COMMON)
    assert phi3.generate(prompt(1), **COMMON).sequences.shape[1] > 43


def test_gradients_are_refused(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, config()) as session:
        cache = session.new_cache()
        with pytest.raises(UnsupportedModelError, match=r"gradients .*torch\.no_grad\(\)"):
            model(prompt(1), past_key_values=cache)


# ---- options that make no sense --------------------------------------------------------------------------------------


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'splitt'"):
        OffloadConfig(splitt=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": -0.1}, r"split is a share and must lie in 0\.\.1, got -0\.1"),
        ({"split": 1.5}, r"must lie in 0\.\.1, got 1\.5"),
        ({"split": float("nan")}, "got nan"),
        ({"split": True}, "got True"),
        ({"split": "half"}, "'auto', 'transfer', 'recompute' or a number from 0 to 1, got 'half'"),
        ({"device_gib": 0}, "device_gib must be a number above zero"),
        ({"device_gib": "max"}, r"device_gib must be one of \('auto', 'min'\) or a number of GiB, got 'max'"),
        ({"host_gib": -1}, "host_gib must be a number above zero"),
        ({"host_gib": "min"}, "host_gib must be one of"),
        ({"block_tokens": 0}, "block_tokens must be 'auto' or a whole number of at least 1, got 0"),
        ({"chunk_blocks": 1.5}, "chunk_blocks must be"),
        ({"slots": True}, "slots must be"),
        ({"overlap": "no"}, "overlap must be True or False"),
        ({"schedule": "paper"}, "schedule must be 'pipelined' or 'kvpr', got 'paper'"),
        ({"profile": 3}, "profile must be 'auto', a path or a HardwareProfile"),
        ({"link": "pcie"}, r"link must be 'auto' or a kvoffload\.EmulatedLink, got 'pcie'"),
    ],
    ids=str,
)
def test_options_outside_their_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        OffloadConfig(**kwargs)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"h2d_gb_per_s": 0}, r"EmulatedLink\.h2d_gb_per_s must be a number above zero \(GB/s; None for an unpaced"),
        ({"h2d_gb_per_s": -1}, "above zero"),
        ({"d2h_gb_per_s": 0.0}, "d2h_gb_per_s must be a number above zero"),
        ({"h2d_gb_per_s": float("inf")}, "got inf"),
        ({"h2d_gb_per_s": "fast"}, "got 'fast'"),
        ({"latency_s": -1e-6}, "latency_s must be zero or more seconds"),
        ({"latency_s": float("nan")}, "latency_s"),
    ],
    ids=str,
)
def test_a_link_of_no_speed(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmulatedLink(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_cache": False}, r"use_cache=False leaves nothing to offload: call generate\(\) outside the session"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded' asks for another cache"),
        ({"cache_implementation": "static"}, "cache_implementation='static' .*leave it out"),
    ],
    ids=str,
)
def test_generate_is_asked_for_another_cache(kwargs: dict[str, Any], message: str, model: PreTrainedModel) -> None:
    with kvoffload.offload(model, config()), no_forward(model), pytest.raises(ConfigError, match=message):
        generate(model, **kwargs)


def test_a_cache_of_someone_else(model: PreTrainedModel, wanted: Outcome) -> None:
    other = make_model("llama", num_key_value_heads=4)
    with kvoffload.offload(other, config()) as theirs, kvoffload.offload(model, config()) as ours:
        for cache in (plain_cache(model), theirs.new_cache()):
            with no_forward(model), pytest.raises(ConfigError, match=r"does not belong to .*use session\.new_cache"):
                generate(model, past_key_values=cache)
        found = outcome([generate(model, past_key_values=ours.new_cache())])
    assert distance(found, wanted) <= TOLERANCE


def test_a_second_session_on_the_same_model(model: PreTrainedModel, wanted: Outcome) -> None:
    with kvoffload.offload(model, config()):
        with pytest.raises(KVOffloadError, match=r"offloaded already: use that session, or close\(\) it first"):
            kvoffload.offload(model, config())
        assert distance(outcome([generate(model)]), wanted) <= TOLERANCE  # the first one is unharmed
    with kvoffload.offload(model, config()):
        assert distance(outcome([generate(model)]), wanted) <= TOLERANCE


def test_a_second_generate_at_the_same_time(model: PreTrainedModel, wanted: Outcome) -> None:
    errors: list[BaseException] = []
    inside, go_on = threading.Event(), threading.Event()

    def wait_here(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert go_on.wait(60)
        return scores

    results: list[Any] = []
    with kvoffload.offload(model, config()):
        first = threading.Thread(target=lambda: results.append(generate(model, logits_processor=[wait_here])))
        first.start()
        assert inside.wait(60)
        with pytest.raises(KVOffloadError, match=r"running already .*one call at a time"):
            generate(model)
        go_on.set()
        first.join()

        def nested(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            try:
                generate(model)
            except KVOffloadError as error:
                errors.append(error)
            return scores

        found = generate(model, logits_processor=[nested])
    assert len(errors) == len(found.logits)
    assert distance(outcome(results), wanted) <= TOLERANCE
    assert distance(outcome([found]), wanted) <= TOLERANCE


# ---- too little memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["transfer", "recompute", 0.5, "auto"])
def test_too_little_host_memory(split: Any, model: PreTrainedModel) -> None:
    row = {"transfer": 384, "recompute": 192, 0.5: 288, "auto": 192}[split]  # bytes of a token, in one layer
    needed = 3 * 48 * 3 * row  # rows, tokens, layers
    for cap_bytes in (needed - 100, needed // 2, 1000):
        with kvoffload.offload(model, config(split=split, host_gib=cap_bytes / 2**30)) as session:
            message = f"3 sequences of 48 tokens need {gib(needed)} of host memory, {gib(cap_bytes)}"
            with no_forward(model), pytest.raises(HostMemoryError, match=message) as caught:
                generate(model)
            assert session.pool.slab_bytes == 0
        assert "raise host_gib, or lower the batch or max_new_tokens" in str(caught.value)


def test_host_memory_for_beams_counts_their_prompt_once(model: PreTrainedModel, wanted: Outcome) -> None:
    """37 tokens of 2 prompts and 11 tokens of 6 beams, in whole blocks of 4."""
    least = 3 * 384 * (2 * 36 + 6 * 12)
    with kvoffload.offload(model, config(split="transfer", host_gib=(least + 3 * 384 * 6 * 4) / 2**30)):
        MODES["beams"].run(model, None)
    with (
        kvoffload.offload(model, config(split="transfer", host_gib=0.8 * least / 2**30)),
        no_forward(model),
        pytest.raises(HostMemoryError, match="6 sequences of 48 tokens"),
    ):
        MODES["beams"].run(model, None)


def test_too_little_device_memory(model: PreTrainedModel) -> None:
    with (
        kvoffload.offload(model, config(device_gib=1e-5)) as session,
        no_forward(model),
        pytest.raises(
            InfeasiblePlanError, match=r"3 sequences of 48 tokens needs at least \d+\.\d\d KiB .*raise device_gib"
        ),
    ):
        generate(model)
    assert session.engine.held_bytes == {}


def test_host_memory_that_runs_out_while_decoding(model: PreTrainedModel, wanted: Outcome) -> None:
    """A custom loop does not say how long it gets: the cap is met later, and nothing is lost but that cache."""

    def loop(cache: Any) -> None:
        for step in range(1000):
            model(prompt(3, 5, seed=step), past_key_values=cache)

    with kvoffload.offload(model, config(host_gib=800_000 / 2**30)) as session:
        message = (
            r"the cache needs \S+ KiB more host memory, \S+ K?i?B of the cap of 781\.25 KiB are left: raise host_gib"
        )
        with torch.no_grad(), pytest.raises(HostMemoryError, match=message):
            loop(session.new_cache())
        session.new_cache()
        assert session.pool.used_bytes == 0
        assert distance(outcome([generate(model)]), wanted) <= TOLERANCE


# ---- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no profile file"),
        ("{", "cannot read the hardware profile"),
        ("[]", "is neither a profile of"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "is damaged"),
    ],
    ids=["missing", "cut off", "foreign", "from another release", "incomplete"],
)
def test_a_profile_file_that_cannot_be_used(
    text: str | None, message: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    before = dict(vars(model))
    with pytest.raises(ProfileError, match=message) as caught:
        kvoffload.offload(model, config(profile=path, split="auto"))
    assert dict(vars(model)) == before
    assert str(path) in str(caught.value)
    assert "kvoffload profile" in str(caught.value)
    assert (path.read_text() if text is not None else None) == text  # not measured again behind the user's back


@pytest.mark.parametrize("split", ["auto", "transfer"])
def test_a_mistyped_preset_is_refused_at_once_also_where_nothing_is_predicted(
    split: str, model: PreTrainedModel
) -> None:
    unpaced = kvoffload.OffloadConfig(profile="a100-40gb-pcie", split=split)  # type: ignore[arg-type]
    threads = threading.active_count()
    with pytest.raises(ProfileError, match="'a100-40gb-pcie'; near: a100-40gb-pcie4"):
        kvoffload.offload(model, unpaced)
    assert threading.active_count() == threads


# ---- exceptions from anywhere ----------------------------------------------------------------------------------------


class Planted(Exception):
    pass


class BrokenStreamer(BaseStreamer):
    def __init__(self) -> None:
        self.num_tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.num_tokens += 1
        if self.num_tokens == 5:
            raise Planted

    def end(self) -> None:
        pass


def failing_at(step: int, error: type[BaseException]) -> Callable[..., Any]:
    calls = []

    def callback(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == step:
            raise error
        return scores

    return callback


def check_after(session: Session, model: PreTrainedModel, wanted: Outcome) -> None:
    """The session serves the next call, and holds no memory of the failed one."""
    session.new_cache()
    assert session.pool.used_bytes == 0
    assert distance(outcome([generate(model)]), wanted) <= TOLERANCE


@pytest.mark.parametrize("error", [Planted, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_an_exception_in_a_logits_processor(
    error: type[BaseException], step: int, model: PreTrainedModel, wanted: Outcome
) -> None:
    with kvoffload.offload(model, config()) as session:
        with pytest.raises(error):
            generate(model, logits_processor=[failing_at(step, error)])
        check_after(session, model, wanted)
    with pytest.raises(error), kvoffload.offload(model, config()) as session:
        generate(model, logits_processor=[failing_at(step, error)])
    assert session.is_closed
    assert session.pool.slab_bytes == 0


def test_a_cache_given_to_a_generate_that_failed_is_not_used_again(model: PreTrainedModel, wanted: Outcome) -> None:
    """It may have stopped between two layers, whose lengths then differ."""
    with kvoffload.offload(model, config()) as session:
        cache = session.new_cache()
        with pytest.raises(Planted):
            generate(model, past_key_values=cache, logits_processor=[failing_at(3, Planted)])
        with torch.no_grad(), pytest.raises(KVOffloadError, match=r"is over: take a new_cache\(\)"):
            model(prompt(3, 1), past_key_values=cache)
        check_after(session, model, wanted)


def test_an_exception_in_a_streamer(model: PreTrainedModel, wanted: Outcome) -> None:
    with kvoffload.offload(model, config()) as session:
        with pytest.raises(Planted):
            model.generate(prompt(1), streamer=BrokenStreamer(), **COMMON)
        check_after(session, model, wanted)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("module", ["self_attn", "mlp", "self_attn.o_proj", "self_attn.k_proj"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_exception_in_a_hook_between_any_two_layers(
    layer: int, module: str, call: int, model: PreTrainedModel, wanted: Outcome
) -> None:
    calls: list[int] = []

    def hook(*args: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise Planted

    with kvoffload.offload(model, config()) as session:
        handle = model.model.layers[layer].get_submodule(module).register_forward_hook(hook)
        try:
            # Recomputation leaves its own forward by an exception too, and may call the projections itself.
            with pytest.raises(Planted):
                generate(model)
        finally:
            handle.remove()
        check_after(session, model, wanted)


class FaultyBackend(EmulatedBackend):
    """Raises at its n-th call."""

    NAMES = ("allocate_host", "allocate_device", "copy_to_device", "copy_to_host", "compute_waits", "release")

    def __init__(self, error: type[BaseException], names: tuple[str, ...] = NAMES) -> None:
        super().__init__(EmulatedLink())
        self.error, self.names = error, names
        self.num_calls, self.fails_at = 0, -1

    def _count(self, name: str) -> None:
        if name in self.names:
            self.num_calls += 1
            if self.num_calls == self.fails_at:
                raise self.error(f"call {self.num_calls}")

    def allocate_host(self, num_bytes: int) -> Any:
        self._count("allocate_host")
        return super().allocate_host(num_bytes)

    def allocate_device(self, num_bytes: int) -> Any:
        self._count("allocate_device")
        return super().allocate_device(num_bytes)

    def copy_to_device(self, dst: Any, src: Any, after: Any) -> Any:
        self._count("copy_to_device")
        return super().copy_to_device(dst, src, after)

    def copy_to_host(self, dst: Any, src: Any, after: Any) -> Any:
        self._count("copy_to_host")
        return super().copy_to_host(dst, src, after)

    def compute_waits(self, event: Any) -> None:
        self._count("compute_waits")
        super().compute_waits(event)

    def release(self, *buffers: Any) -> Any:
        self._count("release")
        return super().release(*buffers)


def calls_of_a_generation(model: PreTrainedModel, mode: str, names: tuple[str, ...]) -> int:
    backend = FaultyBackend(KeyboardInterrupt, names)
    with Session(model, config(), backend):
        MODES[mode].run(model, None)
        return backend.num_calls


@pytest.mark.parametrize("mode", ["early_ends", "prompt_lookup", "padded_beams"])
def test_an_interrupt_at_any_call_of_the_backend(mode: str, model: PreTrainedModel, wanted: Outcome) -> None:
    """Ctrl-C arrives wherever it likes: the next call in the same session must not trip over what was left."""
    MODES[mode].run(model, None)  # some modes look at the plain continuation first
    total = calls_of_a_generation(model, mode, FaultyBackend.NAMES)
    assert total > 100
    for fails_at in [*range(1, 30, 2), *range(30, total - 10, 37), *range(total - 10, total + 1)]:
        backend = FaultyBackend(KeyboardInterrupt)
        with Session(model, config(), backend) as session:
            backend.fails_at = fails_at
            with pytest.raises(KeyboardInterrupt):
                MODES[mode].run(model, None)
            backend.fails_at = -1
            check_after(session, model, wanted)
        assert session.pool.slab_bytes == 0


def test_no_device_memory_at_any_allocation(model: PreTrainedModel, wanted: Outcome) -> None:
    """The device is full at the n-th allocation, most of which come in the prefill."""
    names = ("allocate_device",)
    for fails_at in range(1, calls_of_a_generation(model, "left_padding", names) + 1):
        backend = FaultyBackend(torch.OutOfMemoryError, names)
        with Session(model, config(device_gib=0.0004), backend) as session:
            backend.num_calls, backend.fails_at = 0, fails_at
            with pytest.raises(torch.OutOfMemoryError):
                generate(model)
            check_after(session, model, wanted)
        assert session.engine.held_bytes == {}


def test_no_device_memory_in_the_model_itself_during_prefill(model: PreTrainedModel, wanted: Outcome) -> None:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.shape[1] > 1:
            raise torch.OutOfMemoryError("planted")

    with kvoffload.offload(model, config()) as session:
        handle = model.model.layers[1].mlp.register_forward_hook(hook)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model)
        handle.remove()
        check_after(session, model, wanted)


# ---- after the end ---------------------------------------------------------------------------------------------------


def test_a_cache_outlives_its_session_only_to_say_so(model: PreTrainedModel) -> None:
    with kvoffload.offload(model, config()) as session:
        cache = session.new_cache()
        with torch.no_grad():
            model(prompt(2), past_key_values=cache)
    with torch.no_grad(), pytest.raises(KVOffloadError, match=r"is over: take a new_cache\(\)"):
        model(prompt(2, 1), past_key_values=cache)
    with pytest.raises(KVOffloadError, match=r"closed: call kvoffload\.offload\(model\) again"):
        session.new_cache()
    session.close()  # a second time does nothing


def test_closing_in_the_middle_of_a_custom_loop(model: PreTrainedModel) -> None:
    """Copies are under way, some for a step that never comes."""
    session = Session(model, config(link=EmulatedLink(h2d_gb_per_s=0.01)), None)
    cache = session.new_cache()
    with torch.no_grad():
        model(prompt(2), past_key_values=cache)
        model(prompt(2, 1), past_key_values=cache)
    session.close()
    assert session.pool.slab_bytes == 0
    assert session.engine.held_bytes == {}


def test_what_a_user_has_put_on_the_model_stays(wanted: Outcome) -> None:
    """A method shadowed by someone else, and hooks of theirs."""
    model = make_model("llama", num_key_value_heads=4)
    calls: list[str] = []
    original = model.generate

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append("generate")
        return original(*args, **kwargs)

    vars(model)["generate"] = theirs
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append("hook"))
    with kvoffload.offload(model, config()):
        found = outcome([generate(model)])
    assert distance(found, wanted) <= TOLERANCE
    assert vars(model)["generate"] is theirs
    assert calls.count("generate") == 1
    assert calls.count("hook") == 12
    handle.remove()
    assert num_hooks(model) == 0


def test_a_session_that_is_dropped_without_closing_can_be_collected_after_close(model: PreTrainedModel) -> None:
    import weakref

    session = kvoffload.offload(model, config())
    generate(model)
    session.close()
    reference = weakref.ref(session)
    del session
    gc.collect()
    assert reference() is None


def test_the_check_of_races_is_on_during_faults_too(model: PreTrainedModel, wanted: Outcome) -> None:
    with Session(model, config(), checking_backend()) as session:
        for step in (1, 2, 5):
            with pytest.raises(Planted):
                generate(model, logits_processor=[failing_at(step, Planted)])
            check_after(session, model, wanted)


# ---- arguments of another kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["fast", {"split": "transfer"}, 3])
def test_options_of_another_kind_are_refused(options: Any, model: PreTrainedModel) -> None:
    message = "options are given as a kvoffload.OffloadConfig"
    with pytest.raises(ConfigError, match=message):
        kvoffload.offload(model, options)
    with pytest.raises(ConfigError, match=message):
        kvoffload.generate(model, prompt(1), offload_config=options)
    with pytest.raises(ConfigError, match=message):
        kvoffload.plan(model, kvoffload.Workload(batch=1, prompt_tokens=8, new_tokens=8), profile(), options)
    with pytest.raises(ConfigError, match="workload must be a kvoffload.Workload"):
        kvoffload.plan(model, {"batch": 1}, profile())  # type: ignore[arg-type]
    assert "generate" not in vars(model)


def test_chunks_larger_than_the_cache_take_no_more_memory_than_it(model: PreTrainedModel) -> None:
    wanted = outcome([generate(model)])
    with kvoffload.offload(model, config(chunk_blocks=10**6)) as session:
        assert distance(outcome([generate(model)]), wanted) <= TOLERANCE
        assert session.stats is not None
        assert session.stats.device_kv_peak_decode_bytes < 2**20


@pytest.mark.parametrize("split", ["auto", "transfer", 0.3, 0.5, "recompute"])
def test_a_host_cap_is_refused_before_any_token_or_holds_to_the_end(split: Any) -> None:
    """In steps of a twentieth around what the cache takes, whatever the corrections of the plan would like."""
    model = make_model("opt")
    ids = prompt(3, 24)
    everything = 3 * 48 * 3 * 384  # layers, tokens, rows, bytes of K and V
    finished = []
    for twentieths in range(8, 30):
        options = {"block_tokens": 4, "chunk_blocks": 1, "host_gib": everything * twentieths / 20 / 2**30}
        with kvoffload.offload(model, config(split=split, **options)) as session:
            before = session.num_forwards
            try:
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False)
                finished.append(twentieths)
            except kvoffload.KVOffloadError:
                assert session.num_forwards == before, (split, twentieths)
    assert finished
    assert finished == list(range(finished[0], 30))
    assert finished[0] <= {"transfer": 20, "recompute": 10}.get(split, 24)


def test_a_further_turn_that_the_host_cap_does_not_hold_is_refused_before_its_first_token() -> None:
    model = make_model("opt")
    ids = prompt(3, 24)
    options = {"block_tokens": 4, "chunk_blocks": 1, "host_gib": 3 * 300 * 3 * 384 / 2**30}
    with kvoffload.offload(model, config(split="transfer", **options)) as session:
        cache = session.new_cache()
        call = {"past_key_values": cache, "do_sample": False}
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **call)
        before = session.num_forwards
        with pytest.raises(HostMemoryError, match="raise host_gib"):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=300, **call)
        assert session.num_forwards == before
