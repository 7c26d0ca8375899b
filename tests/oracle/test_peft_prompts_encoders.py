"""Prompts on encoders: HF PEFT is the oracle for values, gradients, counts and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor

import inlay
from inlay.peft import PeftModel, get_peft_model

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TYPES = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
TOKENS = 3
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0,
    "initializer_range": 0.2, "num_labels": 2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2,
}  # fmt: skip
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
T = transformers
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "BERT": ("FEATURE_EXTRACTION", lambda: T.BertModel(T.BertConfig(**SMALL))),
    "RoBERTa": ("FEATURE_EXTRACTION", lambda: T.RobertaModel(T.RobertaConfig(**SMALL))),
    "DeBERTa": (
        "FEATURE_EXTRACTION", lambda: T.DebertaModel(T.DebertaConfig(**SMALL, **RELATIVE)),
    ),
    "DeBERTa v2": (
        "FEATURE_EXTRACTION", lambda: T.DebertaV2Model(T.DebertaV2Config(**SMALL, **RELATIVE)),
    ),
    "BERT classifier": ("SEQ_CLS", lambda: T.BertForSequenceClassification(T.BertConfig(**SMALL))),
    "RoBERTa classifier": (
        "SEQ_CLS", lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**SMALL)),
    ),
    "DeBERTa classifier": (
        "SEQ_CLS", lambda: T.DebertaForSequenceClassification(T.DebertaConfig(**SMALL)),
    ),
    "BERT tagger": ("TOKEN_CLS", lambda: T.BertForTokenClassification(T.BertConfig(**SMALL))),
    "masked LM": ("FEATURE_EXTRACTION", lambda: T.RobertaForMaskedLM(T.RobertaConfig(**SMALL))),
    "BERT answers": ("QUESTION_ANS", lambda: T.BertForQuestionAnswering(T.BertConfig(**SMALL))),
}  # fmt: skip
METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "prompt": (PromptTuningConfig, {}),
    "p-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 20}),
    "prefix": (PrefixTuningConfig, {}),
}
TAKES_KEYS = ("BERT", "RoBERTa", "masked LM")
EVERY = [
    (name, method)
    for name in MODELS
    for method in METHODS
    if method != "prefix" or name in TAKES_KEYS
]
every = pytest.mark.parametrize(("name", "method"), EVERY)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
]


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name][1]()


def both(name: str, method: str) -> tuple[Any, Any]:
    """The same adapter in both libraries."""
    found = []
    cls, options = METHODS[method]
    for make in (get_peft_model, peft.get_peft_model):
        base = build(name)
        torch.manual_seed(7)
        config = cls(task_type=MODELS[name][0], num_virtual_tokens=TOKENS, **options)
        found.append(make(base, config))
    return found[0], found[1]


def batch(name: str) -> dict[str, Tensor]:
    """A padded batch; token types where HF PEFT keeps them, which it does not for answers."""
    kept = MODELS[name][0] in ("SEQ_CLS", "TOKEN_CLS")
    types = {"token_type_ids": TYPES} if kept else {}
    return {"input_ids": IDS, "attention_mask": MASK, **types}


def outputs(model: Any, call: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in model(**call).items() if isinstance(v, Tensor)}


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


def loss_of(found: dict[str, Tensor]) -> Tensor:
    """A loss of every output in which no symmetry makes gradients vanish."""
    return sum((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in found.values())  # type: ignore[return-value]


@every
def test_the_same_seed_gives_the_same_values_counts_and_gradients(name: str, method: str) -> None:
    ours, theirs = both(name, method)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for key in ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
        assert getattr(ours.active_peft_config, key) == getattr(theirs.active_peft_config, key)
    kept = []
    for model in (ours, theirs):
        found = outputs(model.eval(), batch(name))
        loss_of(found).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        kept.append((found, {n: g for n, g in grads.items() if n.startswith("prompt_encoder")}))
        assert all(g is not None for g in grads.values())
    alike(kept[0][0], kept[1][0])
    assert kept[0][1].keys() == kept[1][1].keys()
    assert kept[0][1]
    for key, grad in kept[0][1].items():
        torch.testing.assert_close(grad, kept[1][1][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["RoBERTa", "BERT classifier", "DeBERTa v2"])
@pytest.mark.parametrize("method", METHODS)
def test_either_library_reads_what_the_other_writes(name: str, method: str, tmp_path: Path) -> None:
    if (name, method) not in EVERY:
        pytest.skip("HF PEFT has no such prompt")
    ours, theirs = both(name, method)
    call = batch(name)
    with torch.no_grad():
        wanted = outputs(ours.eval(), call)
        ours.save_pretrained(tmp_path / "ours")
        alike(outputs(peft.PeftModel.from_pretrained(build(name), tmp_path / "ours"), call), wanted)
        theirs.save_pretrained(tmp_path / "theirs")
        found = outputs(PeftModel.from_pretrained(build(name), tmp_path / "theirs"), call)
        alike(found, wanted)
        plain = outputs(inlay.load_adapter(build(name), tmp_path / "ours").eval(), call)
    for key, value in plain.items():  # a plain model's outputs are as long as the text
        text = wanted[key][:, -IDS.shape[1] :] if value.dim() == 3 else wanted[key]
        torch.testing.assert_close(value, text, rtol=1e-4, atol=1e-5)


@every
def test_detach_and_disabling_bring_the_base_back_bit_for_bit(name: str, method: str) -> None:
    call = batch(name)
    base = build(name).eval()
    with torch.no_grad():
        before = outputs(base, call)
        torch.manual_seed(7)
        cls, options = METHODS[method]
        config = cls(task_type=MODELS[name][0], num_virtual_tokens=TOKENS, **options)
        model = get_peft_model(base, config).eval()
        assert not torch.equal(outputs(model, call)[next(iter(before))], before[next(iter(before))])
        with model.disable_adapter():
            off = outputs(model, call)
        after = outputs(inlay.detach(base), call)
    for key, value in before.items():
        assert torch.equal(off[key], value), key
        assert torch.equal(after[key], value), key
    assert not base._forward_pre_hooks


def test_labels_are_widened_and_longer_ones_are_taken_as_hf_peft_takes_them() -> None:
    ours, theirs = both("BERT tagger", "prompt")
    labels = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 1, 1, -100, -100]])
    longer = torch.cat([torch.full((2, TOKENS), -100), labels], dim=1)
    wanted = theirs.eval()(**batch("BERT tagger"), labels=longer).loss
    with pytest.raises(ValueError, match="batch_size"):
        theirs(**batch("BERT tagger"), labels=labels)
    for given in (labels, longer):
        found = ours.eval()(**batch("BERT tagger"), labels=given)
        torch.testing.assert_close(found.loss, wanted, rtol=1e-4, atol=1e-5)
    plain = inlay.attach(build("BERT tagger"), inlay.PromptTuning(tokens=TOKENS))
    found = plain(**batch("BERT tagger"), labels=labels)
    assert found.logits.shape == (2, 6, 2)


def test_what_hf_peft_leaves_out_is_left_out_and_said() -> None:
    ours, theirs = both("BERT", "prompt")
    call = {**batch("BERT"), "token_type_ids": TYPES}
    with pytest.warns(UserWarning, match="Token type ids are not supported"):
        wanted = outputs(theirs.eval(), call)
    with pytest.warns(UserWarning, match="token_type_ids are left out"):
        alike(outputs(ours.eval(), call), wanted)
    call = {**batch("BERT"), "position_ids": torch.arange(6).expand(2, -1)}
    with pytest.warns(UserWarning, match="position_ids are left out"):
        alike(outputs(ours, call), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_activations_gives_the_same_gradients(reentrant: bool) -> None:
    grads = []
    for recompute in (False, True):
        model = both("BERT", "prompt")[0].train()
        if recompute:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None)
            (enable or base.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        loss_of(outputs(model, batch("BERT"))).backward()
        grads += [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_classifier_takes_a_prefix_by_its_encoder() -> None:
    """On transformers 5.24 HF PEFT looks for an argument of a former name, and refuses."""
    torch.manual_seed(7)
    model = get_peft_model(
        build("BERT classifier"), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=TOKENS)
    ).eval()
    found = model(**batch("BERT classifier"))
    found.logits.sum().backward()
    assert found.logits.shape == (2, 2)
    prefix = model.prompt_encoder["default"].embedding.weight
    assert prefix.grad is not None
    assert float(prefix.grad.abs().max()) > 0
    with torch.no_grad():
        body = model.get_base_model().bert
        plain = get_peft_model(
            build("BERT"), PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
        )
        plain.get_base_model().load_state_dict(
            {k: v for k, v in body.state_dict().items() if "adapters" not in k}, strict=False
        )
        plain.prompt_encoder["default"].embedding.weight.copy_(prefix)
        pooled = plain.eval()(**{**batch("BERT"), "token_type_ids": None}).pooler_output
        kept = model(input_ids=IDS, attention_mask=MASK).logits
        head = model.get_base_model().classifier
        torch.testing.assert_close(kept, head(pooled), rtol=1e-4, atol=1e-5)


def test_prefill_starts_a_prefix_as_if_tokens_stood_before_the_text() -> None:
    model = inlay.attach(build("BERT").eval(), inlay.PrefixTuning(tokens=TOKENS))
    assert model(input_ids=IDS).last_hidden_state.shape == (2, 6, 32)
