"""How attention over a segment is cut into programs: tiles of query rows, steps over the tokens, parts of a segment.

Sizes are for the registers and the shared memory of one streaming multiprocessor, of which compute capability 8.6 and
8.9 have least, 99 KiB for one program.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

_TILE_ELEMENTS = {2: 8192, 4: 2048}  # by element size; float32 is not for tensor cores and would spill registers
_WARPS = {2: 4, 4: 8}
_IN_FLIGHT_BYTES = 2**16  # of K and V, requested by one program and not yet used
_PROGRAMS_PER_PROCESSOR = 4


class Tile(NamedTuple):
    """What one program works on at a time."""

    rows: int  # query rows, as many as a tensor core multiplies or more
    block_tokens: int  # of one step
    stages: int  # one step is computed while the others are on their way from memory
    warps: int


def tile(head_dim: int, element_bytes: int, rows: int) -> Tile:
    """The tile for `rows` query rows that share a head of K and V."""
    block_dim = max(16, _power_of_2(head_dim))
    most = min(64, max(16, _TILE_ELEMENTS[element_bytes] // block_dim))
    stage_bytes = 2 * most * block_dim * element_bytes  # 2: K and V
    return Tile(
        rows=min(most, max(16, _power_of_2(rows))),
        block_tokens=most,
        stages=min(4, 1 + _IN_FLIGHT_BYTES // stage_bytes),
        warps=_WARPS[element_bytes],
    )


def split(tokens: int, block_tokens: int, programs: int, processors: int) -> tuple[int, int]:
    """Into how many parts a segment is split, and the tokens of each but the last, so that no processor is idle.

    Args:
        tokens: of the segment.
        block_tokens: of one step; a part is a whole number of steps.
        programs: that run without a split.
        processors: streaming multiprocessors of the device.
    """
    steps = max(1, _divided_up(tokens, block_tokens))
    wanted = max(1, processors * _PROGRAMS_PER_PROCESSOR // programs)
    part_steps = _divided_up(steps, min(steps, wanted))
    return _divided_up(steps, part_steps), part_steps * block_tokens


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 0 if it is too old for asynchronous copies and bfloat16."""
    if device.type != "cuda":
        return 1  # the interpreter: one program after the other
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and properties.major < 8:
        return 0
    return int(properties.multi_processor_count)


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _divided_up(number: int, by: int) -> int:
    return -(-number // by)
