"""How wide numbers are, by the names that PyTorch, checkpoints and datasheets have for them."""

from __future__ import annotations

ITEMSIZE_BYTES = {"float64": 8, "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "float8_e4m3fn": 1}
# of operands that devices compute with
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "int8": 8, "float4": 4, "int4": 4}
