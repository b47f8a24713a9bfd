"""`kvoffload.load`: a checkpoint becomes an offloaded model, with its weights in host memory once."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import FAST_LINK, kvoffload_threads, profile
from modes import prompt
from streaming import kept_gib, sizes_of, streamable
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

import kvoffload
from kvoffload import ConfigError, HostMemoryError, KVOffloadError, OffloadConfig
from kvoffload.machine import mapped_files
from kvoffload.model import loading
from kvoffload.session.model_weights import ModelWeights

GIVEN: dict[str, Any] = {"split": "transfer", "speculate": "off", "profile": profile(), "link": FAST_LINK}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    streamable("llama").bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize("num_resident", [0, 2, 6])
def test_a_loaded_model_answers_as_that_of_transformers(folder: Path, num_resident: int) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    wanted = plain.generate(prompt(2, 20), max_new_tokens=8)
    options = OffloadConfig(device_weights_gib=kept_gib(plain, num_resident), **GIVEN)
    with kvoffload.load(folder, options) as session:
        assert session.model.dtype is torch.bfloat16
        assert not session.model.training
        assert torch.equal(session.model.generate(prompt(2, 20), max_new_tokens=8), wanted)
        assert session.stats is not None
        assert (session.stats.weight_bytes > 0) == (num_resident < 6)
    assert torch.equal(session.model.generate(prompt(2, 20), max_new_tokens=8), wanted)
    assert not kvoffload_threads()


def test_arguments_of_transformers_are_passed_on(folder: Path) -> None:
    for name in ("dtype", "torch_dtype"):
        with kvoffload.load(str(folder), **{name: torch.float32}, attn_implementation="eager") as session:
            assert session.model.dtype is torch.float32
            assert session.model.config._attn_implementation.endswith("eager")


def test_nothing_is_printed_off_a_terminal_and_bars_come_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hf_logging.enable_progress_bar()  # another test may have switched it off
    capfd.readouterr()
    kvoffload.load(folder).close()
    assert capfd.readouterr() == ("", "")
    assert hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        kvoffload.load(folder).close()
        assert not hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.enable_progress_bar()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.mark.usefixtures("loads_nothing")
def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the folder {tmp_path} holds no model: it has no config.json"):
        kvoffload.load(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="is no model: name the folder"):
        kvoffload.load(tmp_path / "weights.bin")
    for missing in (tmp_path / "nothing", "./nothing", "~/nothing"):
        with pytest.raises(ConfigError, match="there is no folder .*nothing"):
            kvoffload.load(missing)


@pytest.mark.usefixtures("loads_nothing")
def test_arguments_that_make_no_sense_are_refused_before_anything_is_loaded(folder: Path) -> None:
    wrong: Any
    for wrong in (None, 3, streamable("llama")):
        with pytest.raises(ConfigError, match="a folder or a name on the hub"):
            kvoffload.load(wrong)
    for wrong in ({"split": 0.5}, streamable("llama").config):
        with pytest.raises(ConfigError, match="OffloadConfig"):
            kvoffload.load(folder, wrong)
    with pytest.raises(ConfigError, match=r"leave out device_map.*OffloadConfig\(device="):
        kvoffload.load(folder, device_map="auto")


def test_what_transformers_cannot_load_is_told_in_one_line(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load") as caught:
        kvoffload.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("loads_nothing")
def test_weights_beyond_free_memory_are_refused_before_they_are_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr("kvoffload.machine.system_memory.available_bytes", lambda: num_bytes)
    with pytest.raises(AssertionError, match="loaded"):
        kvoffload.load(folder)
    monkeypatch.setattr("kvoffload.machine.system_memory.available_bytes", lambda: num_bytes - 1)
    with pytest.raises(HostMemoryError, match="are free: .* are missing; close what else runs"):
        kvoffload.load(folder)


def test_a_checkpoint_is_as_large_as_its_index_says_or_its_files_are(tmp_path: Path) -> None:
    assert loading.checkpoint_bytes(tmp_path) == 0
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(70))
    assert loading.checkpoint_bytes(tmp_path) == 70
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(100))
    assert loading.checkpoint_bytes(tmp_path) == 100
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(50))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert loading.checkpoint_bytes(tmp_path) == 100  # not those of the same weights under another name as well
    (tmp_path / "model-2.safetensors").write_bytes(bytes(60))
    assert loading.checkpoint_bytes(tmp_path) == 110
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 94.0}}))
    assert loading.checkpoint_bytes(tmp_path) == 94


def test_a_model_in_the_cache_of_the_hub_is_measured_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda name, file, **asked: str(folder / file))
    monkeypatch.setattr("kvoffload.machine.system_memory.available_bytes", lambda: 1000)
    with pytest.raises(HostMemoryError, match="the weights of someone/something are"):
        kvoffload.load("someone/something")


def test_a_model_that_cannot_be_offloaded_is_gone_while_the_error_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        model = loading.load_model(*args, **kwargs)
        made.append(weakref.ref(model))
        return model

    def fails(self: Any, num_resident: int) -> None:
        raise KVOffloadError("not today") from ValueError("at all")

    monkeypatch.setattr("kvoffload.api.load_model", load)
    monkeypatch.setattr(ModelWeights, "keep", fails)
    with pytest.raises(KVOffloadError, match="not today") as caught:
        kvoffload.load(folder, OffloadConfig(device_weights_gib=sizes_of(streamable("llama")).least / 2**30))
    assert caught.value.__traceback__ is not None
    assert made[0]() is None
    assert not kvoffload_threads()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_weights_in_files_are_memory_that_is_still_to_be_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    sizes = sizes_of(model)
    streamed = sum(sizes.layers)
    options = OffloadConfig(device_weights_gib=sizes.device_bytes(0) / 2**30, host_gib=0.1, link=FAST_LINK)
    needed = streamed + 2 * sizes.slab  # the slabs of an emulated device are host memory
    monkeypatch.setattr("kvoffload.machine.system_memory.available_bytes", lambda: needed - 1)
    with pytest.raises(HostMemoryError, match="more host memory"):
        kvoffload.offload(model, options)
    monkeypatch.setattr("kvoffload.machine.system_memory.available_bytes", lambda: needed)
    with kvoffload.offload(model, options):
        layers: Any = model.model.layers
        own = [one for layer in layers for one in layer.parameters()]
        assert mapped_files.bytes_in_files((one.data_ptr(), one.numel()) for one in own) == 0
    taken = needed - streamed + sizes.slab  # they are in memory of their own now
    monkeypatch.setattr("kvoffload.machine.system_memory.available_bytes", lambda: taken)
    kvoffload.offload(model, options).close()


def test_the_cache_is_given_no_memory_that_weights_took(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([2**30, 2**30, *[2**29] * 100])
    monkeypatch.setattr("kvoffload.machine.system_memory.available_bytes", lambda: next(free))
    sizes = sizes_of(streamable("llama").bfloat16())
    with kvoffload.load(folder, OffloadConfig(device_weights_gib=1.1 * sizes.least / 2**30, **GIVEN)) as session:
        assert session.pool.cap_bytes < 2**29


MEASURED = """
import json, sys
import torch, kvoffload
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
from kvoffload.session.session import Session

