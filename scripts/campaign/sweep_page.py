"""The page `docs/models.md`, made of the rows of the sweep.

Owns the words and the order of the page. Does not own the rows (`sweep_rows`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from campaign.rows import Row
from campaign.sweep import TOLERANCE
from campaign.sweep_cells import MODES, NEW_TOKENS, PROMPT_TOKENS, SPLITS

HEAD = """# Models

What becomes of each of the {total} text model types of transformers: those of `AutoModelForCausalLM`,
`AutoModelForImageTextToText` and `AutoModelForMultimodalLM`. Each is made tiny, with random weights in float32, and
generates {new_tokens} tokens from prompts of {prompt_tokens} tokens of text, plainly and offloaded:

- {modes},
- each with the splits {splits};
- greedy search also with `attention="whole_layer"`, and over a link without a speed.

*Equal* means the same tokens, and logits that differ by at most {tolerance:g} (relative to the largest where that is
above 1), or by no more than twice what transformers itself differs by when it rounds otherwise.

| Types | |
|---|---|
{counts}

{versions}, commit {commit}. Written by `scripts/sweep_models.py --docs` from `scripts/results/sweep.csv`.
"""
WORDS = {
    "recomputable": "equal; K and V can be recomputed from activations",
    "transferred": "equal; K and V are always transferred",
    "idle": "equal, and nothing is offloaded: the model caches nothing",
    "refused": "refused, with a reason",
    "short": "fall short",
    "not run": "not made here, or transformers itself does not generate with them from text alone",
}
WHOLE_LAYER = "whole layers are put together"


def page(found: Sequence[Row]) -> str:
    """The whole page."""
    by_form = {form: [one for one in found if one["form"] == form] for form in WORDS}
    equal = by_form["recomputable"] + by_form["transferred"]
    counts = [
        f"| {len(rows)} | {WORDS[form]} |" for form, rows in by_form.items() if rows or form not in ("idle", "short")
    ]
    sections = [
        HEAD.format(
            total=len(found),
            new_tokens=NEW_TOKENS,
            prompt_tokens=PROMPT_TOKENS,
            modes=", ".join(MODES),
            splits=", ".join(SPLITS),
            tolerance=TOLERANCE,
            counts="\n".join(counts),
            versions=" / ".join(sorted({one["versions"] for one in found})),
            commit=" / ".join(sorted({one["commit"] for one in found})),
        ),
        f"## Recomputable\n\n{_names(by_form['recomputable'])}\n",
        f"## Transferred\n\n{_names(by_form['transferred'])}\n",
    ]
    whole = [one for one in equal if WHOLE_LAYER in one["warnings"]]
    if whole:
        sections.append(f"Of both, each layer's K and V are put together on the device for: {_names(whole)}\n")
    if idle := by_form["idle"]:
        sections.append(f"Equal without a byte from the host, as the model caches nothing: {_names(idle)}\n")
    tables = {
        "Not in every mode": equal,
        "Refused": by_form["refused"],
        "Fall short": by_form["short"],
        "Not run": by_form["not run"],
    }
    for title, rows in tables.items():
        if table := _table(rows):
            sections.append(f"## {title}\n\n{table}\n")
    return "\n".join(sections)


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(f"`{one['model_type']}`" for one in rows) or "none"


def _table(rows: Sequence[Row]) -> str:
    """Reasons, each with its types, the most frequent first; empty without reasons."""
    types: dict[str, list[str]] = {}
    for one in rows:
        for reason, cells in _reasons(one).items():
            where = "" if cells == "all" else f" ({cells})"
            types.setdefault(reason, []).append(f"`{one['model_type']}`{where}")
    if not types:
        return ""
    counts = Counter({reason: len(names) for reason, names in types.items()})
    lines = ["| Reason | Types |", "|---|---|"]
    lines += [f"| {reason.replace('|', '/')} | {', '.join(types[reason])} |" for reason, _ in counts.most_common()]
    return "\n".join(lines)


def _reasons(one: Row) -> dict[str, str]:
    """Why a type is not equal everywhere, in words that do not name it, and in which modes."""
    found: dict[str, str] = dict(json.loads(one["reasons"]))
    for mode in MODES:  # an outcome that is no exception has no reason of its own
        for outcome in ("wrong", "inexact"):
            if outcome in one[mode]:
                found[outcome] = f"{found[outcome]} {mode}" if outcome in found else mode
    if one["plain"]:
        found = {one["plain"]: "all"}
    names = {one["model_class"]: "the model", f"of {one['model_type']} ": "of the type "}
    general = {}
    for reason, cells in found.items():
        if one["form"] == "refused" and reason.startswith("plain: "):
            continue  # what transformers cannot do either does not matter then
        for name, word in names.items():
            reason = reason.replace(name, word) if name else reason
        reason = reason.replace("plain: ", "transformers: ", 1) if reason.startswith("plain: ") else reason
        general[reason.removeprefix("refused: ")] = cells
    return general
