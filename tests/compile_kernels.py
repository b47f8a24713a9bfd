"""Compiles every kernel as its host code would launch it, for a GPU that need not be there; launches nothing.

    python tests/compile_kernels.py CAPABILITY           a few shapes at several lengths: seconds
    python tests/compile_kernels.py CAPABILITY --all     every head size, dtype and option: minutes

Prints one JSON object per kernel: name, variants that were compiled for one shape at several lengths, bytes of shared
memory, registers of a thread, and bytes of its stack, where registers are spilled to. Run in a process of its own,
since the other tests use Triton's interpreter.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from test_forms import form_of
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime.jit import JITFunction

from kvoffload.kernels import linear_rope, merge, rope, segment_attention, tiles
from kvoffload.kernels.stored import StoredKV

HEAD_DIMS = (64, 80, 96, 128, 256)
FORMS = ("int8", "int4", "int2", "packed_kv")
CUOBJDUMP = Path(compiler.__file__).parent / "bin" / "cuobjdump"


class Absent:
    """Stands in for the driver of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int, *, is_whole: bool) -> None:
    compiled: dict[str, dict[int, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(self.__name__, {})[id(kernel)] = kernel
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Absent(capability))
    tiles.capability = lambda device: capability  # kernels ask for it at each launch

    def report(what: str) -> None:
        for name, kernels in compiled.items():
            used = [resources(kernel) for kernel in kernels.values()]
            row = {
                "kernel": name,
                "what": what,
                "variants": len(kernels),
                "shared_bytes": max(kernel.metadata.shared for kernel in kernels.values()),
                "registers": max(registers for registers, _ in used),
                "stack_bytes": max(stack_bytes for _, stack_bytes in used),
            }
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
        compiled.clear()

    if is_whole:
        every_attention(report)
        every_stored_attention(report)
        for head_dim in HEAD_DIMS:
            others(report, head_dim)
    else:
        attention(report)
        stored_attention(report)
        others(report, 128)


def resources(kernel: Any) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the assembler left them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def attention(report: Callable[[str], None]) -> None:
    """The attention kernel at decode and prefill shapes, with and without what it may be given."""
    for dtype, head_dim, q_tokens, extra in (
        (torch.bfloat16, 128, 1, {}),
        (torch.bfloat16, 128, 64, {}),
        (torch.bfloat16, 256, 64, {}),
        (torch.float16, 80, 3, {"window": 100, "softcap": 30.0}),
        (torch.float32, 128, 1, {}),
        (torch.bfloat16, 64, 1, table(64)),
        (torch.bfloat16, 64, 1, table(7)),
    ):
        for tokens in (1, 16, 17, 256):  # 1 and multiples of 16 are what Triton likes to make variants of
            for position in (0, 1, 16, 17):
                attend(dtype, head_dim, q_tokens, tokens, position, **extra)
        report(f"{dtype}, head_dim {head_dim}, {q_tokens} queries, {', '.join(extra)}")


def every_attention(report: Callable[[str], None]) -> None:
    """Every head size and dtype, for tiles of 16, 32 and 64 rows, plain and with all there is to be given."""
    given = {
        "plain": {"valid": None},
        "padding": {},
        "beams": table(64),
        "beams, window, softcap": table(7) | {"window": 100, "softcap": 30.0},
    }
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype, head_dim, q_tokens in itertools.product(dtypes, HEAD_DIMS, (1, 12, 64)):
        for name, extra in given.items():
            attend(dtype, head_dim, q_tokens, 256, 16, **extra)
            report(f"{dtype}, head_dim {head_dim}, {q_tokens} queries, {name}")


def stored_attention(report: Callable[[str], None]) -> None:
    """Attention over every form at decode and at verification of drafts, at several lengths."""
    for form, (dtype, head_dim, q_tokens) in itertools.product(
        FORMS, ((torch.bfloat16, 128, 1), (torch.bfloat16, 64, 16), (torch.float16, 80, 1))
    ):
        for blocks in (1, 16, 17):
            for position in (0, 1, 16):
                attend_stored(form, dtype, head_dim, q_tokens, blocks, position)
        report(f"{form}, {dtype}, head_dim {head_dim}, {q_tokens} queries")


def every_stored_attention(report: Callable[[str], None]) -> None:
    """Every form, head size and dtype, plain and with all there is to be given."""
    given = {"plain": {"valid": None}, "beams, window, softcap": table(32) | {"window": 100, "softcap": 30.0}}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for form, dtype, head_dim, q_tokens in itertools.product(FORMS, dtypes, HEAD_DIMS, (1, 12, 64)):
        for name, extra in given.items():
            attend_stored(form, dtype, head_dim, q_tokens, 16, 16, **extra)
            report(f"{form}, {dtype}, head_dim {head_dim}, {q_tokens} queries, {name}")


def table(block_tokens: int) -> dict[str, Any]:
    """Rows of beams, in blocks of so many tokens."""
    return {"row_table": torch.zeros(99, 16, dtype=torch.int32), "block_tokens": block_tokens}


def attend(dtype: torch.dtype, head_dim: int, q_tokens: int, tokens: int, position: int, **extra: Any) -> None:
    """Attention of 16 rows over a segment that is merged with what was there, as of the second chunk on."""
    q = torch.zeros(16, q_tokens, 8, head_dim, dtype=dtype)
    out, lse = torch.zeros(q.shape), torch.zeros(q.shape[:3])
    valid = torch.zeros(16, 99, dtype=torch.int32)[:, position // 16 :]
    kv = torch.zeros(tokens, 16, 2, 4, head_dim, dtype=dtype)
    segment_attention.segment_attention(
        q, kv, out, lse, scale=0.1, is_first=False, first_position=position, query_position=300 + position,
        **{"valid": valid} | extra,
    )  # fmt: skip


def attend_stored(
    name: str, dtype: torch.dtype, head_dim: int, q_tokens: int, blocks: int, position: int, **extra: Any
) -> None:
    """The same over blocks of a form."""
    form = form_of(name, head_dim, 32, heads=4)
    q = torch.zeros(16, q_tokens, 8, head_dim, dtype=dtype)
    out, lse = torch.zeros(q.shape), torch.zeros(q.shape[:3])
    valid = torch.zeros(16, 99, dtype=torch.int32)[:, position // 16 :]
    data = torch.zeros(blocks, form.block_bytes(16), dtype=torch.uint8)
    segment_attention.stored_attention(
        q, StoredKV(name, data, 32, 16, 4, head_dim, form.decode), out, lse, scale=0.1, is_first=False,
        first_position=position, query_position=1000 + position, **{"valid": valid} | extra,
    )  # fmt: skip


def others(report: Callable[[str], None], head_dim: int) -> None:
    """Every kernel but attention, at several lengths."""
    out, lse = torch.zeros(2, 3, 32, head_dim), torch.zeros(2, 3, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 2, 16):
            merge.merge_parts(out, lse, out, lse, num_parts=rows, is_first=rows == 1)
        merge.finish(out, lse, out.to(dtype), lse[0, 0])
        weight = torch.zeros(32 * head_dim, 256, dtype=dtype)
        for tokens in (1, 16, 17):
            keys, cos = torch.zeros(tokens, 16, 32, head_dim, dtype=dtype), torch.zeros(tokens, 1, head_dim)
            rope.rope_(keys, cos, cos)
            x = torch.zeros(tokens * 16, 256, dtype=dtype)
            if tokens > 1:  # the smallest has a tile of its own
                linear_rope.linear_rope(x, weight, weight[:, 0].contiguous(), keys, cos, cos)
        report(f"{dtype}, head_dim {head_dim}")


if __name__ == "__main__":
    main(int(sys.argv[1]), is_whole="--all" in sys.argv[2:])
