"""Where a model's weights are while it is offloaded: on the device, or on the host and streamed, layer by layer.

Owns the choice of the layers that stay on the device, the move of everything there and back, and the errors where it
does not fit. Does not own the bytes of a layer (`store/layer_weights.py`), their way (`pipeline/weights.py`), nor the
forwards in which they are read (`hf/streamed_layers.py`).

With a model in host memory and `OffloadConfig(device=...)` what is no decoder layer moves to the device, and every
layer's weights move to a slab of pinned host memory, one after the other, so that host memory holds one layer more than
the model at most. Layers that stay have a copy on the device. With everything on the device already nothing happens.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from kvoffload import hf
from kvoffload.config import GIB, OffloadConfig
from kvoffload.errors import ConfigError, HostMemoryError, InfeasiblePlanError, UnsupportedModelError
from kvoffload.machine import mapped_files, system_memory
from kvoffload.model.decoder_layers import decoder_layers, own_tensors
from kvoffload.pipeline.engine import TransferEngine
from kvoffload.planning.weights import WeightSizes
from kvoffload.session.attached import Attached
from kvoffload.session.memory_limits import free_device_bytes
from kvoffload.session.progress import AllocationProgress
from kvoffload.store.layer_weights import LayerWeights, absorb, can_be_packed, set_apart
from kvoffload.units import counted, gib

logger = logging.getLogger(__name__)
COMFORTABLE_SHARE = 0.6  # of the free device memory: weights that take less stay there under "auto"


def device_for(model: Any, config: OffloadConfig) -> torch.device:
    """The device that a model runs on.

    Raises:
        ConfigError: no such device, or the model is on another one than the host.
        UnsupportedModelError: parameters without values.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "meta" for device in devices):
        raise UnsupportedModelError(
            f"{type(model).__name__} has parameters without values (on the meta device, as accelerate leaves them): "
            "load it into host memory without a device_map, or with kvoffload.load(name, config)"
        )
    here: torch.device = next(iter(devices))
    wanted = named_device(config.device)
    if wanted is None:
        return here
    if here.type != "cpu" and (here.type != wanted.type or wanted.index not in (None, here.index)):
        raise ConfigError(f"the model is on {here}: move it to the host (model.cpu()) or leave out device={wanted!s}")
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", here.index if here.type == "cuda" else torch.cuda.current_device())
    return wanted


