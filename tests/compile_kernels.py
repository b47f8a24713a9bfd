"""Compiles every kernel as its host code would launch it, for a GPU that need not be there; launches nothing.

    python tests/compile_kernels.py CAPABILITY

Prints one JSON object per kernel: name, variants that were compiled for one shape at several lengths, bytes of shared
memory. Run in a process of its own, since the other tests use Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvoffload.kernels import linear_rope, merge, rope, segment_attention, tiles


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


def main(capability: int) -> None:
    compiled: dict[str, dict[int, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(self.__name__, {})[id(kernel)] = kernel
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Absent(capability))

    def report(what: str) -> None:
        for name, kernels in compiled.items():
            shared = max(kernel.metadata.shared for kernel in kernels.values())
            row = {"kernel": name, "what": what, "variants": len(kernels), "shared_bytes": shared}
            sys.stdout.write(json.dumps(row) + "\n")
        compiled.clear()

    attention(report)
    for dtype in (torch.bfloat16, torch.float32):
        out, lse = torch.zeros(2, 3, 32, 128), torch.zeros(2, 3, 32)
        for rows in (1, 2, 16):
            merge.merge_parts(out, lse, out, lse, num_parts=rows, is_first=rows == 1)
        merge.finish(out, lse, out.to(dtype), lse[0, 0])
        weight = torch.zeros(4096, 256, dtype=dtype)
        for tokens in (1, 16, 17):
            keys, cos = torch.zeros(tokens, 16, 32, 128, dtype=dtype), torch.zeros(tokens, 1, 128)
            rope.rope_(keys, cos, cos)
            x = torch.zeros(tokens * 16, 256, dtype=dtype)
            if tokens > 1:  # the smallest has a tile of its own
                linear_rope.linear_rope(x, weight, weight[:, 0].contiguous(), keys, cos, cos)
        report(str(dtype))


def attention(report: Any) -> None:
    """The attention kernel at decode and prefill shapes, with and without what it may be given."""
    for dtype, head_dim, q_tokens, extra in (
        (torch.bfloat16, 128, 1, {}),
        (torch.bfloat16, 128, 64, {}),
        (torch.bfloat16, 256, 64, {}),
        (torch.float16, 80, 3, {"window": 100, "softcap": 30.0}),
        (torch.float32, 128, 1, {}),
        (torch.bfloat16, 64, 1, {"row_table": torch.zeros(99, 16, dtype=torch.int32), "block_tokens": 64}),
        (torch.bfloat16, 64, 1, {"row_table": torch.zeros(99, 16, dtype=torch.int32), "block_tokens": 7}),
    ):
        q = torch.zeros(16, q_tokens, 8, head_dim, dtype=dtype)
        out, lse = torch.zeros(q.shape), torch.zeros(q.shape[:3])
        valid = torch.zeros(16, 99, dtype=torch.int32)
        for tokens in (1, 16, 17, 256):  # 1 and multiples of 16 are what Triton likes to make variants of
            kv = torch.zeros(tokens, 16, 2, 4, head_dim, dtype=dtype)
            for position in (0, 1, 16, 17):
                segment_attention.segment_attention(
                    q, kv, out, lse, scale=0.1, is_first=False, first_position=position,
                    query_position=300 + position, valid=valid[:, position // 16 :], **extra,
                )  # fmt: skip
        report(f"{dtype}, head_dim {head_dim}, {q_tokens} queries, {', '.join(extra)}")
    tiles.processors.cache_clear()


if __name__ == "__main__":
    main(int(sys.argv[1]))
