"""One prompt with the KV cache in host memory, and what it took.

python examples/quick_start.py
python examples/quick_start.py --link-gb-per-s 1 --prompt "Once upon a time"
"""

from __future__ import annotations

from loading import arguments, load

import kvoffload


def main() -> None:
    """Answer one prompt."""
    parser = arguments(__doc__)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--link-gb-per-s", type=float, help="speed of an emulated link, without a GPU")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)

    config = kvoffload.OffloadConfig()
    if options.link_gb_per_s:  # on a CPU there is something to plan then; the first time it is measured, for 20 seconds
        config = kvoffload.OffloadConfig(link=kvoffload.EmulatedLink(h2d_gb_per_s=options.link_gb_per_s))
    with kvoffload.offload(model, config) as session:
        out = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)

    print(tokenizer.decode(out[0], skip_special_tokens=True))
    print(session.stats)


if __name__ == "__main__":
    main()
