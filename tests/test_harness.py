"""scripts/harness.py: lm-eval says the same about a model object without and with offloading, to the last digit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from models import make_model
from transformers import PreTrainedTokenizerFast

import kvoffload

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, its downloads and copies in a folder of the test."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("harness", SCRIPTS / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def letters() -> PreTrainedTokenizerFast:
    """One token for each printable character, and three for beginning, end and padding."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = ["\n", *map(chr, range(32, 127))]
    names = ["<pad>", "<bos>", "<eos>", *characters]
    inner = Tokenizer(models.WordLevel({name: idx for idx, name in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def test_the_tasks_have_a_file_and_an_answer_among_the_choices() -> None:
    tasks = [yaml.safe_load(path.read_text()) for path in (SCRIPTS / "harness").glob("*.yaml")]
    assert sorted(task["output_type"] for task in tasks) == ["generate_until", "multiple_choice"]
    for task in tasks:
        lines = (SCRIPTS / "harness" / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        facts = [yaml.safe_load(line) for line in lines]
        assert all(fact["answer"] in fact["choices"] for fact in facts)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, no dependency of ours: see docs/harness.md"
)
@pytest.mark.filterwarnings("default")  # other people's
@pytest.mark.parametrize("split", ["transfer", 0.5])
def test_answers_and_log_likelihoods_are_the_same_in_all_three_runs(harness: Any, split: Any) -> None:
    tokenizer = letters()
    model = make_model("llama", num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=512)
    config = kvoffload.OffloadConfig(
        split=split, link=kvoffload.EmulatedLink(), device_gib="min", block_tokens=4, chunk_blocks=2
    )
    plain, live, folder = harness.compare(model, tokenizer, config)
    assert {len(answers) for answers in plain.found.answers.values()} == {8}
    assert len({str(answer) for answers in plain.found.answers.values() for answer in answers}) == 16  # none is empty
    for run in (live, folder):
        assert run.found == plain.found
        assert run.h2d_bytes > 1e6
    assert plain.h2d_bytes == 0
    assert "generate" not in vars(model)
