"""Folders whose class writes no text end in a sentence that names it, never in a bug."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import family
import pytest
import tiny
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from inlay.cli.main import main
from inlay.data.tokens import Encoded
from inlay.errors import ModelError
from inlay.evaluate.generation import generate
from inlay.evaluate.losses import losses
from inlay.model.load.causal import check_continues
from inlay.model.load.folder import EMBEDDED
from inlay.model.load.libraries import in_model_code

POCKET = EMBEDDED["pocket"]
CLASSES = {
    "BertForSequenceClassification": ("bert", "--task classify"),
    "BertForTokenClassification": ("bert", "--task classify"),
    "BertForMaskedLM": ("bert", "masked words"),
    "BertModel": ("bert", "--task classify, reward or embed"),
    "LlamaModel": ("llama", "no head that writes text"),
    "BertForQuestionAnswering": ("bert", "marks an answer"),
    "ViTForImageClassification": ("vit", "a class for an image"),
    "CLIPModel": ("clip", "no head that writes text"),
    "Wav2Vec2ForCTC": ("wav2vec2", "spells out sound"),
    "HubertForSequenceClassification": ("hubert", "a class for a sound"),
    "WhisperForConditionalGeneration": ("whisper", "encoder-decoder"),
    "BartForConditionalGeneration": ("bart", "encoder-decoder"),
    "MBartForConditionalGeneration": ("mbart", "encoder-decoder"),
    "MT5ForConditionalGeneration": ("mt5", "encoder-decoder"),
    "T5ForConditionalGeneration": ("t5", "encoder-decoder"),
    "PegasusForConditionalGeneration": ("pegasus", "encoder-decoder"),
    "Blip2ForConditionalGeneration": ("blip-2", "pixel_values"),
}
"""Class -> its model type, and words of its sentence."""


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_writes_no_text_is_refused_by_name(
    tmp_path: Path, capsys: Any, name: str, verb: str
) -> None:
    model_type, words = CLASSES[name]
    config = tiny.tiny(model_type)
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(POCKET / file, tmp_path)
    more = ["--output", str(tmp_path / "out")] if verb == "train" else ["--device", "cpu"]
    run = [verb, "--model", str(tmp_path), "--data", "reports", "--method", "lora"]
    assert main([*run, *more]) == 2
    said = capsys.readouterr().err
    assert name in said
    assert words in said
    assert not (tmp_path / "out" / "run.json").exists()


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TALKS: dict[str, dict[str, Any]] = {
    "sft": {"messages": [USER, ANSWER]},
    "dpo": {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "c"}]},
    "kto": {"prompt": [USER], "completion": [ANSWER], "label": True},
}


def with_number(row: str, i: int) -> str:
    """Return a row unlike the others, every second one labelled false."""
    row = row.replace('"a"', f'"a {i}"').replace('"b"', f'"b {i}"')
    return row.replace("true", ("true", "false")[i % 2])


@pytest.mark.parametrize("task", TALKS)
def test_messages_need_a_chat_template(tmp_path: Path, capsys: Any, task: str) -> None:
    config = tiny.tiny("llama")
    config.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / file, tmp_path)
    data = tmp_path / "rows.jsonl"
    row = json.dumps(TALKS[task])
    data.write_text("\n".join(with_number(row, i) for i in range(20)))
    run = ["plan", "--model", str(tmp_path), "--data", str(data), "--task", task]
    assert main([*run, "--method", "lora", "--device", "cpu"]) == 2
    assert "has no chat template, which messages need" in capsys.readouterr().err


def test_a_model_that_sees_ahead_is_refused() -> None:
    small: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 40, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"RobertaForCausalLM a word sees the words behind it"):
        check_continues(RobertaForCausalLM(RobertaConfig(**small)))
    check_continues(RobertaForCausalLM(RobertaConfig(**small, is_decoder=True)))
    check_continues(LlamaForCausalLM(LlamaConfig(**small)))


def test_an_encoder_decoder_is_not_scored_as_one_text() -> None:
    model = family.built("t5", "T5ForConditionalGeneration")
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        generate(model, tokenizer, ["a b"])
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        losses(model, [Encoded([5, 6, 7], [True] * 3, 3)])


def test_whose_code_failed_is_told() -> None:
    model = family.built("llama", "LlamaForCausalLM")
    with pytest.raises(Exception, match=r".") as caught:
        model(input_ids=torch.zeros(1, 2, 3, 4, dtype=torch.long))
    assert in_model_code(caught.value)
    with pytest.raises(ModelError) as ours:
        raise ModelError("ours")
    assert not in_model_code(ours.value)


def test_families_are_shrunk_and_found() -> None:
    found = family.families()
    assert len(found) > 600
    assert json.loads((Path(__file__).parent / "failed_once.json").read_text()).keys() <= set(found)
