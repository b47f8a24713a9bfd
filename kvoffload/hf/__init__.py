"""Where transformers and the cache meet; with the commands the only importer of transformers.

Owns what is attached to a user's model and takes it off again. Nothing is patched globally: hooks sit on the attention
modules of one model, methods are shadowed on one instance.
"""

from kvoffload.hf.cache import OffloadedHFCache
from kvoffload.hf.first_tokens import FirstTokens, Measure
from kvoffload.hf.hooks import ModelHooks
from kvoffload.hf.interface import SegmentAttention
from kvoffload.hf.layer import OffloadedLayer
from kvoffload.hf.models import attention_modules, check_supported, offloadable_layers, unwrap

__all__ = [
    "FirstTokens",
    "Measure",
    "ModelHooks",
    "OffloadedHFCache",
    "OffloadedLayer",
    "SegmentAttention",
    "attention_modules",
    "check_supported",
    "offloadable_layers",
    "unwrap",
]
