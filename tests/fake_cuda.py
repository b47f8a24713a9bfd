"""A CUDA device that is not there: its memory is the CPU's, its streams are lists of copies, its clock is the host's.

Owns what stands below PyTorch's own Python of `torch.cuda`, so that the code above runs as on a real device: its
handling of devices and indices, the CUDA backend, the benchmarks and their scripts, and the kernels, interpreted.

    tensor      a wrapper that says "cuda:0" around a CPU tensor; an operation on it and a CPU tensor of one dimension
                or more fails, as on a device, and results of operations on wrappers are wrappers
    memory      what live wrappers hold, in whole 512 bytes; allocations above the limit raise `OutOfMemoryError`
    stream      compute runs at once. A copy between host and device on a stream of the caller's waits, if the stream
                is "lazy", until something needs it: an event behind it, a synchronisation, the next operation there.
                So whoever reads or writes too early finds the old bytes, whatever the timing
    pinning     whole pages, each at most once; a failed call is the "last error" that the next operation raises

It proves nothing about speed, numerics or the order of compute; tests/test_gpu.py does that on a device.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kvoffload import ops
from kvoffload.kernels import reference

DEVICE = torch.device("cuda", 0)
NAME = "NVIDIA Fake"
PAGE_BYTES = 4096
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, ALREADY_REGISTERED, NOT_REGISTERED = 0, 1, 2, 712, 713
RealStream, RealEvent, RealGenerator = torch.cuda.Stream, torch.cuda.Event, torch.Generator
Policy = Literal["eager", "lazy"]
_aten: Any = torch.ops.aten
TAKES_CPU_OPERANDS = {
    _aten.copy_,
    _aten._to_copy,
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
}
NO_KERNELS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.detach, _aten.alias}


def _each_tensor(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Arguments or results with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each_tensor(change, one) for one in value)
    if isinstance(value, slice):
        return slice(*(_each_tensor(change, one) for one in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {name: _each_tensor(change, one) for name, one in value.items()}
    return value


def _inner(value: Any) -> Any:
    return _each_tensor(lambda one: one.inner if isinstance(one, CudaTensor) else one, value)


class _Allocation:
    """Device memory of one storage; alive as long as any tensor that lies in it."""

    def __init__(self, memory: Memory, num_bytes: int) -> None:
        self._memory, self._num_bytes = memory, num_bytes
        memory.allocated_bytes += num_bytes
        memory.peak_bytes = max(memory.peak_bytes, memory.allocated_bytes)

    def __del__(self) -> None:
        self._memory.allocated_bytes -= self._num_bytes


class Memory:
    """The device's memory: how much there is, and what is in use."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.others_bytes = 0  # of other processes
        self.fraction = 1.0
        self.allocated_bytes = self.peak_bytes = 0
        self._allocations: weakref.WeakValueDictionary[int, _Allocation] = weakref.WeakValueDictionary()

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.others_bytes - self.allocated_bytes

    def of(self, tensor: torch.Tensor) -> _Allocation:
        """The allocation that a CPU tensor stands for.

        Raises:
            OutOfMemoryError: a new one does not fit.
        """
        storage = tensor.untyped_storage()
        found = self._allocations.get(storage._cdata)
        if found is None:
            num_bytes = -(-storage.nbytes() // 512) * 512
            room = min(self.free_bytes, int(self.fraction * self.total_bytes) - self.allocated_bytes)
            if num_bytes > room:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {num_bytes} bytes wanted, {room} left")
            found = self._allocations[storage._cdata] = _Allocation(self, num_bytes)
        return found


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on the device."""

    inner: torch.Tensor
    allocation: _Allocation
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory) -> CudaTensor:
        allocation = memory.of(inner)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner, made.allocation = inner, allocation
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor of a fake device that is gone")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Event(RealEvent):  # type: ignore[misc]
    """As `torch.cuda.Event`: only what that has, and what it refuses."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        return object.__new__(cls)

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._has_timing = enable_timing
        self._stream: Stream | None = None
        self._at_s: float | None = None  # when it completed

    def record(self, stream: Any = None) -> None:
        self._stream, self._at_s = stream or torch.cuda.current_stream(), None
        self._stream._add(("record", self))

    def wait(self, stream: Any = None) -> None:
        (stream or torch.cuda.current_stream()).wait_event(self)

    def query(self) -> bool:
        return self._stream is None or self._at_s is not None

    def _complete(self) -> None:
        """Run what it is behind; one that was never recorded is no wait."""
        if self._stream is not None and self._at_s is None:
            self._stream._run_until(self)

    def synchronize(self) -> None:
        _device().count("Event.synchronize")
        self._complete()

    def elapsed_time(self, end_event: Any) -> float:
        if not (self._has_timing and end_event._has_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._at_s is None or end_event._at_s is None:
            raise RuntimeError("CUDA error: device not ready: an event has not completed, or was never recorded")
        return (end_event._at_s - self._at_s) * 1e3


class Stream(RealStream):  # type: ignore[misc]
    """As `torch.cuda.Stream`: a queue of copies, records and waits."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        fake = _device()
        if "stream_id" in kwargs:  # an existing one
            return fake.streams[kwargs["stream_id"]] if kwargs["device_index"] == 0 else _stream_of_another_device()
        with torch.cuda.device(device):
            assert fake.current_device == 0, "a stream of another device than the tensors'"
        made = object.__new__(cls)
        made.stream_id, made._queue = len(fake.streams), deque()
        made._policy = "eager" if not fake.streams else fake.policy_of(made.stream_id)
        fake.streams.append(made)
        return made

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        pass

    stream_id: int
    _queue: deque[tuple[str, Any]]
    _policy: Policy
    device = DEVICE
    device_index = 0
    device_type = 1

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __enter__(self) -> Stream:
        self._before = torch.cuda.current_stream()
        torch.cuda.set_stream(self)
        return self

    def __exit__(self, *args: Any) -> None:
        torch.cuda.set_stream(self._before)

    def _add(self, item: tuple[str, Any]) -> None:
        self._queue.append(item)
        if self._policy == "eager" or all(kind == "record" for kind, _ in self._queue):
            self._run()

    def _run(self) -> None:
        """Everything that was queued."""
        while self._queue:
            self._run_next()

    def _run_until(self, event: Event) -> None:
        while event._at_s is None:
            self._run_next()

    def _run_next(self) -> None:
        kind, what = self._queue.popleft()
        if kind == "wait":
            what._complete()
        elif kind == "copy":
            with _disable_current_modes():
                what()
        else:
            what._at_s = time.perf_counter()

    def wait_event(self, event: Any) -> None:
        _device().log.append((self.stream_id, "waits"))
        self._add(("wait", event))

    def wait_stream(self, stream: Any) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return not self._queue

    def synchronize(self) -> None:
        _device().count("Stream.synchronize")
        self._run()


def _stream_of_another_device() -> Stream:
    """May be left and come back to, but not used."""
    made = object.__new__(Stream)
    made.stream_id, made.device_index, made.device = 0, 1, torch.device("cuda", 1)
    return made


class Generator(RealGenerator):  # type: ignore[misc]
    """Random numbers of the device come from the CPU's generator."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        torch.device(device)  # checks it
        return super().__new__(cls)


class Properties(SimpleNamespace):
    """As `torch.cuda.get_device_properties` gives them."""

    name = NAME
    major, minor = 9, 0
    multi_processor_count = 4
    pci_domain_id, pci_bus_id, pci_device_id = 0, 0x1B, 0
    total_memory: int


class FakeCuda:
    """The state of the device, and what `torch._C` offers of it.

    Args:
        policies: of the streams in the order they are made, repeated.
        total_bytes: device memory.
    """

    def __init__(self, *policies: Policy, total_bytes: int) -> None:
        self.memory = Memory(total_bytes)
        self.policies = policies or ("lazy",)
        self.streams: list[Stream] = []
        self.current = 0  # of the streams
        self.current_device = 0
        self.registered: dict[int, int] = {}  # address -> bytes
        self.lockable_bytes: int | None = None
        self.last_error: str | None = None
        self.log: list[tuple[int, str]] = []  # stream and what happened
        self.calls: Counter[str] = Counter()
        self.names: set[str] = set()  # in `torch._C`

    def policy_of(self, stream_id: int) -> Policy:
        return self.policies[(stream_id - 1) % len(self.policies)]

    def count(self, name: str) -> None:
        self.calls[name] += 1

    # ---- operations ----------------------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation of PyTorch, on the host, on the device or between both."""
        given: list[torch.Tensor] = []
        _each_tensor(given.append, (args, kwargs))
        wrappers = [one for one in given if isinstance(one, CudaTensor)]
        packet = func.overloadpacket
        on_device, kwargs = bool(wrappers), dict(kwargs)
        if kwargs.get("device") is not None:
            on_device = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        if not on_device and not wrappers:
            return func(*args, **kwargs)
        plain = [one for one in given if not isinstance(one, CudaTensor)]
        if wrappers and packet not in TAKES_CPU_OPERANDS and any(one.dim() for one in plain):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, cuda:0 and cpu")
        if packet is _aten.record_stream:
            return None
        if not (func.is_view or packet in NO_KERNELS):
            self._raise_last_error(func)
        inner_of = {id(one.inner): one for one in wrappers}
        args, kwargs = _inner((args, kwargs))
        stream = self.streams[self.current]
        if packet is _aten.copy_ and (plain or stream._policy == "lazy"):
            self.count("copy" if plain else "device copy")
            self.log.append((self.current, "copies"))
            stream._add(("copy", lambda: func(*args, **kwargs)))
            if plain and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                stream._run()
            return given[0]
        stream._run()
        if wrappers and (packet is _aten._local_scalar_dense or not on_device):
            self.count("device to host, blocking")
        if packet is _aten.histc:  # the CPU's wants floating point
            args = (args[0].float(), *args[1:])
        found = func(*args, **kwargs)

        def wrapped(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in inner_of:
                wrapper = inner_of[id(tensor)]
                assert wrapper.shape == tensor.shape, f"{func} changes shapes in place"
                return wrapper
            return CudaTensor(tensor, self.memory) if on_device else tensor

        return _each_tensor(wrapped, found)

    def fused(self, func: Any, args: Any, kwargs: Any) -> CudaTensor:
        """One kernel, whatever the CPU makes of it: no device memory but that of its result."""
        self._raise_last_error(func)
        self.streams[self.current]._run()
        args, kwargs = _inner((args, kwargs))
        with _disable_current_modes():
            return CudaTensor(func(*args, **kwargs), self.memory)

    def index(self, func: Any, tensor: CudaTensor, *args: Any) -> Any:
        """`tensor[index]` and `tensor[index] = value`."""
        self.streams[self.current]._run()
        args = _inner(args)
        # as a view would be, an inference tensor only if this is one
        with _disable_current_modes(), torch.inference_mode(tensor.is_inference()):
            found = func(tensor.inner, *args)
            return found if found is None else CudaTensor(found, self.memory)

    def _raise_last_error(self, func: Any) -> None:
        if self.last_error is not None:
            error, self.last_error = self.last_error, None
            raise RuntimeError(f"CUDA error: {error}, reported by {func}")

    def synchronize(self) -> None:
        self.count("synchronize")
        for stream in self.streams:
            stream._run()

    # ---- pinning -------------------------------------------------------------------------------------------------

    def host_register(self, address: int, num_bytes: int, flags: int) -> int:
        code = SUCCESS
        if num_bytes <= 0:
            code = INVALID_VALUE
        elif any(_pages(address, num_bytes) & _pages(*other) for other in self.registered.items()):
            code = ALREADY_REGISTERED
        elif self.lockable_bytes is not None and num_bytes + sum(self.registered.values()) > self.lockable_bytes:
            code = OUT_OF_MEMORY
        if code == SUCCESS:
            self.registered[address] = num_bytes
        else:
            self.last_error = f"code {code}"
        return code

    def host_unregister(self, address: int) -> int:
        assert not any(stream._queue for stream in self.streams), "a copy may still use memory that is unpinned"
        if self.registered.pop(address, None) is None:
            self.last_error = f"code {NOT_REGISTERED}"
            return NOT_REGISTERED
        return SUCCESS

    # ---- what PyTorch's Python calls -----------------------------------------------------------------------------

    def statistics(self, device: int) -> dict[str, Any]:
        held = {"all": {"current": self.memory.allocated_bytes, "peak": self.memory.peak_bytes}}
        return {"allocated_bytes": held, "reserved_bytes": held}

    def reset_peak(self, device: int) -> None:
        self.memory.peak_bytes = self.memory.allocated_bytes

    def set_fraction(self, fraction: float, device: int) -> None:
        self.memory.fraction = fraction

    def exchange_device(self, device: int) -> int:
        if device < 0:  # a `torch.cuda.device` that is to change nothing
            return self.current_device
        before, self.current_device = self.current_device, device
        return before

    def current_stream(self, device: int) -> tuple[int, int, int]:
        return (self.current if device == 0 else 0), device, 1

    def set_stream(self, stream_id: int, device_index: int, device_type: int) -> None:
        self.current_device = device_index
        if device_index == 0:
            self.current = stream_id

    def properties(self, device: int) -> Properties:
        return Properties(total_memory=self.memory.total_bytes)

    def get_free(self, device: int) -> tuple[int, int]:
        return self.memory.free_bytes, self.memory.total_bytes


def _pages(address: int, num_bytes: int) -> set[int]:
    return set(range(address // PAGE_BYTES, -(-(address + num_bytes) // PAGE_BYTES)))


class _Mode(TorchDispatchMode):
    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._fake.run(func, args, kwargs or {})


class _Index(TorchFunctionMode):
    """Does without what PyTorch's C++ asks the CUDA runtime for: the index of "cuda", and the device when indexing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], CudaTensor):
            return _device().index(func, *args)
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], CudaTensor):
            return _device().fused(func, args, kwargs)
        if func in UNGUARDED and isinstance(args[0], CudaTensor):
            return UNGUARDED[func](*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0].to(DEVICE)
        device = _indexed(kwargs.pop("device", None))
        if func in (torch.tensor, torch.as_tensor) and device == DEVICE:
            return func(*args, **kwargs).to(DEVICE)
        if device is not None:
            kwargs["device"] = device
        return func(*(_indexed(one) for one in args), **kwargs)


def _number(as_what: Callable[[Any], Any]) -> Callable[[torch.Tensor], Any]:
    return lambda tensor: as_what(_aten._local_scalar_dense(tensor.view(())))


# Methods whose C++ asks the CUDA runtime for the current device before the operation, and the operation.
UNGUARDED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__invert__: _aten.bitwise_not,
    torch.Tensor.contiguous: _aten.contiguous,
    torch.Tensor.copy_: _aten.copy_,
    torch.Tensor.nonzero: _aten.nonzero,
    torch.Tensor.item: _number(lambda value: value),
    torch.Tensor.__bool__: _number(bool),
    torch.Tensor.__int__: _number(int),
    torch.Tensor.__float__: _number(float),
    torch.Tensor.__index__: _number(int),
}


def _indexed(value: Any) -> Any:
    is_bare = isinstance(value, (str, torch.device)) and str(value) == "cuda"
    return DEVICE if is_bare else value


_active: list[FakeCuda] = []


def _device() -> FakeCuda:
    return _active[-1]


@contextlib.contextmanager
def fake_cuda(*policies: Policy, total_bytes: int = 2**34) -> Iterator[FakeCuda]:
    """PyTorch as if it had a CUDA device, and a second one that nobody may touch.

    Args:
        policies: "lazy" or "eager" for each stream that is made, in turn.
        total_bytes: device memory.
    """
    fake = FakeCuda(*policies, total_bytes=total_bytes)
    cudart = SimpleNamespace(
        cudaHostRegister=fake.host_register, cudaHostUnregister=fake.host_unregister, cudaMemGetInfo=fake.get_free
    )
    below: dict[str, Callable[..., Any]] = {
        "_cuda_getDevice": lambda: fake.current_device,
        "_cuda_setDevice": fake.exchange_device,
        "_cuda_getDeviceCount": lambda: 2,
        "_cuda_synchronize": fake.synchronize,
        "_cuda_memoryStats": fake.statistics,
        "_cuda_resetPeakMemoryStats": fake.reset_peak,
        "_cuda_emptyCache": lambda: fake.count("empty_cache"),
        "_cuda_getMemoryFraction": lambda device: fake.memory.fraction,
        "_cuda_setMemoryFraction": fake.set_fraction,
        "_cuda_getCurrentRawStream": lambda device: fake.current,
        "_cuda_getCurrentStream": fake.current_stream,
        "_cuda_getDefaultStream": lambda device: (0, 0, 1),
        "_cuda_setStream": fake.set_stream,
    }
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, function in below.items():
            patch.setattr(torch._C, name, function, raising=False)
            fake.names.add(name)
        above: dict[str, Any] = {
            "_initialized": True,
            "_cudart": cudart,
            "_exchange_device": fake.exchange_device,
            "_maybe_exchange_device": fake.exchange_device,
            "_get_device_properties": fake.properties,
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "default_generators": (RealGenerator(), RealGenerator()),
            "Stream": Stream,
            "Event": Event,
        }
        for name, value in above.items():
            patch.setattr(torch.cuda, name, value, raising=False)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "Stream", Stream)
        _interpret_kernels(patch)
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters become wrappers
        _active.append(fake)
        Stream()  # the default stream
        try:
            with _Index(), _Mode(fake):
                yield fake
        finally:
            _active.pop()
            torch.__future__.set_swap_module_params_on_conversion(swaps)


class _Twins:
    """Stands for a module of kernels: the twins in `kernels/reference.py`, each as one kernel."""

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given: list[torch.Tensor] = []
            _each_tensor(given.append, (args, kwargs))
            _on_the_device(given)
            _device().streams[_device().current]._run()
            args, kwargs = _inner((args, kwargs))
            with _disable_current_modes():
                getattr(reference, operation)(*args, **kwargs)

        return launch


def use_twins(patch: pytest.MonkeyPatch) -> None:
    """The twins instead of interpreted kernels, which are slow."""
    patch.setattr(ops, "_triton", lambda name, tensor: _Twins() if tensor.is_cuda else None)


def _on_the_device(tensors: Iterable[torch.Tensor]) -> None:
    if not all(isinstance(one, CudaTensor) for one in tensors):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    assert _device().current_device == 0, "Triton launches on the current device"
    _device().count("kernel")


def _interpret_kernels(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter gets the CPU tensors inside the wrappers, and refuses any that are not on the device."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    launch = GridExecutor.__call__

    def on_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        _on_the_device(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))
        _device().streams[_device().current]._run()
        args, kwargs = _inner((args, kwargs))
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    patch.setattr(GridExecutor, "__call__", on_device)
