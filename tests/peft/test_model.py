"""`inlay.peft.PeftModel`: what HF PEFT's users call, and what must hold besides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import AdapterError, CheckpointError, InlayError, MergeError, TargetError
from inlay.peft import PeftModel, get_peft_model

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 8], [2, 40, 41, 42, 8, 6]])


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def lora(**options: Any) -> LoraConfig:
    given: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 8}
    return LoraConfig(**given | {"init_lora_weights": False} | options)


def made(config: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    base = llama(dtype)
    torch.manual_seed(1)
    return get_peft_model(base, config or lora(), **options).eval()


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def unlike(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3


METHODS: dict[str, Any] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "norms": LNTuningConfig,
    "head": lambda: lora(modules_to_save=["lm_head"]),
}


def moved(model: PeftModel, name: str = "default") -> PeftModel:
    """Change every tensor of an adapter, as training would."""
    seed = torch.Generator().manual_seed(sum(map(ord, name)))
    for key, parameter in model.named_parameters():
        if f".{name}." in f"{key}.":
            noise = torch.randn(parameter.shape, generator=seed).to(parameter.dtype)
            parameter.data += 0.1 * noise
    return model


# Off, merged, off while merged.


@pytest.mark.parametrize("name", METHODS)
def test_a_disabled_model_is_the_base(name: str) -> None:
    base, model = logits(llama()), moved(made(METHODS[name]()))
    adapted = logits(model)
    assert unlike(adapted, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_unmerging_gives_the_base_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = moved(made(METHODS[name](), dtype))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base = logits(llama(dtype))
    adapted = logits(model)
    scale = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]

    model.merge_adapter()
    assert model.base_model.merged_adapters == ["default"]
    merged = logits(model)
    torch.testing.assert_close(merged, adapted, rtol=scale, atol=scale)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)

    model.unmerge_adapter()
    assert model.base_model.merged_adapters == []
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=["embedding", "head", "embedding whole"],
)
def test_tied_weights_part_when_merged_and_are_tied_again(options: dict[str, Any]) -> None:
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    off = logits(base)
    torch.manual_seed(1)
    model = moved(get_peft_model(base, lora(**options)))
    adapted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    model.unmerge_adapter()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    assert inputs._parameters["weight"] is outputs._parameters["weight"]
    assert torch.equal(logits(model), adapted)
    with pytest.warns(UserWarning, match="no longer tied"):
        plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-4, atol=1e-4)


def test_a_quantised_layer_is_dense_while_merged_and_then_itself() -> None:
    base = inlay.quantize(llama(), "nf4")
    model = moved(get_peft_model(base, lora())).eval()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    adapted = logits(model)
    with model.disable_adapter():
        off = logits(model)
    model.merge_adapter()
    assert isinstance(model.get_base_model().model.layers[0].self_attn.q_proj, nn.Linear)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-3)
    names = {n for n, _ in model.named_parameters() if model.prefix in n}
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    model.unmerge_adapter()
    assert model.get_base_model().model.layers[0].self_attn.q_proj is layer
    assert names == {n for n, _ in model.named_parameters() if model.prefix in n}
    assert torch.equal(logits(model), adapted)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-3, atol=1e-3)


def test_adapters_merge_one_after_the_other_as_they_do_together() -> None:
    model = made()
    model.add_adapter("b", lora(target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "b"])
    adapted = logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    assert model.base_model.merged_adapters == ["default", "b"]
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["b"])
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)


def test_an_adapter_added_or_saved_while_another_is_merged_sees_the_base(tmp_path: Path) -> None:
    model, fresh = made(), made()
    model.merge_adapter()
    merged = logits(model)
    torch.manual_seed(5)
    model.add_adapter("d", lora(use_dora=True))
    torch.manual_seed(5)
    fresh.add_adapter("d", lora(use_dora=True))
    assert torch.equal(logits(model), merged)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), merged)
    read = PeftModel.from_pretrained(llama(), tmp_path / "d")
    fresh.set_adapter("d")
    assert torch.equal(logits(read), logits(fresh))
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("d")
    assert torch.equal(logits(model), logits(fresh))


def test_a_mode_set_while_merged_holds_afterwards() -> None:
    model = made(lora(lora_dropout=0.5)).train()
    model.merge_adapter()
    model.eval()
    model.unmerge_adapter()
    assert torch.equal(logits(model), logits(model))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", METHODS)
def test_merge_and_unload_leaves_a_plain_model(name: str) -> None:
    model = moved(made(METHODS[name]()))
    adapted = logits(model)
    plain = model.merge_and_unload()
    assert {type(m) for m in plain.modules()} == {type(m) for m in llama().modules()}
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-3, atol=1e-3)
    assert plain.state_dict().keys() == llama().state_dict().keys()


def test_unload_leaves_the_base_even_when_merged() -> None:
    model = moved(made())
    model.merge_adapter()
    plain = model.unload()
    assert torch.equal(logits(plain), logits(llama()))


def test_a_merge_for_good_that_rounding_would_erase_is_refused() -> None:
    model = made(dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        if key.endswith("lora_B.default.weight"):
            parameter.data *= 1e-4
    adapted = logits(model)
    with pytest.raises(MergeError, match="would keep only"):
        model.merge_and_unload()
    assert torch.equal(logits(model), adapted)


def test_a_safe_merge_stops_at_values_that_are_not_finite() -> None:
    model = made()
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = float("inf")
    with pytest.raises(MergeError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert model.base_model.merged_adapters == []


def test_a_prompt_does_not_merge() -> None:
    model = made(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(MergeError, match="cannot merge"):
        model.merge_adapter()


def test_a_streamed_model_does_not_merge_and_still_adapts() -> None:
    base = inlay.stream(llama(), "cpu")
    torch.manual_seed(1)
    model = moved(get_peft_model(base, lora())).eval()
    torch.testing.assert_close(logits(model), logits(moved(made())), rtol=1e-4, atol=1e-4)
    with pytest.raises(MergeError, match="streamed"):
        model.merge_adapter()


# Several adapters.


def test_adapters_act_train_and_go_by_name() -> None:
    model = made()
    first = logits(model)
    model.add_adapter("b", lora())
    assert model.active_adapter == "default"
    assert torch.equal(logits(model), first)
    model.set_adapter("b")
    assert (model.active_adapter, model.active_adapters) == ("b", ["b"])
    assert unlike(logits(model), first)
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"b"}
    model.set_adapter("default", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad("b")
    assert model.get_nb_trainable_parameters()[0] > 0
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("default")
    assert model.active_adapter == "b"
    assert list(model.peft_config) == ["b"]
    model.delete_adapter("b")
    assert model.active_adapters == []
    assert torch.equal(logits(model), logits(llama()))


def test_what_a_user_lets_train_beside_the_adapter_goes_on_training() -> None:
    model = made()
    own = model.get_base_model().model.norm.weight
    own.requires_grad_(True)
    model.add_adapter("b", lora())
    model.set_adapter("b")
    assert own.requires_grad
    model.set_requires_grad("default")
    model.set_adapter("b")
    trained = [n for n, p in model.named_parameters() if p.requires_grad and p is not own]
    assert all(".b." in n for n in trained)
    model.set_adapter("default", inference_mode=True)
    assert [p for p in model.parameters() if p.requires_grad] == [own]


def test_a_new_adapter_leaves_alone_what_trains(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    model.add_adapter("b", lora())
    assert model.get_nb_trainable_parameters()[0] == 0
    model.load_adapter(tmp_path, "c", is_trainable=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".c." in n for n in trained)
    assert model.active_adapter == "default"


def test_a_deleted_adapter_that_is_merged_is_refused() -> None:
    model = made()
    model.add_adapter("b", lora())
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge them first"):
        model.delete_adapter("default")
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]


def test_two_adapters_that_train_one_module_whole_do_not_act_together() -> None:
    model = made(lora(modules_to_save=["lm_head"]))
    model.add_adapter("b", lora(modules_to_save=["lm_head"]))
    model.add_adapter("c", lora(modules_to_save=["model.norm"]))
    with pytest.raises(AdapterError, match="Only one adapter can be set at a time"):
        model.set_adapter(["default", "b"])
    model.set_adapter(["default", "c"])
    assert model.active_adapters == ["default", "c"]


# One batch, several adapters.


@pytest.mark.parametrize("name", METHODS)
def test_rows_go_through_their_own_adapters(name: str) -> None:
    model = moved(made(METHODS[name]()))
    model.add_adapter("b", METHODS[name]())
    moved(model, "b")
    names = ["b", "__base__", "default"]
    mixed = logits(model, adapter_names=names)
    for row, each in enumerate(names):
        if each == "__base__":
            with model.disable_adapter():
                alone = logits(model, IDS[row : row + 1])
        else:
            model.set_adapter(each)
            alone = logits(model, IDS[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    assert unlike(mixed, logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model, adapter_names=names), logits(llama()))


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_rows_go_through_their_own_adapters(beams: int) -> None:
    model = made()
    model.add_adapter("b", lora())
    names = ["b", "default", "b"]
    asked = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}

    def generated(ids: Tensor, **options: Any) -> Tensor:
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **asked, **options
        )

    mixed = generated(IDS, adapter_names=names)
    for row, each in enumerate(names):
        model.set_adapter(each)
        assert torch.equal(mixed[row : row + 1], generated(IDS[row : row + 1]))


def test_adapter_names_that_cannot_be_are_refused_and_leave_nothing_behind() -> None:
    model = made()
    wanted = logits(model)
    with pytest.raises(AdapterError, match="Length of `adapter_names`"):
        logits(model, adapter_names=["default"])
    with pytest.raises(AdapterError, match=r"non-existing adapter.* other"):
        logits(model, adapter_names=["default", "other", "__base__"])
    model.train()
    with pytest.raises(AdapterError, match="training mode"):
        logits(model, adapter_names=["default"] * 3)
    model.eval()
    with pytest.raises(IndexError):
        logits(model, IDS + 60, adapter_names=["default"] * 3)
    assert torch.equal(logits(model), wanted)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        logits(model, adapter_names=["default"] * 3)


def test_a_layer_that_reads_other_rows_than_the_batch_is_named() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, X: Tensor) -> Tensor:
            return self.inner(X.flatten(0, 1))

    model = get_peft_model(Flat(), lora(target_modules=["inner"])).eval()
    with pytest.raises(AdapterError, match="layer inner reads 6 rows where adapter_names gives 2"):
        model(torch.randn(2, 3, 4), adapter_names=["default", "__base__"])


# Files.


def test_adapters_are_saved_as_peft_places_them(tmp_path: Path) -> None:
    model = made(lora(task_type="CAUSAL_LM"))
    model.add_adapter("b", lora(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path / "b"))
    assert theirs.target_modules == {"v_proj"}
    assert theirs.auto_mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    back = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    back.load_adapter(tmp_path / "b", "b")
    assert back.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    for name in ("default", "b"):
        model.set_adapter(name)
        back.set_adapter(name)
        assert torch.equal(logits(back), logits(model))
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["b"]


def test_a_folder_is_read_back_into_its_adapter(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    saved = logits(model)
    moved(model)
    assert unlike(logits(model), saved)
    result = model.train().load_adapter(tmp_path, "default", is_trainable=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert model.training
    assert torch.equal(logits(model.eval()), saved)
    made(lora(r=2)).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="load it under another name"):
        model.load_adapter(tmp_path / "other", "default")
    made(lora(target_modules=["v_proj"])).save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="does not fit adapter 'default'"):
        model.load_adapter(tmp_path / "elsewhere", "default")
    assert torch.equal(logits(model), saved)


def test_how_a_trained_adapter_once_started_does_not_matter(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    config.init_lora_weights = "orthogonal"
    config.save_pretrained(str(tmp_path))
    (tmp_path / "inlay.json").unlink()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(made()))


def test_a_given_configuration_stands_for_the_folders(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(llama(), tmp_path, config=lora())
    assert torch.equal(logits(read), logits(made()))
    with pytest.raises(CheckpointError, match="another name"):
        PeftModel.from_pretrained(llama(), tmp_path, config=lora(lora_alpha=9))


def test_an_adapter_of_no_peft_method_is_left_to_inlay(tmp_path: Path) -> None:
    base = inlay.attach(llama(), inlay.Bottleneck())
    inlay.save_adapter(base, tmp_path)
    with pytest.raises(CheckpointError, match=r"inlay\.load_adapter"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_without_autocast_an_adapter_is_in_its_layers_dtype(tmp_path: Path) -> None:
    model = made(dtype=torch.bfloat16, autocast_adapter_dtype=False)
    model.add_adapter("b", lora(), autocast_adapter_dtype=True)
    kept = {n.split(".")[-2]: p.dtype for n, p in model.named_parameters() if
            model.prefix in n}  # fmt: skip
    assert kept == {"default": torch.bfloat16, "b": torch.float32}
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(read), logits(model))


# What it says.


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_counts_and_states_are_told_as_peft_tells_them(capsys: pytest.CaptureFixture[str]) -> None:
    config = lora(modules_to_save=["lm_head"])
    ours = made(config)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(llama(), config)
    ours.print_trainable_parameters()
    mine = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert mine == capsys.readouterr().out
    state, other = ours.get_model_status(), theirs.get_model_status()
    for field in ("trainable_params", "total_params", "num_adapter_layers", "enabled",
                  "active_adapters", "merged_adapters", "requires_grad", "available_adapters",
                  "devices", "quantization_backend", "peft_types", "base_model_type"):  # fmt: skip
        assert getattr(state, field) == getattr(other, field), field
    names = [layer.name for layer in ours.get_layer_status()]
    assert names == [layer.name for layer in theirs.get_layer_status()]
    ours.merge_adapter()
    assert ours.get_model_status().merged_adapters == ["default"]


def test_the_model_is_found_where_peft_has_it() -> None:
    model = made()
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model.base_model.model, LlamaForCausalLM)
    assert model.get_base_model() is model.base_model.model
    assert model.config is model.base_model.config is model.get_base_model().config
    assert all(model.prefix in n for n, p in model.named_parameters() if p.requires_grad)
    assert model.modules_to_save is None
    assert made(lora(modules_to_save=["lm_head"])).modules_to_save == {"lm_head"}
    with pytest.raises(AttributeError):
        _ = model.nothing_of_this_name


def test_the_users_configuration_is_left_as_it_was() -> None:
    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    model = made(config)
    assert config.target_modules is None
    assert config.base_model_name_or_path is None
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


# What is refused, by name.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"use_qalora": True}, "use_qalora"),
        ({"r": 0}, "rank"),
        ({"lora_dropout": 1.5}, "dropout"),
    ],
)
def test_an_option_that_inlay_lacks_is_named(options: dict[str, Any], words: str) -> None:
    base = llama()
    with pytest.raises(AdapterError, match=words):
        get_peft_model(base, lora(**options))
    assert "inlay" not in vars(base)


def test_other_methods_and_modes_are_named() -> None:
    with pytest.raises(AdapterError, match="OFT"):
        made(peft.OFTConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"peft\.LoraConfig, not by a dict"):
        made({"r": 4})
    projected = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True
    )
    with pytest.raises(AdapterError, match="prefix_projection"):
        made(projected)


def test_targets_that_match_nothing_or_have_no_default_are_told() -> None:
    with pytest.raises(TargetError, match="not found in the base model"):
        made(lora(target_modules=["nothing"]))
    with pytest.raises(TargetError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())
    mixed = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(TargetError, match="ReLU"):
        get_peft_model(mixed, LoraConfig(target_modules=["0"]))


def test_a_second_wrap_and_a_taken_name_are_refused() -> None:
    model = made()
    for wrapped in (model, model.get_base_model()):
        with pytest.raises(AdapterError, match="for a second time"):
            get_peft_model(wrapped, lora())
    with pytest.raises(AdapterError, match="already exists"):
        model.add_adapter("default", lora())
    for call in (model.set_adapter, model.delete_adapter, model.set_requires_grad):
        with pytest.raises(AdapterError, match="nobody"):
            call("nobody")


@pytest.mark.parametrize(
    "options",
    [
        {"path_initial_model_for_weight_conversion": "x"},
        {"push_to_hub": True},
    ],
    ids=lambda o: next(iter(o)),
)
def test_saving_options_that_inlay_lacks_are_named(options: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=next(iter(options))):
        made().save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"key_mapping": {"a": "b"}}, {"ephemeral_gpu_offload": True}, {"ignore_mismatched_sizes": 1}],
    ids=lambda o: next(iter(o)),
)
def test_loading_options_that_inlay_lacks_are_named(options: Any, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    with pytest.raises(InlayError, match=next(iter(options))):
        PeftModel.from_pretrained(llama(), tmp_path, **options)


def test_without_peft_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['peft'] = None; import inlay.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'inlay[peft]'" in done.stderr.splitlines()[-1]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_what_is_excluded_from_all_linear_is_left_out() -> None:
    options: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}
    theirs = peft.get_peft_model(llama(), lora(**options))
    ours = get_peft_model(llama(), lora(**options))
    assert set(inlay.peft.get_peft_model_state_dict(ours)) == set(
        peft.get_peft_model_state_dict(theirs)
    )
