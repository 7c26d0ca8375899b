"""What HF PEFT's tests of custom models ask of an adapted model, against HF PEFT itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import inlay.peft
from inlay import NormTuning, attach
from inlay.errors import AdapterError, CheckpointError, ModelError, TargetError

BOTH = pytest.mark.parametrize("library", [peft, inlay.peft], ids=["peft", "inlay"])


class Bare(nn.Module):
    """A matrix that no layer of torch's holds."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Toy(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(3, 4, 2)
        self.lin0 = nn.Linear(5, 8)
        self.lin1 = nn.Linear(8, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.relu(self.lin0(self.conv(self.norm(x)))))


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(1))


def config(**options: Any) -> LoraConfig:
    options = {"r": 2, "init_lora_weights": False, "target_modules": ["lin0", "lin1"], **options}
    return LoraConfig(**options)


def made(library: Any, config: Any, model: nn.Module | None = None, **options: Any) -> Any:
    model = model or Toy()
    torch.manual_seed(2)
    return library.get_peft_model(model, config, **options).eval()


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_norm_tuning_trains_a_linear_layer_that_is_named_as_in_hf_peft() -> None:
    models = [made(lib, LNTuningConfig(target_modules=["lin0"])) for lib in (peft, inlay.peft)]
    assert trained(models[0]) == trained(models[1])
    outputs: list[Tensor] = []
    for model in models:
        for p in model.parameters():
            p.data += 0.5 * p.requires_grad
        outputs.append(model(inputs()))
    torch.testing.assert_close(*outputs)
    merged = models[1].merge_and_unload()
    torch.testing.assert_close(merged(inputs()), outputs[1])


def test_a_pattern_names_no_layer_for_norm_tuning() -> None:
    model = attach(Toy(), NormTuning(), targets=".*")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("norm" in name for name in names)


def test_single_parameters_are_targets_where_no_layer_has_a_kind() -> None:
    options = {"target_modules": None, "target_parameters": ["0.weight"]}
    outputs = []
    for library in (peft, inlay.peft):
        torch.manual_seed(0)
        base = nn.Sequential(Bare(5, 8), Bare(8, 2))
        outputs.append(made(library, config(**options), base)(torch.ones(3, 5)))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("given", [None, [], ""])
def test_parameters_that_mean_nothing_are_said_in_hf_pefts_words(given: Any) -> None:
    wrong = config(target_modules=given, target_parameters=["nothing"])
    with pytest.raises(TargetError, match="No `target_modules` passed but also no `target_param"):
        made(inlay.peft, wrong)


@BOTH
def test_what_is_targeted_in_vain_beside_other_targets_is_a_warning(library: Any) -> None:
    with pytest.warns(RuntimeWarning, match="were set but no parameter was matched"):
        made(library, config(target_parameters=["nothing"]))
    with pytest.warns(RuntimeWarning, match="target_modules={'no'} were set but no module was m"):
        made(library, config(target_modules=["no"], target_parameters=["lin0.weight"]))


def test_scales_of_a_convolutions_input_are_read_back(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(2, 3, 3))

    scales = IA3Config(target_modules=["0"], feedforward_modules=["0"], init_ia3_weights=False)
    model = made(inlay.peft, scales, base())
    x = torch.randn(1, 2, 4, 4, 4)
    expected = model(x)
    model.save_pretrained(tmp_path)
    again = inlay.peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)


@BOTH
def test_a_layers_numbers_go_with_its_adapter(library: Any) -> None:
    model = made(library, config(lora_dropout=0.5))
    layer = model.base_model.model.lin0
    held = [layer.r, layer.lora_alpha, layer.scaling, layer.use_rslora, layer.lora_dropout]
    assert all("default" in each for each in held)
    assert dict(held[0]) == {"default": 2}
    model.delete_adapter("default")
    assert not any("default" in each for each in held)


@BOTH
def test_a_layer_says_its_widths_and_its_adapters(library: Any) -> None:
    model = made(library, config(target_modules=["lin0", "conv"]))
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    found: list[Any] = layers
    assert [(m.in_features, m.out_features) for m in found] == [(3, 4), (5, 8)]
    assert all(m._all_available_adapter_names() == ["default"] for m in found)
    said = repr(model.base_model.model.lin0)
    assert said.startswith("lora.Linear")
    assert "(lora_A)" in said
    assert "default" in said


@BOTH
def test_an_adapter_may_be_made_without_values(library: Any) -> None:
    full = made(library, config())
    model = made(library, config(), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"meta"}
    state = library.get_peft_model_state_dict(full)
    peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True) if (
        library is peft
    ) else inlay.peft.set_peft_model_state_dict(model, state)
    torch.testing.assert_close(model(inputs()), full(inputs()), rtol=0, atol=0)


def test_an_adapter_without_values_is_not_used(tmp_path: Path) -> None:
    full = made(inlay.peft, config())
    full.save_pretrained(tmp_path / "full")
    model = made(inlay.peft, config(), low_cpu_mem_usage=True)
    with pytest.raises(AdapterError, match="no values yet"):
        model(inputs())
    with pytest.raises(AdapterError, match="no values yet"):
        model.merge_adapter()
    with pytest.raises(CheckpointError, match="no values yet"):
        model.save_pretrained(tmp_path / "none")
    model.load_adapter(tmp_path / "full", "default")
    torch.testing.assert_close(model(inputs()), full(inputs()), rtol=0, atol=0)
    model.merge_adapter()


