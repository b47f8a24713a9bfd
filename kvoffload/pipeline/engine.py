"""The pipeline from host to device: which chunk travels when, who owns which buffer, what waits for what.

Owns the ring of slots, the layer buffers, every wait on this way, and the account of device memory. Does not know
models: layers give it chunks, it gives them bytes on the device. New blocks go the other way in write_back.py. One
layer's pass over the link is a job; jobs follow each other without barriers, over layers and over steps (the paper's
schedule, KVPR arXiv 2411.17089 section 3, is the same code with a gate).

Ownership:
    slot          H2D until `ready`, then compute until `released` (recorded after the chunk's recomputation, or after
                  its attention where attention takes the chunks one by one)
    layer buffer  H2D and compute for its job; free for the next job at `released` (recorded after the attention);
                  lent to write_back.py as a stage while there is no job, and free again at `written`
    scratch       compute alone: K and V of an activation chunk on their way into attention
    gather buffer compute alone: a layer's K and V in the order of the beams
    fetched block H2D until its copy is over, then compute, which drops it
The host hands a buffer to H2D only after it has recorded the event that frees it, so look-ahead is bounded by the
ring and the two layer buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvoffload.backend import Backend, Event
from kvoffload.config import Schedule
from kvoffload.pipeline.chunks import Chunk
from kvoffload.pipeline.device_memory import DeviceMemory
from kvoffload.pipeline.write_back import D2HSlot, WriteBack
from kvoffload.store.block import Block


class LayerSource(Protocol):
    """What the engine needs to know of a cache layer."""

    position: int  # among the offloaded layers
    version: int  # changes with the stored blocks
    is_segmented: bool  # attention takes its chunks one by one, so they need no layer buffer

    @property
    def stored_kv_bytes(self) -> int: ...
    def chunks(self) -> Sequence[Chunk]: ...
    def expects_another_step(self) -> bool: ...


class CacheSource(Protocol):
    """What the engine needs to know of a cache."""

    @property
    def sources(self) -> Sequence[LayerSource]: ...


@dataclass(slots=True, eq=False)
class _Slot:
    room: DeviceMemory
    released: Event  # compute is done with it
    is_busy: bool = False  # holds a chunk that compute has not released


@dataclass(slots=True, eq=False)
class LayerBuffer(D2HSlot):
    """Device memory for one layer's whole K/V in stored row order, or for what a layer stores during a prefill."""

    released: Event = field(kw_only=True)

    def empty(self) -> None:
        """Hold no memory any more."""
        self.bytes = self.bytes[:0].clone()


