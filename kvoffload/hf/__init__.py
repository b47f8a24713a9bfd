"""Where transformers and the cache meet. Only `model`, `bench` and `cli` import transformers as well.

Owns what is attached to a user's model and takes it off again. Nothing is patched globally: hooks sit on the attention
modules of one model, methods are shadowed on one instance. Attention over segments has a name of its own among the
attention functions of transformers, which stays there.
"""

from kvoffload.hf.arguments import generation_name, given_cache, returned_cache
from kvoffload.hf.contract import check_release
from kvoffload.hf.first_tokens import FirstTokens
from kvoffload.hf.hooks import ModelHooks
from kvoffload.hf.interface import SegmentAttention
from kvoffload.hf.layer_owner import Progress
from kvoffload.hf.models import check_supported, offloadable_layers, unwrap
from kvoffload.hf.offloaded_cache import OffloadedHFCache
from kvoffload.hf.offloaded_layer import OffloadedLayer
from kvoffload.hf.shadows import CONTINUOUS_BATCHING, Shadows
from kvoffload.model.self_attention import attention_modules

__all__ = [
    "CONTINUOUS_BATCHING",
    "FirstTokens",
    "ModelHooks",
    "OffloadedHFCache",
    "OffloadedLayer",
    "Progress",
    "SegmentAttention",
    "Shadows",
    "attention_modules",
    "check_release",
    "check_supported",
    "generation_name",
    "given_cache",
    "offloadable_layers",
    "returned_cache",
    "unwrap",
]
