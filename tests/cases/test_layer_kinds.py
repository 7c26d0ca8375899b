"""Layers that are no plain linear ones: the output is the layer's own on the adapted weight.

Each is compared with HF PEFT, where that has the kind, and with the merged model, reloaded.
"""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import inlay
from inlay.errors import CheckpointError, TargetError
from inlay.model.adapters.registry import adapter_places, adapters
from inlay.storage.registry import frozen, kind

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(3))


class Tanh(nn.Linear):
    """A subclass whose output is no product."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input))


class Same(nn.Linear):
    """A subclass that computes what its base does."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Doubled(nn.Embedding):
    """A scaled embedding whose number HF PEFT does not find."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.5


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b, self.c = Doubled(16, 8), Same(8, 8), Tanh(8, 8), nn.Linear(8, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.c(self.b(self.a(self.table(input))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, padding=1, stride=2)
        self.two = nn.Conv2d(4, 6, 3, padding="same")
        self.point = nn.Conv2d(6, 5, 1)
        self.three = nn.Conv3d(2, 4, (1, 3, 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.one(x.flatten(2)), self.point(self.two(x)), self.three(x.view(2, 2, 2, 8, 8)))
        return torch.cat([p.flatten(1) for p in parts], 1)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)


class Attention(nn.Module):
    def __init__(self, batch_first: bool = True, **widths: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=batch_first, **widths)
        self.k, self.v = widths.get("kdim", 16), widths.get("vdim", 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attn(x, x[..., : self.k], x[..., : self.v], need_weights=False)
        return self.out(attended)


def falcon() -> Any:
    return FalconForCausalLM(FalconConfig(**SMALL, alibi=False))


def gemma() -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8, tie_word_embeddings=True))


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**EXPERTS))


def gpt_oss() -> Any:
    return GptOssForCausalLM(GptOssConfig(**EXPERTS, head_dim=8))


def llama4() -> Any:
    config = {**EXPERTS, "num_experts_per_tok": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**config, head_dim=8, intermediate_size_mlp=48))


def granite() -> Any:
    return GraniteMoeForCausalLM(GraniteMoeConfig(**EXPERTS))


IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "falcon": (falcon, IDS),
    "gemma": (gemma, IDS),
    "mixtral": (mixtral, IDS),
    "gpt_oss": (gpt_oss, IDS),
    "llama4": (llama4, IDS),
    "granite": (granite, IDS),
    "mixed": (Mixed, IDS % 16),
    "convolutions": (Convolutions, IMAGE),
    "grouped": (Grouped, IMAGE),
    "attention": (Attention, SEQUENCE),
    "attention-time-first": (lambda: Attention(False), SEQUENCE),
    "attention-apart": (lambda: Attention(kdim=8, vdim=12), SEQUENCE),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def output(name: str, model: Any) -> Tensor:
    """The logits of one batch; HF PEFT's wrapper gives them too."""
    with torch.no_grad():
        found = model(MODELS[name][1])
    return found if isinstance(found, Tensor) else found.logits


def far(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max())


def moved(model: Any, name: str = "default", size: float = 0.2) -> Any:
    """Every tensor of the adapter, as if trained."""
    seed = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, name):
            for tensor in params.parameters(recurse=False):
                tensor.add_(size * torch.randn(tensor.shape, generator=seed))
    return model


def adapted(name: str, targets: Any, method: Any = None) -> Any:
    model = built(name)
    inlay.attach(model, method or inlay.LoRA(rank=4, alpha=8), targets=targets)
    return moved(model)


BOTH = {
    "falcon": ["query_key_value", "dense_h_to_4h"],
    "gemma": ["embed_tokens", "q_proj"],
    "mixtral": "all-linear",
    "gpt_oss": "all-linear",
    "llama4": "all-linear",
    "granite": "all-linear",
    "convolutions": ["one", "two", "point", "three"],
    "attention": ["attn", "out"],
    "attention-time-first": ["attn"],
}
"""What HF PEFT adapts too."""
CASES = [
    *((name, targets, None) for name, targets in BOTH.items()),
    ("mixtral", ["w1", "w3", "w2", "q_proj"], None),
    ("mixtral", ["gate.weight", "down_proj"], None),
    ("convolutions", ["one", "two", "three"], inlay.DoRA(rank=4)),
    ("convolutions", ["two", "point"], inlay.IA3(feedforward=("point",))),
    ("mixed", ["table", "a", "c"], None),
]


