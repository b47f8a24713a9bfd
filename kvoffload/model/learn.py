"""The facts of a model from transformers itself: its class is built without memory and looked at.

Owns the way from what a configuration says to the class that transformers would load, and from a built model to its
facts. Does not own what is read from it (`weights`, `decoder`, `cache_layers`, `kv_widths`) nor keeping it
(`stored_facts`).

    configuration    the class of its `model_type`, which fills in whatever the file leaves out
    model            AutoModelForCausalLM's class, else that for images and texts, else that for several media; on the
                     meta device: parameters have shapes and no values. Its code is that of transformers: code that
                     comes with a model (`trust_remote_code`) is never executed.
    layers           DynamicCache(config=...), and three tokens through the model, without memory as well
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvoffload.errors import ConfigError, KVOffloadError, UnsupportedModelError
from kvoffload.model.cache_layers import cache_layers, positions_of
from kvoffload.model.checkpoint_names import CheckpointNames
from kvoffload.model.decoder import Decoder
from kvoffload.model.facts import KV, CacheTraits, Facts, Layer
from kvoffload.model.fields import dtype_name, dtype_of, itemsize_bytes, reader, stated_positions
from kvoffload.model.guess import guessed
from kvoffload.model.kv_widths import kv_widths
from kvoffload.model.matrix import Group, Matrix, Weight
from kvoffload.model.quantization import quantization_of, stored
from kvoffload.model.weights import weights_of

# in this order; a release may lack some
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_MAX_LAYERS = 10_000
_UNLIMITED = 2**62  # positions


def learned(said: Mapping[str, Any]) -> Facts:
    """The facts of the model that a configuration describes; of a type that transformers does not know a guess.

    Args:
        said: the whole configuration.

    Raises:
        ConfigError: transformers refuses it; with its message.
        UnsupportedModelError: no decoder with a cache.
    """
    kind = said.get("model_type") or "None"
    if not isinstance(kind, str):
        raise ConfigError(f"model_type must be a name such as 'llama', got {kind!r}: correct the configuration")
    if kind not in CONFIG_MAPPING:
        return guessed(said, _why_unknown(said, said.get("model_type")))
    config = _configuration(said, kind)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; only decoder-only models are planned")
    get = reader(said)
    positions = stated_positions(get)  # a default of transformers is not what a file says of its model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a configuration makes a class warn of is told when it is loaded
        model, doubt = _built(config, kind)
        try:
            found = facts_of_model(
                model,
                itemsize=itemsize_bytes(dtype_of(get)),
                quantization_config=get("quantization_config"),
                positions=positions or _UNLIMITED,
            )
        except KVOffloadError:
            raise
        except Exception as error:  # a class that is not laid out like a decoder
            raise UnsupportedModelError(
                f"{type(model).__name__} is not understood as a decoder with a cache ({_short(error)})"
            ) from error
    dtype = dtype_name(dtype_of(get))
    return dataclasses.replace(found, model_type=kind, position_limit=positions, doubt=doubt, dtype=dtype)


def is_of_transformers(said: Mapping[str, Any]) -> bool:
    """Whether what is learned of it is the same in every process: not where somebody registered a type of theirs."""
    known = CONFIG_MAPPING[said["model_type"]] if said.get("model_type") in CONFIG_MAPPING else None
    return known is None or known.__module__.startswith("transformers.")


def without_memory(cls: Any, config: Any) -> Any:
    """A model of some class whose parameters have shapes and no values; the configuration is changed."""
    config.quantization_config = None
    del config.quantization_config
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return cls(config)


def facts_of_model(
    model: Any,
    *,
    itemsize: int,
    quantization_config: Any = None,
    positions: int | None = None,
    widths: Callable[..., list[KV | None]] = kv_widths,
) -> Facts:
    """What a model of transformers is made of.

    Args:
        model: on the meta device if `widths` runs it, else any.
        itemsize: bytes of a value that is not quantised.
        quantization_config: of its checkpoint, None where it is plain.
        positions: tokens it has positions for, by default what its configuration object says.
        widths: how keys and values of its layers are learned.
    """
    config = model.config
    text = config.get_text_config(decoder=True)
    num_weights = sum(one.numel() for one in model.parameters())
    weights = weights_of(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and getattr(head, "weight", 0) is getattr(embedding, "weight", None)
    caches = _caches(model, text, positions)
    names = CheckpointNames(model)
    layers = [Layer(cache, kv) for cache, kv in zip(caches, widths(model, text, caches), strict=True)]
    decoder = Decoder(model, text, layers)
    groups = decoder.groups(weights)
    mlp = decoder.mlp(groups)
    if head is not None and getattr(head, "weight", None) is not None:
        outputs, inputs = head.weight.shape[:2]
        matrix = Matrix("lm_head", "head", inputs, outputs, 1, bias=getattr(head, "bias", None) is not None)
        groups.append(
            Group(matrix, (Weight("lm_head", "weight", "embedding" if is_tied else "head", inputs, outputs),))
        )
    quantization = quantization_of(quantization_config, config.model_type, names)
    matrices, quantized = stored(quantization, names, weights, groups, 8.0 * itemsize)
    heads, head_dim, value_dim, latent_width = _attention(text, layers)
    return Facts(
        model_type=str(config.model_type),
        class_name=type(model).__name__,
        num_weights=num_weights,
        itemsize_bytes=itemsize,
        layers=tuple(layers),
        hidden_size=_number(text, "hidden_size"),
        vocab_size=matrices[-1].outputs if matrices and matrices[-1].part == "head" else int(text.vocab_size),
        num_heads=heads,
        head_dim=head_dim,
        value_dim=value_dim,
        latent_width=latent_width,
        active_width=mlp.active_width,
        mlp_matrices=mlp.matrices,
        norms_per_layer=decoder.norms_per_layer(),
        is_tied=is_tied,
        matrices=matrices,
        position_limit=positions_of(text),
        quantized=quantized,
    )


def _why_unknown(said: Mapping[str, Any], kind: Any) -> str:
    release = transformers.__version__
    if "auto_map" in said:
        return (
            f"model type {kind!r} comes with code of its own (trust_remote_code), which is not executed for this, and "
            f"transformers {release} has none for it: its sizes are guessed by the keys of its configuration"
        )
    return (
        f"model type {kind!r} is not known to transformers {release}: its sizes are guessed by the keys of its "
        "configuration"
    )


def _configuration(said: Mapping[str, Any], kind: str) -> Any:
    """The configuration object of transformers."""
    plain = {name: value for name, value in said.items() if name not in ("quantization_config", "auto_map")}
    number = reader(said)("num_hidden_layers")
    if isinstance(number, int) and number > _MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers of {kind} is {number}, which no decoder has: correct the configuration")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CONFIG_MAPPING[kind].from_dict(plain)
    except Exception as error:  # whatever its class makes of such values
        raise ConfigError(
            f"transformers {transformers.__version__} refuses this configuration of {kind} ({_short(error)}): correct "
            "it, or use the release of transformers it was written for"
        ) from error


def _built(config: Any, kind: str) -> tuple[Any, str]:
    """The model that generates text with such a configuration, without memory, and what is doubtful about it."""
    classes = _classes_of(config)
    if not classes:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no class that generates text from a configuration of {kind}: "
            "there is no KV cache to plan for"
        )
    text = config.get_text_config(decoder=True)
    why: Exception | None = None
    for cls in classes:
        # As the automatic classes do it: some models of several media have a class for their text alone.
        takes_text = cls.config_class is config.sub_configs.get("text_config")
        try:
            return without_memory(cls, copy.deepcopy(text if takes_text else config)), ""
        except Exception as error:  # whatever the code of a class makes of such numbers
            why = why or error
    assert why is not None
    message = f"transformers {transformers.__version__} cannot build {classes[0].__name__} from this configuration"
    if text is not config and _classes_of(text):  # of several media, one of which lacks a library
        model, _ = _built(text, str(text.model_type))
        return model, f"{message} ({_short(why)}), so that its text model alone is counted"
    raise ConfigError(f"{message} ({_short(why)}): correct it") from why


def _classes_of(config: Any) -> list[Any]:
    """Classes that generate text with such a configuration, the first one preferred."""
    found = []
    for name in _AUTO_CLASSES:
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
        if mapping is not None and type(config) in mapping:
            cls = mapping[type(config)]
            found.append(cls[0] if isinstance(cls, tuple) else cls)
    if not found:
        named = [getattr(transformers, str(name), None) for name in getattr(config, "architectures", None) or ()]
        found = [cls for cls in named if getattr(cls, "can_generate", lambda: False)()]
    return found


def _caches(model: Any, text: Any, positions: int | None) -> Sequence[CacheTraits]:
    """What its layers cache; nothing that we know of where the class does without transformers' cache."""
    if not model._supports_default_dynamic_cache():
        return [CacheTraits("state")] * int(getattr(text, "num_hidden_layers", 0) or 0)
    return cache_layers(text, positions)


def _attention(text: Any, layers: Sequence[Layer]) -> tuple[int, int, int, int]:
    """Query heads, the dimensions of their keys and values, and the width of a latent cache (0 where there is none)."""
    heads = _number(text, "num_attention_heads")
    kv = max((one.kv for one in layers if one.kv is not None), key=lambda one: one.values, default=None)
    if kv is None:
        return heads, 0, 0, 0
    if kv.num_heads == 1 and kv.key_dim == _number(text, "kv_lora_rank"):
        head_dim = _number(text, "qk_nope_head_dim") + _number(text, "qk_rope_head_dim")
        return heads, head_dim, _number(text, "v_head_dim") or head_dim, kv.values
    return heads, kv.key_dim, kv.value_dim, 0


def _number(text: Any, name: str) -> int:
    """A field of a configuration, 0 where it is missing; the most of any layer where it differs."""
    try:
        value = getattr(text, name, None)
    except Exception:  # it differs from layer to layer, and the configuration does not answer for all of them
        value = [getattr(one, name, None) or 0 for one in text.per_layer_config]
    return max(value, default=0) if isinstance(value, (list, tuple)) else int(value or 0)


def _short(error: Exception) -> str:
    """The first lines of another library's message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