def named_device(name: str | None) -> torch.device | None:
    """The device of a name; None for none.

    Raises:
        ConfigError: there is no such device here.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is no device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: PyTorch sees no CUDA device here; leave device out")
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        raise ConfigError(f"device={name!r}: PyTorch sees {counted(there, 'CUDA device')} here, the first is cuda:0")
    return device


class ModelWeights:
    """The weights of one model, until `close`.

    Args:
        model: the model.
        config: the user's options.
        engine: brings streamed layers.
        is_compiled: whether the model's forward is.
    """

    def __init__(self, model: Any, config: OffloadConfig, engine: TransferEngine, *, is_compiled: bool = False) -> None:
        self._engine, self._backend, self._config = engine, engine.backend, config
        self._moved = Attached()  # undone by `close`
        self._layers: list[LayerWeights] = []
        self._streamed: hf.StreamedLayers | None = None
        self._by_idx: dict[int, LayerWeights] = {}
        self._model, self._is_compiled = model, is_compiled
        self._num_decoder_layers = 0
        self.sizes = WeightSizes(outside=0, layers=())
        self.num_resident = 0
        self._needs_whole_rows = False
        self._first_number = 0  # of layers that stay at first
        self._is_settled = True  # False: an error left layers neither on the device nor streamed

    def place(self) -> None:
        """Move the model's weights where they shall be; after an error `close` moves back what was moved.

        Raises:
            ConfigError: what was asked for cannot work.
            InfeasiblePlanError: the device is too small for any of it.
            HostMemoryError: the host is.
            UnsupportedModelError: the weights cannot be streamed.
        """
        model = self._model
        modules = decoder_layers(model)
        tensors = [[one for one in own if one.numel()] for own in own_tensors(model, modules)]
        self._num_decoder_layers = len(modules)
        packable = [idx for idx, own in enumerate(tensors) if own and all(map(can_be_packed, own))]
        planned = [LayerWeights(idx, tensors[idx]) for idx in packable]
        inside = {id(tensor) for idx in packable for tensor in tensors[idx]}
        everything = {id(one): one for one in (*model.parameters(), *model.buffers())}
        outside = [tensor for number, tensor in everything.items() if number not in inside]
        outside_bytes = sum(tensor.numel() * tensor.element_size() for tensor in outside)
        self.sizes = WeightSizes(outside=outside_bytes, layers=tuple(layer.num_bytes for layer in planned))
        number = self._first_choice(model)
        if number is None:
            self._move_outside(model, list(everything.values()))
            self._moved.callback(self._backend.synchronize)
            return
        self._check_host(planned, number)
        if any(tensor.is_inference() for idx in packable for tensor in tensors[idx]):
            raise UnsupportedModelError(
                f"the weights of {type(model).__name__} were made under torch.inference_mode() and cannot be streamed: "
                "load the model outside of it"
            )
        self._move_outside(model, outside)
        self._moved.callback(self._forget)
        self._take(planned)
        self._moved.callback(set_apart, planned)
        self._moved.callback(self._engine.stream_weights, self._num_decoder_layers, ())
        layers = [modules[idx] for idx in packable]
        self._streamed = hf.StreamedLayers(self._engine, layers, planned, is_compiled=self._is_compiled)
        self._moved.callback(self._streamed.remove)
        self._moved.callback(self._backend.synchronize)
        self._streamed.install()
        self._first_number = number
        self.keep(number)

    # ---- how much stays ------------------------------------------------------------------------------------------

    @property
    def is_streaming(self) -> bool:
        """Whether any layer's weights cross the link."""
        return self._engine.weights is not None

    @property
    def are_pinned(self) -> bool:
        """Whether the link reads streamed weights at full speed; on an emulated link it always does."""
        return self._backend.emulated or all(layer.is_pinned for layer in self._layers)

    @property
    def streamed_bytes(self) -> int:
        """Over the link in every forward."""
        return self.sizes.streamed_bytes(self.num_resident) if self.is_streaming else 0

    @property
    def device_bytes(self) -> int:
        """On the device, of layers that stay and slabs for those that do not; without what is outside the layers."""
        resident = sum(layer.num_bytes for layer in self._layers if layer.is_resident)
        return resident + (0 if self._engine.weights is None else self._engine.weights.device_bytes)

    def _first_choice(self, model: Any) -> int | None:
        """How many layers stay before anything is generated; None: all weights do, and none is ever streamed.

        Raises:
            ConfigError: what was asked for cannot work.
            InfeasiblePlanError: the device is too small for any of it.
        """
        sizes, asked = self.sizes, self._config.device_weights_gib
        moves = next(model.parameters()).device != self._backend.device
        if asked == "all" or (asked == "auto" and not moves):
            return None
        if isinstance(asked, str):
            room = free_device_bytes(self._backend.device)
            if sizes.total <= COMFORTABLE_SHARE * room:
                return None
            if sizes.least > room:
                raise InfeasiblePlanError(
                    f"device memory: streaming {type(model).__name__} takes at least {sizes.say_least()}, and "
                    f"{gib(room)} may be used: {gib(sizes.least - room)} are missing; use a larger device"
                )
            return 0  # the first generate() says what its cache leaves
        room = int(asked * GIB)
        if sizes.total <= room:
            return None
        if not sizes.layers:
            raise UnsupportedModelError(
                f"the weights of {type(model).__name__} cannot be streamed: its decoder layers are not found, or their "
                "weights are more than plain tensors (quantised by a library?); leave device_weights_gib out"
            )
        if (number := sizes.num_resident(room)) < 0:
            raise ConfigError(
                f"device_weights_gib={asked:g} is too little: {type(model).__name__} takes at least "
                f"{sizes.say_least()} on the device, {gib(sizes.least - room)} more"
            )
        return number

    def fit(self, room_bytes: Callable[[], int]) -> None:
        """Under "auto", before a cache is made: let as many layers stay as it leaves room for.

        Args:
            room_bytes: device memory that weights of layers and slabs may take then.
        """
        if self._streamed is None or self._config.device_weights_gib != "auto":
            return
        room = room_bytes() + self.sizes.outside
        number = max(0, self.sizes.num_resident(room))
        if number < self.num_resident or number - self.num_resident > len(self._layers) // 16:
            self.keep(number)

    def keep(self, number: int) -> None:
        """Let that many layers stay on the device, or after an error none; nothing may be in flight.

        Where there is not even memory for that, the next call tries again.
        """
        try:
            self._keep(number)
        except BaseException:
            self._keep(0)
            raise

    def _keep(self, number: int) -> None:
        self._is_settled = False
        wanted = set(self.sizes.resident(number))
        self._backend.synchronize()
        self._engine.stream_weights(self._num_decoder_layers, ())
        for position, layer in enumerate(self._layers):
            layer.forget_slabs()
            if position not in wanted:
                layer.leave()
        for position in sorted(wanted):
            layer = self._layers[position]
            if not layer.is_resident:
                layer.stay_in(self._engine.bring_weights(layer))
        streamed = [layer for layer in self._layers if not layer.is_resident]
        self._engine.stream_weights(self._num_decoder_layers, streamed)
        self.num_resident, self._is_settled = number, True
        self._engine.weight_device_bytes = self.device_bytes
        logger.info(
            "%d of %d decoder layers stay on the device, %s cross the link in every forward",
            number,
            len(self._layers),
            gib(self.streamed_bytes),
        )

    # ---- there and back ------------------------------------------------------------------------------------------

    def _check_host(self, planned: list[LayerWeights], num_resident: int) -> None:
        """Refuse what host memory cannot hold.

        Raises:
            HostMemoryError: so it is, with the numbers.
        """
        if planned[0].device.type == "cpu":  # what is mapped from files is in none that counts as taken
            in_files = mapped_files.bytes_in_files(stretch for layer in planned for stretch in layer.stretches)
            needed = min(in_files + self.sizes.slab, sum(self.sizes.layers))
        else:
            needed = sum(self.sizes.layers)
        if self._backend.emulated:
            needed += self.sizes.device_bytes(num_resident) - self.sizes.outside
        available = system_memory.available_bytes()
        if needed > available:
            raise HostMemoryError(
                f"streaming weights takes {gib(needed)} more host memory, {gib(available)} are free: "
                f"{gib(needed - available)} are missing; close what else runs, or use quantised weights"
            )

    def _take(self, planned: list[LayerWeights]) -> None:
        """Move layers to the host, one after the other."""
        progress = AllocationProgress(task="moving weights to memory that the link reads")
        progress.expect(sum(layer.num_bytes for layer in planned))
        done = 0
        try:
            for layer in planned:
                self._layers.append(layer)
                self._moved.callback(layer.restore, self._backend)
                layer.move_to_host(self._backend)
                done += layer.num_bytes
                progress.update(done)
        finally:
            progress.stop()
        self._by_idx = {layer.layer_idx: layer for layer in planned}

    def _move_outside(self, model: Any, tensors: list[torch.Tensor]) -> None:
        """Have these on the device."""
        device = self._backend.device
        if all(tensor.device == device for tensor in tensors):
            return
        whole = {id(tensor) for tensor in tensors if type(tensor) not in (torch.Tensor, torch.nn.Parameter)}
        for module in model.modules():
            own = (*module._parameters.values(), *module._buffers.values())
            if any(id(tensor) in whole for tensor in own):
                here = next(tensor.device for tensor in own if tensor is not None)
                back = functools.partial(torch.Tensor.to, device=here)
                self._moved.callback(module._apply, back, recurse=False)
                module._apply(lambda tensor: tensor.to(device), recurse=False)
        there: dict[Any, torch.Tensor] = {}  # two may lie in the same memory
        for tensor in tensors:
            if id(tensor) not in whole and tensor.device != device:
                self._moved.callback(_move_back, tensor, tensor.data)
                place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                tensor.data = there.setdefault(place, tensor.data.to(device)) if tensor.numel() else tensor.to(device)

    def close(self) -> None:
        """Every parameter is where it was, with the values that it has now; nothing may use the model meanwhile.

        Whatever fails in one step, the others are done; a second call does what is left.
        """
        self._moved.close()

    def _forget(self) -> None:
        """Layers are as before."""
        self._layers, self._by_idx, self._streamed = [], {}, None
        self._engine.weight_device_bytes = 0

    # ---- for a layer outside its forward ---------------------------------------------------------------------------

    def present(self, layer_idx: int) -> contextlib.AbstractContextManager[None]:
        """A context in which a decoder layer's weights are on the device."""
        weights = self._by_idx.get(layer_idx)
        if self._streamed is None or weights is None:
            return contextlib.nullcontext()
        return self._streamed.present(weights)

    def absorb(self) -> None:
        """A forward begins: take over weights that somebody put in the place of streamed ones; none may be on its way.

        Raises:
            KVOffloadError: they are of another shape or dtype.
        """
        if self._streamed is not None:
            if not self._is_settled:
                self.keep(self._first_number)
            absorb(self._layers)
            self._streamed.begin_forward()

    @property
    def may_slice(self) -> bool:
        """Whether rows of a prefill may pass the layers in slices, as it looks now."""
        if self._streamed is None or self._needs_whole_rows or len(self._layers) < self._num_decoder_layers:
            return False
        is_alibi = getattr(self._model.config.get_text_config(decoder=True), "alibi", False)
        return self._streamed.go_by_rows and not is_alibi  # whose bias has heads and rows in one

    def need_whole_rows(self, is_needed: bool) -> None:
        """Whether in this call what modules give by the way is collected, once for all rows."""
        self._needs_whole_rows = is_needed
        if is_needed:
            self.slice_rows(None)

    def slice_rows(self, rows: int | None) -> None:
        """From now on so many rows of a prefill pass a layer at once; None: all."""
        if self._streamed is not None:
            self._streamed.rows_per_slice = rows


def _move_back(tensor: torch.Tensor, before: torch.Tensor) -> None:
    """Be where it was, with the values that it has now."""
    is_alike = (tensor.shape, tensor.dtype) == (before.shape, before.dtype)
    if is_alike and can_be_packed(before):
        tensor.data = before.copy_(tensor.data)
        return
    now = tensor.data.to(before.device)  # changed meanwhile, as by model.half(), or expanded, which cannot be written
    tensor.data = before if is_alike and torch.equal(now, before) else now
