"""The pipeline from host to device: which cargo travels when, who owns which buffer, what waits for what.

Owns the order on this way and every wait on it. Knows neither models nor what the bytes mean: layers give it cargo, it
gives them bytes on the device, in memory that buffers.py has. New blocks go the other way in write_back.py. One layer's
pass over the link is a job; jobs follow each other without barriers, over layers and over steps (the paper's schedule,
KVPR arXiv 2411.17089 section 3, is the same code with a gate).

Ownership:
    slot          H2D until `ready`, then compute until `released` (recorded after the chunk's recomputation, or after
                  its attention where attention takes the chunks one by one)
    layer buffer  H2D and compute for its job; free for the next job at `released` (recorded after the attention);
                  lent to write_back.py as a stage while there is no job, and free again at `written`
    scratch       compute alone: K and V of a chunk that attention cannot read itself
    gather buffer compute alone: a layer's K and V in the order of the beams
    fetched block H2D until its copy is over, then compute, which drops it
The host hands a buffer to H2D only after it has recorded the event that frees it, so look-ahead is bounded by the
ring and the two layer buffers.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from kvoffload.backend import Backend, Event
from kvoffload.config import Schedule
from kvoffload.pipeline.buffers import Buffers, LayerBuffer, Slot
from kvoffload.pipeline.cargo import Cargo
from kvoffload.pipeline.weights import WeightSource, WeightStream, brought
from kvoffload.pipeline.write_back import WriteBack
from kvoffload.store.device_memory import DeviceMemory

CargoT = TypeVar("CargoT", bound=Cargo, covariant=True)


class LayerSource(Protocol[CargoT]):
    """What the engine needs to know of a cache layer."""

    position: int  # among the offloaded layers
    version: int  # changes with what `cargo` gives
    is_segmented: bool  # its cargo is used piece by piece, so that it needs no layer buffer

    @property
    def stored_kv_bytes(self) -> int: ...
    @property
    def goes_on(self) -> bool: ...  # whether more tokens are expected
    def cargo(self) -> Sequence[CargoT]: ...
    def expects_another_step(self) -> bool: ...


class CacheSource(Protocol):
    """What the engine needs to know of a cache."""

    @property
    def sources(self) -> Sequence[LayerSource[Cargo]]: ...


@dataclass(slots=True, eq=False)
class Job(Generic[CargoT]):
    """One layer's cargo on its way to the device."""

    layer: LayerSource[CargoT]
    version: int
    cargo: Sequence[CargoT]
    buffer: LayerBuffer | None  # None: all of it stays in slots
    ready: list[Event] = field(default_factory=list)  # of what was issued so far
    slots: list[Slot | None] = field(default_factory=list)

    def has_slot(self, cargo: Cargo) -> bool:
        """Whether it goes into a slot, and not to its place in the layer buffer."""
        return self.buffer is None or cargo.landing_offset is None


