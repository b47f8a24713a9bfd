"""A file of prompts, one a line, answered in batches within one session; answers are JSON lines.

python examples/prompts_file.py prompts.txt --batch 8 > answers.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loading import arguments, load

import kvoffload


def main() -> None:
    """Answer all prompts."""
    parser = arguments(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    prompts = [line for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    model, tokenizer = load(options.model)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts.sort(key=len)  # a batch is padded to its longest prompt
    with kvoffload.offload(model) as session:  # host memory is pinned once, for all batches
        for start in range(0, len(prompts), options.batch):
            batch = prompts[start : start + options.batch]
            inputs = tokenizer(batch, return_tensors="pt", padding=True).to(model.device)
            out = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)
            answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for prompt, answer in zip(batch, answers, strict=True):
                print(json.dumps({"prompt": prompt, "answer": answer}), flush=True)
            assert session.stats is not None
            print(f"{len(batch)} prompts at {session.stats.tokens_per_s:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
