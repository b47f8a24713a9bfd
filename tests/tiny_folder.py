"""A checkpoint folder of a tiny random model with a tokenizer of whole words, where one of a hub would be named."""

from __future__ import annotations

from pathlib import Path

from models import BASE, make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

WORDS = ("user", "assistant", "the", "capital", "of", "France", "is", "Italy", "and", "what", "why", "sky", "blue", "?")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_folder(folder: Path) -> Path:
    """Weights, configuration and tokenizer in `folder`, which is returned."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    filled = [*special, *WORDS, *(f"w{idx}" for idx in range(BASE["vocab_size"] - len(special) - len(WORDS)))]
    made = Tokenizer(WordLevel({word: idx for idx, word in enumerate(filled)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    make_model("llama").save_pretrained(folder)
    return folder
