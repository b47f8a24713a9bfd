"""A model and a machine made so that the answer is known, beside published ones. Not a test module."""

from __future__ import annotations

import dataclasses
from typing import Any

from configs import CONFIGS

from kvoffload.machine.machine import Machine
from kvoffload.model.facts import Facts
from kvoffload.model.stored_facts import facts_of

MODELS = ("opt-6.7b", "llama-2-7b", "llama-3.1-8b", "mixtral-8x7b", "qwen3-8b")  # in `CONFIGS`
TOY = {  # every size another prime or so, that no two can be taken for each other
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 50,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "num_hidden_layers": 3,
    "vocab_size": 101,
    "torch_dtype": "bfloat16",
}


def model(name: str | dict[str, Any]) -> Facts:
    return facts_of(CONFIGS / f"{name}.json" if isinstance(name, str) else name)


def machine(**changes: Any) -> Machine:
    """One FLOP/s and byte/s for everything, but for what a test changes."""
    base = Machine(
        device_name="toy",
        link_name="toy",
        peak_flops_per_s={16: 1.0},
        memory_bytes=10**9,
        memory_bytes_per_s=1.0,
        link_bytes_per_s=1.0,
    )
    return dataclasses.replace(base, **changes)
