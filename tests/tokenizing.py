"""A tokenizer for the tiny models of `models`: one token for each character, and a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for one in messages %}<{{ one['role'][0] }}>{{ one['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TRIMMING = TEMPLATE.replace("one['content']", "one['content'][:3]")  # leaves out what was said, as of thoughts
CHARACTERS = "\0\1~" + "".join(map(chr, range(32, 126))) + "\n"  # ~ ends what somebody says


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """As many tokens as `CHARACTERS`; no bos, "~" is eos and "\\0" padding."""
    vocabulary = {char: idx for idx, char in enumerate(CHARACTERS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="\1"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="~", pad_token="\0", unk_token="\1")
    tokenizer.chat_template = template
    return tokenizer
