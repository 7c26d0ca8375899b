"""`inlay plan`: what is said before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from inlay.cli.main import main


@pytest.fixture
def config(tmp_path: Path) -> str:
    LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ).save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def record(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_alone_is_planned_for_a_gpu(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", config, "--method", "lora", "--max-length", "64", "--device", "h100"]
    found = record(capsys, *words)
    assert found["chosen"] == "keep-all"
    assert found["device"]["rates"] == "data sheet"
    assert found["largest_batch"]["assumed"] is True
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "estimates from 75% of the data sheet's speeds; nothing was measured" in said
    assert "weights" in said


def test_too_little_memory_is_said_with_what_to_do(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", config, "--method", "lora", "--max-length", "64", "--device", "t4"]
    assert main(["plan", *words, "--memory", "1MB"]) == 0
    assert "nothing fits: lower max_length" in capsys.readouterr().out


def test_without_a_method_one_is_proposed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, "--model", config, "--max-length", "64", "--device", "l4")
    assert found["method"] == "lora"
    assert found["storage"] == "dense"
    assert any("fits" in reason for reason in found["reasons"])


def test_what_was_asked_for_is_not_proposed_away(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", config, "--max-length", "64", "--device", "l4"]
    found = record(capsys, *words, "--storage", "nf4")
    assert found["storage"] == "nf4"
    assert any("fits" in reason for reason in found["reasons"])
    ranked = record(capsys, *words, "--rank", "3")
    assert ranked["reasons"] == []
    assert ranked["trained_parameters"] < found["trained_parameters"]
    assert main(["plan", *words, "--rank", "-3"]) == 2
    assert "rank" in capsys.readouterr().err


def test_streamed_weights_are_planned_as_lying_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    LlamaConfig(vocab_size=128, num_attention_heads=4, **deep).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path / "config.json"), "--max-length", "16", "--batch-size", "1"]
    words += ["--device", "l4", "--activations", "layer-inputs"]

    def total(*more: str) -> int:
        return record(capsys, *words, "--rank", "1", *more)["options"][0]["total"]

    resident, streamed = total(), total("--stream", "host")
    weights = 4 * 12 * (4 * 256**2 + 3 * 256 * 1024)
    assert resident - streamed > weights * 9 / 12
    assert total("--stream", "disk") == streamed
    between = f"{(resident + streamed) // 2 / 0.95:.0f}"
    proposed = record(capsys, *words, "--storage", "dense", "--memory", between)
    assert proposed["stream"] == "host"
    assert any("streamed from host, 1 rows a pass: fits" in why for why in proposed["reasons"])
    assert record(capsys, *words, "--memory", between, "--rank", "1")["chosen"] is None


def test_rows_that_are_not_there_are_as_many_as_the_run_lets_in(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", config, "--max-length", "64", "--device", "l4", "--rank", "2"]
    assert record(capsys, *words)["run_seconds"] is None
    one = record(capsys, *words, "--max-rows", "1000")["run_seconds"]
    ten = record(capsys, *words, "--max-rows", "10000")["run_seconds"]
    assert ten == pytest.approx(10 * one, rel=0.02)


def test_several_devices_take_a_part_of_the_run_each(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", config, "--max-length", "64", "--device", "l4", "--rank", "2"]
    words += ["--max-rows", "10000", "--batch-size", "4", "--gradient-accumulation", "4"]
    one = record(capsys, *words)["run_seconds"]
    two = record(capsys, *words, "--gpus", "2", "--parallel", "ddp")["run_seconds"]
    assert two == pytest.approx(one / 2, rel=0.02)


def test_a_wrong_size_is_one_sentence(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", config, "--memory", "much"]) == 2
    assert "'memory' must be a size such as 24GB" in capsys.readouterr().err
