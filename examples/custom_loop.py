"""A decoding loop of your own over a cache in host memory: it stops where the model is unsure of the next token.

python examples/custom_loop.py --least 0.2
"""

from __future__ import annotations

import torch
from loading import arguments, load

import kvoffload


@torch.no_grad()
def main() -> None:
    """Decode one token at a time."""
    parser = arguments(__doc__)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--least", type=float, default=0.1, help="stop below this probability")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids.to(model.device)
    with kvoffload.offload(model) as session:
        cache = session.new_cache()
        logits = model(ids, cache=cache).logits  # the prompt fills it; past_key_values= up to transformers 5.23
        for _ in range(options.new_tokens):
            chance, token = logits[:, -1].softmax(dim=-1).max(dim=-1, keepdim=True)
            if chance < options.least or token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token], dim=1)
            logits = model(token, cache=cache).logits  # one step: the cache crosses the link once
        print(tokenizer.decode(ids[0], skip_special_tokens=True))
        print(f"{cache.get_seq_length()} tokens in the cache, {session.num_forwards} forwards")


if __name__ == "__main__":
    main()
