"""A merge into one member of a tied group is written whole and read back as what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import inlay
from inlay.errors import MergeError
from inlay.model.adapters.registry import adapter_places
from inlay.model.example_inputs import example_inputs
from inlay.model.merge.fidelity import first_tensor

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40,
}  # fmt: skip
PAIR = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SPEECH = {k: v for k, v in PAIR.items() if k != "max_position_embeddings"}
SPEECH |= {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
QWEN = TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": True}
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
MODELS: dict[str, tuple[str, Any]] = {
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "bert": ("BertForMaskedLM", lambda: hf.BertConfig(**TEXT)),
    "bart": ("BartForConditionalGeneration", lambda: hf.BartConfig(**PAIR)),
    "t5": ("T5ForConditionalGeneration", lambda: hf.T5Config(**T5)),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        lambda: hf.SwitchTransformersConfig(**T5, num_decoder_layers=2, num_experts=2),
    ),
    "whisper": ("WhisperForConditionalGeneration", lambda: hf.WhisperConfig(**SPEECH)),
    "llava": (
        "LlavaForConditionalGeneration",
        lambda: hf.LlavaConfig(
            text_config=hf.Qwen2Config(**QWEN),
            vision_config=hf.CLIPVisionConfig(**IMAGE),
            image_token_index=63,
        ),
    ),
    "composite": (
        "EncoderDecoderModel",
        lambda: hf.EncoderDecoderConfig.from_encoder_decoder_configs(
            hf.BertConfig(**TEXT),
            hf.BertConfig(**TEXT, add_cross_attention=True, is_decoder=True),
            decoder_start_token_id=2, pad_token_id=0, eos_token_id=3,
        ),
    ),
}  # fmt: skip
CASES = [
    ("llama", "lora", ["lm_head"]),
    ("bert", "lora", ["decoder"]),
    ("bert", "whole", ["decoder"]),
    ("bert", "lora", ["word_embeddings"]),
    ("bart", "lora", ["lm_head"]),
    ("bart", "whole", ["encoder.embed_tokens"]),
    ("bart", "whole", ["lm_head", "shared", "encoder.embed_tokens", "decoder.embed_tokens"]),
    ("t5", "lora", ["lm_head"]),
    ("t5", "lora", ["shared", "lm_head"]),
    ("t5", "whole", ["encoder.embed_tokens"]),
    ("switch", "lora", ["lm_head"]),
    ("whisper", "lora", ["proj_out"]),
    ("llava", "lora", ["lm_head"]),
    ("llava", "whole", ["embed_tokens"]),
    ("composite", "lora", ["decoder.cls.predictions.decoder"]),
]


def adapted(name: str, how: str, members: list[str]) -> Any:
    """Build a tiny model with trained-looking biases and adapter."""
    torch.manual_seed(0)
    cls, config = MODELS[name]
    model = getattr(hf, cls)(config()).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_(0, 0.1)
    if how == "lora":
        inlay.attach(model, inlay.LoRA(rank=4), targets=members)
    else:
        inlay.attach(model, inlay.LoRA(rank=4), modules_to_save=members)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for p in params.parameters():
                p += 0.1 * torch.randn_like(p)
    return model


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return first_tensor(model(**batch))


@pytest.mark.filterwarnings("ignore:.*no longer equal what they were tied to")
@pytest.mark.filterwarnings("ignore::inlay.model.adapters.watch.InertAdapterWarning")
@pytest.mark.parametrize(("name", "how", "members"), CASES)
def test_what_is_written_is_what_was_measured(
    name: str, how: str, members: list[str], tmp_path: Path
) -> None:
    model = adapted(name, how, members)
    (batch,) = example_inputs(model)
    before = outputs(model, batch)
    with inlay.disabled(model):
        assert float((outputs(model, batch) - before).abs().max()) > 0.01
    report = inlay.merge(model, output=tmp_path / "merged")
    assert report.checked.startswith("on the written files, read back by ")
    assert report.reloaded_logit_difference is not None
    accepted = 1e-5 * max(float(before.abs().max()), 1)
    assert report.reloaded_logit_difference < 10 * accepted
    model.save_pretrained(tmp_path / "own")  # As users do who merged in memory alone.
    for folder in ("merged", "own"):
        again = type(model).from_pretrained(tmp_path / folder).eval()
        assert float((outputs(again, batch) - before).abs().max()) < 10 * accepted
    model.tie_weights()  # Parted for good, in memory too.
    assert float((outputs(model, batch) - before).abs().max()) < 10 * accepted


def test_a_family_that_always_says_tied_is_named() -> None:
    with pytest.warns(UserWarning, match="T5Config says that they are tied, and cannot"):
        inlay.merge(adapted("t5", "lora", ["lm_head"]))


def test_a_file_that_reads_as_another_model_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that drops a member, as transformers does with those it takes for tied."""
    model = adapted("llama", "lora", ["lm_head"])
    save = hf.LlamaForCausalLM.save_pretrained

    def tied(self: Any, folder: Path) -> None:
        state = {k: v for k, v in self.state_dict().items() if k != "lm_head.weight"}
        self.config.tie_word_embeddings = True
        save(self, folder, state_dict=state)

    monkeypatch.setattr(hf.LlamaForCausalLM, "save_pretrained", tied)
    with pytest.raises(MergeError, match=r"other values in lm_head\.weight .* nothing was saved"):
        inlay.merge(model, output=tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_taken_folder_is_refused_before_the_merge(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = adapted("llama", "lora", ["q_proj"])
    with pytest.raises(MergeError, match="is there already"):
        inlay.merge(model, output=tmp_path)
    assert inlay.report(model).adapters
