"""`inlay.peft`: states as dictionaries, every option of the configurations, and the fast paths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl.trainer.utils
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import inlay
from inlay.checkpoint.peft_options import DEFAULTS, PLACEMENT
from inlay.errors import AdapterError
from inlay.model.fast.causal_lm import FastCausalLM
from inlay.model.load.folder import EMBEDDED
from inlay.peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 8]])


def llama(vocabulary: int = 64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def made(config: Any = None) -> PeftModel:
    base = llama()
    torch.manual_seed(1)
    wanted = config or LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(base, wanted).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# States.


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_an_adapters_state_has_the_keys_and_values_of_its_file(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for state in (
        get_peft_model_state_dict(model),
        get_peft_model_state_dict(model, state_dict=model.state_dict()),
    ):
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], state[key]) for key in saved)
    other = peft.get_peft_model(llama(), model.peft_config["default"])
    assert peft.get_peft_model_state_dict(other).keys() == saved.keys()


def test_a_state_given_in_part_is_taken_from_it() -> None:
    model = made()
    doubled = {key: value * 2 for key, value in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=doubled)
    assert all(torch.equal(state[k], v * 2) for k, v in get_peft_model_state_dict(model).items())


def test_a_state_has_the_counts_of_a_norm_that_is_saved_whole() -> None:
    def normed() -> PeftModel:
        base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        return get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["1"]))

    model, fresh = normed(), normed()
    model(torch.randn(8, 4))
    state = get_peft_model_state_dict(model)
    counts = [value for key, value in state.items() if key.endswith("num_batches_tracked")]
    assert [int(count) for count in counts] == [1]
    set_peft_model_state_dict(fresh, state)
    found = get_peft_model_state_dict(fresh)
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_a_state_is_put_into_an_adapter_and_a_wrong_one_is_not() -> None:
    model, fresh = made(), made(LoraConfig(r=4, target_modules=["q_proj"]))
    state = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(fresh, state)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(logits(fresh), logits(model))
    wrong = {key: value[:1] for key, value in state.items()} | {"what": torch.ones(1)}
    before = logits(fresh)
    with pytest.raises(AdapterError, match="1 not used by it: what; 4 misfits"):
        set_peft_model_state_dict(fresh, wrong)
    with pytest.raises(AdapterError, match="missing"):
        set_peft_model_state_dict(fresh, {})
    with pytest.raises(AdapterError, match="ignore_mismatched_sizes"):
        set_peft_model_state_dict(fresh, state, ignore_mismatched_sizes=True)
    with pytest.raises(AdapterError, match="save_embedding_layers"):
        get_peft_model_state_dict(fresh, save_embedding_layers=True)
    assert torch.equal(logits(fresh), before)


def test_the_bases_state_is_without_adapters_and_without_a_merge() -> None:
    model = made(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.merge_adapter()
    wanted = llama().state_dict()
    state = get_base_model_state_dict(model)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    model.unmerge_adapter()
    changed = {key: value + 1 for key, value in wanted.items()}
    set_base_model_state_dict(model, changed)
    found = get_base_model_state_dict(model)
    assert all(torch.equal(found[key], changed[key]) for key in wanted)
    with pytest.raises(AdapterError, match="Unexpected key"):
        set_base_model_state_dict(model, {**wanted, "what": torch.ones(1)})


# Every option of every configuration is taken, is Inlay's, or is refused.

CONFIGS: dict[str, Any] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "LN_TUNING": LNTuningConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "P_TUNING": PromptEncoderConfig,
}
TAKEN = PLACEMENT | {
    "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "bias", "rank_pattern",
    "alpha_pattern", "init_lora_weights", "init_ia3_weights", "init_weights", "fan_in_fan_out",
    "num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs",
    "tokenizer_name_or_path", "encoder_reparameterization_type", "encoder_num_layers",
    "encoder_dropout", "task_type", "peft_type", "auto_mapping", "base_model_name_or_path",
    "revision", "inference_mode", "peft_version", "runtime_config", "num_transformer_submodules",
}  # fmt: skip
IDLE = {"qalora_group_size", "megatron_core", "encoder_hidden_size"}
"""Read by HF PEFT only beside another option, which is refused."""
OTHER = {bool: True, int: 3, str: "x", type(None): {"a": 1}, dict: {"a": 1}, list: [1]}


def others() -> list[tuple[str, str]]:
    return [
        (kind, field.name)
        for kind, cls in CONFIGS.items()
        for field in dataclasses.fields(cls)
        if field.name not in TAKEN | IDLE
    ]


@pytest.mark.parametrize(("kind", "option"), others())
def test_an_option_that_is_not_taken_is_refused_by_its_name(kind: str, option: str) -> None:
    prompts = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    config = CONFIGS[kind](**prompts if "num_virtual_tokens" in DEFAULTS[kind] else {})
    setattr(config, option, OTHER[type(getattr(config, option))])
    with pytest.raises(AdapterError, match=option):
        get_peft_model(llama(), config)


def test_the_options_to_refuse_are_found() -> None:
    found = {option for _, option in others()}
    assert {"lora_bias", "layer_replication", "prefix_projection"} <= found


def test_a_runtime_option_is_refused_too() -> None:
    runtime = peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    with pytest.raises(AdapterError, match="ephemeral_gpu_offload"):
        made(LoraConfig(target_modules=["q_proj"], runtime_config=runtime))


# Prompts.


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_a_prompt_is_off_and_on_as_other_adapters_are(name: str) -> None:
    cls = PrefixTuningConfig if name == "prefix" else PromptTuningConfig
    model = made(cls(task_type="CAUSAL_LM", num_virtual_tokens=3))
    adapted, base = logits(model), logits(llama())
    assert float((adapted - base).abs().max()) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(AdapterError, match="before every row"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])
    with pytest.raises(AttributeError, match=r"inlay\.detach"):
        model.unload()
    assert torch.equal(logits(inlay.detach(model.get_base_model())), base)


def test_a_prompt_starts_from_a_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["pocket"])
    text = "Summarise the report."
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=9, prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text, tokenizer_name_or_path=str(EMBEDDED["pocket"]),
    )  # fmt: skip
    base = llama(len(tokenizer))
    ids = tokenizer(text)["input_ids"]
    model = get_peft_model(base, config)
    (embeddings,) = get_peft_model_state_dict(model).values()
    rows = [ids[i % len(ids)] for i in range(9)]
    assert torch.equal(embeddings, base.get_input_embeddings().weight[rows])
    with pytest.raises(AdapterError, match="vocabulary of 4"):
        get_peft_model(llama(4), config)


def test_a_prompts_values_are_given_and_get_prompt_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = made(config)
    (values,) = get_peft_model_state_dict(model).values()
    assert torch.equal(model.get_prompt_embedding_to_save("default"), values)
    with pytest.raises(AdapterError, match="get_prompt"):
        model.get_prompt(batch_size=2)
    with pytest.raises(AdapterError, match="no prompt"):
        made().get_prompt_embedding_to_save("default")


def test_what_pefts_tuners_do_besides_is_named() -> None:
    assert not hasattr(made(), "add_weighted_adapter")
    with pytest.raises(AttributeError, match=r"inlay\.peft has no add_weighted_adapter"):
        made().add_weighted_adapter(["default"], [1.0], "b")


def test_a_model_card_is_made_and_kept(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n")
    model = made()
    model.save_pretrained(tmp_path)
    assert "# Mine" in card.read_text()
    assert "license: mit" in card.read_text()
    model.create_or_update_model_card(str(tmp_path))
    assert "# Mine" in card.read_text()
    model.save_pretrained(tmp_path / "new")
    assert "- inlay" in (tmp_path / "new" / "README.md").read_text()


def test_a_prefix_can_start_from_zero() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero")
    (prefix,) = get_peft_model_state_dict(made(config)).values()
    assert not prefix.any()


# The model's own ways.


def test_the_fast_paths_are_taken() -> None:
    model = made()
    base = model.get_base_model()
    assert isinstance(base, FastCausalLM)
    assert type(model.train()(input_ids=IDS, labels=IDS)).__name__ == "LossOutput"
    assert not isinstance(model.unload(), FastCausalLM)


def test_a_generation_config_set_on_the_outside_holds() -> None:
    model = made()
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert found.shape[1] == IDS.shape[1] + 3


def test_trls_head_is_not_let_past_an_adapter_on_the_output_head() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    wanted = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(GPT2LMHeadModel(config), wanted)
    trl.trainer.utils.add_fused_lm_head(model.get_base_model(), cast_lm_head_to_fp32=True)
    with pytest.raises(AdapterError, match="output head would be left out"):
        model.train()(input_ids=IDS, labels=IDS, fused_lm_head=True)
    model.disable_adapter_layers()
    assert model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs is not None


def test_a_model_without_an_adapter_says_so_and_takes_a_new_one(tmp_path: Path) -> None:
    model = made()
    model.delete_adapter("default")
    with pytest.raises(AdapterError, match="no adapter is active"):
        _ = model.active_peft_config
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert model.active_adapter == "b"
    assert float((logits(model) - logits(llama())).abs().max()) > 1e-3
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    assert (tmp_path / "b" / "adapter_config.json").is_file()


def test_adapters_stay_off_until_they_are_put_on() -> None:
    model = made()
    adapted, base = logits(model), logits(llama())
    model.merge_adapter()
    merged = logits(model)
    model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)
    model.enable_adapter_layers()
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)


def test_a_model_that_is_no_language_model_is_wrapped_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    adapted = model(x)
    assert model.targeted_module_names == ["0"]
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), adapted)