@dataclass(slots=True, eq=False)
class Job:
    """One layer's chunks on their way to the device."""

    layer: LayerSource
    version: int
    chunks: Sequence[Chunk]
    buffer: LayerBuffer | None  # None: every chunk stays in its slot
    ready: list[Event] = field(default_factory=list)  # of the chunks issued so far
    slots: list[_Slot | None] = field(default_factory=list)

    @property
    def num_activation_chunks(self) -> int:
        return sum(chunk.form == "activation" for chunk in self.chunks)


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
        self.held_bytes: dict[str, int] = {}  # device memory by purpose
        self.peak_bytes = 0
        self._slots: list[_Slot] = []
        self._buffers: list[LayerBuffer] = []
        self._gathered: torch.Tensor | None = None
        self._scratch: DeviceMemory | None = None
        self.write_back = WriteBack(backend)
        self.stage_limit_bytes: int | None = None  # what both stages together may take
        self._next_slot = self._next_buffer = 0
        self._jobs: deque[Job] = deque()
        self._current: Job | None = None  # begun and not finished; the first of the jobs
        self._cache: CacheSource | None = None
        self._next_position = 0
        self._gap: object | None = None  # the span from a step's last attention to the next one's first
        self.last_h2d: Event | None = None

    # ---- device memory -------------------------------------------------------------------------------------------

    def configure(
        self, *, slot_bytes: int, num_slots: int, buffer_bytes: int, d2h_slot_bytes: int, scratch_bytes: int = 0
    ) -> None:
        """Make the ring, the two layer buffers, the D2H slots and the scratch exactly that large."""
        self.drop()
        self.release_stages()
        if [slot.room.bytes.numel() for slot in self._slots] != [slot_bytes] * num_slots:
            slots = self._replace("slots", [slot.room for slot in self._slots], num_slots, slot_bytes)
            self._slots = [_Slot(DeviceMemory(data), released=self.backend.release()) for data in slots]
        if [buffer.bytes.numel() for buffer in self._buffers] != [buffer_bytes] * 2:
            for buffer in self._buffers:
                buffer.take_over(self.backend)
            buffers = self._replace("layer_buffers", self._buffers, 2, buffer_bytes)
            self._buffers = [LayerBuffer(data, released=self.backend.release()) for data in buffers]
        self.account("d2h_slots", 0)
        self.write_back.configure(d2h_slot_bytes)
        self.account("d2h_slots", 2 * d2h_slot_bytes)
        if self._scratch is None or self._scratch.bytes.numel() != scratch_bytes:
            self._scratch = None
            self.account("scratch", scratch_bytes)
            self._scratch = DeviceMemory(self.backend.allocate_device(scratch_bytes))
        self._next_slot = self._next_buffer = 0

    def _replace(
        self, purpose: str, old: Sequence[DeviceMemory | LayerBuffer], count: int, num_bytes: int
    ) -> list[torch.Tensor]:
        """New buffers of one purpose; the old ones go first, so that both never exist at once."""
        for holder in old:
            self.backend.free_device(holder.bytes)
            holder.empty()
        self.account(purpose, 0)
        made = [self.backend.allocate_device(num_bytes) for _ in range(count)]
        self.account(purpose, num_bytes * count)
        return made

    def account(self, purpose: str, num_bytes: int) -> None:
        """Record how much device memory a purpose holds now."""
        self.held_bytes[purpose] = num_bytes
        if not num_bytes:
            del self.held_bytes[purpose]
        self.peak_bytes = max(self.peak_bytes, sum(self.held_bytes.values()))

    def take_peak(self) -> int:
        """The most device memory held since the last call."""
        peak, self.peak_bytes = self.peak_bytes, sum(self.held_bytes.values())
        return peak

    def ensure_buffers(self, num_bytes: int) -> None:
        """Layer buffers of at least that size, for caches whose maximum length was not known."""
        if self.buffer_bytes < num_bytes:
            self.resize_buffers(max(num_bytes, 2 * self.buffer_bytes))

    @property
    def buffer_bytes(self) -> int:
        """Size of each of the two layer buffers."""
        return self._buffers[0].bytes.numel()

    def resize_buffers(self, num_bytes: int) -> None:
        """Layer buffers of exactly that size; all else stays as it is."""
        self.configure(
            slot_bytes=self._slots[0].room.bytes.numel() if self._slots else 0,
            num_slots=len(self._slots),
            buffer_bytes=num_bytes,
            d2h_slot_bytes=self.write_back.slot_bytes,
            scratch_bytes=0 if self._scratch is None else self._scratch.bytes.numel(),
        )

    @property
    def scratch(self) -> DeviceMemory:
        """Memory that compute alone uses: for K and V of a recomputed chunk."""
        assert self._scratch is not None
        return self._scratch

    def measuring_room(self) -> torch.Tensor:
        """Where recomputation writes in a step, to time it while nothing is in flight; synchronise before and after."""
        assert not self._jobs
        room = self._buffers[0].bytes if self._buffers[0].bytes.numel() else self.scratch.bytes
        self.backend.compute(writes=(room,))
        return room

    def idle_slots(self) -> list[torch.Tensor]:
        """The ring, to time attention and copies in while nothing is in flight; synchronise before and after."""
        assert not self._jobs
        slots = [slot.room.bytes for slot in self._slots]
        self.backend.compute(writes=slots)
        return slots

    def gather_buffer(self, num_bytes: int) -> torch.Tensor:
        """The third layer buffer, in which beams find their rows in logical order; used by compute alone."""
        if self._gathered is None or self._gathered.numel() < num_bytes:
            self._gathered = self.backend.allocate_device(max(num_bytes, self._buffers[0].bytes.numel()))
            self.account("gather_buffer", self._gathered.numel())
        return self._gathered

    def start_layer_write_back(self, num_bytes: int) -> WriteBack:
        """A layer is about to store blocks of that many bytes; what stores them, with the layer buffers if idle."""
        is_idle = not self._jobs and self._cache is None
        self.write_back.start_layer(num_bytes, self._buffers if is_idle else (), self.stage_limit_bytes)
        self.account("stages", self.write_back.stage_bytes)
        return self.write_back

    def release_stages(self) -> None:
        """Give back what a prefill staged its blocks in."""
        self.write_back.release_stages()
        self.account("stages", 0)

    # ---- host to device ------------------------------------------------------------------------------------------

    def begin(self, cache: CacheSource, layer: LayerSource, *, in_layer_buffer: bool) -> Job:
        """The job that brings `layer` to the device; prefetched if the order was as expected, else started now.

        Args:
            cache: whose layer.
            layer: the layer.
            in_layer_buffer: whether its K and V are put together there; else `arriving` gives every chunk.
        """
        if self._current is not None and any(slot is not None and slot.is_busy for slot in self._current.slots):
            self.drop()  # an exception ended the last layer in the middle
        self.finish_current()  # where the last attention module had no hook
        head = self._jobs[0] if self._jobs else None
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

    def arriving(self, job: Job, between: Callable[[], None] = lambda: None) -> Iterator[tuple[Chunk, DeviceMemory]]:
        """Chunks in order of transfer, each at the beginning of its slot on the device when yielded.

        With a layer buffer only activation chunks: kv chunks land there by themselves, all of them by the end. The
        caller issues what it does with a chunk before asking for the next; `between` is called when a chunk's slot can
        be filled again, to issue work that needs no slot.
        """
        for idx, chunk in enumerate(job.chunks):
            while len(job.ready) <= idx:
                issued = self._issue(job)
                assert issued, "a slot was held back"
            lands_by_itself = chunk.form == "kv" and job.buffer is not None
            if lands_by_itself and idx + 1 < len(job.chunks) and self.overlap:
                continue  # the queue is in order: waiting for what comes behind is enough
            gate = idx
            if self.schedule == "kvpr" and chunk.form == "activation" and self.overlap:
                # Activations travel first, and are recomputed once as many have arrived as the slots hold.
                gate = max(idx, min(job.num_activation_chunks, len(self._slots)) - 1)
                while len(job.ready) <= gate:
                    if not self._issue(job):
                        gate = len(job.ready) - 1
            self.backend.compute_waits(job.ready[gate])
            slot = job.slots[idx]
            if slot is not None:
                yield chunk, slot.room
                slot.released = self.backend.release(slot.room.part(chunk.source.numel()))
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
        busy = [slot for slot in self._slots if slot.is_busy]
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

    def forget(self, cache: CacheSource) -> None:
        """Drop what was prefetched for a cache that goes away; that of another stays."""
        if self._cache is cache:
            self.drop()

    def _new_job(self, in_layer_buffer: bool | None = None) -> Job:
        assert self._cache is not None
        layer = self._cache.sources[self._next_position]
        self._next_position = (self._next_position + 1) % len(self._cache.sources)
        buffer = None
        if (not layer.is_segmented) if in_layer_buffer is None else in_layer_buffer:
            buffer = self._buffers[self._next_buffer]
            self._next_buffer = (self._next_buffer + 1) % len(self._buffers)
        job = Job(layer, layer.version, layer.chunks(), buffer)
        self._jobs.append(job)
        return job

    def _pump(self) -> None:
        """Issue every copy whose buffer is free, in order."""
        if not self.overlap or self._cache is None:
            return
        while True:
            for job in self._jobs:
                if len(job.ready) < len(job.chunks):
                    break
            else:
                if not self._may_look_ahead():
                    return
                self._new_job()
                continue
            if not self._issue(job):
                return

    def _may_look_ahead(self) -> bool:
        """Whether the next layer's job may start: a layer buffer is free and the layer's own update is over."""
        assert self._cache is not None
        layer = self._cache.sources[self._next_position]
        waits_for_attention = self.schedule == "kvpr" and any(chunk.form == "activation" for chunk in layer.chunks())
        if waits_for_attention and self._jobs:
            return False
        if not layer.is_segmented:
            if sum(job.buffer is not None for job in self._jobs) >= len(self._buffers):
                return False
            if layer.chunks() and layer.stored_kv_bytes > self.buffer_bytes:
                return False  # buffers grow when it is asked for
        return layer.expects_another_step() and all(job.layer is not layer for job in self._jobs)

    def _issue(self, job: Job) -> bool:
        """Queue the next copy of `job`; False if its slot is still in use."""
        chunk = job.chunks[len(job.ready)]
        slot: _Slot | None = None
        if chunk.form == "activation" or job.buffer is None:
            slot = self._slots[self._next_slot]
            if slot.is_busy:
                return False
            slot.is_busy = True
        num_bytes = chunk.source.numel()
        after = [chunk.blocks[-1].written]  # blocks are written in order, so the last is enough
        if slot is not None:
            self._next_slot = (self._next_slot + 1) % len(self._slots)
            target = slot.room.part(num_bytes)
            after.append(slot.released)
        else:
            assert job.buffer is not None
            start = chunk.landing_offset
            target = job.buffer.bytes[start : start + num_bytes]
            after.append(job.buffer.released)
            if job.buffer.written is not None:
                after.append(job.buffer.written)
        if not self.overlap:
            after.append(self.backend.release())
        self.last_h2d = self.backend.copy_to_device(target, chunk.source, after)
        job.ready.append(self.last_h2d)
        job.slots.append(slot)
        return True

    def fetch(self, block: Block) -> torch.Tensor:
        """One block's bytes in device memory of their own, for a crop that reopens it."""
        assert block.host is not None
        data = self.backend.allocate_device(block.num_bytes)
        fresh = self.backend.release()  # the memory may have been used by earlier compute
        self.last_h2d = self.backend.copy_to_device(data, block.host, [fresh, block.written])
        self.backend.compute_waits(self.last_h2d)
        self.backend.compute(reads=(data,))
        return data

    def close(self) -> None:
        """Drop what was prefetched and give the device memory back."""
        self.drop()
        self._slots, self._buffers = [], []
        self.write_back.close()
        self._gathered = self._scratch = None
        self.held_bytes.clear()
