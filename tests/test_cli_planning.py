"""`kvoffload plan`: what it prints, for which machine, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from commands import cache_fixture as cache_fixture
from commands import model_fixture as model_fixture
from commands import run_badly, run_well, table_words
from configs import CONFIGS, LLAMA_2_7B

from kvoffload.profiler.drawing import terminal_tables


def test_plan_recommends_and_compares(model: Path) -> None:
    text = run_well("plan", "--model", model, "--batch", 100, "--hardware", "a100-40gb-pcie4")
    assert text.startswith("Do not offload, unless the batch must stay together")
    assert "sub-batches" in text
    assert "On NVIDIA A100 40GB PCIe, PCIe 4.0 x16: peaks of the datasheet" in text


def test_plan_never_cuts_the_name_of_a_way(model: Path) -> None:
    arguments = ["--price-per-hour", 2, "--grid-g-per-kwh", 300, "--batch", 100, "--hardware", "a100-40gb-pcie4"]
    text = run_well("plan", "--model", model, *arguments)
    for way in ("sub-batches", "offload", "full transfer", "paper's schedule"):
        assert f"│ {way} " in text or f"┃ {way} ┃" in text


@pytest.mark.parametrize("width", [60, 80, 110, 160])
@pytest.mark.parametrize("options", [[], ["--price-per-hour", 2], ["--price-per-hour", 2, "--grid-g-per-kwh", 300]])
def test_plan_cuts_no_figure_on_a_narrow_terminal(
    width: int, options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", CONFIGS / "llama-2-7b.json", "--hardware", "a100-40gb-pcie4", "--batch", 64, *options]
    monkeypatch.setattr(terminal_tables, "WIDTH", 1000)
    wide = run_well("plan", *arguments)
    assert wide.count("TTFT") == 1
    monkeypatch.setattr(terminal_tables, "WIDTH", width)
    narrow = run_well("plan", *arguments)
    assert "…" not in narrow
    figures = Counter({word: number for word, number in table_words(wide).items() if word[0].isdigit()})
    assert figures.total() >= 44
    assert figures <= table_words(narrow)
    assert max(len(line) for line in narrow.splitlines() if line and line[0] in "┏┃┡│└") <= width


def test_plan_with_a_sweep_prints_the_sweep_alone() -> None:
    arguments = ["--config", CONFIGS / "opt-6.7b.json", "--hardware", "a100-40gb-pcie4", "--sweep", "1:131072"]
    text = run_well("plan", *arguments)
    assert text.startswith("Best way, new tokens/s (offloaded)")
    assert " 131,072 tokens " in text
    assert "TTFT" not in text


def test_plan_refuses_a_sweep_of_several_devices() -> None:
    arguments = ["--config", CONFIGS / "opt-6.7b.json", "--hardware", "a100-40gb-pcie4,4090", "--sweep", "1:131072"]
    assert "--sweep is of one device" in run_badly("plan", *arguments)


def test_plan_groups_long_numbers_and_ends_limits_at_the_models_positions() -> None:
    config = CONFIGS / "opt-6.7b.json"
    text = " ".join(run_well("plan", "--config", config, "--hardware", "a100-40gb-pcie4").split())
    assert "Longest prompt with this batch, in tokens: 1920 (all of the model's positions) on the device" in text
    assert "Largest batch with these prompts: 34 on the device" in text
    assert "offloaded. Offloaded: in 256.00 GB of host memory (assumed)." in text
    rows = run_well("roofline", "--config", config, "--hardware", "a100-40gb-pcie4", "--seq", 131072, "--new-tokens", 1)
    assert "one token of 1 sequence at a context of 131,072" in rows
    assert "1 x 131,072 tokens and 1 new one each" in rows


def test_plan_tells_a_prompt_beyond_the_models_positions_in_text_and_in_json() -> None:
    arguments = ["--config", CONFIGS / "opt-6.7b.json", "--hardware", "a100-40gb-pcie4", "--seq", 100_000]
    told = "prompt and new tokens make 100,128, and the model's configuration has positions for 2048."
    assert told in " ".join(run_well("plan", *arguments).split())
    assert told in json.loads(run_well("plan", *arguments, "--json"))["recommendation"]


def test_the_answer_comes_first_in_three_parts_and_its_code_runs(model: Path) -> None:
    """Whether it fits or what is too much, the code to paste, the speed and what bounds it; then the table."""
    for arguments, verdict, code, bound in (
        (["--batch", 1], "Do not offload: ", "out = model.generate(**inputs, max_new_tokens=128)", "reading weights"),
        (["--batch", 100], "Do not offload, unless", "for i in range(0, 100, 34):", "reading weights"),
        (["--seq", "100k"], "Offload: ", "with kvoffload.offload(model):", "the link"),
        (["--seq", "100k", "--split", "transfer"], "Offload: ", 'config = kvoffload.OffloadConfig(split="t', "link"),
        (["--device-memory", 10], "Stream the weights", "from transformers import", "bytes"),
        (
            ["--device-memory", 10, "--w-bits", 4.5, "--batch", 999],
            "Do not offload, unless",
            "for i in range",
            "the host",
        ),
    ):
        said = ["plan", "--model", model, "--hardware", "a100-40gb-pcie4", *arguments]
        answer = json.loads(run_well(*said, "--json"))["answer"]
        assert answer["verdict"].startswith(verdict)
        assert answer["code"].startswith(code)
        compile(answer["code"], "answer", "exec")
        assert answer["speed"].startswith("Predicted")
        assert bound in answer["speed"].partition("bound by")[2]
        text = run_well(*said)
        assert text.startswith(verdict)
        assert all(f"    {line}" in text.splitlines() for line in answer["code"].splitlines())
        assert text.index("bound by") < text.index("TTFT") < text.index("Largest batch")


def test_plan_names_what_is_too_much_and_what_would_fit() -> None:
    small = ["--config", "llama-3.1-8b", "--hardware", "4090", "--device-weights-gib", "all", "--device-memory", 12]
    said = " ".join(run_well("plan", *small).split())
    assert said.startswith(
        "Quantise the weights: weights in 4 bits (4.5 with scales) do; as they are this does not work."
    )
    assert "load_in_4bit=True" in said
    assert "Offloading does not work here: device memory: weights of 16.06 GB" in said
    assert "What would fit: this with weights in 8 bits (--w-bits 8.5, " in said
    told = run_badly("plan", *small, "--device-memory", 4, "--seq", "60k")
    assert "What would fit: weights in 4 bits" not in told
    many = ["--config", "llama-2-7b", "--hardware", "4090", "--batch", 500, "--host-memory", 40]
    alone = " ".join(run_well("plan", *many).split())
    assert alone.startswith("Do not offload, unless the batch must stay together")
    assert "Offloading does not work here: host memory" in alone
    assert "8.69 GB too much" in run_well("plan", "--config", "llama-3.1-8b", "--hardware", "4090", "--seq", "120k")


def test_grouped_queries_and_quantised_weights_are_named_where_they_are_the_reason() -> None:
    def answer(config: str, *arguments: object) -> str:
        said = ["plan", "--config", config, "--hardware", "4090", "--seq", "120k", "--json", *arguments]
        return str(json.loads(run_well(*said))["recommendation"])

    grouped = "Its grouped queries make K and V no larger than activations, so recomputing them gains nothing."
    assert grouped in answer("llama-3.1-8b")
    assert "grouped" not in answer("llama-2-7b")
    quantised = answer("llama-3.1-8b", "--seq", "60k", "--w-bits", 4.5)
    assert "(4.5 bits each)" in quantised
    assert quantised.startswith("Do not offload: ")


def test_several_devices_make_one_table(model: Path) -> None:
    data = json.loads(run_well("plan", "--model", model, "--hardware", "t4, 4090,h200", "--seq", "4k", "--json"))
    assert [one["hardware"] for one in data["cards"]] == ["NVIDIA T4", "NVIDIA GeForce RTX 4090", "NVIDIA H200"]
    rates = [one["tokens_per_s"] for one in data["cards"]]
    assert rates == sorted(rates)
    alone = json.loads(run_well("plan", "--model", model, "--hardware", "t4", "--seq", "4k", "--json"))
    assert data["cards"][0]["recommendation"] == alone["recommendation"]
    text = run_well("plan", "--model", model, "--hardware", "t4,4090,h200", "--seq", "4k")
    assert "│ RTX 4090 │" in text
    too_small = ["--hardware", "t4,l4", "--device-weights-gib", "all", "--device-memory", 2]
    nothing = run_well("plan", "--model", model, *too_small)
    assert nothing.count("nothing works") == 2
    assert "NVIDIA T4: device memory: weights of 13.48 GB" in " ".join(nothing.split())


def test_what_cannot_be_done_has_no_figures_in_json(model: Path) -> None:
    arguments = ["--model", model, "--hardware", "a100-40gb-pcie4", "--seq", "100k", "--json"]
    data = json.loads(run_well("plan", *arguments))
    rows = {row["name"]: row for row in data["forecast"]}
    assert rows["on_device"]["problem"]
    assert {value for name, value in rows["on_device"].items() if name not in ("name", "problem")} == {None}
    assert rows["offload"]["tokens_per_s"] > 0


def test_plan_as_json_holds_the_plan_and_the_alternatives(model: Path) -> None:
    arguments = ["--model", model / "config.json", "--prompt-tokens", 100000, "--hardware", "a100-40gb-pcie4"]
    data = json.loads(run_well("plan", *arguments, "--json"))
    assert data["activation_blocks"] + data["resident_activation_blocks"] > 0
    assert data["predicted_step_s"] < data["full_transfer_step_s"]
    assert [one["way"] for one in data["alternatives"]] == ["drafts", "offload"]
    transferred = json.loads(run_well("plan", *arguments, "--split", "transfer", "--device-gib", 5, "--json"))
    assert transferred["activation_blocks"] == 0
    assert transferred["device_bytes"] <= 5 * 2**30


def test_plan_for_this_machine_takes_the_stored_profile_and_an_emulated_speed(model: Path, cache: Path) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA_2_7B | {"hidden_size": 128, "intermediate_size": 256}))
    arguments = ["plan", "--model", model, "--prompt-tokens", 4096, "--json"]
    slow = json.loads(run_well(*arguments, "--link-gb-per-s", 0.1, "--split", "transfer"))
    fast = json.loads(run_well(*arguments, "--link-gb-per-s", 1.0, "--split", "transfer"))
    assert slow["predicted_step_s"] > fast["predicted_step_s"]
    assert slow["link_bytes_per_step"] == fast["link_bytes_per_step"] > 0
    assert len(list(cache.glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "b300"], "a100-40gb-pcie4"),
        (["--hardware", "missing.json"], "missing.json"),
        (["--batch", -1], "--batch must be a whole number from 1 to 1,000,000,000, got -1"),
        (["--new-tokens", 0], "--new-tokens must be"),
        (["--num-beams", 0], "--num-beams must be"),
        (["--seq", 0], "--prompt-tokens/--seq must be"),
        (["--split", 1.5], "--split must be 'auto' or 'transfer' or 'recompute' or a share from 0 to 1, got 1.5"),
        (["--split", "everything"], "--split must be"),
        (["--split", "nan"], "--split must be"),
        (["--device-gib", "lots"], "--device-gib must be 'auto' or 'min' or a number of GiB above zero, got lots"),
        (["--device-gib", 0], "--device-gib must be"),
        (["--host-gib", "min"], "--host-gib must be 'auto' or a number of GiB above zero, got min"),
        (["--link", "pcie9"], "--link: unknown link 'pcie9'"),
        (["--device-memory", 0], "--device-memory must be a number of GB"),
        (["--price-per-hour", -1], "--price-per-hour must be a price"),
        (["--grid-g-per-kwh", 9999], "--grid-g-per-kwh must be grams from 0 to 5000, got 9999.0"),
        (["--link-gb-per-s", 0], "--link-gb-per-s must be a number above zero (GB/s), got 0.0"),
        (["--device-gib", 0.001, "--prompt-tokens", 100000], "device_gib"),
        (["--host-gib", 0.001, "--prompt-tokens", 100000], "host memory"),
        (["--link-gb-per-s", 1], "link of its own"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_bad_request_is_one_line_and_exit_code_2(arguments: list[object], message: str, model: Path) -> None:
    assert message in run_badly("plan", "--model", model, "--hardware", "a100-40gb-pcie4", *arguments)


def test_a_bad_model_or_profile_file_is_named(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    message = run_badly("plan", "--model", broken, "--hardware", "a100-40gb-pcie4")
    assert f"{broken}: it is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 " in message
    broken.write_bytes(b"\xff\xfe")
    assert f"{broken}: it is no JSON ('utf-8'" in run_badly("plan", "--model", broken, "--hardware", "a100-40gb-pcie4")
    broken.write_text("{")
    assert f"cannot read the hardware profile {broken}" in run_badly("plan", "--model", model, "--hardware", broken)


def test_a_model_that_is_not_here_is_told_with_how_to_get_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = run_badly("plan", "--model", "facebook/opt-125m", "--hardware", "a100-40gb-pcie4")
    assert "facebook/opt-125m: there is no such file; name a config.json or the folder it is in" in message
    assert "`hf download OWNER/NAME config.json --local-dir FOLDER`" in message
    assert "or a size by name (near: opt-13b" in message
    assert "; the hub is switched off (HF_HUB_OFFLINE)" in message
    message = run_badly("plan", "--model", tmp_path, "--hardware", "a100-40gb-pcie4")
    assert f"{tmp_path / 'config.json'}: there is no such file; " in message


@pytest.mark.parametrize("command", ["plan", "report"])
def test_a_machine_without_a_link_to_plan_with_is_told_before_it_is_measured(
    command: str, model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    message = run_badly(command, "--config", model)
    assert "has no speed to plan with: give it one with --link-gb-per-s, or name the machine" in message
    assert not list(cache.glob("*.json"))
    run_well("plan", "--config", model, "--link", "pcie4")
    assert len(list(cache.glob("*.json"))) == 1


def test_a_damaged_stored_profile_stops_plan_and_names_the_file(model: Path, cache: Path) -> None:
    run_well("plan", "--model", model, "--link-gb-per-s", 1)
    (path,) = cache.glob("*.json")
    path.write_text("damaged")
    assert str(path) in run_badly("plan", "--model", model, "--link-gb-per-s", 1)


@pytest.mark.parametrize("command", ["plan", "roofline"])
def test_a_guessed_model_is_called_a_guess_in_text_and_in_json(command: str, model: Path) -> None:
    arguments = [command, "--model", model, "--hardware", "a100-40gb-pcie4"]
    known = json.loads(run_well(*arguments, "--json"))
    assert (known["is_exact"], known["doubt"]) == (True, "")
    (model / "config.json").write_text(json.dumps(LLAMA_2_7B | {"model_type": "brandnew"}))
    found = json.loads(run_well(*arguments, "--json"))
    assert not found["is_exact"]
    assert found["doubt"].startswith("model type 'brandnew' is not known to transformers ")
    assert "a guess: model type 'brandnew' is not known to transformers " in " ".join(run_well(*arguments).split())


@pytest.mark.parametrize("command", ["plan", "roofline"])
def test_a_configuration_that_transformers_refuses_is_one_line(command: str, model: Path) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA_2_7B | {"num_attention_heads": "many"}))
    message = run_badly(command, "--model", model, "--hardware", "a100-40gb-pcie4")
    assert "refuses this configuration of llama (" in message
    assert "): correct it, or use the release of transformers it was written for" in message
