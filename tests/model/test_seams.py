"""Every hook of another library that we touch exists, with the signature that we expect."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    BertModel,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    masking_utils,
    modeling_utils,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.quantizers import auto
from transformers.quantizers.auto import AutoHfQuantizer

from inlay.model.fast.attention import attention, mask_of_layers
from inlay.model.seams import transformers as seam
from inlay.model.seams.imports import when_imported

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
    undo = seam.register_attention("another", attention, mask_of_layers)
    config = LlamaConfig(**SMALL)
    seam.set_attention(config, "another")
    assert modeling_utils.ALL_ATTENTION_FUNCTIONS["another"] is attention
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["another"] is mask_of_layers
    undo()
    assert "another" not in modeling_utils.ALL_ATTENTION_FUNCTIONS
    assert "another" not in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    assert seam.attention_of(config) == seam.SDPA


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


def test_a_quantizer_is_found_by_its_name_for_a_while() -> None:
    undo = seam.register_quantizer("ours", seam.QuantizationConfigMixin, seam.HfQuantizer)
    assert AutoHfQuantizer.supports_quant_method({"quant_method": "ours"})
    assert auto.AUTO_QUANTIZER_MAPPING["ours"] is seam.HfQuantizer
    undo()
    assert not AutoHfQuantizer.supports_quant_method({"quant_method": "ours"})


def test_ties_are_declared_by_class_or_module() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    assert seam.tied_weights(model) == seam.declared_ties(model, all_submodels=True) == ties
    assert getattr(model, seam.TIES)
    seam.declare_ties(model, {})
    assert seam.declared_ties(model, all_submodels=False) == {}
    assert seam.tied_weights(nn.Linear(2, 2)) == {}


def test_a_function_runs_the_blocks_in_training() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).train()
    calls: list[Any] = []

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        calls.append(function)
        return function(*inputs)

    ids = torch.ones(1, 3, dtype=torch.int64)
    seam.checkpoint_blocks(model, run)
    assert vars(model.model)[seam.CHECKPOINTING]
    model(input_ids=ids)
    assert len(calls) == 1
    seam.checkpoint_blocks(model, None)
    model(input_ids=ids)
    assert len(calls) == 1


def test_the_embeddings_outputs_require_gradients_by_a_hook() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert not seam.input_gradients_required(model)
    model.enable_input_require_grads()
    assert seam.input_gradients_required(model)
    model.disable_input_require_grads()
    assert not seam.input_gradients_required(model)


def test_an_auto_class_has_the_classes_of_a_configuration() -> None:
    config = LlamaConfig(**SMALL)
    assert seam.classes_of(AutoModelForCausalLM, config) is LlamaForCausalLM
    assert seam.classes_of(LlamaForCausalLM, config) is None


def test_a_processor_finds_no_video_class_for_a_while() -> None:
    before = vars(ProcessorMixin)["get_possibly_dynamic_module"]
    with seam.no_video_class():
        found = ProcessorMixin.get_possibly_dynamic_module("SmolVLMVideoProcessor")
        assert found is seam.NoVideos
        assert ProcessorMixin.get_possibly_dynamic_module("ProcessorMixin") is ProcessorMixin
    assert vars(ProcessorMixin)["get_possibly_dynamic_module"] is before


def test_trainer_restores_by_our_function_for_a_while() -> None:
    trainer: Any = vars(Trainer)
    before = trainer[seam.RESUMES], trainer[seam.TAKES_BEST]
    seen: list[Any] = []
    undo = seam.restore_by(lambda model, folder: seen.append((model, folder)) is None)
    model, state = nn.Linear(2, 2), SimpleNamespace(best_model_checkpoint="best")
    trainer[seam.RESUMES](SimpleNamespace(model=model), "last")
    trainer[seam.TAKES_BEST](SimpleNamespace(model=model, state=state))
    assert seen == [(model, Path("last")), (model, Path("best"))]
    undo()
    assert (trainer[seam.RESUMES], trainer[seam.TAKES_BEST]) == before


def test_a_module_is_acted_on_once_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("imported_late", "never_acted_on"):
        (tmp_path / f"{name}.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    when_imported("imported_late", lambda module: seen.append(module.value))
    stop = when_imported("never_acted_on", lambda module: seen.append(2))
    stop()
    for name in ("imported_late", "never_acted_on"):
        importlib.import_module(name)
    when_imported("imported_late", lambda module: seen.append(3))
    assert seen == [1, 3]


def test_names_that_weights_had_and_have() -> None:
    assert seam.family_of_experts(SimpleNamespace(model_type="mixtral")) == "mixtral"
    assert seam.family_of_experts(LlamaConfig(**SMALL)) is None
    renamed = seam.renaming(LlamaForCausalLM(LlamaConfig(**SMALL)))
    assert renamed is None or renamed("model.norm.weight") == "model.norm.weight"
    assert seam.renaming(nn.Linear(2, 2)) is None
