"""The dimensions of a decoder, read from its Hugging Face configuration: a config object, or a plain `config.json`.

Owns the many names for the same number and the defaults a bare file leaves out. Does not load models, does not import
transformers or torch. Weights are counted from the dimensions (matrices and norms; biases and the router's likes are
left out), which is within about one percent of the real number.

Where a field is looked for: the text configuration of a multimodal model, else the configuration itself; each name of
`_NAMES` in order; then a default of the architecture; then a ConfigError that names the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvoffload.errors import ConfigError, UnsupportedModelError
from kvoffload.types import ModelShape

ITEMSIZE_BYTES = {"float64": 8, "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "float8_e4m3fn": 1}
_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "head_dim": ("head_dim", "attention_head_dim", "d_kv"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim"),
    "vocab_size": ("vocab_size",),
}
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# Architectures whose MLP is two matrices, 4 * hidden_size wide where the file does not say.
_PLAIN_MLP = (
    *("opt", "gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "bloom", "mpt", "falcon", "phi", "starcoder2"),
    *("nemotron", "codegen", "persimmon", "xglm", "biogpt", "ctrl", "openai-gpt", "arcee", "apertus"),
)
_LEARNED_POSITIONS = ("opt", "gpt2", "gpt_neo", "gpt_bigcode", "biogpt", "openai-gpt")
# Architectures with one matrix for embedding and head where the file does not say.
_TIED_UNLESS_SAID = (
    *("opt", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "cohere", "cohere2", "starcoder2", "smollm3", "gpt2"),
    *("bloom", "mpt", "falcon", "gpt_bigcode", "gpt_neo", "xglm", "biogpt", "ctrl", "openai-gpt"),
)
# Every n-th layer attends to everything, where the file gives neither `layer_types` nor a pattern.
_SLIDING_PATTERN = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4}

_Get = Callable[[str], Any]


def shape_from_config(config: Any, dtype: Any = None) -> ModelShape:
    """The shape of the decoder that `config` describes.

    Args:
        config: a transformers configuration object, the dict of a `config.json`, or a path to such a file or to the
            folder it is in.
        dtype: of weights, K/V and activations: a torch dtype or its name; by default what the configuration says, else
            float32.

    Raises:
        ConfigError: a needed field is missing or no whole number of at least 1 (names it), or the dtype is unknown.
        UnsupportedModelError: an encoder-decoder or attention-free model.
    """
    get = _reader(config)
    if get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{_model(get)} is an encoder-decoder model; only decoders can be offloaded")
    num_layers = _whole(get, "num_layers")
    hidden = _whole(get, "hidden_size")
    heads = _whole(get, "num_heads")
    head_dim = _whole(get, "head_dim", hidden // heads)
    is_multi_query = get("multi_query") and not get("new_decoder_architecture")
    kv_heads = 1 if is_multi_query else _whole(get, "num_kv_heads", heads)
    plain_mlp = get("model_type") in _PLAIN_MLP
    intermediate = _whole(get, "intermediate_size", 4 * hidden if plain_mlp else None)
    mlp_matrices = 2 if plain_mlp else 3
    experts = _first_whole(get, "num_local_experts", "num_experts", "n_routed_experts")
    expert_width = _first_whole(get, "moe_intermediate_size") or intermediate
    active_width = stored_width = intermediate
    if experts:
        shared = _first_whole(get, "shared_expert_intermediate_size") or 0
        shared += expert_width * (_first_whole(get, "n_shared_experts") or 0)
        active_width = shared + expert_width * (_first_whole(get, "num_experts_per_tok", "moe_k") or 1)
        stored_width = shared + expert_width * experts
    vocab = _whole(get, "vocab_size")
    itemsize = _itemsize_bytes(dtype if dtype is not None else get("dtype") or get("torch_dtype") or "float32")

    attention_weights = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim  # q and out, k and v
    layer_weights = attention_weights + mlp_matrices * hidden * stored_width + 2 * hidden  # two norms
    tied = get("tie_word_embeddings")
    if tied is None:
        tied = get("model_type") in _TIED_UNLESS_SAID
    embedding_width = _first_whole(get, "word_embed_proj_dim") or hidden
    embeddings = vocab * embedding_width * (1 if tied else 2)
    if get("model_type") in _LEARNED_POSITIONS:
        embeddings += hidden * (_first_whole(get, "max_position_embeddings", "n_positions") or 0)
    return ModelShape(
        num_layers=num_layers,
        num_offloaded_layers=_num_full_attention_layers(get, num_layers),
        hidden_size=hidden,
        intermediate_size=active_width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        kv_itemsize_bytes=itemsize,
        activation_itemsize_bytes=itemsize,
        weight_bytes=(num_layers * layer_weights + embeddings + hidden) * itemsize,
        mlp_matrices=mlp_matrices,
        latent_width=_latent_width(get),
    )


def _latent_width(get: _Get) -> int:
    """What multi-head latent attention caches of a token: the compressed K/V and the rotated part of the key."""
    rank = _first_whole(get, "kv_lora_rank")
    return rank + (_first_whole(get, "qk_rope_head_dim") or 0) if rank else 0


def sliding_window_tokens(config: Any) -> int:
    """Tokens each layer with a bounded cache holds per sequence; 0 where no layer is bounded."""
    get = _reader(config)
    if get("use_sliding_window") is False:
        return 0
    return _first_whole(get, "sliding_window", "attention_chunk_size") or 0


def _num_full_attention_layers(get: _Get, num_layers: int) -> int:
    """Layers whose cache grows with every token and is their own."""
    types: list[str] = get("layer_types") or []
    if not types:
        types = ["full_attention"] * num_layers
        if get("use_sliding_window") is not False and (get("sliding_window") or get("attention_chunk_size")):
            pattern = get("sliding_window_pattern") or _SLIDING_PATTERN.get(get("model_type"))
            types = [
                "full_attention" if isinstance(pattern, int) and (idx + 1) % pattern == 0 else "sliding_attention"
                for idx in range(num_layers)
            ]
    shared = _first_whole(get, "num_kv_shared_layers") or 0  # the last layers, which read the cache of earlier ones
    own = types[: num_layers - shared]
    lent = 1 if shared and "full_attention" in own else 0  # the last of each type lends its cache, and stays resident
    return sum(kind == "full_attention" for kind in own) - lent


def _reader(config: Any) -> _Get:
    """A lookup in the configuration of the decoder, None for what is missing, whatever form `config` has."""
    if isinstance(config, (str, Path)):
        config = _read(Path(config))
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    if isinstance(config, Mapping):
        for name in _TEXT_CONFIGS:
            if isinstance(config.get(name), Mapping):
                config = {"dtype": config.get("dtype"), "torch_dtype": config.get("torch_dtype")} | dict(config[name])
        mapping = config
        return lambda name: mapping.get(name)
    return lambda name: getattr(config, name, None)


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the model configuration {path}: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} is not a model configuration: it holds a {type(data).__name__}, not an object")
    return data


def _whole(get: _Get, field: str, default: int | None = None) -> int:
    names = _NAMES[field]
    for name in names:
        value = get(name)
        if value is None:
            continue
        if isinstance(value, (list, tuple)) and value:
            value = max(value)  # one per layer (gemma3n)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} of {_model(get)} must be a whole number of at least 1, got {value!r}")
        return value
    if default is None:
        if field == "num_heads":
            raise UnsupportedModelError(
                f"{_model(get)} has no attention heads ({' or '.join(names)} is missing): there is no KV cache"
            )
        raise ConfigError(f"the configuration of {_model(get)} lacks {names[0]} (also looked for: {_rest(names)})")
    return default


def _rest(names: tuple[str, ...]) -> str:
    return ", ".join(names[1:]) or "no other name"


def _first_whole(get: _Get, *names: str) -> int | None:
    values = (get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value), None)


def _itemsize_bytes(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEMSIZE_BYTES:
        raise ConfigError(f"unknown dtype {name!r}; known: {', '.join(sorted(ITEMSIZE_BYTES))}")
    return ITEMSIZE_BYTES[name]


def _model(get: _Get) -> str:
    return str(get("model_type") or "this model")
