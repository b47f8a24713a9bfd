from __future__ import annotations

from run_script import run_script
from test_sweep_rows import report

from campaign.sweep import CellVerdict, Report
from campaign.sweep_cells import CELLS
from campaign.sweep_page import page
from campaign.sweep_rows import row_of


def refused(model_type: str, model_class: str) -> Report:
    """A type that is refused everywhere."""
    verdicts = dict.fromkeys(CELLS, CellVerdict("refused", f"offload: {model_class} has nothing that grows"))
    return Report(model_type, model_class, "4 LinearAttentionLayer", verdicts=verdicts)


def test_types_stand_by_what_became_of_them_with_counts() -> None:
    stateful = {f"lookup__{way}": CellVerdict("plain", "stateful") for way in ("transfer", "recompute", "half", "auto")}
    no_lookup = CellVerdict("plain", "of no matter")
    found = [
        report("bamba", **stateful),
        report("llama"),
        report("bloom")._replace(verdicts={cell: CellVerdict("equal", h2d_bytes=1) for cell in CELLS}),
        report("openai-gpt")._replace(verdicts={cell: CellVerdict("equal") for cell in CELLS}),
        refused("mamba", "MambaForCausalLM"),
        refused("rwkv", "RwkvForCausalLM"),
        report("other", **stateful)._replace(
            verdicts={**refused("other", "X").verdicts, ("lookup", "half"): no_lookup}
        ),
        Report("pi0", plain="not built: no timm"),
    ]
    text = page([row_of(one) for one in found])
    assert "each of the 8 text model types" in text
    assert "| 2 | equal; K and V can be recomputed" in text
    assert "## Recomputable\n\n`bamba`, `llama`\n" in text
    assert "## Transferred\n\n`bloom`\n" in text
    assert "as the model caches nothing: `openai-gpt`\n" in text
    assert "| transformers: stateful | `bamba` (lookup) |" in text
    assert "| offload: the model has nothing that grows | `mamba`, `rwkv`" in text
    assert "| not built: no timm | `pi0` |" in text
    assert "of no matter" not in text
    assert "fall short" not in text.lower()


def test_what_is_wrong_is_shown_with_its_modes() -> None:
    text = page(
        [row_of(report("doge", greedy__half=CellVerdict("wrong"), turns__half=CellVerdict("error", "IndexError: x")))]
    )
    assert "| 1 | fall short |" in text
    assert "| wrong | `doge` (greedy) |" in text
    assert "| error: IndexError: x | `doge` (turns/half) |" in text


def test_whole_layers_are_named() -> None:
    warned = CellVerdict(
        "equal", h2d_bytes=1, recomputed_tokens=1, warnings=("X attends so: whole layers are put together",)
    )
    text = page([row_of(report("axk1", greedy__half=warned)), row_of(report("llama"))])
    assert "put together on the device for: `axk1`\n" in text


def test_the_page_says_what_the_rows_say() -> None:
    done = run_script("sweep_models", "--docs", "--check")
    assert done.exit_code == 0, done.stderr
