"""Recomputation of K and V from a layer's activation: through the model's own forward, or two strided GEMMs.

The generic path calls the attention module's own `forward` with a cache that takes K and V and ends it, so they pass
through the model's projections, norms, adapters and rotary code whatever these are. The fast path writes the
projections straight to where a transferred chunk would have landed and rotates the keys in place; it is used only
where it reproduced the generic path on real tokens. Method: KVPR (arXiv 2411.17089), section 3.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from kvoffload.kernels import ops
from kvoffload.store.derived import Derived
from kvoffload.store.tail import KVShape
from kvoffload.store.verification import Recompute, reproduces

# Of the second comparison: beyond what models clip K and V at, within float16 together with whatever adds up to them.
LARGEST_KV, LARGEST_ACTIVATION = 1e3, 1e4


class _Captured(Exception):
    """Ends the forward of an attention module once K and V are known."""


class _CapturingCache:
    """Stands in for the cache: takes K and V and ends the forward."""

    is_compileable = False

    def __init__(self, out: torch.Tensor, shape: KVShape) -> None:
        self._out, self._shape = out, shape

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        out_keys, out_values = self._shape.split(self._out)  # [tokens, rows, heads, dim]
        out_keys.copy_(keys.permute(2, 0, 1, 3))
        out_values.copy_(values.permute(2, 0, 1, 3))
        raise _Captured

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class GenericRecompute:
    """Through the attention module's own forward.

    Args:
        module: the attention module.
        shape: of its K/V.
        cache_name: the name that its forward has for a cache.
    """

    def __init__(self, module: nn.Module, shape: KVShape, cache_name: str) -> None:
        self._module, self._shape, self._cache_name = module, shape, cache_name

    def __call__(self, activation: torch.Tensor, embeddings: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        kwargs: dict[str, Any] = {"position_embeddings": embeddings} if embeddings else {}
        kwargs[self._cache_name] = _CapturingCache(out, self._shape)
        hidden_states = activation.transpose(0, 1).contiguous()  # [rows, tokens, hidden]
        with torch.no_grad():
            try:
                self._module.forward(hidden_states=hidden_states, attention_mask=None, **kwargs)
            except _Captured:
                return
        raise TypeError(f"{type(self._module).__name__} did not update its cache")


class FastRecompute:
    """Two GEMMs into the strided halves of `out`, then the rotation of the keys in place.

    Args:
        module: an attention module with plain linear `k_proj` and `v_proj`.
        shape: of its K/V.
    """

    def __init__(self, module: nn.Module, shape: KVShape) -> None:
        self._keys: Any = module.k_proj  # nn.Linear
        self._values: Any = module.v_proj
        self._shape = shape
        self._rows = Derived(lambda activation: activation.view(-1, activation.shape[-1]))
        self._by_token = Derived(lambda embedding: embedding.transpose(0, 1))  # [tokens, rows or 1, rotary_dim]
        self._targets = Derived(functools.partial(_parts, shape=shape))

    @staticmethod
    def applies_to(module: nn.Module, dtype: torch.dtype) -> bool:
        """Whether the projections are plain linear layers that nothing hooks into."""
        projections = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
        return all(
            type(projection) is nn.Linear  # which is no longer so where it is parametrized
            and projection.weight.dtype == dtype
            and not projection._forward_hooks
            and not projection._forward_pre_hooks
            and not hasattr(projection, "_hf_hook")
            for projection in projections
        ) and not torch.is_autocast_enabled(next(module.parameters()).device.type)

    def __call__(self, activation: torch.Tensor, embeddings: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        flat = self._rows.of(activation)
        flat_keys, flat_values, keys = self._targets.of(out)
        with torch.no_grad():
            ops.linear_into(flat, self._keys.weight, self._keys.bias, flat_keys)
            ops.linear_into(flat, self._values.weight, self._values.bias, flat_values)
            if embeddings:
                cos, sin = embeddings
                ops.rope_(keys, self._by_token.of(cos), self._by_token.of(sin))


def _parts(out: torch.Tensor, shape: KVShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of [tokens, rows, width]: where the products go, both two-dimensional, and the keys by head."""
    flat = out.view(-1, shape.width)
    return flat[:, : shape.key_width], flat[:, shape.key_width :], shape.keys_of(out)


def choose_path(
    module: nn.Module,
    shape: KVShape,
    activation: torch.Tensor,
    embeddings: tuple[torch.Tensor, ...],
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cache_name: str,
) -> Recompute | None:
    """The fastest path that reproduces K and V of real tokens, or None.

    The tokens stand elsewhere than they stood, so that a module which counts positions itself is found out. The fast
    path must also agree with the generic one on rotations of our own, as those of padding or of a prompt of one token
    turn nothing, and on activations so large that nothing is clipped only later.

    Args:
        module: the attention module.
        shape: of its K/V.
        activation: its input, [rows, tokens, hidden].
        embeddings: position embeddings of these tokens, each [rows or 1, tokens, width].
        keys: what it computed from that, [rows, heads, tokens, dim]; values likewise.
        cache_name: the name that the module's forward has for a cache.
    """
    tokens = activation.shape[1]
    order = torch.arange(tokens, -1, -1, device=activation.device).clamp(max=tokens - 1)  # backwards, the last twice
    x = activation.transpose(0, 1).index_select(0, order)
    embeddings = tuple(part.index_select(1, order) for part in embeddings)
    wanted = torch.empty(*x.shape[:2], shape.width, dtype=shape.dtype, device=x.device)
    for place, given in zip(shape.split(wanted), (keys, values), strict=True):
        place.copy_(given.permute(2, 0, 1, 3).index_select(0, order))
    generic = GenericRecompute(module, shape, cache_name)
    if not reproduces(generic, x, embeddings, wanted, shape):
        return None
    if FastRecompute.applies_to(module, x.dtype) and shape.dtype == x.dtype:
        fast = FastRecompute(module, shape)
        if reproduces(fast, x, embeddings, wanted, shape):
            loud, turned = _loud(x, wanted), _turned(embeddings)
            generic(loud, turned, wanted)
            if reproduces(fast, loud, turned, wanted, shape):
                return fast
    return generic


def _loud(x: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Activations whose K/V are about as large as `LARGEST_KV`."""
    factor = torch.minimum(LARGEST_KV / kv.abs().max().float(), LARGEST_ACTIVATION / x.abs().max().float())
    return (x * factor).to(x.dtype)


def _turned(embeddings: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Position embeddings of the same shapes, cosine and sine, that turn every token by an angle of its own.

    All pairs of a head turn by the same angle, which is the same however a model lays out its pairs.
    """
    return tuple(
        function(torch.arange(1.0, part.shape[1] + 1, device=part.device))[None, :, None].to(part.dtype).expand_as(part)
        for function, part in zip((torch.cos, torch.sin), embeddings, strict=False)
    )
