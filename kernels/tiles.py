"""How attention over a segment is cut into programs: tiles of query rows, steps over the tokens, parts of a segment.

Sizes are for the registers and the shared memory of one streaming multiprocessor, of which compute capability 8.6, 8.9
and 12.0 have least, 99 KiB for one program. They are what compiles without spilling registers (tests/test_compiles.py),
not what was measured to be fastest: that takes a device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kvoffload.kernels.sizes import divided_up, power_of_2

# Query rows of a tile, by compute capability. On 9.0 operands of a product stay in shared memory; the others
# hold them in registers, or what they copy for the matrix units: twice as many rows would spill.
_QUERY_ROWS = {80: 32, 86: 32, 89: 32, 90: 64, 100: 32, 120: 32}
_STEP_ELEMENTS = 8192  # tokens of a step times head_dim
_FLOAT32_ELEMENTS = 2048  # of either: no tensor cores, so all of it is in registers
_WARPS = 8  # four have not the registers for the masks of padded heads, of row tables and of windows
_IN_FLIGHT_BYTES = 2**16  # of K and V, requested by one program and not yet used
_PROGRAMS_PER_PROCESSOR = 4


class Tile(NamedTuple):
    """What one program works on at a time."""

    rows: int  # query rows, as many as a tensor core multiplies or more
    block_tokens: int  # of one step
    stages: int  # one step is computed while the others are on their way from memory
    warps: int


@functools.lru_cache(maxsize=256)  # asked for at every launch
def tile(head_dim: int, element_bytes: int, rows: int, capability: int, *, is_decoded: bool = False) -> Tile:
    """The tile for `rows` query rows that share a head of K and V, on a device of that compute capability (as 89).

    Where K and V are decoded from fewer bytes, and a mask hides what pads a head, registers hold the fewest rows.
    """
    block_dim = max(16, power_of_2(head_dim))
    most_rows = 16 if block_dim > 128 else _QUERY_ROWS[max(known for known in _QUERY_ROWS if known <= capability)]
    step_elements = _STEP_ELEMENTS
    if element_bytes == 4:
        most_rows, step_elements = min(64, max(16, _FLOAT32_ELEMENTS // block_dim)), _FLOAT32_ELEMENTS
    if is_decoded and block_dim != head_dim:
        most_rows = 16
    block_tokens = min(64, max(16, step_elements // block_dim))
    if is_decoded and capability >= 100:  # 4 bits spill some registers with more
        block_tokens = max(16, block_tokens // 2)
    stage_bytes = 2 * block_tokens * block_dim * element_bytes  # 2: K and V
    return Tile(
        rows=min(most_rows, max(16, power_of_2(rows))),
        block_tokens=block_tokens,
        stages=min(4, 1 + _IN_FLIGHT_BYTES // stage_bytes),
        warps=_WARPS,
    )


@functools.lru_cache(maxsize=256)
def split(tokens: int, block_tokens: int, programs: int, processors: int) -> tuple[int, int]:
    """Into how many parts a segment is split, and the tokens of each but the last, so that no processor is idle.

    Args:
        tokens: of the segment.
        block_tokens: of one step; a part is a whole number of steps.
        programs: that run without a split.
        processors: streaming multiprocessors of the device.
    """
    steps = max(1, divided_up(tokens, block_tokens))
    wanted = max(1, processors * _PROGRAMS_PER_PROCESSOR // programs)
    part_steps = divided_up(steps, min(steps, wanted))
    return divided_up(steps, part_steps), part_steps * block_tokens


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 0 if it is too old for asynchronous copies and bfloat16."""
    if device.type != "cuda":
        return 1  # the interpreter: one program after the other
    if capability(device) < min(_QUERY_ROWS):
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as one number, 89 for 8.9; where there is none, the least that has a tile."""
    if device.type != "cuda" or torch.version.hip is not None:
        return min(_QUERY_ROWS)
    properties = torch.cuda.get_device_properties(device)
    return 10 * int(properties.major) + int(properties.minor)