@BOTH
def test_nothing_trains_while_adapters_are_disabled(library: Any) -> None:
    model = made(library, config())
    before = trained(model)
    with model.disable_adapter():
        assert not trained(model)
    assert trained(model) == before


@BOTH
def test_layers_that_differ_are_said_when_all_are_disabled(library: Any) -> None:
    model = made(library, config())
    model.base_model.model.lin0.enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled"):
        with model.disable_adapter():
            pass


def test_rows_of_a_convolution_have_adapters_of_their_own() -> None:
    model = made(inlay.peft, config(target_modules=["conv", "lin0"]))
    model.add_adapter("other", config(target_modules=["conv"]))
    x = inputs(2)
    mixed = model(x, adapter_names=["default", "other"])
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(x)[row])
    with pytest.raises(AdapterError, match="one sample without a batch"):
        model(inputs(1)[0], adapter_names=["default", "other", "other"])


def test_rows_of_what_reads_several_inputs_are_refused_as_in_hf_peft() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x)[0]

    model = made(inlay.peft, config(target_modules=["mha"]), Attending())
    with pytest.raises(TypeError, match=r"lora.MultiheadAttention does not support mixed adapter"):
        model(torch.ones(2, 3, 8), adapter_names=["default", "default"])


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lin1"]}, {"trainable_token_indices": {"emb": [1, 2]}}],
)
def test_two_adapters_that_train_the_same_whole_are_not_merged_together(
    options: dict[str, Any],
) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.lin0, self.lin1 = nn.Embedding(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin1(self.lin0(self.emb(x)))

    chosen = config(target_modules=["lin0"], **options)
    model = made(inlay.peft, chosen, Embedded())
    model.add_adapter("other", chosen)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="Only one adapter can be set at a time for"):
            verb(adapter_names=["default", "other"])


@BOTH
def test_a_merge_takes_the_adapters_that_the_layers_were_given(library: Any) -> None:
    model = made(library, config())
    model.add_adapter("other", config())
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.set_adapter(["default", "other"])
    expected = model(inputs())
    model.merge_adapter()
    torch.testing.assert_close(model(inputs()), expected)


def test_a_merge_of_layers_that_were_given_different_adapters_is_refused() -> None:
    model = made(inlay.peft, config())
    model.add_adapter("other", config())
    model.base_model.model.lin0.set_adapter("other")
    with pytest.raises(AdapterError, match=r"chose different adapters \(default and other\)"):
        model.merge_adapter()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_untrained_dora_held_in_halves_changes_nothing(dtype: torch.dtype) -> None:
    base = Toy(dtype)
    expected = copy.deepcopy(base).state_dict()
    chosen = LoraConfig(target_modules=["lin0"], use_dora=True)
    model = made(inlay.peft, chosen, base, autocast_adapter_dtype=False)
    assert model.base_model.model.lin0.lora_magnitude_vector["default"].weight.dtype == dtype
    merged = model.merge_and_unload().state_dict()
    assert all(torch.equal(merged[key], value) for key, value in expected.items())


def test_an_embedding_starts_the_same_gaussian_or_not() -> None:
    chosen = LoraConfig(target_modules=["0"], init_lora_weights="gaussian")
    states = [
        made(lib, chosen, nn.Sequential(nn.Embedding(6, 4))).state_dict()
        for lib in (peft, inlay.peft)
    ]
    key = "base_model.model.0.lora_embedding_B.default"
    assert torch.equal(states[0][key], states[1][key])
    assert bool(states[1][key].any())


@BOTH
def test_what_a_configuration_says_otherwise_than_the_model_is_a_warning(library: Any) -> None:
    with pytest.warns(UserWarning, match="was renamed from 'elsewhere' to 'None'"):
        made(library, config(base_model_name_or_path="elsewhere"))
    with pytest.warns(UserWarning, match="already set base model revision to old, overwriting"):
        made(library, config(revision="old"), revision="new")
    with pytest.warns(UserWarning, match="Adapter name 'lora' should not be contained in the pre"):
        made(library, config(), adapter_name="lora")


def test_layers_of_the_users_own_are_refused() -> None:
    chosen = config()
    chosen._register_custom_module({nn.Linear: nn.Linear})
    with pytest.raises(AdapterError, match="registers custom layers"):
        made(inlay.peft, chosen)


def test_ranks_are_padded_for_hotswapping() -> None:
    model = made(inlay.peft, config())
    expected = model(inputs())
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if "lin0.lora_" in n}
    assert shapes == {(5, 5), (8, 5)}
    torch.testing.assert_close(model(inputs()), expected)


def test_an_adapted_layers_weight_is_not_set_to_a_mere_tensor() -> None:
    layer = made(inlay.peft, config()).base_model.model.lin0
    with pytest.raises(ModelError, match="FSDP1"):
        object.__setattr__(layer, "weight", torch.zeros(8, 5))


def test_embeddings_that_are_not_known_are_said_when_they_are_to_be_saved(tmp_path: Path) -> None:
    model = made(inlay.peft, config())
    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