class TransferEngine:
    """Moves chunks to the device ahead of need, and lends its idle buffers to new blocks on their way back.

    Args:
        backend: the queues.
        overlap: False issues each copy when it is needed, behind all earlier compute, and waits for it.
        schedule: "pipelined", or "kvpr": the next layer's activations leave after this layer's attention, and
            recomputation starts when the whole activation has arrived.
    """

    def __init__(self, backend: Backend, *, overlap: bool = True, schedule: Schedule = "pipelined") -> None:
        self.backend = backend
        self.overlap = overlap
        self.schedule = schedule
        self.buffers = Buffers(backend)
        self.account = self.buffers.account
        self.write_back = WriteBack(backend)
        self.stage_limit_bytes: int | None = None  # what both stages together may take
        self._next_slot = self._next_buffer = 0
        self._jobs: deque[Job[Cargo]] = deque()
        self._current: Job[Cargo] | None = None  # begun and not finished; the first of the jobs
        self._cache: CacheSource | None = None
        self._next_position = 0
        self._gap: object | None = None  # the span from a step's last attention to the next one's first
        self.last_h2d: Event | None = None
        self._in_forward: Callable[[], CacheSource | None] = lambda: None  # a weak reference
        self.weights: WeightStream | None = None  # which share the link with chunks
        self._earlier_weight_bytes = 0  # delivered by streams that are closed
        self.is_generating = False  # forwards follow each other, and nobody changes weights between them
        self.brings_weights_ahead = True  # False: any of them may change before it is asked for
        self.weight_device_bytes = 0  # of layers that stay, and slabs
        self.layer_indices: Sequence[int] = ()  # in the decoder, of the offloaded layers; asked for beside weights

    # ---- device memory -------------------------------------------------------------------------------------------

    def configure(
        self, *, slot_bytes: int, num_slots: int, buffer_bytes: int, d2h_slot_bytes: int, scratch_bytes: int = 0
    ) -> None:
        """Make the ring, the two layer buffers, the D2H slots and the scratch exactly that large."""
        self.drop()
        self.release_stages()
        self.buffers.configure(
            slot_bytes=slot_bytes, num_slots=num_slots, buffer_bytes=buffer_bytes, scratch_bytes=scratch_bytes
        )
        self.account.note("d2h_slots", 0)
        self.write_back.configure(d2h_slot_bytes)
        self.account.note("d2h_slots", 2 * d2h_slot_bytes)
        self._next_slot = self._next_buffer = 0

    def ensure_buffers(self, num_bytes: int) -> None:
        """Layer buffers of at least that size, for caches whose maximum length was not known."""
        if self.buffers.layer_bytes < num_bytes:
            self.resize_buffers(max(num_bytes, 2 * self.buffers.layer_bytes))

    def resize_buffers(self, num_bytes: int) -> None:
        """Layer buffers of exactly that size; all else stays as it is."""
        sizes = {**self.buffers.sizes, "buffer_bytes": num_bytes}
        self.configure(**sizes, d2h_slot_bytes=self.write_back.slot_bytes)

    def start_layer_write_back(self, num_bytes: int) -> WriteBack:
        """A layer is about to store blocks of that many bytes; what stores them, with the layer buffers if idle."""
        is_idle = not self._jobs and self._cache is None
        lent = self.buffers.layer_buffers if is_idle else ()
        self.write_back.start_layer(num_bytes, lent, self.stage_limit_bytes)
        self.account.note("stages", self.write_back.stage_bytes)
        return self.write_back

    def release_stages(self) -> None:
        """Give back what a prefill staged its blocks in."""
        self.write_back.release_stages()
        self.account.note("stages", 0)

    # ---- host to device ------------------------------------------------------------------------------------------

    def begin(self, cache: CacheSource, layer: LayerSource[CargoT], *, in_layer_buffer: bool) -> Job[CargoT]:
        """The job that brings `layer` to the device; prefetched if the order was as expected, else started now.

        Args:
            cache: whose layer.
            layer: the layer.
            in_layer_buffer: whether its K and V are put together there; else `arriving` gives all of its cargo.
        """
        if self._current is not None and any(slot is not None and slot.is_busy for slot in self._current.slots):
            self.drop()  # an exception ended the last layer in the middle
        self.finish_current()  # where the last attention module had no hook
        head: Job[Any] | None = self._jobs[0] if self._jobs else None
        if (
            self._cache is not cache
            or head is None
            or head.layer is not layer
            or head.version != layer.version
            or (head.buffer is None) == in_layer_buffer
        ):
            self.drop()
            self._cache = cache
            self._next_position = layer.position
            head = self._new_job(in_layer_buffer)
        if head.buffer is not None:
            head.buffer.take_over(self.backend)
        if self._gap is not None:
            self.backend.end_span(self._gap)
            self._gap = None
        self._current = head
        self._pump()
        return head

    def prefetch(self, cache: CacheSource) -> None:
        """Start bringing the first layer's blocks, which a step of `cache` will ask for next."""
        ahead = (job for job in self._jobs if job is not self._current)
        if self._cache is not cache or any(job.version != job.layer.version for job in ahead):
            self.drop()
            self._cache = cache
            self._next_position = 0
        self._pump()

    def arriving(
        self, job: Job[CargoT], between: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[CargoT, DeviceMemory]]:
        """Cargo in order of transfer, each at the beginning of its slot on the device when yielded.

        With a layer buffer only what has a slot: the rest lands there by itself, all of it by the end. The caller
        issues what it does with a piece before asking for the next; `between` is called when its slot can be filled
        again, to issue work that needs no slot.
        """
        for idx, cargo in enumerate(job.cargo):
            while len(job.ready) <= idx:
                issued = self._issue(job)
                assert issued, "a slot was held back"
            if not job.has_slot(cargo) and idx + 1 < len(job.cargo) and self.overlap:
                continue  # the queue is in order: waiting for what comes behind is enough
            gate = idx
            if cargo.waits_for_others and self.overlap:
                # Such cargo travels first, and is used once as much has arrived as the slots hold.
                num_waiting = sum(other.waits_for_others for other in job.cargo)
                gate = max(idx, min(num_waiting, len(self.buffers.slots)) - 1)
                while len(job.ready) <= gate:
                    if not self._issue(job):
                        gate = len(job.ready) - 1
            self.backend.compute_waits(job.ready[gate])
            slot = job.slots[idx]
            if slot is not None:
                yield cargo, slot.room
                slot.released = self.backend.release(slot.room.part(cargo.source.numel()))
                slot.is_busy = False
                self._pump()
                between()

    def finish_current(self) -> None:
        """The attention that reads the current job's layer buffer has been issued."""
        job = self._current
        if job is None:
            return  # nothing was transferred for it, or it was dropped meanwhile
        self._current = None
        self._jobs.popleft()
        if job.buffer is not None:
            job.buffer.released = self.backend.release(job.buffer.bytes)
            job.buffer.written = None  # compute has waited for it
        if self._cache is not None and job.layer is self._cache.sources[-1]:
            self._gap = self.backend.start_span("gap")
        self._pump()

    def drop(self) -> None:
        """Forget everything that was prefetched (another cache, a crop, an error, the end of a generation)."""
        busy = [slot for slot in self.buffers.slots if slot.is_busy]
        if (self._jobs or busy) and self.last_h2d is not None:
            # A copy may still be landing in a buffer that compute writes next.
            self.backend.compute_waits(self.last_h2d)
        for job in self._jobs:
            if job.buffer is not None:
                job.buffer.take_over(self.backend)
                job.buffer.released = self.backend.release(job.buffer.bytes)
        for slot in busy:
            slot.released = self.backend.release(slot.room.bytes)
            slot.is_busy = False
        self._jobs.clear()
        self._current = self._cache = self._gap = None

    def forget_gap(self) -> None:
        """Something else than the next step follows: what passes until that is no gap between two."""
        self._gap = None

    def forget(self, cache: CacheSource) -> None:
        """Drop what was prefetched for a cache that goes away; that of another stays."""
        if self._cache is cache:
            self.drop()

    def stream_weights(self, num_layers: int, layers: Sequence[WeightSource]) -> None:
        """From now on the weights of these layers share the link with chunks; nothing may be in flight.

        Args:
            num_layers: of the decoder.
            layers: in order; none ends it.
        """
        before, self.weights = self.weights, None  # also where there is no room for new ones
        if before is not None:
            self._earlier_weight_bytes += before.delivered_bytes
            before.close()
        if layers:
            self.weights = WeightStream(self.backend, num_layers, layers, overlap=self.overlap)

    @property
    def delivered_weight_bytes(self) -> int:
        """Given to layers that asked for them, so far."""
        return self._earlier_weight_bytes + (0 if self.weights is None else self.weights.delivered_bytes)

    def bring_weights(self, layer: WeightSource) -> torch.Tensor:
        """A layer's weights in device memory of their own, uint8."""
        return brought(self.backend, layer)

    def note_forward(self, cache: CacheSource) -> None:
        """A forward begins with that cache, which says whether another will follow."""
        self._in_forward = weakref.ref(cache)

    def begin_weights(self, layer: WeightSource) -> torch.Tensor:
        """A decoder layer begins whose weights are streamed: these, uint8 on the device, valid until `end_weights`."""
        assert self.weights is not None
        data = self.weights.begin(layer)
        self._pump()
        return data

    def end_weights(self) -> None:
        """The forward of that layer has been issued, or has failed."""
        if self.weights is not None:
            self.weights.end()
            self._pump()

    def drop_weights(self) -> None:
        """Forget weights that were brought ahead: whoever holds the model may change them now."""
        if self.weights is not None:
            self.weights.drop()

    def _new_job(self, in_layer_buffer: bool | None = None) -> Job[Any]:
        assert self._cache is not None
        layer = self._cache.sources[self._next_position]
        self._next_position = (self._next_position + 1) % len(self._cache.sources)
        buffer = None
        if (not layer.is_segmented) if in_layer_buffer is None else in_layer_buffer:
            buffer = self.buffers.layer_buffers[self._next_buffer]
            self._next_buffer = (self._next_buffer + 1) % len(self.buffers.layer_buffers)
        job = Job(layer, layer.version, layer.cargo(), buffer)
        self._jobs.append(job)
        return job

    def _pump(self) -> None:
        """Issue every copy whose buffer is free, in order."""
        while self.overlap:
            job = self._next_job()
            if self.weights is not None and self.brings_weights_ahead:
                layer_idx = None if job is None else self.layer_indices[job.layer.position]
                fraction = 0.0 if job is None else len(job.ready) / len(job.cargo)
                if self.weights.goes_first(layer_idx, fraction, goes_on=self._goes_on()):
                    self.weights.issue()
                    continue
            if job is None or not self._issue(job):
                return

    def _goes_on(self) -> bool:
        """Whether another forward is expected to follow the one that was begun last.

        Outside `generate()` weights of the next one are not brought ahead: they may change until then.
        """
        cache = self._in_forward()
        return self.is_generating and cache is not None and cache.sources[0].goes_on

    def _next_job(self) -> Job[Cargo] | None:
        """The first that has cargo to issue, begun ahead of need where that is possible; None where there is none."""
        while self._cache is not None:
            for job in self._jobs:
                if len(job.ready) < len(job.cargo):
                    return job
            if not self._may_look_ahead():
                return None
            self._new_job()
        return None

    def _may_look_ahead(self) -> bool:
        """Whether the next layer's job may start: a layer buffer is free and the layer's own update is over."""
        assert self._cache is not None
        layer = self._cache.sources[self._next_position]
        if self._jobs and any(cargo.waits_for_others for cargo in layer.cargo()):
            return False  # it leaves after the attention of the layer before
        if not layer.is_segmented:
            if sum(job.buffer is not None for job in self._jobs) >= len(self.buffers.layer_buffers):
                return False
            if layer.cargo() and layer.stored_kv_bytes > self.buffers.layer_bytes:
                return False  # buffers grow when it is asked for
        return layer.expects_another_step() and all(job.layer is not layer for job in self._jobs)

    def _issue(self, job: Job[Cargo]) -> bool:
        """Queue the next copy of `job`; False if its slot is still in use."""
        cargo = job.cargo[len(job.ready)]
        slot: Slot | None = None
        if job.has_slot(cargo):
            slot = self.buffers.slots[self._next_slot]
            if slot.is_busy:
                return False
            slot.is_busy = True
        num_bytes = cargo.source.numel()
        after = [cargo.after]
        if slot is not None:
            self._next_slot = (self._next_slot + 1) % len(self.buffers.slots)
            target = slot.room.part(num_bytes)
            after.append(slot.released)
        else:
            start = cargo.landing_offset
            assert job.buffer is not None and start is not None
            target = job.buffer.bytes[start : start + num_bytes]
            after.append(job.buffer.released)
            if job.buffer.written is not None:
                after.append(job.buffer.written)
        if not self.overlap:
            after.append(self.backend.release())
        self.last_h2d = self.backend.copy_to_device(target, cargo.source, after)
        job.ready.append(self.last_h2d)
        job.slots.append(slot)
        return True

    def fetch(self, cargo: Cargo) -> DeviceMemory:
        """Bytes in device memory of their own, for a crop that reopens a block."""
        data = self.backend.allocate_device(cargo.source.numel())
        fresh = self.backend.release()  # the memory may have been used by earlier compute
        self.last_h2d = self.backend.copy_to_device(data, cargo.source, [fresh, cargo.after])
        self.backend.compute_waits(self.last_h2d)
        self.backend.compute(reads=(data,))
        return DeviceMemory(data)

    def close(self) -> None:
        """Drop what was prefetched and give the device memory back."""
        self.drop()
        self.write_back.close()
        self.buffers.close()
