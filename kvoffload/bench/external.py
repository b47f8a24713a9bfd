"""Tools of others, each run as its own benchmark program: what it prints becomes rows, a missing tool a reason.

Owns their commands, the versions these were written for, and the reading of their output. They bring weights, prompts
and clocks of their own, so their tokens are not compared and only the figures they print are taken.

    flexllmgen       FlexLLMGen 0.1.8 (formerly FlexGen), OPT, dummy weights, the whole cache in host memory
    zero_inference   ZeRO-Inference with KV offloading, DeepSpeed 0.18, a clone of DeepSpeedExamples, OPT
    llama_cpp        llama-bench of llama.cpp, --no-kv-offload: one sequence, a GGUF file of yours

None of these commands has been run against the tool by this project yet; their output format is as documented.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path

from kvoffload.bench.providers import Bed, Provider
from kvoffload.bench.serving import Samples
from kvoffload.errors import KVOffloadError

LIMIT_S = 1800
_HUB_NAMES = {"opt-6.7b": "facebook/opt-6.7b", "opt-13b": "facebook/opt-13b"}


class External(Provider, ABC):
    """A program that measures itself: it prints figures, not tokens."""

    def problem(self, bed: Bed) -> str | None:
        why = self.missing()
        if why is None and bed.lab.device.type != "cuda":
            why = "has no emulated link: needs CUDA"
        if why is None and (bed.options() or bed.cell.is_ragged):
            why = "its benchmark program decodes equal prompts greedily"
        return why or self.unsupported(bed)

    @abstractmethod
    def missing(self) -> str | None:
        """What is not installed here and how to get it; None if all is there."""

    @abstractmethod
    def unsupported(self, bed: Bed) -> str | None:
        """Why it cannot run this cell; None if it can."""

    @abstractmethod
    def command(self, bed: Bed) -> list[str]:
        """The benchmark program and its arguments."""

    @abstractmethod
    def parse(self, output: str, bed: Bed) -> Samples:
        """The figures in what the program printed.

        Raises:
            KVOffloadError: they are not there.
        """

    def figures(self, bed: Bed) -> Samples:
        """Run the program.

        Raises:
            KVOffloadError: it failed, took too long, or printed something else.
        """
        command = self.command(bed)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KVOffloadError(f"{self.name}: {error}") from error
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise KVOffloadError(f"{self.name} ended with code {done.returncode}: {last}")
        return self.parse(done.stdout, bed)


class _ForOPT(External):
    """One that knows OPT by its name on the hub and prints latencies of prefill and decode."""

    package: str
    version: str

    def missing(self) -> str | None:
        return _wrong_version(self.package, self.version)

    def unsupported(self, bed: Bed) -> str | None:
        known = ", ".join(_HUB_NAMES)
        return None if _model_of(bed) in _HUB_NAMES else f"{self.name} is set up for {known} only"

    def parse(self, output: str, bed: Bed) -> Samples:
        return _latencies(self.name, output, bed)


class FlexLLMGen(_ForOPT):
    """https://github.com/FMInference/FlexLLMGen"""

    name = "flexllmgen"
    package, version = "flexllmgen", "0.1.8"

    def command(self, bed: Bed) -> list[str]:
        cell = bed.cell
        return [
            *(sys.executable, "-m", "flexllmgen.flex_opt", "--path", "_DUMMY_"),
            *("--model", _HUB_NAMES[_model_of(bed)], "--gpu-batch-size", str(cell.batch), "--num-gpu-batches", "1"),
            *("--prompt-len", str(cell.prompt_tokens), "--gen-len", str(cell.new_tokens)),
            # weights on the GPU, cache in host memory, activations on the GPU
            *("--percent", "100", "0", "0", "100", "100", "0", "--overlap", "True", "--pin-weight", "0"),
        ]


