"""How much memory a generation may take on the device and on the host, and what to say where that is too little.

Owns the caps ("auto" is a share of what is free now, within the limits of the process and its control group), how long
a prefill chunk may be under them, and that beams share the stored blocks of their prompt. Does not own what is taken
(`sizing`, `planner`), nor the room that is left while a cache grows (`kvoffload/store/`).
"""

from __future__ import annotations

import torch

from kvoffload.backend import Backend
from kvoffload.config import GIB, OffloadConfig
from kvoffload.errors import HostMemoryError
from kvoffload.machine import system_memory
from kvoffload.model.shape import ModelShape
from kvoffload.planning.forms import FORMS
from kvoffload.planning.geometry import Geometry
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.memory import (
    DEVICE_SHARE,
    HOST_SHARE,
    PrefillParts,
    prefill_chunk_tokens,
    prefill_parts,
    prefill_peak_bytes,
)
from kvoffload.planning.sizing import planned_forms, smallest_sizes, uncapped_sizes
from kvoffload.units import counted, gib


class MemoryLimits:
    """The limits of a session, as they are when asked for.

    Args:
        config: the user's options.
        shape: of the model.
        backend: of the session.
    """

    def __init__(self, config: OffloadConfig, shape: ModelShape, backend: Backend) -> None:
        self._config = config
        self._shape = shape
        self._backend = backend

    # ---- device --------------------------------------------------------------------------------------------------

    @property
    def caps_device(self) -> bool:
        """Whether there is a cap on device memory; else whatever is comfortable without resident blocks is held."""
        setting = self._config.device_gib
        return not (setting == "min" or (setting == "auto" and self._backend.emulated))

    def device_cap_bytes(
        self, geometry: Geometry, prompt_tokens: int, held_bytes: int, others_bytes: int = 0
    ) -> int | None:
        """The cap on device memory; None for whatever is comfortable without resident blocks.

        "auto" is what a prefill leaves of the free memory, and where that is too little for anything, what is least.

        Args:
            geometry: of the cache.
            prompt_tokens: tokens of the prompt.
            held_bytes: device memory the session holds already, and will use again.
            others_bytes: device memory that its other caches hold; leaves no less than works.
        """
        if not self.caps_device:
            return None
        setting = self._config.device_gib
        least = smallest_sizes(geometry, self._config, forms=planned_forms(self._config, geometry)).fixed_device_bytes
        if setting != "auto":
            cap = int(float(setting) * GIB)
            return max(cap - others_bytes, min(cap, least))
        parts = self.prefill_parts(geometry, prompt_tokens, held_bytes) or PrefillParts(prompt_tokens, geometry.rows)
        room = self._free_device_bytes(held_bytes) - self._prefill_peak_bytes(geometry, parts.tokens, parts.rows)
        return max(room, least)

    def prefill_parts(self, geometry: Geometry, prompt_tokens: int, held_bytes: int) -> PrefillParts | None:
        """In which parts the prompt fits on the device; None where nothing is known to decide by.

        With streamed weights in few passes over these, rows in slices; else in parts of as many tokens as fit.

        Args: as of `device_cap_bytes`.
        """
        if self._backend.emulated or self._config.device_gib != "auto":
            return None
        sizes, rows = uncapped_sizes(geometry, self._config), geometry.rows
        room = self._free_device_bytes(held_bytes) - sizes.fixed_device_bytes
        if geometry.weight_bytes:
            return self._prefill_parts(geometry, prompt_tokens, room)
        tokens = prefill_chunk_tokens(self._shape, rows=rows, prompt_tokens=prompt_tokens, room_bytes=room)
        return PrefillParts(tokens, rows)

    def weights_room_bytes(self, geometry: Geometry, prompt_tokens: int, held_bytes: int, weights_bytes: int) -> int:
        """Device memory that the weights of decoder layers may take, as the cache leaves it with comfortable buffers.

        A byte of weights that stays saves a byte of every step's transfers, as a resident byte of the cache does, and
        that of the prefill and of every draft as well: weights come first, and residents of the cache have the rest.

        Args: as of `device_cap_bytes`.
            weights_bytes: that these take now.
        """
        sizes = uncapped_sizes(geometry, self._config)
        cache_bytes = sizes.fixed_device_bytes
        if self._config.device_gib not in ("auto", "min"):
            cache_bytes = max(cache_bytes, int(float(self._config.device_gib) * GIB))
        # the same share of what is held as of what is free, so that a second call leaves them as the first one did
        room = self._free_device_bytes(int(DEVICE_SHARE * (held_bytes + weights_bytes))) - cache_bytes
        parts = self._prefill_parts(geometry, prompt_tokens, room)
        return room - self._prefill_peak_bytes(geometry, parts.tokens, parts.rows)

    def _prefill_parts(self, geometry: Geometry, prompt_tokens: int, room_bytes: int) -> PrefillParts:
        return prefill_parts(
            self._shape,
            rows=geometry.rows,
            prompt_tokens=prompt_tokens,
            room_bytes=room_bytes,
            may_slice=geometry.may_slice,
        )

    def _free_device_bytes(self, held_bytes: int) -> int:
        """What may be taken on the device, or is held by the session."""
        return free_device_bytes(self._backend.device) + held_bytes

    def _prefill_peak_bytes(self, geometry: Geometry, tokens: int, at_once: int) -> int:
        rows = geometry.rows
        return prefill_peak_bytes(self._shape, num_tokens=rows * tokens, rows=rows, rows_at_once=at_once)

    # ---- host ----------------------------------------------------------------------------------------------------

    def host_cap_bytes(self, held_bytes: int = 0) -> int:
        """The cap on host memory, of which the session holds so much already: what its pool may grow to."""
        if self._config.host_gib != "auto":
            return int(float(self._config.host_gib) * GIB)
        available_bytes = system_memory.available_bytes() + self._backend.kept_host_bytes
        return int(HOST_SHARE * available_bytes) + held_bytes

    def full_host_cap_bytes(self, geometry: Geometry, prompt_tokens: int, held_bytes: int) -> int:
        """The cap as if every row stored every block: beams share those of their prompt."""
        return int(self.host_cap_bytes(held_bytes) / _stored_share(geometry, prompt_tokens))

    def check_least_host(self, geometry: Geometry, inputs: PlanInputs, prompt_tokens: int, held_bytes: int) -> None:
        """Refuse what no plan can make fit, with the numbers of the full length.

        Raises:
            HostMemoryError: so it is.
        """
        # whether a block can be packed is seen when it is there
        sizes = {form: size for form, size in inputs.bytes_per_token.items() if not FORMS[form].needs_rates}
        kept = min(size for form, size in sizes.items() if not FORMS[form].is_recomputed)
        smallest = min(sizes.values()) if inputs.split is None else kept
        recomputed = next(size for form, size in sizes.items() if FORMS[form].is_recomputed)
        token_bytes = smallest if inputs.split is None else inputs.split * recomputed + (1 - inputs.split) * kept
        num_tokens = geometry.max_tokens // inputs.block_tokens * inputs.block_tokens
        needed = geometry.num_offloaded_layers * num_tokens * token_bytes * _stored_share(geometry, prompt_tokens)
        on_device = max(0, inputs.device_bytes - inputs.fixed_device_bytes) * token_bytes / smallest
        needed, cap = int(needed - on_device), self.host_cap_bytes(held_bytes)
        if needed > cap:
            raise _host_too_small(geometry, needed, cap)


