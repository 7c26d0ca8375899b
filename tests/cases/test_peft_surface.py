"""What TRL, `peft.optimizers`, `peft.helpers` and scripts look for on a model of `inlay.peft`."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PromptEncoderConfig, PromptTuningConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.trainer_pt_utils import get_parameter_names

import inlay.peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

IDS = torch.tensor([[1, 5, 9, 2], [3, 3, 60, 11]])
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
                         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], lora_dropout=0.1),
    "head": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, rank_pattern={"v_proj": 2},
                                 target_modules=["q_proj", "v_proj"]),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip
LAYERED = [name for name in CONFIGS if name not in ("prompt", "p-tuning")]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def both(config: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the same adapter on the same model, Inlay's and HF PEFT's."""
    found: list[Any] = []
    for library in (inlay.peft, peft):
        torch.manual_seed(1)
        found.append(library.get_peft_model(llama(), config()))
    return found[0], found[1]


def apart(one: Any, other: Any) -> float:
    """Return how far two outputs' logits are from each other."""
    return float((one.logits - other.logits).detach().abs().max())


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# Names.


@pytest.mark.parametrize("name", CONFIGS)
def test_what_trains_has_hf_pefts_names_and_is_found_by_them(name: str) -> None:
    ours, theirs = both(CONFIGS[name])
    assert trained(ours).keys() == trained(theirs).keys()
    for key, parameter in trained(ours).items():
        assert ours.get_parameter(key) is parameter
        assert torch.equal(parameter, theirs.get_parameter(key))
    walked = set(get_parameter_names(ours, [nn.LayerNorm]))
    assert trained(ours).keys() <= walked  # how Trainer chooses what decays
    assert len(list(ours.parameters())) == len({id(p) for p in ours.parameters()})


@pytest.mark.parametrize("name", LAYERED)
def test_a_state_has_hf_pefts_names_and_is_loaded_by_them(name: str) -> None:
    ours, theirs = both(CONFIGS[name])
    keys = {key for key in theirs.state_dict() if key in trained(theirs)}
    assert keys <= ours.state_dict().keys()
    assert not any(".adapters." in key for key in ours.state_dict())
    state = {key: value + 1 for key, value in ours.state_dict().items()}
    ours.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    assert ours.prefix == theirs.prefix
    assert all(ours.prefix in key or "modules_to_save" in key for key in trained(ours))


@pytest.mark.parametrize("name", LAYERED)
def test_casts_and_copies_reach_every_tensor_once(name: str) -> None:
    model, _ = both(CONFIGS[name])
    twin = copy.deepcopy(model)
    assert trained(twin).keys() == trained(model).keys()
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    twin.to(torch.float64)
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert apart(twin.eval()(input_ids=IDS), model.eval()(input_ids=IDS)) < 1e-5
    modules = {id(m) for m in model.get_base_model().modules()}
    plain = model.unload()
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert len({id(m) for m in plain.modules()}) < len(modules)


def test_plain_inlay_keeps_its_own_names() -> None:
    model = llama()
    inlay.attach(model, inlay.LoRA(rank=2), targets=["q_proj"])
    assert all(".adapters.default." in key for key in trained(model))
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


# Layers.


def test_layers_are_hf_pefts_by_isinstance_at_the_same_places() -> None:
    for name, cls in (("lora", LoraLayer), ("dora", LoraLayer), ("ia3", IA3Layer)):
        ours, theirs = both(CONFIGS[name])
        for wanted in (BaseTunerLayer, cls):
            places = [n for n, m in theirs.named_modules() if isinstance(m, wanted)]
            assert [n for n, m in ours.named_modules() if isinstance(m, wanted)] == places
    ours, _ = both(CONFIGS["head"])
    assert not isinstance(ours.get_output_embeddings(), BaseTunerLayer)  # trained whole


