"""Where adapters go, what is refused, and what the model is with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from inlay.checkpoint.adapter import save_adapter
from inlay.errors import AdapterError, TargetError, UsageError
from inlay.methods.bitfit import BitFit
from inlay.methods.bottleneck import Bottleneck
from inlay.methods.dora import DoRA
from inlay.methods.full import Full
from inlay.methods.ia3 import IA3
from inlay.methods.lora import LoRA
from inlay.methods.prefix import PrefixTuning
from inlay.methods.prompt import PromptTuning
from inlay.model.adapters.attach import attach, detach, use
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.registry import active, adapter_places, adapters
from inlay.model.adapters.report import report
from inlay.model.load.quantize import quantize
from inlay.model.merge.merge import merge

IDS = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "initializer_range": 0.15,
}  # fmt: skip


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()


def deberta() -> Any:
    torch.manual_seed(0)
    return DebertaForSequenceClassification(DebertaConfig(**SIZES, num_labels=3)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def randomise(model: nn.Module, name: str = "default") -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, name):
            for p in params.parameters():
                p += 0.1 * torch.randn_like(p)


def found(model: nn.Module) -> tuple[str, ...]:
    return adapters(model)["default"].found.names


def test_all_linear_leaves_the_head_out(llama: Any) -> None:
    attach(llama, LoRA(rank=2))
    assert len(found(llama)) == 3 * 7
    assert "lm_head" in adapters(llama)["default"].found.left_out
    assert isinstance(llama.model.layers[0].mlp.up_proj, nn.Linear)
    assert repr(type(llama.model.layers[0].mlp.up_proj)) == repr(nn.Linear)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 6),
        ("self_attn.q_proj", 3),
        (r".*\.(q|k)_proj", 6),
        (r"model\.layers\.[01]\.mlp\..*", 6),
        ("model.layers.2.mlp.up_proj", 1),
        ("residual", 6),
        ("mlp-out", 3),
        ("key-value", 6),
    ],
)
def test_targets(llama: Any, targets: Any, count: int) -> None:
    attach(llama, LoRA(rank=2), targets=targets)
    assert len(found(llama)) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["q_proj", "w_proj"]}, r"'w_proj' matches no layer.*Did you mean '.*_proj'"),
        ({"targets": "attention"}, "'attention' matches no layer of the model"),
        ({"targets": "self_attn"}, "matches 'model.layers.0.self_attn', a LlamaAttention"),
        ({"targets": "q_proj("}, "neither a name nor a valid regex"),
        ({"exclude": "wq"}, "exclude 'wq' matches no layer"),
        ({"targets": "q_proj", "exclude": "q_proj"}, "leave no layer"),
        ({"layers": [0, 7]}, r"layers \[7\] match nothing; the targets lie in blocks 0-2"),
        ({"layers": "2-9"}, r"layers \[3, .*\] match nothing"),
        ({"modules_to_save": ["score"]}, "'score' matches no module"),
    ],
)
def test_refused_with_a_sentence(llama: Any, arguments: dict[str, Any], message: str) -> None:
    before = logits(llama)
    with pytest.raises(TargetError, match=message):
        attach(llama, LoRA(rank=2), **arguments)
    assert not adapters(llama)
    assert all(p.requires_grad for p in llama.parameters())
    assert torch.equal(logits(llama), before)


@pytest.mark.parametrize("layers", ["x", "3-1", "1,,2"])
def test_layers_that_cannot_be_read(llama: Any, layers: str) -> None:
    with pytest.raises(UsageError, match="layers"):
        attach(llama, LoRA(rank=2), layers=layers)


def test_layer_ranges_and_exclude(llama: Any) -> None:
    attach(llama, LoRA(rank=2), layers="0,2", exclude=[r".*\.mlp\..*", "o_proj"])
    names = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 2) for n in "qkv"]
    assert list(found(llama)) == names


def test_patterns_give_layers_their_own_rank(llama: Any) -> None:
    method = LoRA(rank=2, alpha=2, rank_pattern={"q_proj": 5}, alpha_pattern={"layers.0.*": 9})
    attach(llama, method)
    attention = llama.model.layers[0].self_attn
    assert attention.q_proj.adapters["default"].A.shape == (5, 32)
    assert attention.k_proj.adapters["default"].A.shape == (2, 32)
    assert attention.q_proj.methods["default"].scale == 9 / 5
    assert llama.model.layers[1].self_attn.q_proj.methods["default"].scale == 2 / 5


def test_lora_biases() -> None:
    everything = sum(p.numel() for n, p in bert().named_parameters() if n.endswith("bias"))
    for which, biases in (("none", 0), ("lora_only", 3 * 32), ("all", everything)):
        model = attach(bert(), LoRA(rank=2, bias_training=which), targets="query")
        assert report(model).trainable == 3 * 2 * (32 + 32) + biases


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings(llama: Any, target: str, tmp_path: Path) -> None:
    before = llama.lm_head.weight.clone()
    attach(llama, LoRA(rank=2), targets=[target, "q_proj"])
    randomise(llama)
    adapted = logits(llama)
    found = merge(llama)
    assert found.untied == ("lm_head.weight",)
    assert not llama.config.tie_word_embeddings
    other = llama.lm_head if target == "embed_tokens" else llama.model.embed_tokens
    assert torch.equal(other.weight, before)
    llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), adapted, atol=1e-5, rtol=1e-5)


def test_full_fine_tuning_keeps_tied_weights_tied(llama: Any) -> None:
    attach(llama, Full())
    randomise(llama)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert merge(llama).untied == ()
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert llama.config.tie_word_embeddings


def test_a_classifier_is_trained_whole() -> None:
    model = bert()
    head = {n: p.clone() for n, p in model.classifier.named_parameters()}
    attach(model, LoRA(rank=2), targets="query", modules_to_save=["classifier"])
    assert report(model).trainable == 3 * 2 * 64 + 32 * 3 + 3
    randomise(model)
    adapted = logits(model)
    assert all(torch.equal(model.classifier._parameters[n], head[n]) for n in head)
    merge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model.classifier.weight, head["weight"])


def test_a_classifier_comes_back() -> None:
    model = bert()
    before = logits(model)
    attach(model, LoRA(rank=2), targets="query", modules_to_save=["classifier"])
    randomise(model)
    assert torch.equal(logits(detach(model)), before)


def test_bert_adapters_follow_the_right_layers() -> None:
    model = attach(bert(), Bottleneck(variant="pfeiffer"))
    assert found(model) == tuple(f"bert.encoder.layer.{i}.output.dense" for i in range(3))
    model = attach(bert(), Bottleneck(variant="houlsby"))
    assert len(found(model)) == 6
    model = attach(bert(), IA3())
    scaled = {n: p.l.shape for n, p in adapter_places(model, "default")}
    assert scaled["bert.encoder.layer.0.output.dense"] == (1, 48)
    assert scaled["bert.encoder.layer.0.attention.self.key"] == (32, 1)
    assert len(scaled) == 9


def test_experts_are_linear_layers_too_and_their_router_is_passed_over() -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    model = MixtralForCausalLM(config)
    attach(model, LoRA(rank=2))
    place = adapters(model)["default"].found
    assert sum("experts" in name for name in place.names) == 3 * 2
    routers = [n for n, kind in place.passed_over if kind == "parameter of a MixtralTopKRouter"]
    assert len(routers) == 3
    assert "passed over (parameter of a MixtralTopKRouter)" in str(report(model))
    attach(model, LoRA(rank=2), targets="experts", name="second")
    attach(model, LoRA(rank=2), exclude="experts", name="third")
    kinds = {kind for _, kind in adapters(model)["third"].found.passed_over}
    assert "3-D expert weights" in kinds


def test_methods_that_do_not_fit(llama: Any) -> None:
    with pytest.raises(TargetError, match="bitfit selects no parameter of this LlamaForCausalLM"):
        attach(llama, BitFit())
    for method in (PrefixTuning(tokens=2), PromptTuning(tokens=2)):
        with pytest.raises(AdapterError, match="takes no key-value cache"):
            attach(nn.Sequential(nn.Linear(2, 2)), method)
        with pytest.raises(AdapterError, match="acts on the whole model"):
            attach(llama, method, targets="q_proj")
    with pytest.raises(AdapterError, match="quantised and cannot train"):
        attach(quantize(llama, "nf4"), Full())
    with pytest.raises(TargetError, match="no layer of kind"):
        attach(nn.Sequential(nn.LayerNorm(2)), LoRA())
    with pytest.raises(TargetError, match="leave no layer; the model has 1 that could be adapted"):
        attach(nn.Sequential(nn.Conv2d(1, 1, 1)), LoRA())
    assert not adapters(llama)


@pytest.mark.parametrize("name", ["default", "", "a.b", " a", "keys"])
def test_names_that_cannot_be(llama: Any, name: str) -> None:
    attach(llama, LoRA(rank=2))
    with pytest.raises(AdapterError, match="name"):
        attach(llama, LoRA(rank=2), name=name)
    assert active(llama) == ("default",)


def test_unknown_and_repeated_names(llama: Any) -> None:
    with pytest.raises(AdapterError, match=r"has no adapter; call inlay.attach first"):
        use(llama, "default")
    attach(llama, LoRA(rank=2), name="french")
    with pytest.raises(AdapterError, match=r"no adapter named 'frensh'.*Did you mean 'french'"):
        use(llama, "frensh")
    with pytest.raises(AdapterError, match="twice"):
        use(llama, "french", "french")


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # new name
def test_prompts_refuse_reentrant_checkpointing(llama: Any) -> None:
    attach(llama, PrefixTuning(tokens=2))
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    llama.train()
    with pytest.raises(AdapterError, match=r"drops the key-value cache.*use_reentrant=False"):
        llama(input_ids=IDS)
    llama.eval()
    logits(llama)


def test_hidden_layer_inputs_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=x)

    model = attach(Named(), LoRA(rank=2))
    randomise(model)
    x = torch.randn(2, 4)
    assert not torch.equal(model(x), detach(model)(x))


def test_attaching_and_using_one_adapter_does_not_walk_the_others() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for number in range(50):
        attach(model, LoRA(rank=1), name=f"a{number}")
    visited = sum(1 for _ in own_modules(model))
    assert visited == 3
    use(model, "a7")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".a7." in name for name in trained)


@pytest.mark.parametrize("exclude", ["mlp", r"model\.layers\.\d+\.mlp", ["mlp", "o_proj"]])
def test_what_lies_below_an_excluded_module_is_left_out(llama: Any, exclude: Any) -> None:
    attach(llama, LoRA(rank=2), exclude=exclude)
    assert found(llama)
    assert not [n for n in found(llama) if ".mlp." in n]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_no_method_goes_to_what_trains_whole(tmp_path: Path) -> None:
    """As in HF PEFT, which would not read an adapter there."""
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, num_labels=3, max_position_embeddings=40, pad_token_id=0)
    model = RobertaForSequenceClassification(config).eval()
    base = copy.deepcopy(model)
    attach(model, LoRA(rank=2), targets=["query", "dense"], modules_to_save=["classifier"])
    assert found(model)
    assert not [n for n in found(model) if n.startswith("classifier")]
    randomise(model)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PromptTuning(tokens=2, start="ids", ids=(61,)), "ids must lie in the vocabulary"),
        (PrefixTuning(tokens=2), "takes no key-value cache"),
    ],
)
def test_a_prompt_that_does_not_fit_leaves_no_trace(llama: Any, method: Any, message: str) -> None:
    model = llama if isinstance(method, PromptTuning) else deberta()
    before = [(type(m), set(vars(m))) for m in model.modules()]
    attention = model.config._attn_implementation
    with pytest.raises(AdapterError, match=message):
        attach(model, method)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    assert not model._forward_pre_hooks
    assert model.config._attn_implementation == attention


def test_what_reads_the_base_stands_on_no_trained_copy_of_it(llama: Any) -> None:
    attach(llama, DoRA(rank=2), targets=["q_proj"], name="dora")
    attach(llama, Full(), targets=["q_proj"], name="full")
    with pytest.raises(AdapterError, match="'full' has a trained copy of that weight"):
        use(llama, "dora", "full")
    assert active(llama) == ("dora",)


def test_torchs_encoder_does_not_read_past_an_adapter() -> None:
    """Its layers have a fast way in evaluation, with the weights of the layers below them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = attach(nn.TransformerEncoder(layer, 2), LoRA(rank=2), targets=["linear1", "linear2"])
    randomise(model)
    x = torch.randn(2, 5, 16)
    trained = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)