class ZeroInference(_ForOPT):
    """https://github.com/deepspeedai/DeepSpeedExamples, inference/huggingface/zero_inference"""

    name = "zero_inference"
    package, version = "deepspeed", "0.18"
    folder_variable = "DEEPSPEED_EXAMPLES"

    def missing(self) -> str | None:
        if why := super().missing():
            return why
        if not self._script().is_file():
            return f"set {self.folder_variable} to a clone of DeepSpeedExamples"
        return None

    def _script(self) -> Path:
        return Path(os.environ.get(self.folder_variable, "")) / "inference/huggingface/zero_inference/run_model.py"

    def command(self, bed: Bed) -> list[str]:
        cell = bed.cell
        return [
            *("deepspeed", "--num_gpus", "1", str(self._script()), "--dummy", "--model", _HUB_NAMES[_model_of(bed)]),
            *("--batch-size", str(cell.batch), "--prompt-len", str(cell.prompt_tokens)),
            *("--gen-len", str(cell.new_tokens), "--pin-memory", "1", "--kv-offload"),
        ]


class LlamaCpp(External):
    """https://github.com/ggml-org/llama.cpp, tools/llama-bench"""

    name = "llama_cpp"
    program, model_variable = "llama-bench", "KVOFFLOAD_GGUF"

    def missing(self) -> str | None:
        if shutil.which(self.program) is None:
            return f"{self.program} of llama.cpp is not on PATH"
        if not Path(os.environ.get(self.model_variable, "")).is_file():
            return f"set {self.model_variable} to a GGUF file of the cell's model"
        return None

    def unsupported(self, bed: Bed) -> str | None:
        return None if bed.cell.batch == 1 else f"{self.program} decodes one sequence, the cell has {bed.cell.batch}"

    def command(self, bed: Bed) -> list[str]:
        cell = bed.cell
        return [
            *(self.program, "-m", os.environ[self.model_variable], "-ngl", "999", "-nkvo", "1", "-o", "json"),
            *("-p", "0", "-n", "0", "-pg", f"{cell.prompt_tokens},{cell.new_tokens}"),
        ]

    def parse(self, output: str, bed: Bed) -> Samples:
        try:
            tests = [one for one in json.loads(output) if one["n_gen"] == bed.cell.new_tokens and one["n_prompt"]]
            total_s = [float(ns) / 1e9 for ns in tests[0]["samples_ns"]]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise KVOffloadError(f"{self.name} printed no test of {bed.cell.name}: {output[:200]!r}") from error
        return {"total": ("s", total_s)}


def external_providers() -> dict[str, External]:
    """All of them, by name."""
    found: list[External] = [FlexLLMGen(), ZeroInference(), LlamaCpp()]
    return {provider.name: provider for provider in found}


def _wrong_version(package: str, version: str) -> str | None:
    """Why the installed version will not do; patch releases are taken."""
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} {version} is not installed"
    if installed == version or installed.startswith(f"{version}."):
        return None
    return f"written for {package} {version}, {installed} is installed"


def _model_of(bed: Bed) -> str:
    return bed.cell.name.split(" ")[0]


def _latencies(name: str, output: str, bed: Bed) -> Samples:
    """Lines such as "prefill latency: 1.234 s" and "decode latency: 5.678 s", in any order."""
    found = {
        phase: re.search(rf"{phase} latency[^:\n]*:\s*([0-9.]+)\s*(?:s|seconds)?\b", output)
        for phase in ("prefill", "decode")
    }
    prefill, decode = found["prefill"], found["decode"]
    if prefill is None or decode is None:
        raise KVOffloadError(f"{name} printed no prefill and decode latency: {output[-200:]!r}")
    decode_s, steps = float(decode[1]), max(1, bed.cell.new_tokens - 1)
    figures: Samples = {"ttft": ("s", [float(prefill[1])]), "tpot": ("s", [decode_s / steps])}
    figures["decode_tokens_per_s"] = ("1/s", [bed.cell.batch * steps / decode_s])
    figures["total"] = ("s", [float(prefill[1]) + decode_s])
    return figures