def free_device_bytes(device: torch.device) -> int:
    """What may be taken on a device: of what is free in the driver's eyes or cached by PyTorch.

    No more than a cap on the process allows (`torch.cuda.set_per_process_memory_fraction`).
    """
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return int(DEVICE_SHARE * min(free + reserved - allocated, allowed - allocated))


def check_full_host(geometry: Geometry, prompt_tokens: int, needed_bytes: int, cap_bytes: int) -> None:
    """Refuse before any token a cache that cannot fit on the host at its full length.

    Args:
        geometry: of the cache.
        prompt_tokens: tokens of the prompt, which beams share.
        needed_bytes: what it takes, as if every row stored every block; `cap_bytes` likewise.

    Raises:
        HostMemoryError: so it is, with the numbers as they are with shared blocks.
    """
    if needed_bytes > cap_bytes:
        share = _stored_share(geometry, prompt_tokens)
        raise _host_too_small(geometry, int(needed_bytes * share), int(cap_bytes * share))


def _stored_share(geometry: Geometry, prompt_tokens: int) -> float:
    """Stored rows over logical rows: prompt blocks of beams are stored once per sequence."""
    prompt_share = min(1.0, prompt_tokens / max(1, geometry.max_tokens))
    return 1 - prompt_share * (1 - 1 / max(1, geometry.beams))


def _host_too_small(geometry: Geometry, needed: int, cap: int) -> HostMemoryError:
    return HostMemoryError(
        f"offloading {counted(geometry.rows, 'sequence')} of {counted(geometry.max_tokens, 'token')} needs "
        f"{gib(needed)} of host memory, {gib(cap)} may be used: raise host_gib, or lower the batch or max_new_tokens"
    )