def test_a_prompt_starts_as_the_model_reads_its_tokens() -> None:
    """Gemma 3 scales its embeddings."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    model: Any = Gemma3ForCausalLM(config)
    attach(model, PromptTuning(tokens=3, start="ids", ids=(4, 5, 6)))
    _, params = next(adapter_places(model, "default"))
    wanted = model.get_input_embeddings()(torch.tensor([4, 5, 6]))
    torch.testing.assert_close(params.embeddings, wanted)


def test_one_row_without_a_batch_trains_its_biases() -> None:
    model = attach(nn.Sequential(nn.Linear(4, 3)), LoRA(rank=2, bias_training="lora_only"))
    x = torch.randn(4)
    wanted = [p.shape for p in model.parameters() if p.requires_grad]
    model(x).sum().backward()
    assert [p.grad.shape for p in model.parameters() if p.grad is not None] == wanted


@pytest.mark.filterwarnings("ignore:Inlay's fast path")
def test_a_decoder_that_counts_positions_along_its_mask_trains_on_padded_rows() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = OPTForCausalLM(config).train()
    ids, mask = torch.arange(4, 36).view(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    calls: list[dict[str, Any]] = [{}, {"attention_mask": mask}]
    base = [model(input_ids=ids, use_cache=False, **call).logits for call in calls]
    attach(model, LoRA(rank=2)).train()
    for call, expected in zip(calls, base, strict=True):
        found = model(input_ids=ids, use_cache=False, **call).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
