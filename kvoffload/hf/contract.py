"""What we rely on of transformers beyond its documented interface, one promise an entry, and the releases tested.

Owns the range of releases that all tests ran on, the only place that looks at a version. A release outside it is
checked against every promise when a model is offloaded: it works with one warning, or is refused with what moved.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import transformers
from packaging.version import Version
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from kvoffload.errors import UnsupportedModelError
from kvoffload.hf.arguments import CACHE_NAMES, generation_name, name_of_cache
from kvoffload.hf.offloaded_cache import OffloadedHFCache
from kvoffload.hf.offloaded_layer import OffloadedLayer

TESTED = (Version("5.17"), Version("5.24"))  # the oldest and the newest minor release
PREPARE_CACHE = (*("self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),)
OF_THE_WHOLE_CACHE = {"crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"}
ASKED_OF_A_CACHE = {"activate_past_recording", "get_query_offset", "get_max_length", "get_mask_sizes"}


class Promise(NamedTuple):
    """One thing that a release must still have."""

    name: str  # as a user would search for it
    holds: Callable[[], bool]


def public_methods(cls: type) -> set[str]:
    """Names of the methods that a class itself defines."""
    return {name for name in vars(cls) if not name.startswith("_") and callable(getattr(cls, name))}


def _parameters(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _layers_are_asked_as_ours() -> bool:
    asked = ("update", "get_mask_sizes", "get_seq_length")
    return all(_parameters(getattr(DynamicLayer, one)) == _parameters(getattr(OffloadedLayer, one)) for one in asked)


def _layers_have_no_other_methods() -> bool:
    wanted = public_methods(CacheLayerMixin) | public_methods(DynamicLayer)
    return wanted - public_methods(OffloadedLayer) <= OF_THE_WHOLE_CACHE <= public_methods(OffloadedHFCache)


def _outputs_carry_the_cache() -> bool:
    kinds = (GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput)
    return all(generation_name() in kind.__dataclass_fields__ for kind in kinds)


def _attention_is_called_as_known() -> bool:
    names = _parameters(LlamaAttention.forward)
    return {"hidden_states", "position_embeddings"} <= set(names) and not set(names).isdisjoint(CACHE_NAMES)


def _attention_is_looked_up_by_name() -> bool:
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return (
        all("sdpa" in one and "sdpa" in type(one)._global_mapping and hasattr(one, "register") for one in registries)
        and hasattr(PreTrainedModel, "_can_set_attn_implementation")
        and "_attn_implementation_internal" in vars(transformers.LlamaConfig())
    )


PROMISES = (
    Promise(
        "GenerationMixin._prepare_cache_for_generation(" + ", ".join(PREPARE_CACHE) + ")",
        lambda: _parameters(GenerationMixin._prepare_cache_for_generation) == PREPARE_CACHE,
    ),
    Promise(
        "GenerationMixin.prepare_inputs_for_generation with the cache as one of " + ", ".join(CACHE_NAMES),
        lambda: name_of_cache(GenerationMixin.prepare_inputs_for_generation) is not None,
    ),
    Promise(
        "GenerationMixin._get_logits_processor(..., logits_processor=...)",
        lambda: "logits_processor" in _parameters(GenerationMixin._get_logits_processor),
    ),
    Promise("outputs of generate() that carry the cache under the same name", _outputs_carry_the_cache),
    Promise(
        "models that take the cache under the same name",
        lambda: name_of_cache(LlamaForCausalLM.forward) == generation_name(),
    ),
    Promise("attention modules given hidden_states, position_embeddings and a cache", _attention_is_called_as_known),
    Promise("ALL_ATTENTION_FUNCTIONS and ALL_MASK_ATTENTION_FUNCTIONS by name", _attention_is_looked_up_by_name),
    Promise(
        "PreTrainedModel._supports_default_dynamic_cache and get_decoder",
        lambda: all(hasattr(LlamaForCausalLM, name) for name in ("_supports_default_dynamic_cache", "get_decoder")),
    ),
    Promise(
        "PreTrainedConfig.get_text_config(decoder=...)",
        lambda: "decoder" in _parameters(PreTrainedConfig.get_text_config),
    ),
    Promise(
        "DynamicCache(config=...).layers",
        lambda: (
            [type(one) for one in DynamicCache(config=transformers.LlamaConfig(num_hidden_layers=2)).layers]
            == [DynamicLayer, DynamicLayer]
        ),
    ),
    Promise("the methods of DynamicLayer", _layers_have_no_other_methods),
    Promise("the arguments of update, get_mask_sizes and get_seq_length of a layer", _layers_are_asked_as_ours),
    Promise("the methods of Cache", lambda: public_methods(Cache) >= ASKED_OF_A_CACHE),
)


def check_release(version: str = transformers.__version__) -> None:
    """Warn of a release that was not tested, or refuse it if it broke a promise.

    Raises:
        UnsupportedModelError: it did; names what moved.
    """
    release = Version(version)
    oldest, newest = TESTED
    if oldest.release <= release.release[:2] <= newest.release:
        return
    tested = f"tested with transformers {oldest} to {newest}"
    moved = [promise.name for promise in PROMISES if not _holds(promise)]
    if moved:
        raise UnsupportedModelError(
            f"transformers {version} moved what kvoffload relies on ({'; '.join(moved)}): it is {tested}, so install "
            f"'transformers>={oldest},<{newest.major}.{newest.minor + 1}' or a newer kvoffload"
        )
    warnings.warn(
        f"kvoffload is {tested}, and this is {version}: what it relies on is still there, so it goes on", stacklevel=4
    )


def _holds(promise: Promise) -> bool:
    try:
        return promise.holds()
    except (AttributeError, TypeError, KeyError):
        return False
