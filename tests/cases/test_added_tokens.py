"""Tokens added to a base: their rows train, are in the file, and are read from HF PEFT's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import inlay
import inlay.peft
from inlay.memory.devices import Device
from inlay.model.adapters.registry import adapter_places
from inlay.model.adapters.tokens import ids_of
from inlay.tasks.config import load_config
from inlay.train.adapted_model import built

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.randint(1, 70, (2, 12), generator=torch.Generator().manual_seed(4))
IDS[:, :4] = torch.tensor([3, 64, 65, 69])
TIES = pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])


def llama(tie: bool = False, rows: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=tie, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def resized(seed: int, tie: bool = False) -> LlamaForCausalLM:
    return with_new_rows(llama(tie), seed)


def with_new_rows(model: Any, seed: int) -> Any:
    """Add six tokens, whose rows every process draws anew."""
    torch.manual_seed(seed)
    model.resize_token_embeddings(70, mean_resizing=False)
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight[64:] = torch.randn(6, 32) * 0.3
    return model


def moved(model: Any, name: str = "default") -> Any:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, name):
            for p in params.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def moved_peft(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same(a: Tensor, b: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


PLACES: list[dict[str, Any]] = [
    {"targets": ["q_proj"]},
    {"targets": ["q_proj", "embed_tokens"]},
    {"targets": ["q_proj", "lm_head"]},
    {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"targets": ["q_proj"], "trainable_tokens": [3, 64, 65]},
    {"targets": ["q_proj"], "trainable_tokens": range(64, 70)},
    {"targets": ["q_proj"], "trainable_tokens": {"embed_tokens": [64], "lm_head": [65, 3]}},
]


@TIES
@pytest.mark.parametrize("where", PLACES, ids=lambda p: json.dumps(p, default=list))
def test_new_rows_are_in_the_file(where: dict[str, Any], tie: bool, tmp_path: Path) -> None:
    model = moved(inlay.attach(resized(1, tie), inlay.LoRA(rank=4), **where))
    y = logits(model)
    inlay.save_adapter(model, tmp_path)
    other = resized(2, tie)
    base = logits(other)
    inlay.load_adapter(other, tmp_path)
    same(logits(other), y)
    inlay.save_adapter(other, tmp_path / "again")
    with inlay.disabled(other):
        assert torch.equal(logits(other), base)
    (tmp_path / "inlay.json").unlink()
    same(logits(inlay.load_adapter(resized(3, tie), tmp_path)), y)
    same(logits(inlay.load_adapter(resized(4, tie), tmp_path / "again")), y)
    assert torch.equal(logits(inlay.detach(other)), base)


@TIES
@pytest.mark.parametrize("where", PLACES[:7], ids=lambda p: json.dumps(p, default=list))
def test_peft_reads_the_folder_on_rows_drawn_anew(
    where: dict[str, Any], tie: bool, tmp_path: Path
) -> None:
    if tie and where.get("modules_to_save") == ["lm_head"]:
        pytest.skip("HF PEFT ties the base's head again")
    model = moved(inlay.attach(resized(1, tie), inlay.LoRA(rank=4), **where))
    inlay.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(resized(2, tie), str(tmp_path)).eval()
    same(logits(theirs), logits(model))


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [65, 3, 64]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}},
    {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 64], "lm_head": [5]},
    },
    {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 64], "lm_head": [3, 64]},
    },
]


@TIES
@pytest.mark.parametrize("options", CONFIGS, ids=lambda o: json.dumps(o))
def test_folders_of_peft_with_embeddings_are_read(
    options: dict[str, Any], tie: bool, tmp_path: Path
) -> None:
    theirs = moved_peft(peft.get_peft_model(resized(1, tie), peft.LoraConfig(r=4, **options)))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    y = logits(peft.PeftModel.from_pretrained(resized(2, tie), str(tmp_path)).eval())
    model = inlay.load_adapter(resized(2, tie), tmp_path)
    same(logits(model), y)
    inlay.save_adapter(model, tmp_path / "again")
    same(logits(inlay.load_adapter(resized(2, tie), tmp_path / "again")), y)
    drop_in = inlay.peft.PeftModel.from_pretrained(resized(2, tie), tmp_path).eval()
    same(logits(drop_in), y)


@TIES
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_rows_train_merge_and_come_off(tie: bool, storage: str) -> None:
    model: Any = llama(tie, rows=70)
    if storage != "dense":
        inlay.quantize(model, storage, head_storage="dense" if tie else storage)
    base = logits(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inlay.attach(model, inlay.LoRA(rank=2), targets=["q_proj"], trainable_tokens=[65, 3])
    assert torch.equal(logits(model), base)
    assert inlay.report(model).trainable == 2 * 2 * (32 + 32) + 2 * 32
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    y = logits(model.eval())
    assert not torch.allclose(y, base, atol=1e-2)
    merged = copy.deepcopy(model)
    report = inlay.merge(merged)
    same(logits(merged), y, atol=1e-5)
    if storage == "dense":
        assert not report.untied
        ends = (merged.get_input_embeddings(), merged.get_output_embeddings())
        assert (ends[0].weight is ends[1].weight) == tie
        changed = (ends[0].weight != before["model.embed_tokens.weight"]).any(1).nonzero()
        assert changed.flatten().tolist() == [3, 65]
    inlay.detach(model)
    assert torch.equal(logits(model), base)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@TIES
def test_gradients_are_those_of_the_dense_rows(tie: bool) -> None:
    plain = llama(tie, rows=70)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    wanted = plain.model.embed_tokens.weight.grad
    model = inlay.attach(
        llama(tie, rows=70), inlay.LoRA(rank=2), targets=["q_proj"], trainable_tokens=[65, 3]
    )
    for training in (False, True):
        model.zero_grad()
        model.train(training)(input_ids=IDS, labels=IDS).loss.backward()
        (rows,) = [p for n, p in model.named_parameters() if n.endswith("token_rows")]
        assert wanted is not None
        assert rows.grad is not None
        same(rows.grad, wanted[[65, 3]])


def test_peft_and_inlay_peft_save_the_same_rows(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[65, 3])
    for get, folder in ((peft.get_peft_model, "theirs"), (inlay.peft.get_peft_model, "ours")):
        torch.manual_seed(5)
        get(llama(True, rows=70), config).save_pretrained(tmp_path / folder)
    ours, theirs = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    config_file = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config_file["trainable_token_indices"] == [65, 3]


def test_a_checkpoint_tells_that_the_vocabulary_was_changed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")

    def base(seed: int) -> Any:
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
        return with_new_rows(loaded, seed)

    model = moved(inlay.attach(base(1), inlay.LoRA(rank=2)))
    inlay.save_adapter(model, tmp_path / "adapter")
    same(logits(inlay.load_adapter(base(2), tmp_path / "adapter")), logits(model))
    unchanged = inlay.attach(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), inlay.LoRA(rank=2))
    inlay.save_adapter(unchanged, tmp_path / "plain")
    keys = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert not any("wte" in key or "lm_head" in key for key in keys)


def test_nothing_tells_and_the_other_rows_are_refused(tmp_path: Path) -> None:
    def base(seed: int) -> Any:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
        return with_new_rows(GPT2LMHeadModel(config).eval(), seed)

    model = moved(inlay.attach(base(1), inlay.LoRA(rank=2)))
    inlay.save_adapter(model, tmp_path / "a")
    with pytest.raises(inlay.CheckpointError, match="embeddings=True"):
        inlay.load_adapter(base(2), tmp_path / "a")
    inlay.save_adapter(model, tmp_path / "b", embeddings=True)
    same(logits(inlay.load_adapter(base(2), tmp_path / "b")), logits(model))


def test_two_adapters_with_rows_of_their_own(tmp_path: Path) -> None:
    model: Any = resized(1)
    for name, ids in (("a", [3, 64]), ("b", [64, 69])):
        inlay.attach(model, inlay.LoRA(rank=2), targets=["q_proj"], trainable_tokens=ids, name=name)
    moved(model, "a")
    moved(inlay.use(model, "b"), "b")
    b = logits(model)
    a = logits(inlay.use(model, "a"))
    assert not torch.allclose(a, b, atol=1e-3)
    inlay.save_adapter(model, tmp_path, "a")
    same(logits(inlay.load_adapter(resized(2), tmp_path)), a)
    inlay.detach(model, "a")
    same(logits(inlay.use(model, "b")), b)


def test_other_methods_bring_rows_too(tmp_path: Path) -> None:
    for number, method in enumerate((inlay.DoRA(rank=2), inlay.IA3(), inlay.BitFit)):
        if method is inlay.BitFit:
            method, base = inlay.NormTuning(), resized
        else:
            base = resized
        model = moved(inlay.attach(base(1), method, trainable_tokens=[64, 3]))
        folder = tmp_path / str(number)
        inlay.save_adapter(model, folder)
        same(logits(inlay.load_adapter(base(2), folder)), logits(model))


def test_a_compiled_and_a_copied_model() -> None:
    model = moved(inlay.attach(llama(True, 70), inlay.LoRA(rank=2), trainable_tokens=[65, 3]))
    same(logits(copy.deepcopy(model)), logits(model))
    compiled = torch.compile(model.model.embed_tokens, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), model.model.embed_tokens(IDS))
    half = copy.deepcopy(model).bfloat16()
    assert logits(half).dtype == torch.bfloat16


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"trainable_tokens": [70]}, "rows 0 to 69; call model.resize_token_embeddings first"),
    ({"trainable_tokens": [-1]}, "rows 0 to 69"),
    ({"trainable_tokens": [3, 3]}, "names token 3 twice"),
    ({"trainable_tokens": {"head": [3]}}, "matches no module|no module"),
    ({"trainable_tokens": {"norm": [3]}}, "train it whole with modules_to_save"),
    ({"trainable_tokens": [3], "modules_to_save": ["embed_tokens"]}, "trains whole"),
    ({"trainable_tokens": [3], "targets": ["embed_tokens"]}, "both"),
]


@pytest.mark.parametrize(("asked", "sentence"), REFUSED, ids=lambda x: json.dumps(x))
def test_what_cannot_train_is_refused(asked: dict[str, Any], sentence: str) -> None:
    model = llama(rows=70)
    with pytest.raises((inlay.AdapterError, inlay.TargetError), match=sentence):
        inlay.attach(model, inlay.LoRA(rank=2), **asked)
    assert not any(p is None for p in model.parameters())
    assert "inlay" not in vars(model)


def test_a_base_that_was_not_resized_is_told_to(tmp_path: Path) -> None:
    model = inlay.attach(resized(1), inlay.LoRA(rank=2), targets=["q_proj"])
    inlay.save_adapter(model, tmp_path)
    with pytest.raises(inlay.CheckpointError, match="resize_token_embeddings"):
        inlay.load_adapter(llama(), tmp_path)


class Vocabulary:
    """As much of a tokenizer as is asked."""

    def get_vocab(self) -> dict[str, int]:
        return {"<tool>": 64, "the": 3, "7": 9}


def test_tokens_of_a_run_are_named_by_themselves_or_by_their_ids() -> None:
    assert ids_of(["<tool>", "3", 64, "the", "7", 7], Vocabulary()) == [64, 3, 9, 7]
    with pytest.raises(inlay.UsageError, match=r"'<tol>', which is no token .* mean '<tool>'"):
        ids_of(["<tol>"], Vocabulary())


def test_a_run_s_key_reaches_its_plan() -> None:
    given = {"model": "pocket", "data": "reports", "output": "out"}
    config = load_config(None, {**given, "trainable_tokens": ["the", "3"]})
    assert config.trainable_tokens == ["the", "3"]
    cpu = Device("a CPU", "cpu", 1 << 30, 1e10, 1e11, 1e11)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    plain, more = (
        inlay.report(built(shape, c, cpu)).trainable for c in (load_config(None, given), config)
    )
    assert more - plain == 2 * 32