@pytest.mark.parametrize("name", ["lora", "dora", "rslora"])
def test_a_layers_numbers_are_hf_pefts(name: str) -> None:
    ours, theirs = both(CONFIGS[name])
    for place, theirs_here in theirs.named_modules():
        if isinstance(theirs_here, LoraLayer):
            here = ours.get_submodule(place)
            assert here.r == theirs_here.r
            assert here.lora_alpha == theirs_here.lora_alpha
            assert here.scaling == pytest.approx(theirs_here.scaling)
            assert here.use_rslora == theirs_here.use_rslora
            assert torch.allclose(here.get_delta_weight("default"),
                                  theirs_here.get_delta_weight("default"))  # fmt: skip
            assert torch.equal(here.base_layer.weight, theirs_here.base_layer.weight)


def experts() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, head_dim=8,
                            moe_intermediate_size=16, num_key_value_heads=2)  # fmt: skip
    return Qwen3MoeForCausalLM(config)


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning")  # peft's
@pytest.mark.filterwarnings("ignore:.*alpha_pattern keys did not match:RuntimeWarning")
def test_experts_are_adapted_by_their_former_names_as_hf_peft_does() -> None:
    models: list[Any] = []
    for library in (inlay.peft, peft):
        names = ["gate_proj", "up_proj", "down_proj", "q_proj"]
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=names, init_lora_weights=False)
        models.append(library.get_peft_model(experts(), config))
    ours, theirs = models
    assert trained(ours).keys() == trained(theirs).keys()
    assert all(ours.get_parameter(key) is parameter for key, parameter in trained(ours).items())
    found = inlay.peft.get_peft_model_state_dict(ours)
    wanted = peft.get_peft_model_state_dict(theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert apart(ours(input_ids=IDS), theirs(input_ids=IDS)) < 1e-5
    with peft.helpers.rescale_adapter_scale(ours, 0.5):
        with peft.helpers.rescale_adapter_scale(theirs, 0.5):
            assert apart(ours(input_ids=IDS), theirs(input_ids=IDS)) < 1e-5
    ours.load_state_dict({key: value + 1 for key, value in ours.state_dict().items()})
    with pytest.raises(inlay.TargetError, match="fused"):
        inlay.peft.get_peft_model(experts(), LoraConfig(target_modules=["gate_proj"]))


def test_a_scale_that_is_set_is_the_scale_that_acts() -> None:
    config = lambda: LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)  # noqa: E731
    ours, theirs = both(config)
    whole = ours(input_ids=IDS).logits
    for multiplier in (0.0, 0.5, -1.0):
        found: list[Tensor] = []
        for model in (ours, theirs):
            with peft.helpers.rescale_adapter_scale(model, multiplier):
                found.append(model(input_ids=IDS).logits)
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours(input_ids=IDS).logits, whole)
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    layer.set_scale("default", 3.0)
    layer.scale_layer(2.0)
    assert layer.scaling["default"] == pytest.approx(6 * 2.0)
    layer.unscale_layer()
    assert layer.scaling["default"] == pytest.approx(2.0)


