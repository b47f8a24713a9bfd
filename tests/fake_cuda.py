"""A CUDA device that is not there: its memory is the CPU's, its streams are lists of copies.

Stands below PyTorch's own Python of `torch.cuda`, so that the code above runs as on a real device: its handling of
devices and indices, the CUDA backend, the benchmarks and their scripts, and the kernels, interpreted. Owns operations,
pinning and what of PyTorch is replaced; `fake_cuda_tensors`, `fake_cuda_streams`, `fake_cuda_kernels` and
`fake_cuda_clock` own the rest.

    tensor      a wrapper that says "cuda:0" around a CPU tensor; an operation on it and a CPU tensor of one dimension
                or more fails, as on a device, and results of operations on wrappers are wrappers
    memory      what live wrappers hold, in whole 512 bytes; allocations above the limit raise `OutOfMemoryError`
    stream      compute runs at once. A copy between host and device on a stream of the caller's waits, if the stream
                is "lazy", until something needs it: an event behind it, a synchronisation, the next operation there.
                So whoever reads or writes too early finds the old bytes, whatever the timing
    pinning     whole pages, each at most once; a failed call is the "last error" that the next operation raises

    time        the host's, and nothing takes any; or arithmetic by given speeds, see `fake_cuda_clock`

It proves nothing about speed, numerics or the order of compute; tests/test_gpu.py does that on a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda_clock import Clock, Speeds
from fake_cuda_kernels import interpret_kernels
from fake_cuda_streams import Event, Policy, Stream, Streams, activated
from fake_cuda_tensors import DEVICE, CudaTensor, Memory, each_tensor, inner
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kvoffload.backend import pinned

NAME = "NVIDIA Fake"
PAGE_BYTES = 4096
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, ALREADY_REGISTERED, NOT_REGISTERED = 0, 1, 2, 712, 713
RealGenerator = torch.Generator
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
        clock: see `Streams`.
    """

    def __init__(self, *policies: Policy, total_bytes: int, clock: Clock | None = None) -> None:
        self.memory = Memory(total_bytes)
        self.streams = Streams(*policies, clock=clock)
        self.registered: dict[int, int] = {}  # address -> bytes
        self.lockable_bytes: int | None = None
        self.last_error: str | None = None
        self.names: set[str] = set()  # in `torch._C`

    # ---- operations ----------------------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation of PyTorch, on the host, on the device or between both."""
        given: list[torch.Tensor] = []
        each_tensor(given.append, (args, kwargs))
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
        args, kwargs = inner((args, kwargs))
        if packet is _aten.copy_ and (plain or self.streams.is_lazy):
            self.streams.count("copy" if plain else "device copy")
            num_bytes = args[0].numel() * args[0].element_size()
            self.streams.launch(
                lambda clock: num_bytes / clock.speeds.link_bytes_per_s if plain else clock.speeds.operation_s(args[:2])
            )
            is_blocking = bool(plain) and not (kwargs.get("non_blocking") or args[2:] == (True,))
            self.streams.copy(lambda: func(*args, **kwargs), is_blocking=is_blocking)
            return given[0]
        self.streams.run()
        if wrappers and (packet is _aten._local_scalar_dense or not on_device):
            self.streams.count("device to host, blocking")
            self.streams.host_waits_for_current()
        if packet is _aten.histc:  # the CPU's wants floating point
            args = (args[0].float(), *args[1:])
        found = func(*args, **kwargs)
        if on_device and not (func.is_view or packet in NO_KERNELS):
            self._launch(packet, args, kwargs, found)

        def wrapped(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in inner_of:
                wrapper = inner_of[id(tensor)]
                assert wrapper.shape == tensor.shape, f"{func} changes shapes in place"
                return wrapper
            return CudaTensor(tensor, self.memory) if on_device else tensor

        return each_tensor(wrapped, found)

    def fused(self, func: Any, args: Any, kwargs: Any) -> CudaTensor:
        """One kernel, whatever the CPU makes of it: no device memory but that of its result."""
        self._raise_last_error(func)
        self.streams.run()
        args, kwargs = inner((args, kwargs))
        with _disable_current_modes():
            found = func(*args, **kwargs)
            self._launch(None, args, kwargs, found)
            return CudaTensor(found, self.memory)

    def _launch(self, packet: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        given: dict[int, torch.Tensor] = {}
        each_tensor(lambda one: given.setdefault(id(one), one), (args, kwargs, found))
        if packet in (_aten.mm, _aten.addmm):
            x, weight = args[-2:]
            self.streams.launch(lambda clock: clock.speeds.product_s(x, weight, found))
        else:
            self.streams.launch(lambda clock: clock.speeds.operation_s(given.values()))

    def index(self, func: Any, tensor: CudaTensor, *args: Any) -> Any:
        """`tensor[index]` and `tensor[index] = value`."""
        self.streams.run()
        args = inner(args)
        # as a view would be, an inference tensor only if this is one
        with _disable_current_modes(), torch.inference_mode(tensor.is_inference()):
            found = func(tensor.inner, *args)
            return found if found is None else CudaTensor(found, self.memory)

    def _raise_last_error(self, func: Any) -> None:
        if self.last_error is not None:
            error, self.last_error = self.last_error, None
            raise RuntimeError(f"CUDA error: {error}, reported by {func}")

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
        assert self.streams.is_idle, "a copy may still use memory that is unpinned"
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

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], CudaTensor):
            return self._fake.index(func, *args)
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], CudaTensor):
            return self._fake.fused(func, args, kwargs)
        if func in UNGUARDED and isinstance(args[0], CudaTensor):
            return UNGUARDED[func](*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0].to(DEVICE)
        if func == SET_DATA and any(isinstance(one, CudaTensor) for one in args):
            return _set_data(*args)
        device = _indexed(kwargs.pop("device", None))
        if func in (torch.tensor, torch.as_tensor) and device == DEVICE:
            return func(*args, **kwargs).to(DEVICE)
        if device is not None:
            kwargs["device"] = device
        return func(*(_indexed(one) for one in args), **kwargs)


SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """`tensor.data = data` from one device to the other, which C++ refuses for a wrapper and a plain tensor."""
    moved = data.detach()
    if isinstance(tensor, torch.nn.Parameter):
        moved = torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, moved)  # the same object is the other one now


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


@contextlib.contextmanager
def fake_cuda(
    *policies: Policy, total_bytes: int = 2**34, speeds: Speeds | None = None, keeps_pinned: bool = False
) -> Iterator[FakeCuda]:
    """PyTorch as if it had a CUDA device, and a second one that nobody may touch.

    Args:
        policies: "lazy" or "eager" for each stream that is made, in turn.
        total_bytes: device memory.
        speeds: of device, link and host: then `time` tells the time of the fake. None: nothing takes any time.
        keeps_pinned: whether pinned memory is kept from one session to the next; never from one fake to the next.
    """
    clock = None if speeds is None else Clock(speeds)
    fake = FakeCuda(*policies, total_bytes=total_bytes, clock=clock)
    cudart = SimpleNamespace(
        cudaHostRegister=fake.host_register, cudaHostUnregister=fake.host_unregister, cudaMemGetInfo=fake.get_free
    )
    below: dict[str, Callable[..., Any]] = {
        "_cuda_getDevice": lambda: fake.streams.current_device,
        "_cuda_setDevice": fake.streams.exchange_device,
        "_cuda_getDeviceCount": lambda: 2,
        "_cuda_synchronize": fake.streams.synchronize,
        "_cuda_sleep": fake.streams.delay,
        "_cuda_memoryStats": fake.statistics,
        "_cuda_resetPeakMemoryStats": fake.reset_peak,
        "_cuda_emptyCache": lambda: fake.streams.count("empty_cache"),
        "_host_emptyCache": lambda: fake.streams.count("empty host cache"),
        "_cuda_getMemoryFraction": lambda device: fake.memory.fraction,
        "_cuda_setMemoryFraction": fake.set_fraction,
        "_cuda_getCurrentRawStream": lambda device: fake.streams.current,
        "_cuda_getCurrentStream": fake.streams.current_stream,
        "_cuda_getDefaultStream": lambda device: (0, 0, 1),
        "_cuda_setStream": fake.streams.set_stream,
    }
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, function in below.items():
            patch.setattr(torch._C, name, function, raising=False)
            fake.names.add(name)
        above: dict[str, Any] = {
            "_initialized": True,
            "_cudart": cudart,
            "_exchange_device": fake.streams.exchange_device,
            "_maybe_exchange_device": fake.streams.exchange_device,
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
        interpret_kernels(patch)
        if not keeps_pinned:
            patch.setattr(pinned, "KEPT_SHARE", 0.0)
        if clock is not None:
            clock.install(patch)
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters become wrappers
        try:
            with activated(fake.streams), _Index(fake), _Mode(fake):
                try:
                    yield fake
                finally:
                    pinned.free_pinned()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
