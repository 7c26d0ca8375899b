"""Models with a head: what is new, what it starts from, what is refused, and that peft reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads_tiny import make_encoder
from train_tiny import make_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
)

import inlay
from inlay.errors import ModelError
from inlay.memory.simulate import fake_tensors
from inlay.memory.skeleton import skeleton
from inlay.model.load.heads import Head, head_from, head_loss, head_of, not_adapted, to_train
from inlay.model.load.pretrained import load
from inlay.storage.registry import frozen

THREE = Head("sequence", ("a", "b", "c"), "single_label_classification", seed=3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "encoder": make_encoder(folder / "encoder"),
        "causal": make_model(folder / "causal"),
        "unpooled": make_encoder(folder / "unpooled", pooler=False),
    }


@pytest.mark.parametrize("base", ["encoder", "causal"])
@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_a_new_head_comes_from_the_seed_alone_and_stays_dense(
    bases: dict[str, Path], base: str, storage: str
):
    head_name = "classifier" if base == "encoder" else "score"
    torch.manual_seed(99)
    model, tokenizer = load(str(bases[base]), storage, head=THREE)
    dense, _ = load(str(bases[base]), head=THREE)
    other, _ = load(str(bases[base]), head=Head("sequence", THREE.labels, THREE.problem, seed=4))
    weights = [m.get_submodule(head_name).weight for m in (model, dense, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].std() > 0
    assert frozen(model.get_submodule(head_name)).storage == "dense"
    assert to_train(model) == (head_name,)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert head_of(model) == Head("sequence", THREE.labels, THREE.problem)


def test_loading_draws_nothing_from_the_callers_generator(bases: dict[str, Path]):
    torch.manual_seed(5)
    load(str(bases["encoder"]), head=THREE)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_a_pooler_that_the_checkpoint_lacks_is_new_and_trains(bases: dict[str, Path]):
    model, _ = load(str(bases["unpooled"]), head=THREE)
    assert to_train(model) == ("classifier", "bert.pooler.dense")
    assert not_adapted(model) == ("bert.pooler.dense",)
    again, _ = load(str(bases["unpooled"]), head=THREE)
    assert torch.equal(model.bert.pooler.dense.weight, again.bert.pooler.dense.weight)
    tokens, _ = load(str(bases["unpooled"]), head=Head("tokens", ("O", "x")))
    assert to_train(tokens) == ("classifier",)


@pytest.mark.parametrize("base", ["encoder", "causal"])
def test_hidden_states_alone_have_no_head_to_train(bases: dict[str, Path], base: str):
    model, _ = load(str(bases[base]), head=Head("embedding"))
    assert to_train(model) == ()
    assert head_of(model) == Head("embedding", ())


def test_a_pooler_beside_the_hidden_states_takes_no_part(bases: dict[str, Path]):
    pooled, _ = load(str(bases["encoder"]), head=Head("embedding"))
    assert not_adapted(pooled) == ("pooler.dense",)
    for base, head in (("causal", Head("embedding")), ("encoder", THREE)):
        model, _ = load(str(bases[base]), head=head)
        assert not_adapted(model) == ()


def test_a_language_model_and_a_plain_module_have_no_head(bases: dict[str, Path]):
    model, _ = load(str(bases["causal"]))
    assert head_of(model) is None
    assert head_of(torch.nn.Linear(2, 2)) is None
    assert to_train(torch.nn.Linear(2, 2)) == ()


def test_a_trained_head_is_kept_only_where_it_gives_the_same_classes(
    bases: dict[str, Path], tmp_path: Path
):
    model, tokenizer = load(str(bases["encoder"]), head=THREE)
    with torch.no_grad():
        model.classifier.weight.fill_(0.25)
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    kept, _ = load(str(tmp_path / "trained"), "nf4", head=THREE)
    assert bool((kept.classifier.weight == 0.25).all())
    assert frozen(kept.classifier).storage == "dense"
    renamed, _ = load(str(tmp_path / "trained"), head=Head("sequence", ("a", "b", "d"), seed=3))
    assert not bool((renamed.classifier.weight == 0.25).any())
    wider, _ = load(str(tmp_path / "trained"), head=Head("sequence", ("a", "b", "c", "d")))
    assert wider.classifier.weight.shape == (4, 32)
    whole, _ = load(str(tmp_path / "trained"))
    assert bool((whole.classifier.weight == 0.25).all())


def test_an_old_head_is_left_out_and_missing_blocks_are_not(tmp_path: Path):
    config = BertConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    make_encoder(tmp_path / "masked")
    BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    model, _ = load(str(tmp_path / "masked"), head=THREE)
    assert to_train(model) == ("classifier", "bert.pooler.dense")
    config.num_hidden_layers = 3
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path / "masked")
    with pytest.raises(ModelError, match=r"lacks 16 weights .* below its head"):
        load(str(tmp_path / "masked"), head=THREE)
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path / "masked")
    with pytest.raises(ModelError, match="has no place for"):
        load(str(tmp_path / "masked"), head=THREE)


@pytest.mark.parametrize("base", ["encoder", "causal"])
@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("stream", ["disk", "host"])
def test_a_streamed_model_has_the_same_head_and_outputs(
    bases: dict[str, Path], base: str, storage: str, stream: Any,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    resident, _ = load(str(bases[base]), storage, head=THREE)
    streamed, _ = load(str(bases[base]), storage, head=THREE, stream=stream)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 3]])
    with torch.no_grad():
        assert torch.equal(resident(input_ids=ids).logits, streamed(input_ids=ids).logits)
    inlay.attach(streamed, inlay.LoRA(rank=2), modules_to_save=to_train(streamed))
    streamed(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    trained = [p for p in streamed.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert any(bool(p.grad.any()) for p in trained if p.grad is not None)


def test_what_cannot_be_is_said():
    with pytest.raises(ModelError, match="does not describe a head"):
        head_from({"purpose": "else", "labels": []}, "inlay.json")
    said = THREE.described()
    assert head_from(said, "inlay.json") == Head("sequence", THREE.labels, THREE.problem)


def test_without_a_padding_token_the_end_token_fills_short_rows(
    bases: dict[str, Path], tmp_path: Path
):
    model, tokenizer = load(str(bases["causal"]))
    tokenizer.pad_token = None
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "unpadded")
    tokenizer.save_pretrained(tmp_path / "unpadded")
    found, same = load(str(tmp_path / "unpadded"), head=THREE)
    assert found.config.pad_token_id == same.pad_token_id == same.eos_token_id
    ids = torch.tensor([[3, 4, 5], [6, same.pad_token_id, same.pad_token_id]])
    both = found(input_ids=ids, attention_mask=(ids != same.pad_token_id).long()).logits
    alone = found(input_ids=ids[1:, :1]).logits
    assert torch.allclose(both[1:], alone, atol=1e-5)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    with pytest.raises(ModelError, match="neither a padding token nor an end token"):
        load(str(tmp_path / "unpadded"), head=THREE)


def test_a_model_without_a_padding_token_can_be_planned():
    shape = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    with fake_tensors():
        model = skeleton(shape, "nf4", double_quant=False, dtype="float32", head=THREE)
        assert model(input_ids=torch.zeros(2, 3, dtype=torch.long)).logits.shape == (2, 3)
    assert head_of(model) == Head("sequence", THREE.labels, THREE.problem)
    assert frozen(model.score).storage == "dense"
    assert shape.pad_token_id is None


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (THREE, torch.tensor([0, 2])),
        (Head("sequence", ("a", "b"), "multi_label_classification"),
         torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
        (Head("sequence", problem="regression"), torch.tensor([0.5, -2.0])),
        (Head("tokens", ("O", "x")), torch.tensor([[-100, 1, 0], [0, -100, -100]])),
    ],
    ids=["single", "multi", "regression", "tokens"],
)  # fmt: skip
@pytest.mark.parametrize("base", ["encoder", "causal"])
def test_the_loss_is_transformers_own(
    bases: dict[str, Path], base: str, head: Head, labels: torch.Tensor
):
    model, _ = load(str(bases[base]), head=head)
    found = model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), labels=labels)
    assert head_loss(head, found.logits, labels) == pytest.approx(float(found.loss), rel=1e-5)


def test_the_tokens_loss_is_of_the_whole_batch():
    logits, labels = torch.randn(1, 3, 2), torch.tensor([[1, -100, 0]])
    head = Head("tokens", ("O", "x"))
    whole = F.cross_entropy(logits[0, [0, 2]], torch.tensor([1, 0]), reduction="sum")
    assert float(head_loss(head, logits, labels, 4)) == pytest.approx(float(whole) / 4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own, on a name of transformers
@pytest.mark.parametrize("base", ["encoder", "causal", "unpooled"])
@pytest.mark.parametrize("purpose", ["sequence", "tokens"])
def test_peft_reads_an_adapter_and_its_head(
    bases: dict[str, Path], base: str, purpose: Any, tmp_path: Path
):
    from peft import PeftModel

    model, _ = load(str(bases[base]), head=Head(purpose, ("a", "b", "c"), seed=3))
    whole, left_out = to_train(model), not_adapted(model)
    inlay.attach(model, inlay.LoRA(rank=2), exclude=left_out, modules_to_save=whole, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    inlay.save_adapter(model, tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 3]])
    mine = model.eval()(input_ids=ids).logits
    auto = {
        "sequence": AutoModelForSequenceClassification,
        "tokens": AutoModelForTokenClassification,
    }[purpose]
    plain = auto.from_pretrained(bases[base], num_labels=3)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert torch.allclose(theirs(input_ids=ids).logits, mine, atol=1e-5)
    again, _ = load(str(bases[base]), head=Head(purpose, ("a", "b", "c"), seed=8))
    inlay.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(input_ids=ids).logits, mine)
