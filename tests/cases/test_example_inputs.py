"""Inputs that a model of any family takes are found by trying, or asked for in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from inlay.errors import ModelError
from inlay.model.example_inputs import example_inputs

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40,
}  # fmt: skip
PAIR = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
SOUND = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2, "vocab_size": 32,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SPEECH = PAIR | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
CLIP = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": TEXT,
    "RobertaForMaskedLM": TEXT | {"pad_token_id": 1},
    "GPT2ForSequenceClassification": GPT2 | {"pad_token_id": None},
    "T5ForConditionalGeneration": T5,
    "T5EncoderModel": T5,
    "BartForConditionalGeneration": PAIR | {"max_position_embeddings": 64},
    "BartForSequenceClassification": PAIR | {"max_position_embeddings": 64},
    "WhisperForConditionalGeneration": SPEECH,
    "WhisperForAudioClassification": SPEECH,
    "Speech2TextForConditionalGeneration": SPEECH
    | {"input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 16},
    "Wav2Vec2ForCTC": SOUND,
    "HubertForSequenceClassification": SOUND,
    "ASTForAudioClassification": {k: v for k, v in IMAGE.items() if k != "image_size"}
    | {"num_mel_bins": 16, "max_length": 32},
    "ViTForImageClassification": IMAGE,
    "CLIPModel": CLIP,
    "LayoutLMForTokenClassification": TEXT,
    "VisionEncoderDecoderModel": {},
}


def build(name: str) -> Any:
    """Build a tiny model of a class of transformers."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    if name == "VisionEncoderDecoderModel":
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.ViTConfig(**IMAGE),
            transformers.GPT2Config(**GPT2, add_cross_attention=True),
        )
        return cls(config).eval()
    return cls(cls.config_class(**CASES[name])).eval()


@pytest.mark.parametrize("name", CASES)
def test_the_model_takes_them(name: str) -> None:
    model = build(name)
    batches = example_inputs(model)
    assert sum(next(iter(batch.values())).shape[0] for batch in batches) == 4
    again = example_inputs(model)
    with torch.no_grad():
        for batch, same in zip(batches, again, strict=True):
            model(**batch)
            assert all(torch.equal(batch[key], same[key]) for key in batch)


def test_special_tokens_are_left_out() -> None:
    model = build("BartForConditionalGeneration")
    (batch,) = example_inputs(model)
    assert batch["input_ids"][:, -1].tolist() == [2] * 4
    for ids in (batch["input_ids"][:, :-1], batch["decoder_input_ids"]):
        assert not torch.isin(ids, torch.tensor([0, 1, 2])).any()


def test_a_model_of_no_known_inputs_is_told_so() -> None:
    with pytest.raises(ModelError, match="no configuration of transformers; give inputs="):
        example_inputs(nn.Sequential(nn.Linear(2, 2)))

    class Odd(transformers.LlamaForCausalLM):
        def forward(self, something: torch.Tensor) -> None:  # pyright: ignore
            del something

    with pytest.raises(ModelError, match="Give inputs="):
        example_inputs(Odd(transformers.LlamaConfig(**TEXT)))