def test_a_tensor_that_is_set_by_hf_pefts_name_is_the_one_that_acts() -> None:
    model, _ = both(CONFIGS["lora"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = model.eval()(input_ids=IDS)
    layer.lora_B["default"].weight.data.fill_(0.5)
    assert apart(model(input_ids=IDS), before) > 1e-3
    layer.lora_B.default.weight = nn.Parameter(torch.zeros(32, 4))
    assert not layer.params("default").B.any()


def test_dropout_that_is_turned_off_is_off() -> None:
    model, _ = both(CONFIGS["lora"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.methods["default"].dropout == 0.0
    layer.lora_B["default"].weight.data.fill_(0.5)
    model.train()
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


# Optimisers.


def loraplus(model: Any) -> Any:
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )


def lorafa(model: Any) -> Any:
    return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)


@pytest.mark.parametrize("made", [loraplus, lorafa])
def test_pefts_optimisers_do_to_both_the_same(made: Callable[[Any], Any]) -> None:
    config = lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"] if made  # noqa: E731
                                is loraplus else ["q_proj"])  # fmt: skip
    models = both(config)
    before = {k: v.detach().clone() for k, v in models[0].named_parameters()}
    for model in models:
        optimizer = made(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    ours, theirs = (dict(model.named_parameters()) for model in models)
    moved = [key for key in ours if not torch.equal(ours[key], before[key])]
    assert any("lora_B" in key for key in moved)
    for key in (key for key in ours if "lora_" in key):
        torch.testing.assert_close(ours[key], theirs[key], atol=2e-5, rtol=1e-3)
    if made is lorafa:
        assert not any(p.requires_grad for key, p in ours.items() if "lora_A" in key)


def test_an_adapter_is_swapped_while_it_is_hot(tmp_path: Path) -> None:
    made = lambda alpha: inlay.peft.get_peft_model(  # noqa: E731
        llama(), LoraConfig(lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
    )
    first, second = made(8), made(32)
    second.save_pretrained(tmp_path)
    hotswap_adapter(first, str(tmp_path), adapter_name="default")
    assert apart(first(input_ids=IDS), second(input_ids=IDS)) < 1e-6
    first.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(first, str(tmp_path), adapter_name="default")


# Saving.


def test_accelerates_idiom_saves_the_values_that_are_given(tmp_path: Path) -> None:
    model, _ = both(CONFIGS["lora"])
    kept = inlay.peft.get_peft_model_state_dict(model)
    for number, state in enumerate(
        (
            {key: value + 1 for key, value in model.state_dict().items()},
            {key: value.detach() + 1 for key, value in model.named_parameters() if "lora_" in key},
            {key: value + 1 for key, value in kept.items()},
        )
    ):
        folder = tmp_path / str(number)
        model.save_pretrained(
            folder, is_main_process=True, save_function=torch.save, state_dict=state, token=None
        )
        saved = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(saved[key], value + 1) for key, value in kept.items())
    found = inlay.peft.get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], value) for key, value in kept.items())


def test_a_state_that_lacks_the_adapters_values_is_refused(tmp_path: Path) -> None:
    model, _ = both(CONFIGS["lora"])
    with pytest.raises(inlay.AdapterError, match="lacks"):
        model.save_pretrained(tmp_path / "out", state_dict={})
    cut = {key: value[:1] for key, value in model.state_dict().items() if value.ndim}
    with pytest.raises(inlay.AdapterError, match="of shape"):
        model.save_pretrained(tmp_path / "out", state_dict=cut)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_pickle_that_is_asked_for_is_safetensors_and_said(tmp_path: Path) -> None:
    model, _ = both(CONFIGS["lora"])
    with pytest.warns(UserWarning, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert peft.PeftModel.from_pretrained(llama(), tmp_path).peft_config["default"].r == 4


def test_tags_go_to_the_card(tmp_path: Path) -> None:
    base = llama()
    base.add_model_tags(["mine"])
    model = inlay.peft.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, tags=["dpo"])
    text = (tmp_path / "README.md").read_text()
    assert all(f"- {tag}\n" in text for tag in ("dpo", "mine", "lora", "transformers"))
    assert "pipeline_tag: text-generation" in text


# Other ways in.


def test_an_injected_model_stays_itself_and_has_its_state() -> None:
    ours, theirs = llama(), llama()
    torch.manual_seed(1)
    assert inlay.peft.inject_adapter_in_model(LoraConfig(r=4), ours) is ours
    torch.manual_seed(1)
    peft.inject_adapter_in_model(LoraConfig(r=4), theirs)
    found = inlay.peft.get_peft_model_state_dict(ours)
    wanted = peft.get_peft_model_state_dict(theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    raised = {key: value + 1 for key, value in found.items()}
    assert not inlay.peft.set_peft_model_state_dict(ours, raised).unexpected_keys
    inlay.peft.set_peft_model_state_dict(theirs, raised)  # HF PEFT's own layers
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    again = inlay.peft.inject_adapter_in_model(LoraConfig(r=4), llama(), state_dict=found)
    assert inlay.peft.get_peft_model_state_dict(again).keys() == found.keys()
    with pytest.raises(inlay.AdapterError, match="prompt"):
        inlay.peft.inject_adapter_in_model(CONFIGS["prompt"](), llama())


def test_mixed_methods_act_together() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = inlay.peft.get_peft_model(llama(), config, mixed=True)
    assert isinstance(model, peft.PeftMixedModel)
    model.add_adapter("b", IA3Config(target_modules=["v_proj"], feedforward_modules=[],
                                     init_ia3_weights=False))  # fmt: skip
    one = model(input_ids=IDS)
    model.set_adapter(["default", "b"])
    two = model(input_ids=IDS)
    assert apart(one, two) > 1e-3
    assert apart(model.merge_and_unload()(input_ids=IDS), two) < 1e-5


def test_a_model_is_of_its_tasks_class_and_auto_models_are_inlays(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = inlay.peft.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    assert isinstance(model, peft.PeftModelForCausalLM)
    model.save_pretrained(tmp_path / "a")
    loaded = inlay.peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a", dtype="bfloat16")
    assert isinstance(loaded, inlay.peft.PeftModel)
    assert loaded.get_base_model().lm_head.weight.dtype is torch.bfloat16
    with inlay.peft.take_over():
        taken = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(taken, inlay.peft.PeftModel)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert not isinstance(theirs, inlay.peft.PeftModel)
    classified = LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0))
    found = inlay.peft.get_peft_model(classified, LoraConfig(task_type="SEQ_CLS"))
    assert isinstance(found, peft.PeftModelForSequenceClassification)


