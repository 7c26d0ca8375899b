"""Every hook of another library that we touch exists, with the signature that we expect."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    BertModel,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    masking_utils,
    modeling_utils,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from inlay.model.fast.attention import ATTENTION, attention, mask_of_layers
from inlay.model.seams import transformers as seam

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


def names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_attention_is_called_by_these_names() -> None:
    first = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]
    assert names(seam.sdpa_attention_forward)[:7] == first == names(attention)[:7]
    assert seam.sdpa_attention_forward.__kwdefaults__ is None


def test_masks_are_asked_for_by_these_names() -> None:
    assert names(seam.sdpa_mask)[:5] == [
        "batch_size", "q_length", "kv_length", "q_offset", "kv_offset",
    ]  # fmt: skip
    known = {"local_size", "allow_is_causal_skip", "allow_is_bidirectional_skip", "use_vmap"}
    assert known <= set(names(seam.sdpa_mask))
    source = inspect.getsource(masking_utils)
    assert source.count("allow_is_causal_skip=allow_is_causal_skip") >= 3
    assert source.count("use_vmap=use_vmap") >= 3


def test_our_attention_is_found_by_its_name() -> None:
    assert modeling_utils.ALL_ATTENTION_FUNCTIONS[ATTENTION] is attention
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION] is mask_of_layers


def test_a_mask_that_is_integers_is_passed_on_as_it_is() -> None:
    seen: list[Any] = []

    class Seeing(nn.Module):
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            seen.append(attention_mask)
            raise StopIteration

    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.model.layers[0] = Seeing()
    segments = torch.zeros(1, 1, 1, 3, dtype=torch.int64)
    with pytest.raises(StopIteration):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64), attention_mask=segments)
    assert seen[0] is segments


def test_a_configuration_names_its_attention() -> None:
    config = LlamaConfig(**SMALL)
    seam.set_attention(config, seam.EAGER)
    assert seam.attention_of(config) == seam.EAGER
    assert seam.attention_of(LlamaForCausalLM(LlamaConfig(**SMALL)).config) == seam.SDPA


def test_a_forward_says_which_argument_is_its_cache() -> None:
    assert seam.cache_argument(LlamaForCausalLM.forward) in seam.CACHE_NAMES
    assert seam.cache_argument(BertModel.forward) in seam.CACHE_NAMES
    assert seam.cache_argument(nn.Linear.forward) is None
    cache = DynamicCache()
    assert seam.cache_in([1, None, cache]) is cache
    assert issubclass(DynamicCache, Cache)


def test_an_output_says_what_its_cache_is_called() -> None:
    field = seam.cache_field(CausalLMOutputWithPast)
    cache = DynamicCache()
    held: Any = {field: cache}
    assert seam.cache_in(CausalLMOutputWithPast(**held).values()) is cache


def test_a_loaders_quantizer_comes_off() -> None:
    hooks = {
        "_process_model_before_weight_loading": ["self", "model", "kwargs"],
        "param_needs_quantization": ["self", "model", "param_name", "kwargs"],
        "get_quantize_ops": ["self"],
        "remove_quantization_config": ["self", "model"],
    }
    for name, expected in hooks.items():
        assert names(getattr(seam.HfQuantizer, name)) == expected, name
    assert names(seam.ConversionOps.convert)[:4] == [
        "self", "input_dict", "source_patterns", "target_patterns",
    ]  # fmt: skip

    class Quantizer:
        def remove_quantization_config(self, model: Any) -> None:
            vars(model).pop("_weight_conversions")  # as transformers 5.24 does

    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    model._weight_conversions = ["kept", "ours"]
    quantizer: Any = Quantizer()
    seam.release_quantizer(model, quantizer, keep=lambda c: c == "kept")
    assert model._weight_conversions == ["kept"]


def test_initial_values_and_checkpointing() -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    weight = model.lm_head.weight
    with torch.no_grad():
        weight.zero_()
    seam.mark_initialised(weight, False)
    seam.mark_initialised(model.lm_head, False)
    seam.initialise_weights(model, model.lm_head)
    assert float(weight.detach().abs().max()) > 0
    assert seam.kept_in_full(model) == ()
    assert seam.checkpointing_function(model.model.layers[0]) is None
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert callable(seam.checkpointing_function(model.model.layers[0]))
    with seam.no_init_weights():
        assert isinstance(
            seam.built_empty(LlamaForCausalLM, LlamaConfig(**SMALL), torch.bfloat16).lm_head.weight,
            nn.Parameter,
        )


def test_the_loss_is_transformers_own() -> None:
    assert LlamaForCausalLM(LlamaConfig(**SMALL)).loss_function is seam.ForCausalLMLoss
    assert names(seam.ForCausalLMLoss)[:3] == ["logits", "labels", "vocab_size"]


def test_mappings_of_classes() -> None:
    assert issubclass(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["llama"]], PreTrainedModel)


def test_trl() -> None:
    from trl.chat_template_utils import get_training_chat_template
    from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer
    from trl.trainer.utils import add_fused_lm_head

    from inlay.train.trl import checkpointing_left_on

    assert len(names(get_training_chat_template)) >= 1
    assert {"model", "outputs", "temperature"} <= set(names(add_fused_lm_head))
    before = grpo_trainer.disable_gradient_checkpointing
    assert names(before)[0] == "model"
    with checkpointing_left_on():
        assert grpo_trainer.disable_gradient_checkpointing is not before
    assert grpo_trainer.disable_gradient_checkpointing is before
    for trainer in (dpo_trainer.DPOTrainer, kto_trainer.KTOTrainer):
        assert names(trainer._compute_loss)[:3] == ["self", "model", "inputs"]
        assert names(trainer._prepare_dataset)[1:] == [
            "dataset", "processing_class", "args", "dataset_name",
        ]  # fmt: skip


def test_peft() -> None:
    from inlay.peft import seam as peft

    assert "LORA" in {str(kind.value) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert "LORA" in {str(kind.value) for kind in peft.PEFT_TYPE_TO_TUNER_MAPPING}
    assert names(peft.BaseTuner.get_model_config) == ["model"]
    assert names(peft.check_target_module_exists) == ["config", "key"]
    assert "llama" in peft.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    for status in (peft.TunerLayerStatus, peft.TunerModelStatus):
        assert {"enabled", "active_adapters", "requires_grad"} <= set(names(status))