@pytest.mark.parametrize(("name", "targets", "method"), CASES, ids=lambda v: str(v)[:30])
def test_hf_peft_computes_the_same_both_ways(
    tmp_path: Path, name: str, targets: Any, method: Any
) -> None:
    model = adapted(name, targets, method)
    wanted = output(name, model)
    assert far(wanted, output(name, built(name))) > 1e-2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*HF PEFT 0.21 computes otherwise.*")
        inlay.save_adapter(model, tmp_path / "ours")
    theirs = read_by_peft(built(name), tmp_path / "ours", tmp_path / "theirs")
    assert far(output(name, theirs), wanted) < 1e-5
    assert far(output(name, inlay.load_adapter(built(name), tmp_path / "theirs")), wanted) < 1e-5
    assert far(output(name, inlay.load_adapter(built(name), tmp_path / "ours")), wanted) < 1e-6


def read_by_peft(model: Any, folder: Path, saved: Path | None = None) -> Any:
    """The model with HF PEFT's adapter from a folder; it warns of much that is as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.PeftModel.from_pretrained(model, folder).eval()
        if saved is not None:
            found.save_pretrained(saved)
    return found


EVERY = [
    *CASES,
    ("mixed", "all-linear", None),
    ("mixed", ["table", "b"], inlay.DoRA(rank=4)),
    ("mixed", ["a", "b"], inlay.IA3(feedforward=())),
    ("grouped", ["conv"], None),
    ("grouped", ["conv"], inlay.DoRA(rank=4)),
    ("attention-apart", ["attn"], None),
    ("attention", ["attn"], inlay.DoRA(rank=4)),
    ("attention", ["attn"], inlay.IA3(feedforward=())),
    ("mixtral", ["experts"], inlay.DoRA(rank=4)),
    ("gpt_oss", ["experts"], inlay.IA3()),
]


@pytest.mark.parametrize(("name", "targets", "method"), EVERY, ids=lambda v: str(v)[:30])
def test_the_merged_and_the_saved_model_are_the_adapted_one(
    tmp_path: Path, name: str, targets: Any, method: Any
) -> None:
    model = adapted(name, targets, method)
    before = {n: type(m) for n, m in built(name).named_modules()}
    wanted = output(name, model)
    assert far(wanted, output(name, built(name))) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inlay.save_adapter(model, tmp_path)
        again = inlay.load_adapter(built(name), tmp_path)
    assert far(output(name, again), wanted) < 1e-6
    with torch.no_grad(), inlay.disabled(model):
        assert far(output(name, model), output(name, built(name))) < 1e-6
    weights = dict(inlay.merged_weights(model)) if hasattr(inlay, "merged_weights") else {}
    key = "input_ids" if hasattr(model, "config") else first_argument(model)
    inlay.merge(model, inputs=[{key: MODELS[name][1]}])
    assert far(output(name, model), wanted) < 2e-5
    assert {n: type(m) for n, m in model.named_modules()} == before
    for key, value in weights.items():
        assert torch.equal(value, model.state_dict()[key])


def first_argument(model: nn.Module) -> str:
    return "input" if isinstance(model, Mixed) else "x"


@pytest.mark.parametrize(("name", "targets", "method"), EVERY, ids=lambda v: str(v)[:30])
def test_gradients_are_those_of_the_dense_weight(name: str, targets: Any, method: Any) -> None:
    """What autograd gives for the parameters that the method defines, put in the plain model."""
    dtype = torch.float32 if "experts" in str(built(name)).lower() else torch.float64
    model = adapted(name, targets, method).to(dtype)
    x = MODELS[name][1]
    x = x.to(dtype) if x.is_floating_point() else x
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss_of(found: Any) -> Tensor:
        y = found if isinstance(found, Tensor) else found.logits
        return (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()).sum()

    with inlay.plain("products"):
        got = torch.autograd.grad(loss_of(model(x)), trained)
    new: dict[str, Tensor] = {}
    for place, module in model.named_modules():
        for _, _, parameters in getattr(module, "merged_parameters", list)():
            new |= {f"{place}.{n}": t for n, t in parameters.items()}
    found = torch.func.functional_call(built(name).to(dtype), new, (x,), tie_weights=False)
    wanted = torch.autograd.grad(loss_of(found), trained)
    rounding = 1e-9 if dtype == torch.float64 else 2e-4
    for ours, theirs in zip(got, wanted, strict=True):
        assert far(ours, theirs) < rounding * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "convolutions"])
def test_a_backward_pass_keeps_no_adapted_weight(name: str) -> None:
    model = adapted(name, BOTH[name]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    shapes = {p.shape for n, p in model.named_parameters() if not p.requires_grad and p.ndim > 1}
    made: list[Any] = []

    class Making(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape in shapes and not out._is_view():
                made.append(weakref.ref(out.untyped_storage()))
            return out

    with Making():
        found = model(MODELS[name][1])
    y = found if isinstance(found, Tensor) else found.logits
    gc.collect()
    assert made
    assert not [ref for ref in made if ref() is not None]
    first = torch.autograd.grad(y.sum(), trained, retain_graph=True)
    second = torch.autograd.grad(y.sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_goes_to_the_input_of_a_convolution_and_nowhere_else() -> None:
    model = built("convolutions")
    inlay.attach(model, inlay.LoRA(rank=4, dropout=0.5), targets=["two", "one"])
    moved(model).train()
    torch.manual_seed(1)
    first, second = output("convolutions", model), output("convolutions", model)
    assert far(first, second) > 1e-3
    many = torch.stack([output("convolutions", model) for _ in range(200)])
    off = (many.mean(0) - output("convolutions", model.eval())).abs()
    assert bool((off < 7 * many.std(0) / 200**0.5 + 1e-5).all())
    for name, targets in (("mixtral", ["experts"]), ("attention", ["attn"]), ("mixed", ["b"])):
        model = inlay.attach(built(name), inlay.LoRA(rank=4, dropout=0.5), targets=targets)
        moved(model).train()
        assert far(output(name, model), output(name, model)) == 0
        assert "without dropout: " in str(inlay.report(model))


def test_two_adapters_act_in_order_and_leave_each_other_alone() -> None:
    for name, targets in (("mixtral", "all-linear"), ("convolutions", ["two"]), ("mixed", ["b"])):
        model = adapted(name, targets)
        one = output(name, model)
        inlay.attach(model, inlay.LoRA(rank=2), targets=targets, name="second")
        assert far(output(name, model), one) == 0
        moved(model, "second")
        inlay.use(model, "second", "default")
        assert far(output(name, model), one) > 1e-3
        inlay.use(model, "default")
        assert far(output(name, model), one) == 0
        inlay.detach(model)
        assert far(output(name, model), output(name, built(name))) == 0
        assert {type(m) for m in model.modules()} == {type(m) for m in built(name).modules()}


def test_what_all_linear_passes_over_is_listed_as_what_it_is() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
            y = super().forward(x)
            return y, y

    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv, self.table = nn.Linear(4, 4), nn.Conv1d(2, 2, 3), Doubled(4, 4)
            self.attn, self.odd, self.norm = nn.MultiheadAttention(4, 2), Odd(4, 4), nn.LayerNorm(4)
            self.positions = nn.Parameter(torch.zeros(8, 4))

    model = inlay.attach(Everything(), inlay.LoRA(rank=2))
    found = adapters(model)["default"].found
    assert found.names == ("linear",)
    assert dict(found.passed_over) == {
        "positions": "parameter of a Everything",
        "conv": "convolution",
        "table": "subclass Doubled of Embedding whose forward is its own",
        "attn": "attention module",
        "odd": "subclass Odd of Linear whose forward is its own",
    }
    text = str(inlay.report(model))
    assert "passed over (convolution): conv (1)" in text
    assert "passed over (subclass Odd of Linear whose forward is its own): odd (1)" in text


def test_trained_is_a_share_of_the_whole_model() -> None:
    model = built("mixtral")
    base = sum(p.numel() for p in model.parameters())
    report = inlay.report(inlay.attach(model, inlay.LoRA(rank=2)))
    assert report.total == base + report.trainable
    assert report.percent == pytest.approx(100 * report.trainable / (base + report.trainable))
    full = inlay.report(inlay.attach(built("falcon"), inlay.Full()))
    assert full.percent == 100
    inlay.attach(model, inlay.LoRA(rank=4), name="waiting")
    assert inlay.report(model).trainable == report.trainable


def test_only_some_of_the_layers_in_one_parameter_is_refused() -> None:
    with pytest.raises(TargetError, match=r"w1 and w3 are one parameter here.*name both"):
        inlay.attach(built("mixtral"), inlay.LoRA(), targets=["w1", "q_proj"])


def test_a_subclass_with_the_plain_product_is_packed_and_another_stays_dense() -> None:
    model = inlay.quantize(built("mixed"), "nf4")
    assert type(model.a).__name__ == "NF4Linear"
    assert type(model.b) is Tanh
    packed = inlay.quantize(built("falcon"), "nf4")
    assert frozen(packed.transformer.h[0].mlp.dense_h_to_4h).storage == "nf4"
    assert kind(nn.MultiheadAttention(4, 2).out_proj) is None


REMAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("Glm4Moe", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8}),
    "qwen3_next": ("Qwen3Next", {"num_experts": 4, "shared_expert_intermediate_size": 24,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
}  # fmt: skip


@pytest.mark.parametrize("family", REMAPPED)
def test_hf_peft_finds_layers_whose_names_it_takes_for_experts(tmp_path: Path, family: str) -> None:
    name, own = REMAPPED[family]
    common = {**GROUPED, "moe_intermediate_size": 24, "max_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(**common, num_experts_per_tok=2, **own)

    def model() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    ours = moved(inlay.attach(model(), inlay.LoRA(rank=4, rank_pattern={"gate_proj": 2})))
    with torch.no_grad():
        wanted = ours(input_ids=IDS).logits
    inlay.save_adapter(ours, tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert any("gate_proj.weight" in p for p in options["target_parameters"])
    with torch.no_grad():
        theirs = read_by_peft(model(), tmp_path)(input_ids=IDS).logits
    assert far(theirs, wanted) < 1e-5
    (tmp_path / "inlay.json").unlink()
    with torch.no_grad():
        again = inlay.load_adapter(model(), tmp_path)(input_ids=IDS).logits
    assert far(again, wanted) < 1e-6
    dora = inlay.attach(model(), inlay.DoRA(rank=2), exclude="experts")
    with pytest.warns(UserWarning, match="HF PEFT reads the name .* as the experts'"):
        inlay.save_adapter(dora, tmp_path / "dora")
    options["target_modules"], options["target_parameters"] = ["gate_proj"], None
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match="transformers 5 has joined in the experts"):
        inlay.load_adapter(model(), tmp_path)


def test_what_hf_peft_computes_otherwise_is_said(tmp_path: Path) -> None:
    for name, targets, reason in (
        ("grouped", ["conv"], "grouped convolution"),
        ("mixed", ["b"], "adds to the output of Tanh"),
        ("attention", ["out_proj"], "output projection alone"),
        ("attention-apart", ["attn"], "other widths"),
    ):
        with pytest.warns(UserWarning, match=reason):
            inlay.save_adapter(adapted(name, targets), tmp_path / name)
        assert "HF PEFT 0.21 computes otherwise" in (tmp_path / name / "README.md").read_text()


def test_a_copy_of_an_adapted_model_is_its_own() -> None:
    for name in ("mixtral", "convolutions", "attention"):
        model = adapted(name, BOTH[name])
        twin = copy.deepcopy(model)
        wanted = output(name, model)
        moved(model)
        assert far(output(name, twin), wanted) == 0


def test_a_computed_weight_is_listed_and_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
            self.linear, self.token = nn.Linear(4, 4), nn.Parameter(torch.zeros(1, 1, 4))

    model = inlay.attach(Normed(), inlay.LoRA(rank=2))
    over = adapters(model)["default"].found.passed_over
    assert dict(over) == {"conv": "weight that a parametrisation computes"}
    with pytest.raises(TargetError, match="'conv', a ParametrizedConv1d"):
        inlay.attach(Normed(), inlay.LoRA(rank=2), targets="conv")
    inlay.quantize(built("mixed"), "nf4")
    assert "layers of class Tanh stay dense (1)" in caplog.text


def test_torchs_fused_encoder_reads_the_adapted_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    inlay.attach(model, inlay.LoRA(rank=2), targets="self_attn")
    moved(model)
    plain = model(SEQUENCE).detach()
    with torch.no_grad():
        fused = model(SEQUENCE)
    assert far(fused, plain) < 1e-5
    with torch.no_grad(), inlay.disabled(model):
        assert far(fused, model(SEQUENCE)) > 1e-2


def test_hf_peft_s_configurations_start_and_act_as_there() -> None:
    import inlay.peft as ours

    def both(name: str, **options: Any) -> tuple[Any, Any]:
        config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(5)
            first = ours.get_peft_model(built(name), copy.deepcopy(config)).eval()
            torch.manual_seed(5)
            return first, peft.get_peft_model(built(name), copy.deepcopy(config)).eval()

    for name, options in (
        ("mixtral", {"target_modules": "all-linear"}),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
        ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
        ("convolutions", {"target_modules": ["one", "two", "three", "point"]}),
        ("attention", {"target_modules": ["attn", "out"]}),
    ):
        model, theirs = both(name, **options)
        assert far(output(name, model), output(name, theirs)) < 1e-5
        assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    with pytest.raises(TargetError, match="without also targeting w3"):
        both("mixtral", target_modules=["w1"])


def test_a_scale_that_changes_after_attach_acts_on_the_adapter_too():
    embedding = Gemma3TextScaledWordEmbedding(16, 8, 0, embed_scale=3.0)
    model = nn.Sequential(embedding)
    inlay.attach(model, inlay.LoRA(rank=2), targets=["0"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    before = model(torch.arange(6))
    embedding.embed_scale.fill_(30.0)
    torch.testing.assert_close(model(torch.arange(6)), 10 * before)
