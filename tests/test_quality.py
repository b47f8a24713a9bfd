"""`kvoffload quality`: predictions over stored forms against those over the model's own cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from models import WIDE, make_model
from quantizing import quantizing_cache
from transformers import PreTrainedModel

from kvoffload.bench import quality
from kvoffload.errors import ConfigError


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", **WIDE)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 96, (1, 200), generator=torch.Generator().manual_seed(2))


def measured(model: PreTrainedModel, ids: torch.Tensor, *kv_dtypes: str) -> dict[str, quality.Quality]:
    found = quality.measure_quality(model, ids, kv_dtypes, contexts=(80,), positions=60, block_tokens=16)
    return {one.kv_dtype: one for one in found}


def test_figures_are_those_of_a_plain_cache_with_the_same_forms(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """The divergence by hand, over logits of transformers' own cache and of one that goes through the form."""
    exact, stored = (
        torch.cat(list(quality._logits(model, ids[:, :141], 80, cache))).double()
        for cache in (quantizing_cache(model, lambda *_, form=form: form, 16) for form in ("kv", "int4"))
    )
    found = measured(model, ids, "int4")["int4"]
    before, after = exact.softmax(-1), stored.softmax(-1)
    kld = (before * (before / after).log()).sum(-1)
    assert found.positions == len(kld) == 60
    assert found.mean_kld == pytest.approx(float(kld.mean()), rel=1e-3)
    assert found.p99_kld == pytest.approx(float(kld.quantile(0.99)), rel=1e-3)
    assert found.same_top_share == float((exact.argmax(-1) == stored.argmax(-1)).double().mean())
    follows = ids[0, 81:141, None]
    nll = [-float(probability.log().gather(-1, follows).mean()) for probability in (before, after)]
    assert found.perplexity == pytest.approx(math.exp(nll[1]), rel=1e-4)
    assert found.perplexity_change == pytest.approx(math.exp(nll[1] - nll[0]) - 1, abs=1e-5)


def test_fewer_bits_are_less_accurate_and_smaller(model: PreTrainedModel, ids: torch.Tensor) -> None:
    found = measured(model, ids, "int8", "int4")
    assert 0 < found["int8"].mean_kld < found["int4"].mean_kld / 10
    assert 1 < found["int8"].bytes_ratio < found["int4"].bytes_ratio
    assert found["int8"].same_top_share >= found["int4"].same_top_share
    assert not found["int8"].kept_exact_blocks


def test_a_text_that_is_too_short_is_told_with_the_numbers(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="the text has 200 tokens, contexts of 150 and 60 positions need 211"):
        quality.measure_quality(model, ids, ["int8"], contexts=(150,), positions=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "a,b"], "--contexts must be numbers of tokens"),
        (["--contexts", "0"], "--contexts must be numbers of tokens"),
        (["--kv-dtype", "int3"], "'int8' or 'int4' or 'int2' or 'all'"),
        (["--positions", "0"], "a whole number from 1"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    done = run("quality", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xff\xfe\x00")
    done = run("quality", "--text", str(path))
    assert done.exit_code == 2
    assert "cannot read" in done.stderr


def test_the_command_prints_a_table_or_json(
    model: PreTrainedModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvoffload.cli import chat, model_source

    class Tokenizer:
        def __call__(self, text: str, **kwargs: Any) -> dict[str, torch.Tensor]:
            assert len(text) > 1000, "English that Python brings"
            return {"input_ids": ids}

    source = model_source.Source("a folder")
    monkeypatch.setattr(model_source, "find_model", lambda name: source)
    monkeypatch.setattr(chat, "load_model", lambda *args: (model, Tokenizer()))
    arguments = ("quality", "--contexts", "60", "--positions", "40")
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.stderr
    assert all(word in shown.stdout for word in ("int8", "int4", "int2", "mean KLD", "same top"))
    assert max(map(len, shown.stdout.splitlines())) <= 80
    data = json.loads(run(*arguments, "--kv-dtype", "int4", "--json").stdout)
    assert [one["kv_dtype"] for one in data["quality"]] == ["int4"]
    assert data["quality"][0]["positions"] == 40
