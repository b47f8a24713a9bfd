"""A chat over one cache: each turn computes only what is new, and answers are printed while they are made.

python examples/chat.py
printf 'What is the capital of France?\\nAnd of Italy?\\n' | python examples/chat.py
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from loading import arguments, load
from transformers import TextStreamer

import kvoffload


def main() -> None:
    """Ask and answer, turn by turn."""
    parser = arguments(__doc__)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    with kvoffload.offload(model) as session:
        cache = session.new_cache()
        cached = torch.zeros(1, 0, dtype=torch.long, device=model.device)  # the tokens that it holds
        for question in questions():
            messages.append({"role": "user", "content": question})
            inputs: Any = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            ids = inputs["input_ids"]
            if not torch.equal(ids[:, : cached.shape[1]], cached):  # the template wrote an earlier turn anew
                cache.close()
                cache = session.new_cache()
            out = model.generate(  # `past_key_values` instead of `cache` up to transformers 5.23
                **inputs, cache=cache, max_new_tokens=options.new_tokens, do_sample=False, streamer=streamer
            )
            cached = out[:, : cache.get_seq_length()]
            answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})


def questions() -> Any:
    """Lines from the keyboard, or from a pipe, until one is empty."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question


if __name__ == "__main__":
    main()