def bytes_now(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

small, large, least_gib = sys.argv[1], sys.argv[2], float(sys.argv[3])
link = kvoffload.EmulatedLink(h2d_gb_per_s=20)
ids = torch.arange(3, 13)[None]
def use(folder, gib):  # first one where libraries, threads and the like take their memory
    with kvoffload.load(folder, kvoffload.OffloadConfig(device_weights_gib=gib, link=link, split="transfer",
                                                        profile="a100-40gb-pcie4")) as session:
        session.model.generate(ids, max_new_tokens=3, do_sample=False)
        return session.stats.weight_bytes
use(small, 0.001)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is what there is now
before = bytes_now("VmRSS")
streamed = use(large, least_gib)
print(json.dumps([bytes_now("VmHWM") - before, streamed]))
"""


@pytest.mark.slow
def test_host_memory_holds_the_weights_once(tmp_path: Path) -> None:
    sizes = {}
    for name, wide in (("small", {"hidden_size": 64}), ("large", {"hidden_size": 1024, "intermediate_size": 2560})):
        model = streamable("llama", 16, **wide, head_dim=wide["hidden_size"] // 4, num_key_value_heads=4)
        sizes[name] = sizes_of(model)
        model.save_pretrained(tmp_path / name)
        del model
        gc.collect()
    weights = sizes["large"]
    assert weights.total > 300e6
    least_gib = weights.device_bytes(2) / 2**30
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), str(least_gib)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    peak, streamed = json.loads(done.stdout)
    assert streamed > 0.8 * weights.total
    device = weights.device_bytes(2) - weights.outside  # emulated: host memory as well
    assert 0.9 * weights.total < peak <= weights.total + weights.slab + device + 32 * 2**20
