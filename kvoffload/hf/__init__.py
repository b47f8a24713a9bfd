"""Where transformers and the cache meet. Only `model`, `bench` and `cli` import transformers as well.

Owns what is attached to a user's model and takes it off again. Nothing is patched globally: hooks sit on the attention
modules of one model, methods are shadowed on one instance. Attention over segments has a name of its own among the
attention functions of transformers, which stays there.
"""

from kvoffload.hf.arguments import generation_name, given_cache, returned_cache
from kvoffload.hf.contract import check_release
from kvoffload.hf.decode_call import ONE_BY_ONE, DecodeCall, logits_of, output_for, output_with
from kvoffload.hf.draft_processors import draft_processors
from kvoffload.hf.first_tokens import FirstTokens
from kvoffload.hf.hooks import ModelHooks
from kvoffload.hf.interface import SegmentAttention
from kvoffload.hf.layer_owner import Progress
from kvoffload.hf.models import check_supported, offloadable_layers, unwrap
from kvoffload.hf.offloaded_cache import OffloadedHFCache
from kvoffload.hf.offloaded_layer import OffloadedLayer
from kvoffload.hf.rotation import changing_rotations
from kvoffload.hf.shadows import CONTINUOUS_BATCHING, Shadows
from kvoffload.hf.streamed_layers import StreamedLayers
from kvoffload.model.self_attention import attention_modules

__all__ = [
    "CONTINUOUS_BATCHING",
    "ONE_BY_ONE",
    "DecodeCall",
    "FirstTokens",
    "ModelHooks",
    "OffloadedHFCache",
    "OffloadedLayer",
    "Progress",
    "SegmentAttention",
    "Shadows",
    "StreamedLayers",
    "attention_modules",
    "changing_rotations",
    "check_release",
    "check_supported",
    "draft_processors",
    "generation_name",
    "given_cache",
    "logits_of",
    "offloadable_layers",
    "output_for",
    "output_with",
    "returned_cache",
    "unwrap",
]
