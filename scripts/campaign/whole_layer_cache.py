"""A plain cache in host memory that moves whole layers: what transformers' offloaded cache moves, on any backend.

Owns the traffic of `cache_implementation="offloaded"` (transformers 5.23, `Cache.update`), which itself needs CUDA:
one layer ahead is fetched in one copy, the new token is appended, and the *whole layer* is copied back on the compute
queue before attention. With `writes_back=False` the same without that copy: after the prefill only new tokens are
added, on the device. The two differ in the write-back alone, which is how an ablation names its share.

Greedy decoding of unpadded prompts only; a baseline, never the product.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvoffload.backend import Backend, Event
from kvoffload.backend.base import HostBuffer


class _Layer(DynamicLayer):
    """One layer's K and V as one contiguous tensor `[2, rows, kv_heads, tokens, head_dim]` in host memory."""

    def __init__(self, cache: WholeLayerCache, idx: int, host: HostBuffer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._idx = idx
        self._tokens = 0
        self._stored_shape: torch.Size | None = None
        self._host = host
        self._written: Event | None = None  # the host copy is complete
        self._fresh: torch.Tensor | None = None  # tokens since the prefill, where nothing is written back

    @property
    def host_bytes(self) -> int:
        return self._host.tensor.numel()

    def get_seq_length(self) -> int:
        return self._tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._cache.drop_attended()
        new = torch.stack((key_states, value_states))
        whole = self._joined(new)
        self._tokens = whole.shape[3]
        if self._cache.writes_back or self._stored_shape is None:
            self._write(whole)
        self._cache.attends_to(whole)
        return whole[0], whole[1]

    def _joined(self, new: torch.Tensor) -> torch.Tensor:
        """Everything there is with `new` behind it; waits for the copy that was asked for one layer ago."""
        if self._stored_shape is None:
            return new
        stored = self._cache.fetched(self._idx)
        if not self._cache.writes_back:
            new = self._fresh = new if self._fresh is None else torch.cat((self._fresh, new), dim=3)
        self._cache.backend.compute(reads=(stored, new))
        return torch.cat((stored, new), dim=3)

    def _write(self, whole: torch.Tensor) -> None:
        backend = self._cache.backend
        num_bytes = whole.numel() * whole.element_size()
        flat = whole.contiguous().view(-1).view(torch.uint8)
        backend.compute(writes=(flat,))
        # Attention reads `flat` as well: it is not released here, the copy only starts behind what filled it.
        self._written = backend.copy_to_host(self._host.tensor[:num_bytes], flat, [backend.release()])
        backend.compute_waits(self._written)  # transformers copies on the compute stream; `flat` may be freed behind it
        self._stored_shape = whole.shape

    def fetch(self, buffer: torch.Tensor, released: Event) -> tuple[Event, torch.Tensor]:
        """Queue the copy to the device; its completion, and the tensor it fills."""
        assert self._written is not None and self._stored_shape is not None
        num_bytes = self._stored_shape.numel() * self._cache.dtype.itemsize
        ready = self._cache.backend.copy_to_device(
            buffer[:num_bytes], self._host.tensor[:num_bytes], [self._written, released]
        )
        return ready, buffer[:num_bytes].view(self._cache.dtype).view(self._stored_shape)


class WholeLayerCache(Cache):
    """All layers, two device buffers, and the fetch of one layer ahead.

    Args:
        model: tells layers and dtype.
        backend: the link; stays the caller's to close.
        max_tokens: the longest the cache will get.
        row_bytes: K and V of one token of one layer for the whole batch.
        writes_back: copy every layer back at every step.

    Raises:
        ValueError: the model has one layer: there is none to fetch ahead.
    """

    def __init__(
        self, model: PreTrainedModel, backend: Backend, max_tokens: int, row_bytes: int, *, writes_back: bool
    ) -> None:
        self.backend = backend
        self.max_tokens = max_tokens
        self.dtype = model.dtype
        self.writes_back = writes_back
        num_layers = model.config.num_hidden_layers
        if num_layers < 2:
            raise ValueError(f"a cache that fetches one layer ahead needs 2 layers, the model has {num_layers}")
        # Pinning takes long: all of it here, before anybody's clock starts.
        self._own = [_Layer(self, idx, backend.allocate_host(max_tokens * row_bytes)) for idx in range(num_layers)]
        super().__init__(layers=list(self._own))
        # The one at layer_idx % 2 is read by compute until the layer's attention; the other is being filled.
        self._buffers = [backend.allocate_device(max_tokens * row_bytes) for _ in range(2)]
        self._ready: dict[int, tuple[Event, torch.Tensor]] = {}
        self._num_fetched = 0
        self._attended: torch.Tensor | None = None  # the layer whose attention was issued last

    @property
    def host_bytes(self) -> int:
        """Host memory of all layers."""
        return sum(layer.host_bytes for layer in self._own)

    @property
    def device_bytes(self) -> int:
        """The two buffers and the layer put together for attention."""
        return 3 * self._buffers[0].numel()

    def fetched(self, idx: int) -> torch.Tensor:
        """The stored part of a layer, on the device for compute issued from now on; asks for the next layer's."""
        if idx not in self._ready:
            self._ask(idx)
        ready, stored = self._ready.pop(idx)
        self.backend.compute_waits(ready)
        self._ask((idx + 1) % len(self._own))
        return stored

    def attends_to(self, whole: torch.Tensor) -> None:
        """Attention over this is issued next."""
        self.backend.compute(reads=(whole,))
        self._attended = whole

    def drop_attended(self) -> None:
        """The layer before is through with its tensor."""
        if self._attended is not None:
            self.backend.free_device(self._attended)
            self._attended = None

    def _ask(self, idx: int) -> None:
        buffer = self._buffers[self._num_fetched % 2]
        self._num_fetched += 1
        self._ready[idx] = self._own[idx].fetch(buffer, self.backend.release(buffer))