def attributes() -> dict[tuple[str, str], object]:
    """Return every attribute of the loaded modules of peft and TRL, and peft's loaders' targets."""
    loaded = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in ("peft", "trl")}
    found = {(name, key): value for name, m in loaded.items() for key, value in vars(m).items()}
    loaders = [name for name in dir(peft) if name.startswith("AutoPeftModel")]
    return found | {(name, "target"): getattr(peft, name)._target_peft_class for name in loaders}


@pytest.mark.parametrize("end", ["with", "close", "error", "nested"])
def test_take_over_gives_every_attribute_back(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("trl.trainer.sft_trainer")
    later = ModuleType("trl.loaded_later")
    before = attributes()
    taken = inlay.peft.take_over()
    changed = {key for key, value in attributes().items() if value is not before.get(key)}
    assert {("peft", "get_peft_model"), ("trl.trainer.sft_trainer", "get_peft_model")} <= changed
    assert ("AutoPeftModelForCausalLM", "target") in changed
    monkeypatch.setitem(sys.modules, later.__name__, later)
    exec("from peft import get_peft_model", vars(later))
    assert vars(later)["get_peft_model"] is inlay.peft.get_peft_model
    if end == "with":
        with taken:
            pass
    elif end == "error":
        with pytest.raises(ZeroDivisionError), taken:
            raise ZeroDivisionError
    else:
        if end == "nested":
            inlay.peft.take_over().close()
            assert peft.get_peft_model is inlay.peft.get_peft_model
        taken.close()
    after = attributes()
    assert vars(later)["get_peft_model"] is peft.get_peft_model
    assert [key for key, value in before.items() if after[key] is not value] == []


def test_rows_of_an_encoder_decoder_have_their_adapters_under_beams() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "vocab_size": 64}  # fmt: skip
    base = BartForConditionalGeneration(BartConfig(**sizes)).eval()
    wanted = LoraConfig(task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    model = inlay.peft.get_peft_model(base, wanted).eval()
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    mixed = model.generate(input_ids=IDS, adapter_names=["default", "__base__"], **options)
    alone = model.generate(input_ids=IDS[:1], **options)
    with model.disable_adapter():
        plain = model.generate(input_ids=IDS[1:], **options)
    for found, one in zip(mixed, (alone[0], plain[0]), strict=True):
        length = min(len(found), len(one))
        assert torch.equal(found[:length], one[:length])


def test_a_status_names_layers_and_models_as_hf_peft_does():
    model = inlay.peft.get_peft_model(llama(), CONFIGS["lora"]())
    kinds = {status.module_type for status in model.get_layer_status()}
    assert kinds == {"lora.Linear", "lora.Embedding"}
    assert model.get_model_status().adapter_model_type == "LoraModel"


def test_targeted_parameters_are_named():
    config = LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])
    model = inlay.peft.get_peft_model(llama(), config)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert model.base_model.targeted_parameter_names == names
