"""The first rows of a device: is memory pinned, how fast is the link, are kernels and tokens right.

Each number is a row of its own, saved at once. What is wrong is a row as well, and ends the step after all were made.

Tolerances are of the norm of the error over that of the twin in float64 (`TOLERANCE`). Outputs are filled with NaN
first, so that what a kernel leaves out is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvoffload
from campaign import rows
from kvoffload.backend import CudaBackend
from kvoffload.bench import Preset
from kvoffload.bench.presets import make_model
from kvoffload.kernels import ops, pieces, reference
from kvoffload.kernels.stored import StoredKV
from kvoffload.planning.forms import FORMS
from kvoffload.store.forms import made_of_kv
from kvoffload.store.forms.encoded import Encoded
from kvoffload.store.tail import KVShape

PIN_BYTES = 2**30
COPIES = 4
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
LOGIT_TOLERANCE = 5e-6  # float32, as in tests/test_gpu.py
TINY = Preset(
    architecture="llama", hidden=256, heads=4, kv_heads=2, ffn=512, layers=4, batch=2, cached_tokens=96, vocab=512
)
NEW_TOKENS = 16
# Recomputation; drafts in lock-step on the newest tokens; drafts of rows at their own pace on copies of all; a model in
# host memory, all of whose layers are streamed.
GENERATE: dict[str, dict[str, Any]] = {
    "generate": {"split": 0.5, "speculate": "off"},
    "generate with drafts": {"split": 0.5, "speculate": 4},
    "generate with drafts on 4-bit copies": {"split": "transfer", "speculate": 4, "draft_cache": "int4"},
    "generate with streamed weights": {"split": 0.5, "speculate": "off", "device": "cuda"},
}
Tell = Callable[[str], None]


def run(path: Path, tell: Tell) -> None:
    """All of it.

    Raises:
        AssertionError: something is wrong; all rows were made.
    """
    device, wrong = torch.device("cuda", torch.cuda.current_device()), []

    def save(what: str, metric: str, unit: str, x: Any, value: float, config: dict[str, Any], link: str) -> None:
        rows.save(path, [rows.row("smoke", what, metric, unit, x, [value], config, link)])
        tell(f"{what}: {value:.4g} {unit}".rstrip() + f" ({metric})")

    for what, value, link in pin_and_copy(device):
        save(what, "rate", "GB/s", PIN_BYTES, value, {"bytes": PIN_BYTES}, link)
        wrong += [] if value > 0 else [f"{what}: host memory could not be pinned"]
    with torch.no_grad():
        for case in cases(device):
            began_s = time.perf_counter()
            error = case.error()
            torch.cuda.synchronize()
            config = {"dtype": str(case.dtype).removeprefix("torch."), "tolerance": TOLERANCE[case.dtype]}
            save(case.name, "relative_error", "", case.name, error, config, "none")
            tell(f"{case.name}: {time.perf_counter() - began_s:.1f} s with its compilation")
            wrong += [] if error <= TOLERANCE[case.dtype] else [f"{case.name} is off by {error:.2g}"]
    for what, options in GENERATE.items():
        distance, tokens_equal, h2d_bytes = checked_generate(device, dict(options))
        config = {"tokens_equal": tokens_equal, "h2d_bytes": h2d_bytes, "new_tokens": NEW_TOKENS}
        save(what, "max_abs_logit_difference", "", "tiny llama, float32", distance, config, "none")
        if not (tokens_equal and distance <= LOGIT_TOLERANCE and h2d_bytes):
            wrong.append(
                f"{what}: tokens equal {tokens_equal}, logits off by {distance:.2g}, {h2d_bytes} bytes came back"
            )
    if wrong:
        raise AssertionError("; ".join(wrong))


def pin_and_copy(device: torch.device) -> Iterator[tuple[str, float, str]]:
    """Name, GB/s and link of pinning (0 where that is refused), and of copies each way."""
    backend = CudaBackend(device)
    try:
        began_s = time.perf_counter()
        host = backend.allocate_host(PIN_BYTES)
        pinned_s = time.perf_counter() - began_s
        yield "pin", PIN_BYTES / pinned_s / 1e9 if host.pinned_bytes else 0.0, "none"
        there = backend.allocate_device(PIN_BYTES)
        ways: dict[str, Callable[[], Any]] = {
            "h2d": lambda: backend.copy_to_device(there, host.tensor, [backend.release()]),
            "d2h": lambda: backend.copy_to_host(host.tensor, there, [backend.release()]),
        }
        for name, copy in ways.items():
            copy()
            backend.synchronize()
            began_s = time.perf_counter()
            for _ in range(COPIES):
                copy()
            backend.synchronize()
            rate = COPIES * PIN_BYTES / (time.perf_counter() - began_s) / 1e9
            kind = "measured pinned" if host.pinned_bytes else "measured pageable"
            yield name, rate, f"{kind} {rate:.3f} GB/s"
    finally:
        backend.close()


class Case(NamedTuple):
    """One call of a kernel, and the same of its twin."""

    name: str
    dtype: torch.dtype
    call: Callable[..., None]  # of tensors and options
    twin: Callable[..., None]
    given: dict[str, Any]
    outputs: dict[str, Tensor]

    def error(self) -> float:
        """The largest relative error of the outputs."""
        exact = {name: out.double() for name, out in self.outputs.items()}
        self.call(**self.given, **self.outputs)
        self.twin(**{name: _double(value) for name, value in self.given.items()}, **exact)
        distances = torch.tensor([_distance(self.outputs[name], exact[name]) for name in exact])
        return float(distances.max())  # NaN if one is


def cases(device: torch.device) -> Iterator[Case]:
    """Every kernel, once: attention in decoding with grouped queries, over parts, and with all that it may be given."""

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def attention(name: str, q: Tensor, kv: Tensor, **options: Any) -> Case:
        given = {"q": q, "kv": kv, "scale": q.shape[-1] ** -0.5, "is_first": True, "first_position": 0}
        given |= {"query_position": kv.shape[0] - q.shape[1]} | options
        outputs = {"out": _poison(q.shape, device), "lse": _poison(q.shape[:3], device)}
        return Case(name, q.dtype, ops.segment_attention, reference.segment_attention, given, outputs)

    yield attention("attention", made(8, 1, 32, 128), made(256, 8, 2, 8, 128))
    yield attention("attention in parts", made(1, 1, 32, 128), made(4096, 1, 2, 8, 128))
    yield attention("attention of many queries", made(2, 48, 8, 128), made(200, 2, 2, 8, 128))
    half = {"dtype": torch.float16}
    valid = torch.full((4, 8), -1, dtype=torch.int32, device=device)
    valid[1, 0] = -256  # a row whose first eight tokens are padding
    table = torch.tensor([[0, 1, 2, 3]] * 8 + [[0, 0, 2, 2]] * 8, dtype=torch.int32, device=device)
    beams = {"valid": valid, "row_table": table, "block_tokens": 16}
    yield attention("attention of beams", made(4, 1, 16, 80, **half), made(250, 4, 2, 4, 80, **half), **beams)
    capped = {"window": 100, "softcap": 30.0}
    yield attention("attention, window and softcap", made(4, 1, 16, 256), made(256, 4, 2, 8, 256), **capped)

    for name, row in FORMS.items():
        if row.is_encoded:
            yield _stored(name, device, made(8, 1, 32, 128), made(4, 64, 8, 2, 8, 128))

    parts = {"part_out": made(4, 1, 8, 128, dtype=torch.float32), "part_lse": made(4, 1, 8, dtype=torch.float32)}
    into = {"out": made(4, 1, 8, 128, dtype=torch.float32), "lse": made(4, 1, 8, dtype=torch.float32)}
    yield Case("merge", torch.float32, ops.merge_, reference.merge_, parts, into)
    finished = {"out": made(4, 1, 8, 128, dtype=torch.float32), "lse": made(4, 1, 8, dtype=torch.float32)}
    result = {"result": _poison((4, 1, 8, 128), device, torch.bfloat16)}
    yield Case("finish", torch.bfloat16, ops.finish, reference.finish, finished | {"sinks": made(8)}, result)
    angle = torch.rand(64, 1, 128, device=device)
    turned = {"cos": angle.cos().bfloat16(), "sin": angle.sin().bfloat16()}
    yield Case("rope", torch.bfloat16, ops.rope_, reference.rope_, turned, {"keys": made(64, 4, 8, 128)})

    from kvoffload.kernels.linear_rope import linear_rope

    x = {"x": made(64 * 4, 512), "weight": made(8 * 128, 512) * 512**-0.5, "bias": made(8 * 128)}
    keys = {"keys": _poison((64, 4, 8, 128), device, torch.bfloat16)}
    yield Case("linear_rope", torch.bfloat16, linear_rope, reference.linear_rope, x | turned, keys)


def _stored(name: str, device: torch.device, q: Tensor, kv: Tensor) -> Case:
    """Attention over blocks of a form, K and V [blocks, tokens, rows, 2, heads, head_dim]."""
    blocks, block_tokens, rows, _, heads, head_dim = kv.shape
    form = made_of_kv([name], KVShape(heads, head_dim, heads, head_dim, kv.dtype), block_tokens)[name]
    assert isinstance(form, Encoded)
    data = torch.empty(blocks, form.block_bytes(rows), dtype=torch.uint8, device=device)
    form.encode(kv, data)
    stored = StoredKV(name, data, block_tokens, rows, heads, head_dim, form.decode)
    given = {"q": q, "stored": stored, "scale": head_dim**-0.5, "is_first": True, "first_position": 0}
    given |= {"query_position": stored.num_tokens - 1}
    outputs = {"out": _poison(q.shape, device), "lse": _poison(q.shape[:3], device)}
    return Case(f"attention over {name}", q.dtype, ops.stored_attention, pieces.stored_attention, given, outputs)


def checked_generate(device: torch.device, options: dict[str, Any]) -> tuple[float, bool, int]:
    """Largest difference of logits, whether all tokens are those of plain `generate`, and bytes that came back.

    Args:
        device: the GPU.
        options: of `OffloadConfig`; a device in it stands for a model in host memory, which may be changed here.
    """
    model: Any = make_model(TINY, device)
    torch.manual_seed(1)
    ids = torch.randint(3, TINY.vocab, (TINY.batch, TINY.cached_tokens), device=device)
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    if "device" in options:
        model.cpu()
        options["device_weights_gib"] = _least_weights_gib(model)
    config = kvoffload.OffloadConfig(block_tokens=8, chunk_blocks=2, device_gib="min", **options)
    with kvoffload.offload(model, config) as session:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    assert session.stats is not None
    pairs = zip(found.logits, expected.logits, strict=True)
    distance = max(float((one.float() - other.float()).abs().max()) for one, other in pairs)
    return distance, bool(torch.equal(found.sequences, expected.sequences)), session.stats.h2d_bytes


def _least_weights_gib(model: Any) -> float:
    """Device memory with which every decoder layer is streamed."""
    layers = [sum(one.numel() * one.element_size() for one in layer.parameters()) for layer in model.model.layers]
    everything = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    return float(everything - sum(layers) + 2.5 * max(layers)) / 2**30


def _poison(shape: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(tuple(shape), float("nan"), device=device, dtype=dtype)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _distance(found: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm; NaN where there is any."""
    return float((found.double() - exact).norm() / exact.norm())
