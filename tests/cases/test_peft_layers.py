"""What scripts and transformers do to one layer of an adapted model, against HF PEFT's layers."""

from __future__ import annotations

import copy
import io
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer, inspect_matched_modules
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
import inlay.peft
from inlay.errors import AdapterError, TargetError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[1, 2, 3], [7, 0, 2]])
EVERY = ["emb", "lin0", "lin1", "head", "0", "1", "2"]
BOTH = pytest.mark.parametrize("library", [peft, inlay.peft], ids=["peft", "inlay"])


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(10, 8)
        self.lin0 = nn.Linear(8, 8)
        self.lin1 = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Any) -> Any:
        return self.head(self.lin1(torch.relu(self.lin0(self.emb(x)))))


def config(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, target_modules=["lin0", "lin1"], **options)


def everything() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1", "head"],
                      trainable_token_indices={"emb": [1, 2]})  # fmt: skip


def adapted(library: Any) -> Any:
    torch.manual_seed(1)
    model = library.get_peft_model(Toy(), config())
    model.add_adapter("other", config())
    return model.eval()


def set_other(model: Any) -> None:
    model.base_model.model.lin0.set_adapter("other")


def set_both(model: Any) -> None:
    model.base_model.model.lin0.set_adapter(["default", "other"])


def off(model: Any) -> None:
    model.base_model.model.lin0.enable_adapters(False)


def off_and_on(model: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(False)
    model.base_model.model.lin1.enable_adapters(True)


def by_its_attribute(model: Any) -> None:
    model.base_model.model.lin1._active_adapter = "other"


def frozen(model: Any) -> None:
    model.base_model.model.lin1.set_requires_grad("default", False)


def inference(model: Any) -> None:
    model.base_model.model.lin1.set_adapter("other", inference_mode=True)


def whole_model_again(model: Any) -> None:
    set_other(model)
    model.set_adapter("default")


@pytest.mark.parametrize(
    "change",
    [set_other, set_both, off, off_and_on, by_its_attribute, frozen, inference, whole_model_again],
)
def test_a_layers_verbs_do_what_hf_pefts_do(change: Any) -> None:
    seen: list[Any] = []
    for library in (peft, inlay.peft):
        model = adapted(library)
        change(model)
        layers = [(s.enabled, s.active_adapters) for s in model.get_layer_status()]
        status = model.get_model_status()
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        seen.append((model(IDS), layers, (status.enabled, status.active_adapters), trains))
    theirs, ours = seen
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]


def switch(model: nn.Module, on: bool) -> None:
    """Do what transformers' `enable_adapters` and `disable_adapters` do."""
    for _, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            module.enable_adapters(enabled=on)


def test_transformers_own_switch_reaches_injected_layers() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
                             num_hidden_layers=1, num_attention_heads=2)).eval()  # fmt: skip
    base = model(IDS).logits
    inlay.peft.inject_adapter_in_model(
        LoraConfig(init_lora_weights=False, target_modules=["q_proj"]), model
    )
    tuned = model(IDS).logits
    switch(model, False)
    assert torch.equal(model(IDS).logits, base)
    switch(model, True)
    assert torch.equal(model(IDS).logits, tuned)
    assert not torch.equal(tuned, base)


@BOTH
def test_what_trains_whole_is_in_hf_pefts_wrappers(library: Any) -> None:
    model = library.get_peft_model(Toy(), everything())
    base = model.base_model.model
    for name in ("lin1", "head"):
        wrapper = getattr(base, name)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        assert isinstance(wrapper.original_module, type(getattr(Toy(), name)))
        copied = wrapper.modules_to_save["default"]
        assert type(copied) is type(wrapper.original_module)
        x = torch.randn(2, 8)
        torch.testing.assert_close(copied(x), wrapper(x))
        next(copied.parameters()).data.add_(1.0)  # the copy is what acts, the original is not
        torch.testing.assert_close(copied(x), wrapper(x))
        assert not torch.allclose(wrapper.original_module(x), wrapper(x))
    assert isinstance(base.emb, TrainableTokensWrapper)
    rows = base.emb.token_adapter.trainable_tokens_delta["default"]
    assert rows.shape == (2, 8)
    assert rows.requires_grad
    assert isinstance(base.emb.token_adapter, BaseTunerLayer)
    names = [(s.name, s.module_type) for s in model.get_layer_status()]
    assert sorted(names) == [
        ("model.emb.token_adapter", "TrainableTokensLayer"), ("model.head", "ModulesToSaveWrapper"),
        ("model.lin0", "lora.Linear"), ("model.lin1", "ModulesToSaveWrapper"),
    ]  # fmt: skip


def test_a_wrapper_is_copied_pickled_and_given_back() -> None:
    model = inlay.peft.get_peft_model(Toy(), everything())
    out = model(IDS)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(IDS), out)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(IDS), out)
    for each in (model, twin):
        base = each.unload()
        kept = {type(m) for m in base.modules()}
        assert kept == {type(m) for m in Toy().modules()}
        torch.testing.assert_close(base(IDS), Toy()(IDS), atol=0, rtol=0)


def test_a_wrapper_goes_with_the_adapter_that_inlay_takes_off() -> None:
    model = inlay.peft.inject_adapter_in_model(everything(), Toy())
    assert isinstance(model.head, ModulesToSaveWrapper)
    inlay.detach(model)
    assert type(model.head) is nn.Sequential


def test_one_adapters_wrapper_switches_alone() -> None:
    model: Any = inlay.peft.get_peft_model(Toy(), everything())
    model.add_adapter("other", everything())
    model.base_model.model.head.set_adapter("other")
    assert model.get_model_status().active_adapters == "irregular"
    model.base_model.model.head.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    plain = model.base_model.model.head.original_module
    x = torch.randn(2, 8)
    assert torch.equal(model.base_model.model.head(x), plain(x))


def test_a_layers_matrices_are_linear_layers() -> None:
    model = inlay.peft.get_peft_model(Toy(), config())
    layer: Any = model.base_model.model.lin0
    assert isinstance(layer.lora_A["default"], nn.Linear)
    assert layer.lora_B["default"].out_features == 8
    assert str(layer).startswith("lora.Linear(")
    assert layer._get_available_adapters() == {"default"}


@pytest.mark.parametrize("verb", ["merge", "unmerge", "delete_adapter"])
def test_what_needs_the_whole_model_is_refused_at_one_layer(verb: str) -> None:
    layer: Any = inlay.peft.get_peft_model(Toy(), config()).base_model.model.lin0
    with pytest.raises(AdapterError, match="one layer alone"):
        getattr(layer, verb)(*(["default"] if verb == "delete_adapter" else []))


@BOTH
@pytest.mark.parametrize(
    ("targets", "exclude", "words"),
    [
        (EVERY, EVERY, "All modules were excluded"),
        (["none"], None, r"Target modules .* not found in the base model"),
        (["lin0", "none"], ["lin0"], "No modules were targeted for adaptation"),
    ],
)
def test_targets_that_leave_nothing_are_refused_in_the_same_words(
    library: Any, targets: list[str], exclude: list[str] | None, words: str
) -> None:
    asked = LoraConfig(target_modules=targets, exclude_modules=exclude)
    with pytest.raises(ValueError, match=words) as caught:
        library.get_peft_model(Toy(), asked)
    if library is inlay.peft:
        assert isinstance(caught.value, TargetError)


@BOTH
def test_an_exclusion_that_leaves_nothing_out_is_said(library: Any) -> None:
    asked = LoraConfig(target_modules=["lin0"], exclude_modules=["lin9"])
    with pytest.warns(UserWarning, match="but no modules were excluded"):
        library.get_peft_model(Toy(), asked)


@BOTH
def test_a_long_list_of_targets_becomes_the_suffixes_that_mean_it(library: Any) -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
                           for _ in range(24))  # fmt: skip
    asked = LoraConfig(target_modules=[f"{i}.q" for i in range(24)])
    model = library.get_peft_model(blocks, asked)
    assert model.peft_config["default"].target_modules == {"q"}
    assert len(model.base_model.targeted_module_names) == 24


def test_ia3_says_which_layers_are_feed_forward_and_what_matches() -> None:
    asked = IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"])
    model: Any = inlay.peft.get_peft_model(Toy(), asked)
    assert [model.base_model.model.get_submodule(n).is_feedforward for n in ("lin0", "lin1")] == [
        False, True,
    ]  # fmt: skip
    assert inspect_matched_modules(model)["matched"] == ["lin0", "lin1"]


@BOTH
def test_a_prompt_has_no_layers_to_describe_or_unload(library: Any) -> None:
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
                            num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    asked = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = library.get_peft_model(base, asked)
    for verb in ("get_layer_status", "get_model_status"):
        with pytest.raises(TypeError, match="invalid PeftModel instance"):
            getattr(model, verb)()
    with pytest.raises(AttributeError, match="unload"):
        model.unload()


def test_biases_that_a_model_has_not_are_said_and_the_adapter_trains() -> None:
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
                            num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no bias"):
        model = inlay.peft.get_peft_model(
            base, LoraConfig(bias="all", task_type="CAUSAL_LM", target_modules=["q_proj"])
        )
    assert model.get_nb_trainable_parameters()[0] == 8 * (16 + 16)


def test_pefts_own_functions_describe_an_injected_model() -> None:
    asked = LoraConfig(target_modules=["lin0", "emb"], modules_to_save=["lin1"])
    model = inlay.peft.inject_adapter_in_model(asked, Toy())
    wanted = peft.inject_adapter_in_model(asked, Toy())
    ours, theirs = peft.get_layer_status(model), peft.get_layer_status(wanted)
    for one, other in zip(ours, theirs, strict=True):
        assert one == other
    assert peft.get_model_status(model).requires_grad == {"default": True}
